"""The GPU benchmark's code on a tiny shape and a CPU: what a card is lent for minutes must not fail there first."""

import argparse
import json

import pytest
import torch
from conftest import pair, script

from dpo_tutorial import models, prefix


@pytest.fixture(scope="module")
def gpu():
    return script("benchmarks/gpu.py")


@pytest.fixture
def options(tmp_path, tokenizer, monkeypatch):
    """A tiny run: the tests' tokenizer, and 30 pairs in a folder laid out as the hub serves it."""
    monkeypatch.setattr(models, "load_tokenizer", lambda cfg: tokenizer)
    rows = [pair(f"What is {n}?", f"The number {n}.", f"A nice one, {n} of them!") for n in range(30)]
    for name, part in (("train_prefs", rows[:20]), ("val_prefs", rows[20:25]), ("test_prefs", rows[25:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    monkeypatch.setenv("ULTRAFEEDBACK_SAMPLE", str(tmp_path))
    return argparse.Namespace(
        tiny=True, shapes=None, trainers=["stock TRL", "ours", "ours, attention apart"], pairs=24, rounds=1, workers=1,
        sets={"UltraFeedback": None}, seeds=None, seconds=1e9,
    )  # fmt: skip


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_stage_b_measures_stock_and_ours_and_profiles_a_step(gpu, options, tmp_path):
    gpu.stage_b(options, gpu.Record(tmp_path / "gpu.jsonl"))
    lines = written(tmp_path / "gpu.jsonl")
    trained = {line["who"]: line for line in lines if line["name"] == "training"}
    assert set(trained) == set(options.trainers) and not [who for who, line in trained.items() if "failed" in line]
    assert all(line["first_loss"] == pytest.approx(0.6931, abs=1e-3) for line in trained.values())
    assert all(line["pairs_per_second"] > 0 and len(line["steps"]) == 3 for line in trained.values())
    assert trained["ours"]["positions"] < trained["stock TRL"]["positions"], "prompts are shared"
    assert trained["ours, attention apart"]["last_loss"] == pytest.approx(trained["ours"]["last_loss"], abs=1e-5)
    assert len([line for line in lines if "profile of a step" in line["name"]]) == 2
    _, rows = gpu.speed_rows(lines)
    assert [row[2] for row in rows] == options.trainers


def test_stage_d_holds_every_row_out_once_and_scores_what_was_trained(gpu, options, tmp_path):
    gpu.stage_d(options, gpu.Record(tmp_path / "gpu.jsonl"))
    lines = written(tmp_path / "gpu.jsonl")
    folds = [line for line in lines if line["name"] == "fold"]
    usable = next(line["usable"] for line in lines if line["name"] == "rows")
    assert len(folds) == 2 and sum(len(line["margins"]) for line in folds) == usable
    assert any(margin != 0 for line in folds for margin in line["margins"]), "the adapter reached the scorer"
    assert folds[0]["kl"]["per_answer"]["n"] == 2 and folds[0]["first_loss"] == pytest.approx(0.6931, abs=1e-3)
    (row,) = gpu.fold_rows(lines)[1]
    assert row[4] == str(usable)


def test_a_prompt_is_held_out_in_exactly_one_fold(gpu):
    rows = [{"prompt": [{"role": "user", "content": str(n // 2)}], "n": n} for n in range(40)]
    held = [gpu.split(rows, 7, fold)[0] for fold in range(gpu.FOLDS)]
    assert sorted(row["n"] for part in held for row in part) == list(range(40))
    where = [{row["n"] // 2 for row in part} for part in held]
    assert sum(map(len, where)) == len(set().union(*where)) == 20
    assert gpu.split(rows, 7, 0) != gpu.split(rows, 8, 0)


def test_attention_laid_out_apart_is_that_of_the_mask(gpu, tiny_folder):
    from transformers import AutoModelForCausalLM

    decoder = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).base_model
    ids = torch.tensor([[7, 8, 1, 2, 9], [7, 8, 4, 0, 0], [7, 8, 3, 0, 0], [7, 5, 6, 1, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    found = {}
    for how in ("mask", "apart"):
        with torch.no_grad(), gpu.sharing(how):
            found[how] = prefix.forward(decoder, ids, mask, use_cache=False).last_hidden_state[mask.bool()]
        decoder.config._attn_implementation = "sdpa"
    assert torch.allclose(found["mask"], found["apart"], atol=1e-5)


def test_the_page_holds_the_tables_of_its_record(gpu, pytestconfig, tmp_path):
    folder = pytestconfig.rootpath / "benchmarks"
    text = (folder / "gpu.md").read_text(encoding="utf-8")
    (tmp_path / "gpu.md").write_text(text, encoding="utf-8")
    gpu.page(tmp_path / "gpu.md", written(folder / "gpu.jsonl"))
    assert (tmp_path / "gpu.md").read_text(encoding="utf-8") == text
