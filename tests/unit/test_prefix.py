"""Prefix sharing: the packed pass is the plain one, for every way in which two sequences can overlap."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from dpo_tutorial.loading import models
from dpo_tutorial.training import prefix, train


def collated(sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded on the right with zeros, as TRL's collator does: (input ids, attention mask)."""
    length = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (length - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (length - len(s)) for s in sequences])
    return ids, mask


def test_one_pair_by_hand():
    ids, mask = collated([[7, 8, 1, 2], [7, 8, 3]])
    packed = prefix.pack(ids, mask)
    assert packed.input_ids.tolist() == [[7, 8, 1, 2, 3]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert packed.attention_mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],  # the rejected answer sees the prompt and itself, not the chosen answer
    ]
    assert packed.columns[0].tolist() == [0, 1, 2, 3] and packed.columns[1, :3].tolist() == [0, 1, 4]


sequence = st.lists(st.integers(1, 3), min_size=1, max_size=7)  # few words: long and short overlaps both happen


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(sequence, sequence), min_size=1, max_size=4))
def test_hidden_states_are_those_of_the_plain_pass(tiny_folder, batch):
    decoder = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).base_model
    ids, mask = collated([chosen for chosen, _ in batch] + [rejected for _, rejected in batch])
    with torch.no_grad():
        plain = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        packed = prefix.forward(decoder, ids, mask, use_cache=False).last_hidden_state
    assert packed.shape == plain.shape and packed.isfinite().all()
    assert torch.allclose(packed[mask.bool()], plain[mask.bool()], atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradient_are_those_without(cfg, tokenizer, pairs, tmp_path, checkpointing):
    results = {}
    for shared in (False, True):
        changed = dataclasses.replace(cfg, prefix_sharing=shared, gradient_checkpointing=checkpointing, batch_size=4)
        torch.manual_seed(0)
        trainer = train.build_trainer(changed, models.load_base(changed), tokenizer, pairs, None, tmp_path / "out")
        assert trainer.shares_prefixes is shared
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        grads = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
        results[shared] = loss.item(), grads
    assert results[True][0] == pytest.approx(results[False][0], abs=1e-5)
    assert torch.allclose(results[True][1], results[False][1], atol=1e-5) and results[True][1].norm() > 0.01


def test_fewer_tokens_go_through_the_decoder_and_only_for_the_trainer(cfg, tokenizer, pairs, tmp_path):
    trainer = train.build_trainer(cfg, models.load_base(cfg), tokenizer, pairs, None, tmp_path / "out")
    causal = trainer.model.get_base_model()
    seen = []
    causal.base_model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, batch)
    assert seen[0] == prefix.pack(batch["input_ids"], batch["attention_mask"]).input_ids.numel()
    assert seen[0] < 0.8 * batch["input_ids"].numel(), "most of a tiny pair is template"

    seen.clear()
    trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert seen == [batch["input_ids"].numel()], "a plain pass stays plain"
    ids = tokenizer("How do I", return_tensors="pt").input_ids
    generated = trainer.model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > ids.shape[1]


def test_a_second_trainer_on_the_same_base_packs_once(cfg, tokenizer, pairs, tmp_path):
    base = models.load_base(cfg)
    losses = []
    for _ in range(2):
        trainer = train.build_trainer(cfg, base, tokenizer, pairs, None, tmp_path / "out")
        with torch.no_grad():
            losses.append(trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))).item())
        base = trainer.model.unload()
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("window", "shared"), [(8, False), (10_000, True), (None, True)])
def test_a_window_shorter_than_the_batch_computes_it_plainly(cfg, tokenizer, pairs, tmp_path, window, shared):
    trainer = train.build_trainer(cfg, models.load_base(cfg), tokenizer, pairs, None, tmp_path / "out")
    decoder, seen = trainer.model.get_base_model().base_model, []
    decoder.config.sliding_window = window
    decoder.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    assert trainer.shares_prefixes
    seen.clear()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, batch)
    assert (seen[0] < batch["input_ids"].numel()) is shared


@pytest.mark.parametrize(("weight", "words"), [(0.0, ""), (0.01, "not those of the plain pass")])
def test_a_layer_that_weakly_goes_by_places_of_its_own_is_found(tiny_folder, weight, words):
    """As a hybrid's: it looks at the place in the row, where the rejected answer now lies behind the chosen one."""
    causal = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    wave = torch.arange(256)[:, None] * torch.linspace(0.1, 1, causal.config.hidden_size)

    def add(module, args, output):
        return output + weight * size * wave[: output.shape[1]].sin()

    size = causal.base_model(torch.arange(3, 9)[None], output_hidden_states=True).hidden_states[1].std()
    causal.base_model.layers[1].mlp.register_forward_hook(add)
    assert words in prefix.obstacle(causal) and bool(prefix.obstacle(causal)) is bool(words)


def test_another_implementation_of_attention_is_left_alone(tiny_folder):
    causal = AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager")
    assert "eager" in prefix.obstacle(causal)
