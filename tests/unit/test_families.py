"""Which models share prefixes: tiny random ones of every family, by the loss and gradient of stock TRL."""

import copy
import dataclasses
import logging
import signal

import pytest
import torch
from conftest import conversations
from datasets import Dataset
from transformers import AutoModelForCausalLM, Gemma2ForCausalLM, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl import DPOConfig, DPOTrainer

from dpo_tutorial.errors import ModelUnsuitableError
from dpo_tutorial.loading import models
from dpo_tutorial.training import faster, prefix

#: (changes to the family's tiny config, whether prefixes are shared)
KNOWN = {
    "llama": ({}, True),
    "qwen2": ({}, True),
    "qwen3": ({}, True),
    "gemma2": ({}, Gemma2ForCausalLM._supports_sdpa),  # soft caps: newer transformers do not take torch's attention
    "gemma3_text": ({}, True),
    "phi3": ({}, True),
    "mistral": ({"sliding_window": None}, True),
    "mistral, window": ({"sliding_window": 8}, False),
    "gpt2": ({}, True),
    "gpt_neox": ({}, True),
    "mixtral": ({"output_router_logits": True}, False),
    "qwen3_moe": ({"output_router_logits": True}, False),
    "mamba": ({}, False),
    "lfm2, convolutions": ({"layer_types": ["conv", "full_attention"]}, False),
    "bloom": ({}, False),
    "opt": ({}, True),
    "falcon": ({"alibi": False}, True),
    "falcon, ALiBi": ({"alibi": True}, False),
}
#: Sizes by the names that families give them; a config gets those that it has.
TINY = dict(
    hidden_size=64, n_embd=64, d_model=64, d_ff=64, num_hidden_layers=2, n_layer=2, num_layers=2,
    num_attention_heads=4, n_head=4,
    num_heads=4, num_key_value_heads=2, num_kv_heads=2, head_dim=16, intermediate_size=64, n_inner=64, ffn_dim=64,
    max_position_embeddings=256, n_positions=256, max_seq_len=256, num_experts=4, num_local_experts=4,
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_layers=2, decoder_attention_heads=4,
    decoder_ffn_dim=64, encoder_layers=2, embedding_size=64, word_embed_proj_dim=64, is_decoder=True, state_size=8,
    mamba_n_heads=8, mamba_num_heads=8, mamba_d_head=16, mamba_head_dim=16, mamba_d_state=8, ssm_state_size=8,
    mamba_chunk_size=16, chunk_size=16,
)  # fmt: skip
MOST = 20e6  # weights of a model that counts as tiny
#: By name: asking for the classes would import every family, in each worker.
OTHERS = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING and name not in KNOWN]


def tiny(name: str, tokenizer, **changes):
    """A small random model of a family, its matrices large enough to matter; skips what cannot be built small."""
    kind = CONFIG_MAPPING[name.partition(",")[0]]
    special = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    try:
        known = kind().to_dict()
        sizes = {key: size for key, size in TINY.items() if key in {*known, *kind.attribute_map}}
        steady = {key: 0.0 for key, value in known.items() if "drop" in key and isinstance(value, float)}
        config = kind(**sizes | steady | special | changes)
        with torch.device("meta"):
            weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if weights > MOST:
            pytest.skip(f"{weights / 1e6:,.0f} million weights")
        set_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # each family has demands of its own on its sizes
        pytest.skip(f"not built: {type(error).__name__}: {str(error)[:120]}")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(("kind", "head"), [("gpt_neox_japanese", "embed_out"), ("biogpt", "output_projection")])
def test_a_head_of_another_name_is_refused_until_it_is_kept_in_16_bits(kind, head, cfg, tokenizer, tmp_path):
    tiny(kind, tokenizer).save_pretrained(tmp_path)
    cfg = dataclasses.replace(cfg, model=str(tmp_path))
    with pytest.raises(ModelUnsuitableError, match=f"KEEP_16BIT={head}"):
        models.load_base(cfg)
    kept = models.load_base(dataclasses.replace(cfg, keep_16bit=(head,)))
    assert type(kept.get_output_embeddings()) is torch.nn.Linear


def one_step(trainer_class, model, reference, tokenizer, folder):
    """(loss, gradient, trainer) of the four pairs."""
    args = DPOConfig(
        folder, per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to="none", max_length=None,
        gradient_checkpointing=False, save_strategy="no", remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = trainer_class(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=Dataset.from_list(conversations()),
        processing_class=tokenizer,
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    set_seed(0)  # some routers draw
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return loss.item(), grads, trainer


def check(name, tokenizer, folder, **changes) -> bool:
    """Compare with stock TRL; returns whether prefixes are shared."""
    model = tiny(name, tokenizer, **changes)
    reference = copy.deepcopy(model)
    for parameter in reference.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter) if parameter.is_floating_point() else 0
    try:
        loss, gradient, _ = one_step(DPOTrainer, copy.deepcopy(model), copy.deepcopy(reference), tokenizer, folder)
    except Exception as error:
        pytest.skip(f"stock TRL fails: {type(error).__name__}: {str(error)[:120]}")
    ours, found, trainer = one_step(faster.FastDPOTrainer, model, reference, tokenizer, folder)
    shared = trainer.shares_prefixes and prefix.window(model.config) >= 64
    logging.getLogger(__name__).warning("FAMILY %s %s", name, "on" if shared else f"off: {prefix.obstacle(model)}")
    assert ours == pytest.approx(loss, rel=1e-4)
    assert (found - gradient).norm() < 1e-3 * gradient.norm()
    return shared


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_family_shares_prefixes_or_not(name, tokenizer, tmp_path):
    changes, expected = KNOWN[name]
    assert check(name, tokenizer, str(tmp_path), **changes) is expected


@pytest.fixture
def brief():
    """Skip what keeps a core busy for 30 seconds: some layers are slow without kernels of their own."""

    def stop(*_):
        pytest.skip("not tiny: more than 30 s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 30)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_family_trains_as_stock_trl_does(name, tokenizer, tmp_path, brief):
    check(name, tokenizer, str(tmp_path))
