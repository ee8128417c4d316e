"""The speed benchmark: its page, its promises, and its code on a tiny model."""

import json
from pathlib import Path

import pytest
from conftest import script
from transformers import AutoConfig

FOLDER = Path(__file__).parents[1] / "benchmarks"
RECORD = json.loads((FOLDER / "training_speed.json").read_text(encoding="utf-8"))
SECTIONS = RECORD["sections"]


@pytest.fixture(scope="module")
def speed():
    return script("benchmarks/training_speed.py")


def test_the_page_is_the_one_that_the_record_gives(speed):
    assert set(SECTIONS) >= {"compare", "whole", "switches", "order", "growth"}
    assert (FOLDER / "training_speed.md").read_text(encoding="utf-8") == speed.page(RECORD)


def test_it_is_two_and_a_half_times_stock_trl_and_near_the_bare_passes_in_less_memory(speed):
    for section, repeats in (("compare", 3), ("whole", 1)):
        ours, stock, raw = (SECTIONS[section][name] for name in ("ours", "stock", "raw"))
        assert len(ours) == len(stock) == len(raw) >= repeats
        assert min(speed.by_repeat(ours, stock, "pairs_per_second")) >= 2.5
        assert min(speed.by_repeat(ours, raw, "tokens_per_second")) >= 0.6
        assert max(speed.by_repeat(ours, stock, "peak_gib")) < 1
    assert ours[0]["pairs"] == stock[0]["pairs"] > 300, "all of the profile"


def test_head_and_prefix_sharing_pay_and_checkpointing_costs(speed):
    found = SECTIONS["switches"]
    assert set(found) == set(speed.SWITCHES)
    for name in ("prompt computed once per answer", "TRL's LM head as it comes", "gradient checkpointing"):
        assert speed.fastest(found[name]) < 0.95 * speed.fastest(found["ours"]), name


def test_the_losses_are_stock_trls_within_what_other_padding_does(speed):
    found = SECTIONS["order"]
    for key in ("losses", "rewards"):
        ours, floor = (
            max(abs(a - b) for a, b in zip(found["stock"][key], found[name][key], strict=True))
            for name in ("ours", "stock, padded to a multiple of 64")
        )
        assert ours <= 3 * floor, key


def test_bfloat16_hides_a_young_adapter_and_float32_does_not(speed):
    found = SECTIONS["order"]
    ours, stock, exact = found["ours"], found["stock"], found["ours, float32"]
    assert ours["untouched"] > 0.5 and stock["untouched"] > 0.5 > 0.05 > exact["untouched"]
    assert max(ours["rewards"][-1], stock["rewards"][-1]) < exact["rewards"][-1]


def test_time_grows_in_proportion_to_tokens_and_memory_not_with_pairs(speed):
    found = SECTIONS["growth"]
    assert 0.85 < speed.slope(found["pairs"], "tokens", "seconds") < 1.15
    assert speed.slope(found["length"], "tokens", "seconds") < 1.3, "attention has a part that grows with the square"
    assert abs(speed.slope(found["pairs"], "pairs", "peak_gib")) < 0.1
    rows = [row["peak_mib"] for row in found["rows"]]
    assert rows[-1] < rows[0] + 100, "sixteen times the rows: the source stays on disk"


def test_how_fast_and_why_quotes_the_recorded_ratios(speed):
    text = (FOLDER.parent / "docs" / "faster.md").read_text(encoding="utf-8")
    ours, stock, raw = (SECTIONS["compare"][name] for name in ("ours", "stock", "raw"))
    (all_ours,), (all_stock,) = SECTIONS["whole"]["ours"], SECTIONS["whole"]["stock"]
    found, head = SECTIONS["switches"], "TRL's LM head as it comes"

    def of_ours(name: str) -> str:
        return f"{speed.fastest(found[name]) / speed.fastest(found['ours']):.2f}"

    for quoted in (
        f"{speed.spread(speed.by_repeat(ours, stock, 'pairs_per_second'))} times stock TRL",
        f"the whole profile, once: {all_ours['pairs_per_second'] / all_stock['pairs_per_second']:.1f}",
        f"{speed.spread(speed.by_repeat(ours, stock, 'peak_gib'), 2)} of its peak memory",
        f"{speed.spread(speed.by_repeat(ours, raw, 'tokens_per_second'), 2)} of the token rate",
        f"Without that: {of_ours(head)} of the speed",
        f"Without: {of_ours('prompt computed once per answer')}.",
        f"With it: {of_ours('gradient checkpointing')}.",
        f"({of_ours('reference precomputed')} of the speed)",
    ):
        assert quoted in text
    assert f"the `cpu` profile has {len(all_ours['steps'])}." in speed.page(RECORD)


def test_shapes_have_the_sizes_they_are_named_after(speed):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, low, high in (("30M", 25e6, 40e6), ("135M", 134e6, 136e6), ("360M", 355e6, 370e6), ("0.5B", 4.8e8, 5.1e8),
                            ("7B", 7.5e9, 7.7e9)):  # fmt: skip
        with torch.device("meta"):
            model = LlamaForCausalLM(
                LlamaConfig(**dict(vocab_size=49152, tie_word_embeddings=True) | speed.SHAPES[name])
            )
        assert low < sum(p.numel() for p in model.parameters()) < high, name


@pytest.mark.parametrize("trainer", ["ours", "stock"])
def test_one_measurement_on_a_tiny_model(speed, tiny_folder, tokenizer, tmp_path, monkeypatch, trainer):
    from dpo_tutorial import environment, models, train

    monkeypatch.setattr(environment, "tune_allocator", environment.tune_allocator)  # the task switches it off for good
    monkeypatch.setattr(train, "fit_head_to_cpu", train.fit_head_to_cpu)
    monkeypatch.setattr(models, "load_tokenizer", lambda cfg: tokenizer)
    knobs = {"model": str(tiny_folder), "dtype": "fp32", "max_tokens": 128}
    task = {"trainer": trainer, "pairs": 16, "val": 2, "length": 96, "knobs": knobs, "untouched": True}
    found = speed.train_once(task, tmp_path)
    assert found["untouched"] < 0.2, "in float32 nearly every output moves"
    assert found["pairs"] == 16 and len(found["losses"]) == len(found["steps"]) == 2
    assert found["positions"] < found["tokens"] * 2 if trainer == "ours" else found["positions"] >= found["tokens"] * 2
    assert {"import", "load", "tokenize", "backward", "evaluation"} <= set(found["phases"])
    assert found["losses"][0] == pytest.approx(0.6931, abs=1e-3) and found["peak_gib"] > 0


def test_a_measurement_that_fails_ends_the_run_with_its_error(speed):
    task = {"kind": "matmul", "dtype": "no such type", "size": 8}
    with pytest.raises(SystemExit, match="KeyError"):
        speed.child(task)
    assert speed.child(task | {"dtype": "fp32"})["flops"] > 0


def test_a_checkpoint_of_random_weights_is_saved_with_its_tokenizer(speed, tiny_folder, tmp_path, monkeypatch):
    from dpo_tutorial import models

    tokenizer = models.load_tokenizer(speed.settings({"knobs": {"model": str(tiny_folder)}}))
    monkeypatch.setattr(models, "load_tokenizer", lambda cfg: tokenizer)
    shape = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    made = speed.make_once({"make": shape, "path": str(tmp_path / "made")}, tmp_path)
    found = AutoConfig.from_pretrained(tmp_path / "made")
    assert made["weights"] > 0 and found.hidden_size == 32 and found.vocab_size == len(tokenizer)
