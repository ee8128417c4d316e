"""Loading, 4-bit storage, LoRA, and the gradient that a 4-bit layer may lose without a word."""

import dataclasses
import json
import re
import shutil

import bitsandbytes as bnb
import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_families import tiny

from dpo_tutorial import config, knobs, run_folder
from dpo_tutorial.adapter import lora
from dpo_tutorial.errors import ArtifactError, ConfigError, ModelCorruptError, ModelFetchError, ModelUnsuitableError
from dpo_tutorial.loading import digests, embedded, models, sizes
from dpo_tutorial.training import card, footprint, train

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = torch.arange(3, 35).reshape(2, 16)

UNPINNED = {"someone/model": "not pinned", "gpt2": "not pinned", "someone/model@main": "not pinned: main is a name"}
PINNED = {"someone/model@" + "7ae557604a" * 4: "commit " + "7ae557604a" * 4}


@pytest.mark.parametrize(("model", "words"), (UNPINNED | PINNED).items())
def test_a_hub_model_is_called_pinned_only_where_a_commit_was_given(model, words):
    cfg = config.resolve(profile="cpu", model=model)
    where = models.source(cfg)
    assert where.pin.startswith(words)
    base = {"name": where.name, "revision": where.revision, "pin": where.pin, "storage": "bfloat16"}
    record = {"base": base, "history": {"train": []}, "pairs": {"number": 1, "sha256": "0"}, "config": cfg.identity()}
    text = card.model_card(cfg, record | {"hardware": {"cores": 2}, "versions": {}})
    assert "with its weights in bfloat16" in text and "4-bit" not in text and "4bit" not in text.lower()
    assert f"| Base revision | {where.pin} |" in text and "SHA-256" not in text


def test_a_folder_is_known_by_what_it_holds_and_the_embedded_model_by_its_checksum(cfg, monkeypatch):
    assert models.source(cfg).digest[:12] in models.source(cfg).pin
    monkeypatch.setattr(embedded, "ensure_embedded_model", lambda: "somewhere")
    assert embedded.GGUF_SHA256[:12] in models.source(dataclasses.replace(cfg, model="embedded")).pin


def first_block_gradient(model) -> float:
    model.train()
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    block = model.base_model.model.model.layers[0]
    return torch.stack([p.grad.norm() for n, p in block.named_parameters() if "lora_B" in n]).norm().item()


def evaluate_once(model) -> None:
    model.eval()
    with torch.no_grad():
        model(IDS)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_survive_an_evaluation(cfg, dtype):
    """bitsandbytes repacks 4-bit weights in eval mode on some CPUs; the packed kernel has no backward pass."""
    policy = get_peft_model(models.load_base(dataclasses.replace(cfg, dtype=dtype)), lora.lora_config(cfg))
    before = first_block_gradient(policy)
    evaluate_once(policy)
    assert before > 0
    assert first_block_gradient(policy) == pytest.approx(before, rel=1e-3)


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="this CPU has no AVX512-BF16, so nothing is repacked")
def test_without_our_guard_the_gradient_is_lost(cfg, monkeypatch):
    """The reason for `keep_gradients`. When this fails, bitsandbytes has fixed it, and the guard can go."""
    monkeypatch.setattr(models, "keep_gradients", lambda model: None)
    policy = get_peft_model(models.load_base(dataclasses.replace(cfg, dtype="bf16")), lora.lora_config(cfg))
    before = first_block_gradient(policy)
    evaluate_once(policy)
    assert first_block_gradient(policy) < 0.8 * before  # two layers lose part of it; more layers, more


def test_the_base_is_nf4_with_double_quantization_and_no_cache(cfg):
    base = models.load_base(cfg)
    layer = base.model.layers[0].self_attn.q_proj
    assert isinstance(layer, bnb.nn.Linear4bit) and layer.weight.quant_type == "nf4" and layer.weight.quant_state.nested
    assert base.config.use_cache is False
    assert not isinstance(base.lm_head, bnb.nn.Linear4bit)


def test_measured_bytes_match_the_arithmetic(cfg):
    full = models.load_base(cfg, quantize=False)
    inside, outside = sizes.linear_weights(full)
    assert sum(sizes.weight_bytes(full).values()) == 4 * (inside + outside)
    parts = sizes.weight_bytes(models.load_base(cfg))
    assert parts["4-bit weights"] == inside / 2
    assert parts["other weights"] == 4 * outside


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (("down_proj",), r"layers\.\d\.mlp\.down_proj"),
        ((r"model\.layers\.(0|1)",), r"layers\.\d\."),
        ((r"model\.layers\.1",), r"layers\.1\."),
        (("k_proj", "v_proj", r"model\.layers\.(0|29)\."), r"layers\.0\.|[kv]_proj"),
        ((r"model\.layers\.0\.mlp",), r"layers\.0\.mlp"),
    ],
)
def test_the_named_layers_stay_in_16_bits_and_all_others_are_4_bit(cfg, keep, kept):
    cfg = dataclasses.replace(cfg, dtype="bf16", keep_16bit=keep)
    base = models.load_base(cfg)
    linear = {name: m for name, m in base.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"}
    plain = {name for name, m in linear.items() if not isinstance(m, bnb.nn.Linear4bit)}
    assert (
        plain
        == {name for name in linear if re.search(kept, name)}
        == {name for name in linear if not sizes.becomes_nf4(name, keep)}
    )
    assert {linear[name].weight.dtype for name in plain} == {torch.bfloat16} == {base.lm_head.weight.dtype}
    assert not isinstance(base.lm_head, bnb.nn.Linear4bit)

    measured = sizes.weight_bytes(base)
    inside, outside = sizes.linear_weights(models.load_base(cfg, quantize=False), keep)
    assert measured["4-bit weights"] == inside / 2 and measured["other weights"] == 2 * outside
    assert footprint.weight_bytes(footprint.read_shape(cfg), size=2) == sum(measured.values())


def test_an_adapter_learns_on_16_bit_layers_and_on_4_bit_ones(cfg):
    cfg = dataclasses.replace(cfg, keep_16bit=(r"model\.layers\.0",))
    policy = get_peft_model(models.load_base(cfg), lora.lora_config(cfg)).train()
    policy(IDS, labels=IDS).loss.backward()
    grads = {name: p.grad for name, p in policy.named_parameters() if "lora_B" in name}
    assert len(grads) == 14 and all(grad.norm() > 0 for grad in grads.values())


def test_bits_per_weight_is_the_papers_figure():
    assert sizes.nf4_bits_per_weight() == pytest.approx(4.127, abs=5e-4)


def test_adapter_off_equals_the_base_bit_for_bit(cfg):
    base = models.load_base(cfg)
    with torch.no_grad():
        before = base(IDS).logits
        policy = get_peft_model(base, lora.lora_config(cfg))
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        assert not torch.equal(policy(IDS).logits, before)
        with policy.disable_adapter():
            assert torch.equal(policy(IDS).logits, before)


def test_merging_into_4_bits_is_not_the_same_model(cfg):
    """Why the adapter stays beside its base: the sum is rounded to 4 bits once more."""
    policy = get_peft_model(models.load_base(cfg), lora.lora_config(cfg))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    with torch.no_grad():
        beside = policy(IDS).logits
        with policy.disable_adapter():
            base = policy(IDS).logits
        merged = policy.merge_and_unload()(IDS).logits
    moved, lost = (beside - base).norm(), (merged - beside).norm()
    assert moved > 0 and lost > 0.2 * moved


def test_trainable_share_counts_what_the_shapes_say(cfg):
    base = models.load_base(cfg)
    expected = sum(
        cfg.lora_r * (m.in_features + m.out_features) for n, m in base.named_modules() if n.rsplit(".", 1)[-1] in SEVEN
    )
    total = sum(sizes.linear_weights(models.load_base(cfg, quantize=False)))
    trainable, all_weights = lora.trainable_share(get_peft_model(base, lora.lora_config(cfg)))
    assert trainable == expected
    assert all_weights == total + expected


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "phi3", "falcon", "mixtral", "qwen2_moe", "mamba2"])
def test_all_linear_is_every_linear_layer_that_can_carry_one_and_peft_chooses_the_same(kind, tokenizer, cfg, tmp_path):
    tiny(kind, tokenizer, **{"num_heads": 8} if kind == "mamba2" else {}).save_pretrained(tmp_path)
    base = models.load_base(dataclasses.replace(cfg, model=str(tmp_path)))
    expected = list(lora.target_layers(base, cfg))
    four_bit = [n for n, m in base.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    barred = {"qwen2_moe": ("gate_proj", "up_proj", "down_proj"), "mamba2": ("out_proj",)}.get(kind, ())
    left_out = [n for n in four_bit if n.endswith(barred)]
    assert set(four_bit) - set(left_out) == set(expected) - {n for n in expected if n not in four_bit}
    lora.check_lora_targets(base, cfg)
    policy = get_peft_model(base, lora.lora_config(cfg, base))
    assert [n.removeprefix("base_model.model.") for n, m in policy.named_modules() if hasattr(m, "lora_A")] == expected


def test_the_default_gives_a_llama_the_adapter_that_its_seven_names_gave(cfg, tokenizer, pairs, tmp_path):
    weights = []
    for targets in (knobs.Config.lora_targets, SEVEN):
        named = dataclasses.replace(cfg, lora_targets=targets)
        assert lora.lora_config(named, models.load_base(cfg)).target_modules == set(SEVEN)
        torch.manual_seed(3)
        trainer = train.build_trainer(named, models.load_base(cfg), tokenizer, pairs, None, tmp_path / "trainer")
        trainer.train()
        weights.append({n: p.data for n, p in trainer.model.named_parameters() if p.requires_grad})
    assert weights[0].keys() == weights[1].keys() and len(weights[0]) == 2 * 2 * len(SEVEN)
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


def test_missing_target_layers_are_named_with_the_ones_there(cfg):
    wrong = dataclasses.replace(cfg, lora_targets=("q_proj", "c_attn"))
    with pytest.raises(ConfigError, match="c_attn") as error:
        lora.check_lora_targets(models.load_base(cfg), wrong)
    assert "gate_proj" in error.value.fix


def test_an_unreachable_hub_gives_one_sentence_with_a_fix(cfg, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelFetchError, match="someone/model") as error:
        models.load_tokenizer(dataclasses.replace(cfg, model="someone/model"))
    assert "PROFILE=cpu" in error.value.fix


def test_a_tokenizer_without_template_is_refused(cfg, tiny_folder, tmp_path):
    import shutil

    folder = tmp_path / "no-template"
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelUnsuitableError, match="chat template"):
        models.load_tokenizer(dataclasses.replace(cfg, model=str(folder)))


def test_an_adapter_of_another_tool_names_no_commit_and_fits_any(cfg, tmp_path):
    policy = get_peft_model(models.load_base(cfg), lora.lora_config(cfg))
    policy.peft_config["default"].base_model_name_or_path = "someone/model"
    policy.save_pretrained(tmp_path, save_embedding_layers=False)
    lora.check_adapter(dataclasses.replace(cfg, model="someone/model", model_revision="a" * 40), tmp_path)
    with pytest.raises(ArtifactError, match="someone/model"):
        lora.check_adapter(dataclasses.replace(cfg, model="another/model", model_revision="a" * 40), tmp_path)


def test_an_adapter_of_another_base_is_refused(cfg, tmp_path):
    policy = get_peft_model(models.load_base(cfg), lora.lora_config(cfg))
    policy.peft_config["default"].base_model_name_or_path = "another/base"
    policy.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)  # else it asks the hub
    with pytest.raises(ArtifactError, match="another/base"):
        lora.load_policy(cfg, tmp_path / "adapter")
    with pytest.raises(ArtifactError, match="no adapter"):
        lora.load_policy(cfg, tmp_path / "nowhere")


def test_an_adapter_is_refused_on_its_base_with_other_layers_in_4_bits(cfg, adapter):
    record = json.loads((adapter / "training.json").read_text())
    assert record["config"]["keep_16bit"] == []
    lora.check_adapter(cfg, adapter)
    with pytest.raises(ArtifactError, match="KEEP_16BIT=none; here it is v_proj") as caught:
        lora.check_adapter(dataclasses.replace(cfg, keep_16bit=("v_proj",)), adapter)
    assert "Set KEEP_16BIT=none" in caught.value.fix


def test_of_a_base_from_the_hub_name_and_commit_must_be_those_of_the_training(cfg, tmp_path):
    LoraConfig(base_model_name_or_path="someone/model", revision="a" * 40).save_pretrained(tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    here = dataclasses.replace(cfg, model="someone/model", model_revision="a" * 40)
    lora.check_adapter(here, tmp_path)
    for other in ({"model_revision": "b" * 40}, {"model_revision": None}, {"model": "someone/else"}):
        with pytest.raises(ArtifactError, match="was trained on someone/model .revision aaaa"):
            lora.check_adapter(dataclasses.replace(here, **other), tmp_path)


def test_an_old_torchao_as_on_colab_does_not_stop_an_adapter_on_16_bit_layers(monkeypatch):
    def refuse():
        raise ImportError("Found an incompatible version of torchao.")

    for asks in (peft.tuners.lora.torchao, peft.utils.quantization_utils):
        monkeypatch.setattr(asks, "is_torchao_available", refuse)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ImportError):
        get_peft_model(model, LoraConfig(target_modules=["0"]))
    lora.pass_over_old_torchao()
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    assert model.merge_and_unload()[0].weight.shape == (4, 4)


# --- which base it is ----


@pytest.fixture
def adapter(cfg, tokenizer, pairs):
    """An adapter as training saves it, on the tiny base."""
    run = run_folder.Run(cfg)
    train.train(cfg, run, models.load_base(cfg), tokenizer, pairs, pairs)
    return run.adapter


def a_weight_changed(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= -1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def a_config_changed(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.1}))


@pytest.mark.parametrize("change", [a_weight_changed, a_config_changed])
def test_another_base_in_a_folder_of_the_same_name_is_refused(change, cfg, adapter, tmp_path):
    other = shutil.copytree(cfg.model, tmp_path / "other" / "tiny-llama")
    change(other)
    with pytest.raises(ArtifactError, match="was trained on tiny-llama .digest .* not on tiny-llama .digest"):
        lora.check_adapter(dataclasses.replace(cfg, model=str(other)), adapter)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_same_base_is_taken_under_another_name_in_more_files_and_in_any_compute_type(cfg, adapter, dtype, tmp_path):
    models.AutoModelForCausalLM.from_pretrained(cfg.model).save_pretrained(tmp_path / "new", max_shard_size="100KB")
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1
    lora.check_adapter(dataclasses.replace(cfg, model=str(tmp_path / "new"), dtype=dtype), adapter)


def test_a_damaged_base_is_an_error_that_names_its_folder(cfg, tmp_path):
    other = shutil.copytree(cfg.model, tmp_path / "other")
    (other / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ModelCorruptError, match=r"The checkpoint in .*other could not be read"):
        digests.of_folder(other)
