"""The speed benchmark: its page, its promises, and its code on a tiny model, the GPU section's included."""

import argparse
import copy
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


def test_the_readme_quotes_the_recorded_ratios(speed):
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
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
        assert quoted in readme
    assert f"the `cpu` profile has {len(all_ours['steps'])}." in speed.page(RECORD)


def test_without_a_gpu_the_page_says_not_measured(speed):
    record = copy.deepcopy(RECORD)
    record["sections"]["cuda"] = None
    assert "Not measured" in speed.page(record)


def test_the_shapes_of_the_gpu_section_have_the_sizes_they_are_named_after(speed):
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


def on_a_gpu(speed, monkeypatch, answer):
    """The section with each measurement replaced by `answer(task)`; what was asked, and what was found."""
    asked = []

    def child(task, may_fail=False):
        asked.append(task)
        return answer(task)

    monkeypatch.setattr(speed, "child", child)
    monkeypatch.setattr(speed, "attentions", lambda: ["sdpa", "flash_attention_2"])
    options = argparse.Namespace(
        shapes=["0.5B", "7B"], dtypes=["bf16", "fp16"], length=1024, pairs=None, matmul=64, repeats=1
    )
    return asked, speed.cuda(options)


def measured(task):
    return {"tokens_per_second": 100.0, "peak_gib": 1.0, "weights": 1, "flops": 1e12, "checkpointing": True}


def test_the_gpu_section_takes_every_shape_type_attention_and_trainer(speed, monkeypatch):
    asked, found = on_a_gpu(speed, monkeypatch, measured)
    trained = [task for task in asked if task["kind"] == "train"]
    assert len(trained) == len(found["runs"]) == 2 * 2 * 2 * len(speed.ON_GPU)
    assert {task["trainer"] for task in trained} == {"ours", "stock"}
    assert all(task["knobs"]["batch_size"] * task["knobs"]["grad_accum"] == 8 for task in trained)
    (run,) = found["runs"]["7B, fp16, sdpa, ours"]
    assert run["utilisation"] == pytest.approx(speed.model_flops("7B", {"tokens_per_second": 100.0}) / 1e12)
    page = speed.cuda_page(found)
    assert "Not measured" not in page and page.count("| 100 |") == len(trained)
    assert "| 7B, bf16, flash_attention_2, stock TRL | 8 | on | 100 | 1.0 |" in page


def test_batches_are_halved_until_memory_is_enough_and_other_errors_are_shown(speed, monkeypatch):
    def answer(task):
        if task["kind"] == "train" and task["trainer"] == "stock":
            if task["knobs"]["dtype"] == "fp16":
                return {"failed": "NotImplementedError: not implemented for 'BFloat16'"}
            assert task["arguments"]["per_device_train_batch_size"] == task["knobs"]["batch_size"]
        if task["kind"] == "train" and task["knobs"]["batch_size"] > 2:
            return {"failed": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"}
        return measured(task)

    asked, found = on_a_gpu(speed, monkeypatch, answer)
    assert [run["batch_size"] for run in found["runs"]["7B, bf16, sdpa, stock TRL"]] == [2]
    assert [run["batch_size"] for run in found["runs"]["7B, bf16, sdpa, ours, 1 pair at a time"]] == [1]
    page = speed.cuda_page(found)
    assert "| 7B, fp16, sdpa, stock TRL | 8 | fails: NotImplementedError: not implemented for 'BFloat16' |" in page


def test_a_measurement_that_may_fail_gives_its_last_line(speed):
    task = {"kind": "matmul", "dtype": "no such type", "size": 8}
    assert speed.child(task, may_fail=True) == {"failed": "KeyError: 'no such type'"}
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
