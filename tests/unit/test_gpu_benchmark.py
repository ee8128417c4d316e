"""The GPU benchmark's stages on a tiny shape and a CPU: what a card is lent for minutes must not fail there first."""

import argparse
import json
import sys

import folds
import gpu
import gpu_first
import gpu_speed
import gpu_ultrafeedback
import harness
import pytest
from conftest import pair
from harness import Record

from dpo_tutorial.loading import models


@pytest.fixture
def options(tmp_path, tokenizer, monkeypatch):
    """A tiny run: the tests' tokenizer, and 30 pairs in a folder laid out as the hub serves it."""
    monkeypatch.setattr(models, "load_tokenizer", lambda cfg: tokenizer)
    rows = [pair(f"What is {n}?", f"The number {n}.", f"A nice one, {n} of them!") for n in range(30)]
    for name, part in (("train_prefs", rows[:20]), ("val_prefs", rows[20:25]), ("test_prefs", rows[25:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    monkeypatch.setenv("ULTRAFEEDBACK_SAMPLE", str(tmp_path))
    parser = argparse.ArgumentParser()
    gpu.options(parser)
    return parser.parse_args(["--tiny", "--pairs", "16", "--rounds", "1"])


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "gpu.jsonl")


def test_stage_a_trains_with_and_without_our_cast_and_compares_the_memory_plan(options, record, monkeypatch):
    monkeypatch.setattr(gpu_first, "said", lambda words, last=0: {"code": 0, "said": words})  # minutes of tests
    gpu_first.stage_a(record, options)
    lines = record.lines()
    steps = [line for line in lines if line["name"].startswith("five steps")]
    assert len(steps) == 2 and all(len(line["losses"]) == 5 and line["finite"] for line in steps)
    assert steps[0]["adapter"] == ["torch.float32"]
    assert len([line for line in lines if line["name"].startswith("memory")]) == 3
    assert all(line["predicted_gib"] > 0 for line in lines if line["name"].startswith("memory"))
    assert all(made.count("\n") > 2 for made in gpu_first.tables(lines).values())


def test_a_command_is_recorded_with_its_exit_code_and_what_it_said():
    words = [sys.executable, "-c", "print('one\\ntwo'); raise SystemExit(3)"]
    assert gpu_first.said(words) == {"code": 3, "said": ["one", "two"]}
    assert gpu_first.said(words, last=1)["said"] == ["two"]


def test_stage_b_measures_stock_and_ours_and_profiles_a_step(options, record):
    options.trainers = [who for who in gpu_speed.TRAINERS if "compiled" not in who]  # minutes of a compiler on a CPU
    gpu_speed.stage_b(record, options)
    lines = record.lines()
    trained = {(line["data"], line["who"]): line for line in lines if line["name"] == "training"}
    assert len(trained) == 2 * len(options.trainers) and not [
        who for who, found in trained.items() if "failed" in found
    ]
    assert all(line["losses"][0] == pytest.approx(0.6931, abs=1e-3) for line in trained.values())
    assert {who: len(line["steps"]) for (_, who), line in trained.items()} == dict.fromkeys(options.trainers, 2) | {
        "ours, 16 pairs at a time": 1
    }
    assert all(line["pairs_per_second"] > 0 for line in trained.values() if len(line["steps"]) > 1)
    ours, stock, unshared = (trained["UltraFeedback", who] for who in ("ours", "stock TRL", "ours, no prefix sharing"))
    assert ours["positions"] < min(stock["positions"], unshared["positions"]), "prompts are shared"
    profiles = [line for line in lines if "profile of a step" in line["name"]]
    assert len(profiles) == 2 and all(line["checkpointing"] for line in profiles), "as in the trainings"
    assert ours["phases"]["backward"] > 0 and ours["phases"]["reference, forward"] > 0
    made = gpu_speed.tables(lines)
    assert made["speed"].count("\n") == 1 + len(trained) and made["profile"].count("\n") == 3
    assert gpu_speed.tables([])["profile"] == harness.UNMEASURED


def test_stage_b_begins_no_training_after_its_time(options, record):
    options.seconds = 0
    gpu_speed.stage_b(record, options)
    lines = record.lines()
    assert lines[-1]["name"] == "stopped" and not [line for line in lines if line["name"] == "training"]
    assert len([line for line in lines if "profile of a step" in line["name"]]) == 2, "what is most wanted comes first"


def test_stage_c_runs_commands_side_by_side_and_keeps_what_they_saved(record, tmp_path):
    saves = f"open({str(tmp_path / 'good' / 'summary.json')!r}, 'w').write('{{\"minutes\": 1}}'); print('done')"
    runs = {
        "good": ("a good run", [sys.executable, "-c", saves]),
        "bad": ("a bad run", [sys.executable, "-c", "raise SystemExit('no such thing')"]),
    }
    gpu.side_by_side(record, tmp_path, runs)
    found = {line["name"]: line for line in record.lines()}
    assert found["a good run"]["code"] == 0 and found["a good run"]["summary"] == {"minutes": 1}
    assert found["a bad run"]["code"] == 1 and found["a bad run"]["said"] == ["no such thing"]


@pytest.mark.slow  # all six notebooks, minutes
def test_stage_c_runs_the_notebooks_of_the_smoke_profile(tmp_path):
    gpu.main(["C", "--tiny", "--out", str(tmp_path)])
    (smoke,) = [line for line in Record(tmp_path / "gpu.jsonl").lines() if line["name"] == "smoke"]
    assert smoke["code"] == 0 and len(list((tmp_path / "executed").rglob("0*.ipynb"))) == 6


def test_what_a_runner_uploads_is_what_the_stages_write(pytestconfig):
    uploaded = (pytestconfig.rootpath / ".github" / "workflows" / "gpu.yml").read_text(encoding="utf-8")
    for kept in ("gpu.*", f"{gpu.EXECUTED}/**/*.ipynb", f"{gpu.EXECUTED}/*.log"):
        assert f"benchmarks/{kept}\n" in uploaded


def test_stage_c_asks_for_the_notebooks_and_the_quickstart(options, record, monkeypatch):
    asked = {}
    monkeypatch.setattr(gpu, "side_by_side", lambda record, keep, runs: asked.update(runs))
    options.tiny = False
    gpu.stage_c(record, options)
    assert {name: words[:2] for name, (_, words) in asked.items()}.keys() == {
        "embedded", "ultrafeedback-fp16", "quickstart"
    }  # fmt: skip
    assert "DTYPE fp16" in " ".join(asked["ultrafeedback-fp16"][1])


def test_stage_d_holds_every_row_out_once_and_scores_what_was_trained(options, record):
    gpu_ultrafeedback.stage_d(record, options)
    lines = record.lines()
    folds = [line for line in lines if line["name"] == "fold"]
    usable = next(line["usable"] for line in lines if line["name"] == "rows")
    assert len(folds) == 2 and sum(len(line["margins"]) for line in folds) == usable
    assert any(margin != 0 for line in folds for margin in line["margins"]), "the adapter reached the scorer"
    assert folds[0]["kl"]["per_answer"]["n"] == 2 and folds[0]["first_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert f"| {usable} |" in gpu_ultrafeedback.tables(lines)["ultrafeedback"]


def test_short_pairs_and_long_ones_are_told_apart_also_where_their_lengths_came_later():
    about = {"name": "fold", "epochs": 1, "rate": 1e-4, "seed": 42}
    row = {"lengths": [100, 512, 513, 900], "longer": [5, -5, 5, -5]}
    first = about | {"fold": 0, "margins": [1.0, 1.0, 1.0, -1.0]}  # recorded before rows had a length
    later = about | {"fold": 1, "margins": [1.0, -1.0, -1.0, -1.0]} | row
    made = gpu_ultrafeedback.lengths_table(
        gpu_ultrafeedback.runs_of([{"name": "lengths", "seed": 42, "fold": 0} | row, first, later])
    )
    short, long = (line.split(" | ") for line in made.splitlines()[2:])
    assert short[3:5] == ["up to 512", "4"] and short[5].startswith("0.750") and short[7:9] == ["1.00", "0.50"]
    assert long[3:5] == ["513 to 1,024", "4"] and long[5].startswith("0.250") and long[6].startswith("-0.250")
    unknown = gpu_ultrafeedback.runs_of([first])
    assert gpu_ultrafeedback.lengths_table(unknown) == harness.UNMEASURED


def test_a_prompt_is_held_out_in_exactly_one_fold():
    rows = [{"prompt": [{"role": "user", "content": str(n // 2)}], "n": n} for n in range(40)]
    held = [folds.split(rows, 7, fold, 5)[0] for fold in range(5)]
    assert sorted(row["n"] for part in held for row in part) == list(range(40))
    where = [{row["n"] // 2 for row in part} for part in held]
    assert sum(map(len, where)) == len(set().union(*where)) == 20
    assert folds.split(rows, 7, 0, 5) != folds.split(rows, 8, 0, 5)


def test_without_a_card_it_ends_before_it_writes(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(SystemExit, match="No CUDA device"):
        gpu.main(["A", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
