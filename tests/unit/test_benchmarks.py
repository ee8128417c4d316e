"""The benchmarks: their harness, the committed pages, what the records promise, and each of them on a tiny model."""

import argparse
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import colab
import effect
import effect_page
import export
import failures
import four_bit
import gpu
import growth
import harness
import memory_plan
import methods
import on_policy
import pytest
import reliability
import tasks
import training_speed
import trainings
import ultrafeedback
from conftest import pair
from datasets import Dataset

from dpo_tutorial import config, run_folder, show
from dpo_tutorial.comparing import generation
from dpo_tutorial.knobs import PROFILES
from dpo_tutorial.loading import models
from dpo_tutorial.pairs import encoding, sources
from dpo_tutorial.show import figures
from dpo_tutorial.training import train

BENCHMARKS = (
    colab, effect, export, failures, four_bit, gpu, growth, memory_plan, methods, on_policy, reliability,
    training_speed, ultrafeedback,
)  # fmt: skip


def lines_of(name):
    return harness.Record(harness.HERE / f"{name}.jsonl").lines()


# --- harness ----


def test_variants_take_turns():
    assert list(harness.turns({"a": 1, "b": 2}, 2)) == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]


def test_a_run_that_is_killed_keeps_what_it_measured(tmp_path):
    record = tmp_path / "x.jsonl"
    program = (
        f"import os, pathlib, harness; record = harness.Record(pathlib.Path({str(record)!r}))\n"
        "for n in range(9):\n    record.write('stage', 'run', n=n)\n    n == 2 and os.kill(os.getpid(), 9)"
    )
    env = os.environ | {"PYTHONPATH": str(harness.HERE)}
    assert subprocess.run([sys.executable, "-c", program], env=env).returncode == -signal.SIGKILL
    assert [line["n"] for line in harness.Record(record).lines()] == [0, 1, 2]


def test_the_newest_run_of_a_stage_counts_once_it_has_measured_anything():
    lines = [{"stage": stage, "name": name, "n": n} for n, (stage, name) in enumerate(
        [("a", "machine"), ("a", "x"), ("b", "machine"), ("a", "machine"), ("a", "x"), ("a", "x"), ("a", "machine")]
    )]  # fmt: skip
    about, found = harness.latest(lines, "a")
    assert about["n"] == 3 and [line["n"] for line in found["x"]] == [4, 5]


def test_a_child_answers_or_ends_the_run_with_its_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(harness.HERE))
    script = tmp_path / "script.py"
    script.write_text(
        "import os, harness\n"
        "harness.answer({'double': lambda task, folder: [2 * task['n'], os.environ['GIVEN'], folder.exists()]})\n"
    )
    assert harness.child(script, {"kind": "double", "n": 4}, {"GIVEN": "yes"}) == [8, "yes", True]
    with pytest.raises(SystemExit, match="no such kind"):
        harness.child(script, {"kind": "no such kind"})


def test_a_benchmark_runs_its_stages_and_writes_its_tables_between_the_words(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "child", lambda *task: {"hardware": {}, "versions": {}})
    page = tmp_path / "some.md"
    page.write_text("Before.\n\n<!-- t -->\nold\n<!-- end of t -->\n\nAfter.\n")

    def tables(lines):
        _, found = harness.latest(lines, "stage")
        return {"t": harness.table(["n"], [[line["n"]] for line in found["run"]])}

    stages = {"stage": lambda record, options: record.write("stage", "run", n=7)}
    harness.main("some.py", stages, tables, argv=["--out", str(tmp_path)])
    assert page.read_text() == "Before.\n\n<!-- t -->\n| n |\n| --- |\n| 7 |\n<!-- end of t -->\n\nAfter.\n"


def test_a_stopped_stage_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    asked = []

    def child(script, task, env):
        asked.append(task["n"])
        if task["n"] == 2:
            raise SystemExit("failed")
        time.sleep(0.1)
        return task

    monkeypatch.setattr(harness, "child", child)
    record, tasks = begun(tmp_path, "stage"), {str(n): {"n": n} for n in range(9)}
    with pytest.raises(SystemExit, match="failed"):
        harness.in_turn("some.py", record, "stage", tasks, at_once=1)
    assert asked[:3] == [0, 1, 2] and len(asked) < 9, "what had not begun is left"
    tasks["2"] = {"n": 20}
    harness.in_turn("some.py", record, "stage", tasks)
    assert sorted(asked) == [*range(9), 20], "each is measured once"
    assert harness.newest(record.lines(), "stage").keys() == tasks.keys()
    assert len(harness.machines(record.lines() * 2, "stage").split("\n\n")) == 1


def test_a_figure_is_written_beside_its_page_with_its_alt_text(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "child", lambda *task: {"hardware": {}, "versions": {}})
    (tmp_path / "docs").mkdir()
    page, (figure, _) = tmp_path / "docs" / "some.md", figures.new_figure(alt="Nothing, twice.", columns=2)
    page.write_text("<!-- f -->\n<!-- end of f -->\n")
    harness.main(
        "some.py", {"stage": lambda record, options: None}, lambda lines: {"f": harness.image(figure, "f.png")},
        argv=["--out", str(tmp_path)], figures=lambda lines: {"f.png": figure}, page="docs/some.md",
    )  # fmt: skip
    assert "![Nothing, twice.](f.png)" in page.read_text()
    assert (tmp_path / "docs" / "f.png").read_bytes().startswith(b"\x89PNG")


# --- pages and records ----


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda module: module.__name__)
def test_the_committed_tables_are_those_that_the_record_gives(benchmark):
    page = harness.HERE / getattr(benchmark, "PAGE", f"{benchmark.__name__}.md")
    text = page.read_text(encoding="utf-8")
    assert harness.with_tables(text, benchmark.tables(lines_of(benchmark.__name__))) == text


def test_recorded_speed_is_two_and_a_half_times_stock_trl_in_less_memory():
    for stage in ("compare", "whole"):
        _, found = harness.latest(lines_of("training_speed"), stage)
        assert min(training_speed.ratios(found["ours"], found["stock"], "pairs_per_second")) >= 2.5
        assert min(training_speed.ratios(found["ours"], found["raw"], "tokens_per_second")) >= 0.6
        assert max(training_speed.ratios(found["ours"], found["stock"], "peak_gib")) < 1
    assert found["ours"][0]["pairs"] == training_speed.ALL
    _, order = harness.latest(lines_of("training_speed"), "order")
    for key in ("losses", "rewards"):
        assert training_speed.apart(order, "ours", key) <= 3 * training_speed.apart(order, training_speed.PADDED, key)


def test_the_cpu_profile_keeps_the_layers_that_the_search_chose():
    found = {name: runs[-1] for name, runs in harness.latest(lines_of("four_bit"), "search")[1].items()}
    assert set(found) == set(four_bit.CHOICES) and len(found["all in 4 bits"]["nlls"]) == 86
    assert PROFILES["cpu"]["keep_16bit"] == tuple(four_bit.CHOICES[four_bit.choose(found)])
    worst, kept, best = (found[n]["nll"] for n in ("all in 4 bits", four_bit.choose(found), "all in 16 bits"))
    assert best < kept < worst


def test_of_choices_that_cannot_be_told_apart_the_cheapest_is_taken_and_none_above_the_limit():
    def one(mb, nlls):
        return {"mb": mb, "nlls": nlls, "tokens": [10] * 4, "nll": sum(nlls) / 40}

    found = {
        "all in 4 bits": one(100, [40, 41, 39, 40]),
        "cheap": one(105, [33, 32, 34, 30]),
        "dear": one(115, [32, 33, 31, 32]),  # lower in the mean, not in the interval
        "too dear": one(121, [10, 10, 10, 10]),
    }
    assert four_bit.choose(found) == "cheap"
    assert four_bit.choose(found | {"dear": one(115, [20, 20, 20, 20])}) == "dear"


def test_twenty_recorded_kills_left_the_adapter_of_an_undisturbed_training():
    (found,) = harness.latest(lines_of("reliability"), "kills")[1]["kills"]
    hits = [kill["hit"] for kill in found["kills"]]
    assert len(hits) == 20 and hits.count("write") >= 5
    assert found["same adapter"] and found["same history"] and found["left over"] == []


def recipe(kept, kl, distinct=0.8, followed=(1,) * 20):
    return {
        "kept": kept, "distinct_2": {"mean": distinct}, "followed": list(followed), "kl": {"per_token": {"mean": kl}},
    }  # fmt: skip


def test_a_recipe_is_chosen_by_what_it_writes_its_cost_and_its_distance():
    base = recipe([0.7] * 20, 0.0)
    best, near = recipe([1.0] * 10 + [0.9] * 10, 0.3), recipe([0.9] * 10 + [1.0] * 10, 0.1)
    tried = {"base": base, "best": best, "near": near, "worse": recipe([0.8] * 20, 0.01)}
    assert effect.choose(tried) == "near", "as good as the best within its error, and closer to the base"
    assert effect.choose(tried | {"near": near | {"distinct_2": {"mean": 0.5}}}) == "best", "repeats itself"
    assert effect.choose(tried | {"near": near | {"followed": [0] * 20}}) == "best", "no longer follows instructions"
    assert effect.choose(tried | {"SFT, 0.00015": recipe([1.0] * 20, 0.01)}) == "near", "the control is no candidate"
    assert effect.choose({"base": base, "only": recipe([1.0] * 20, 0.1, distinct=0.5)}) is None


def test_the_cpu_profile_has_the_recipe_and_the_pairs_that_the_rule_chooses():
    tried, fewer = (harness.newest(lines_of("effect"), stage) for stage in ("recipes", "fewer"))
    assert effect.choose(tried) == effect.CHOSEN
    of_profile = {name: PROFILES["cpu"][name] for name in ("learning_rate", "sft_weight")}
    assert effect.RECIPES[effect.CHOSEN] == of_profile
    sizes = {f"{effect.ALL} pairs": tried[effect.CHOSEN]} | fewer
    assert effect.choose(sizes | {"base": tried["base"]}) == f"{PROFILES['cpu']['max_train']} pairs"


# --- stages, with children that answer at once ----


def measured(name, stage, of):
    """What was measured in a committed line."""
    line = harness.latest(lines_of(name), stage)[1][of][0]
    return {key: value for key, value in line.items() if key not in ("stage", "name", "at", "turn")}


def test_stages_of_training_speed_record_what_the_tables_read(tmp_path, monkeypatch):
    found, asked = measured("training_speed", "order", "ours"), []

    def child(script, task, env):
        asked.append(task)
        return found | {"steps": [step + len(asked) for step in found["steps"]]}

    monkeypatch.setattr(training_speed, "child", child)
    record = begun(tmp_path, *training_speed.STAGES)
    for stage in training_speed.STAGES.values():
        stage(record, argparse.Namespace(pairs=64, turns=2))
    assert [task.get("trainer") for task in asked[:6]] == ["ours", "stock", "ours"] * 2, "in turn"
    assert all(made.count("|") > 8 for name, made in training_speed.tables(record.lines()).items() if name != "machine")


def test_growth_records_what_its_table_reads(tmp_path, monkeypatch):
    def child(script, task, env=None):
        if task["kind"] == "make":
            return {"weights": int(task["shape"].removesuffix("M")) * 10**6}
        if task["kind"] == "prepare":
            return {"rows": task["rows"], "kept": 400, "seconds": task["rows"] / 100, "peak_mib": 50}
        tokens = task["pairs"] * task["length"]
        return {"tokens": tokens, "steps": [9, tokens / 1e3, tokens / 1e3], "peak_gib": 2}

    monkeypatch.setattr(growth, "child", child)
    record = begun(tmp_path, "growth")
    growth.growth(record, None)
    found = harness.latest(record.lines(), "growth")[1]
    assert growth.slope(found["pairs"], "tokens", "seconds") == pytest.approx(1)
    assert growth.slope(found["pairs"], "pairs", "peak_gib") == pytest.approx(0)
    growth.figure(found, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_memory_settings_are_recorded_by_name(tmp_path, monkeypatch):
    found = measured("memory_plan", "settings", "2 x 256, fp32")
    monkeypatch.setattr(memory_plan, "child", lambda *_: copy.deepcopy(found))
    record = begun(tmp_path, "settings")
    memory_plan.all_settings(record, None)
    assert memory_plan.tables(record.lines())["settings"].count("\n") == 1 + len(memory_plan.SETTINGS)
    assert record.lines()[-1]["settings"]["model"] == "qwen2", "not where it lay"


def test_the_search_for_layers_records_what_its_tables_read(tmp_path, monkeypatch):
    found = measured("four_bit", "search", "all in 4 bits")
    answered = {"finished": 0.5, "distinct_2": 0.6, "samples": ["One\nanswer."]}
    made = iter(range(100))

    def child(script, task, env=None):
        less = next(made)
        return found | {"nlls": [n - less for n in found["nlls"]]} | (answered if task["answers"] else {})

    monkeypatch.setattr(four_bit, "child", child)
    record = begun(tmp_path, *four_bit.STAGES)
    for stage in four_bit.STAGES.values():
        stage(record, None)
    tables = four_bit.tables(record.lines())
    assert tables["search"].count("\n") == 1 + len(four_bit.CHOICES) and "| One answer. |" in tables["samples"]


def begun(folder, *stages):
    record = harness.Record(folder / "record.jsonl")
    about, _ = harness.latest(lines_of("training_speed"), "compare")
    for stage in stages:
        record.write(stage, "machine", hardware=about["hardware"], versions=about["versions"])
    return record


# --- each on a tiny model ----


@pytest.fixture
def knobs(tiny_folder, tmp_path):
    """What makes a profile tiny: the model, 40 short pairs, one step, and little to write."""
    rows = [pair(f"What is {n}?", f"The number {n}.", f"A nice one, {n} of them!") for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(tiny_folder), "data": str(tmp_path / "pairs.jsonl"), "dtype": "fp32", "max_tokens": 128,
        "max_new_tokens": 8, "compare_prompts": 2, "max_steps": 2,
    }  # fmt: skip


@pytest.mark.parametrize("trainer", ["ours", "stock"])
def test_one_training_is_measured(knobs, tmp_path, trainer):
    task = {"trainer": trainer, "pairs": 16, "val": 2, "length": 96, "knobs": knobs, "untouched": True}
    found = tasks.train_task(task, tmp_path)
    assert found["untouched"] < 0.2, "in float32 nearly every output moves"
    assert found["pairs"] == 16 and len(found["losses"]) == len(found["steps"]) == 2
    assert found["positions"] < found["tokens"] * 2 if trainer == "ours" else found["positions"] >= found["tokens"] * 2
    assert {"import", "load", "tokenize", "backward", "evaluation"} <= set(found["phases"])
    assert found["losses"][0] == pytest.approx(0.6931, abs=1e-3) and found["peak_gib"] > 0
    assert found["steady"]["pairs_per_second"] > 0


def test_the_reference_computed_before_counts_in_the_seconds(knobs, tmp_path):
    task = {"trainer": "ours", "pairs": 8, "length": 96, "knobs": knobs | {"max_steps": 1}}
    found = tasks.train_task(task | {"arguments": {"precompute_ref_log_probs": True}}, tmp_path)
    assert found["seconds"] > found["phases"]["tokenize"] and "reference, forward" not in found["phases"]
    assert found["losses"][0] == pytest.approx(0.6931, abs=1e-3)


def test_bare_passes_audit_and_a_checkpoint_of_random_weights_are_measured(knobs, tmp_path):
    assert tasks.raw_task({"knobs": knobs, "shape": (2, 16)}, tmp_path)["tokens_per_second"] > 0
    long = Path(shutil.copytree(knobs["model"], tmp_path / "long"))
    found = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps(found | {"max_position_embeddings": 1024}))
    audited = {"model": str(long), "max_tokens": 1024}
    assert tasks.prepare_task({"rows": 60, "knobs": audited}, tmp_path)["kept"] > 0
    task = {"shape": "tiny", "path": str(tmp_path / "made"), "knobs": {"model": knobs["model"]}}
    assert tasks.make_task(task, tmp_path)["weights"] > 0
    assert models.load_tokenizer(trainings.config_of(model=task["path"])).chat_template


def test_a_memory_plan_is_measured(tiny_folder, tmp_path):
    knobs = {"model": str(tiny_folder), "dtype": "fp32", "batch_size": 2, "max_tokens": 64}
    found = memory_plan.measure({"knobs": knobs, "evaluates": True}, tmp_path)
    assert found["predicted"] == sum(found["phases"][found["peak"]].values()) and found["measured"] > 0


def test_an_effect_is_measured_and_written(knobs, tmp_path, monkeypatch):
    task = {"knobs": knobs | {"learning_rate": 1e-2}, "split": "val", "answers": True}
    trained = effect.train(task, tmp_path)
    swapped = effect.train(task | {"swapped": True, "answers": False}, tmp_path)
    base = effect.train(task | {"untrained": True}, tmp_path)
    assert trained["margin"]["mean"] > base["margin"]["mean"] == 0 > swapped["margin"]["mean"]
    assert all(write(trained) for write in effect_page.OF_RECIPES.values())
    record = begun(tmp_path, "recipes")
    for name in ("base", *effect.RECIPES):
        record.write("recipes", name, **(base if name == "base" else trained))
    recipes = effect.tables(record.lines())["recipes"]
    assert recipes.count("\n") == 2 + len(effect.RECIPES)
    assert [line.split(" | ")[0] for line in recipes.splitlines()[2:]] == [
        f"| {name}" for name in ("base", *effect.RECIPES)
    ]
    assert effect.tables(record.lines())["fewer"] == harness.UNMEASURED
    asked = []
    monkeypatch.setattr(harness, "child", lambda script, task, env=None: asked.append(task) or trained)
    effect.fewer(begun(tmp_path, "fewer"), argparse.Namespace())
    assert sorted(task["knobs"]["max_train"] for task in asked) == sorted(effect.FEWER)
    assert all(task["split"] == "val" and task["knobs"]["sft_weight"] == 1 for task in asked)
    fewer = effect.tables(record.lines())["fewer"].splitlines()[2:]
    assert [line.split(" | ")[0] for line in fewer] == [f"| {n} pairs" for n in (*sorted(effect.FEWER), effect.ALL)]


def test_sft_comes_first_where_a_recipe_asks_for_it(knobs, tmp_path):
    found = effect.train({"knobs": knobs | {"start_from": "SFT"}, "split": "val"}, tmp_path)
    assert (tmp_path / "sft" / "adapter_model.safetensors").is_file() and found["margin"]["mean"] != 0


def test_two_second_rounds_are_measured_and_written(knobs, tmp_path, monkeypatch):
    tiny = knobs | {"learning_rate": 1e-2, "lora_r": 4, "max_train": 8, "max_test": 2, "instructions": 2}
    drawn = iter(range(10**6))

    def generate(config, model, tokenizer, prompts, *_, **__):  # every second answer keeps a rule less
        return [{"text": f"It is {n}{'.!'[n % 2]}", "tokens": 4, "finished": True} for n in islice(drawn, len(prompts))]

    monkeypatch.setattr(generation, "generate", generate)
    monkeypatch.setattr(
        on_policy, "child", lambda script, task, env: on_policy.rounds(task | {"knobs": tiny}, tmp_path)
    )
    record = begun(tmp_path, "rounds")
    on_policy.second_round(record, argparse.Namespace(seeds=[42]))
    found = {line["name"].partition(",")[0]: line for line in record.lines() if line["name"] != "machine"}
    assert list(found) == list(on_policy.ROUNDS) and [found[name]["pairs"] for name in on_policy.ROUNDS] == [0, 4, 4, 4]
    margins = [found[name]["margin"]["mean"] for name in on_policy.ROUNDS]
    assert margins[0] == 0 < margins[1] and len(set(margins)) == 4, "each is scored against the base"
    assert on_policy.tables(record.lines())["rounds"].count("\n") == 1 + len(on_policy.ROUNDS)


def test_a_saved_adapter_is_judged_on_everything_and_written(knobs, cfg, tokenizer, pairs, tmp_path, monkeypatch):
    run = run_folder.Run(config.resolve(profile="cpu", artifacts=str(tmp_path)))
    train.train(cfg, run, models.load_base(cfg), tokenizer, Dataset.from_list(list(pairs)), pairs)
    monkeypatch.setattr(effect, "WHOLE", {"compare_prompts": 4, "max_new_tokens": 8, "instructions": 6})
    monkeypatch.setattr(harness, "child", lambda script, task, env=None: effect.judge(task, tmp_path))
    record = begun(tmp_path, "seeds")
    monkeypatch.setattr(effect, "WHOLE", effect.WHOLE | knobs)
    effect.seeds(record, argparse.Namespace(runs=[str(tmp_path)]))
    judged = record.lines()[-1]
    assert len(judged["each"]["margin"]) == len(pairs)
    for name, found in (
        ("ends complete", judged["rules"]["after"]["ends complete"]), ("followed", judged["instructions"]["after"])
    ):  # fmt: skip
        each = judged["each"][name]
        assert (len(each), sum(each)) == (found["n"], round(found["rate"] * found["n"]))
    with pytest.raises(SystemExit, match="control"):
        effect.control(record, argparse.Namespace(runs=[str(tmp_path)]))
    tables = effect.tables(record.lines())
    assert "SFT alone" not in tables["seeds"] and tables["control"] == tables["apart"] == harness.UNMEASURED
    assert f"seed {cfg.seed}" in tables["changes"] and {"seeds", "against", "instructions"} <= tables.keys()
    (figure,) = effect.drawn(record.lines()).values()
    assert "ends complete" in figures.alt_text(figure) and "word counts on" in figures.alt_text(figure)
    about, of_dpo = record.lines()
    other = copy.deepcopy(of_dpo)  # of SFT alone, as if all its answers kept this rule
    other["rules"]["after"]["ends complete"]["rate"] = 1.0
    other["each"]["ends complete"], of_dpo["each"]["ends complete"] = [1, 1], [0, 1]
    for line in (about, other):
        record.write("control", line["name"], **{k: v for k, v in line.items() if k not in ("stage", "name", "at")})
    tables = effect.tables(record.lines())
    assert all(f"{effect_page.ALONE}, seed {cfg.seed}" in tables[name] for name in ("seeds", "kinds", "instructions"))
    assert "| ends complete | -0.50 (" in effect_page.apart_table(*({"seed": r} for r in (of_dpo, other)))
    of_control, before = (
        next(row for row in made.splitlines() if "ends complete" in row)
        for made in (tables["control"], tables["changes"])
    )
    assert "→ 100%" in of_control and of_control != before and "1 of SFT alone" in tables["figure"]
    assert f"| {cfg.max_train} pairs" not in tables["seeds"], "judged once"
    again = {k: v for k, v in of_dpo.items() if k not in ("stage", "name", "at")} | {"seconds": 360.0}
    record.write("seeds", of_dpo["name"], **again)
    rows = [row.split(" | ") for row in effect.tables(record.lines())["seeds"].splitlines()[2:]]
    minutes = {row[0].removeprefix("| "): row[-2] for row in rows}
    assert list(minutes) == [
        f"{kind}seed {cfg.seed}" for kind in ("", f"{effect_page.ALONE}, ", f"{cfg.max_train} pairs, ")
    ]
    assert minutes.pop(f"seed {cfg.seed}") == "6.0" and "6.0" not in minutes.values()
    with pytest.raises(SystemExit, match="--runs"):
        effect.seeds(record, argparse.Namespace(runs=[]))


def test_a_rehearsal_of_colab_is_recorded_as_it_goes(tmp_path):
    class Session:
        def __init__(self, name):
            self.name = name

        __enter__, __exit__ = lambda self: self, lambda *_: None

        def run(self, source):
            return "AssertionError: no internet" if "nowhere" in source else None

        def run_notebook(self, path, parameters=""):
            stops = self.name == "held" and "SessionError: restart" or self.name == colab.NEEDS_ADAPTER and "no adapter"
            return {"seconds": 1.0, "error": stops or None, "cell": 5 if stops else None}

    class Colab:
        folder, checkout, python, before = tmp_path, tmp_path, sys.executable, {"torch": "2.0", "numpy": "2.0"}
        session = staticmethod(Session)

        def changes(self):
            return {"upgraded": {"pyarrow": ["1", "2"]}, "downgraded": {}, "removed": {}, "added": {"trl": "1"}}

    record = harness.Record(tmp_path / "colab.jsonl")
    record.write("stand-in", "machine")
    colab.rehearse(Colab(), record)
    found = colab.newest(record.lines())
    assert {path.stem for path in colab.NOTEBOOKS} | {colab.TRAINS, colab.HELD} <= set(found)
    assert found["where pip fails"]["said"] == ["AssertionError: no internet"]
    assert colab.passed(colab.HELD, found[colab.HELD]) and colab.passed(colab.TRAINS, found[colab.TRAINS])
    assert not colab.passed(colab.NEEDS_ADAPTER, found[colab.NEEDS_ADAPTER]), "it stopped, but for another reason"
    assert colab.tables(record.lines())["notebooks"].count("FAILED") == 1


def test_a_checkpoint_is_measured(knobs, tmp_path):
    found = reliability.measure_checkpoint({"profile": "smoke", "knobs": knobs | {"max_steps": 3}}, tmp_path)
    assert len(found["step seconds"]) == 3 and len(found["seconds between steps, a checkpoint in each"]) == 2
    assert found["checkpoint MB"] > 0


def test_a_fault_is_recorded_as_a_user_meets_it(tmp_path, monkeypatch):
    said = f"raise SystemExit('ConfigError: {tmp_path}/pairs.csv is bad.\\n  Fix: Write another.')"
    monkeypatch.setattr(reliability, "command", lambda word, **parameters: [sys.executable, "-c", said])
    found = reliability.fault(tmp_path, "run", {"DATA": tmp_path / "pairs.csv"})
    says = "pairs.csv is bad.\n  Fix: Write another."
    assert found == {"command": "run -p DATA pairs.csv", "exit code": 1, "says": says}


@pytest.mark.slow
def test_the_commands_of_the_harness_are_the_packages(tmp_path):
    for word in ("run", "train"):
        assert reliability.fault(tmp_path, word, {"BTA": "0.1"})["says"].startswith("Unknown parameter BTA.")


def test_a_run_notes_its_commit_and_the_numbers_it_was_given_and_no_folder():
    parser = argparse.ArgumentParser()
    parser.add_argument("stages", nargs="*")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--lengths", nargs="*", type=int, default=[512])
    parser.add_argument("--runs", nargs="*", default=[])
    chosen = parser.parse_args(["--workers", "4", "--lengths", "64", "--runs", "runs/mine"])
    assert harness.numbers(chosen, parser) == {"workers": 4, "lengths": [64]}
    assert harness.numbers(parser.parse_args([]), parser) == {}
    assert bool(harness.commit()) == (harness.ROOT / ".git").exists()
    assert re.fullmatch(r"([0-9a-f]{7,40}\+?)?", harness.commit())


@pytest.fixture
def one_at_a_time(monkeypatch):
    """Children that are called here, and not in processes of their own, do not share torch and TRL with another."""
    monkeypatch.setattr(harness, "ThreadPoolExecutor", lambda n: ThreadPoolExecutor(1))


def test_ultrafeedback_holds_each_row_out_once_and_records_no_text(knobs, tmp_path, monkeypatch, one_at_a_time):
    monkeypatch.setenv("ULTRAFEEDBACK_SAMPLE", knobs.pop("data"))
    monkeypatch.setattr(ultrafeedback, "FOLDS", {96: 2})
    done = []

    def child(script, task, env):
        done.append(task)
        return ultrafeedback.measure(task | {"knobs": knobs | task["knobs"]}, tmp_path)

    monkeypatch.setattr(harness, "child", child)
    record, asked = begun(tmp_path, "folds"), argparse.Namespace(rates=[1.5e-4], seeds=[1], folds=[0, 1], max_tokens=96)
    ultrafeedback.all_folds(record, asked)
    ultrafeedback.all_folds(record, asked)
    assert len(done) == 2, "a fold that is recorded is not trained again"
    runs = ultrafeedback.runs_of(record.lines())
    (parts,) = runs.values()
    assert sum(part["n"] for part in parts) == 40 and "kl" in parts[0] and "kl" not in parts[1]
    assert all(len(part["lengths"]) == part["n"] and max(part["lengths"]) <= 96 for part in parts)
    assert all(len(ultrafeedback.judged(judge, parts)) == 40 for judge in ultrafeedback.JUDGES)
    assert any(ultrafeedback.margins(parts)) and parts[0]["first_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert "number" not in record.path.read_text() and str(tmp_path) not in record.path.read_text()
    tables = ultrafeedback.tables(record.lines())
    assert "| 40 |" in tables["trained"] and "word counts" in tables["judges"]
    assert "1.5e-04" in tables["figure"] or "0.00015" in tables["figure"]
    (figure,) = ultrafeedback.drawn(record.lines()).values()
    assert figures.picture(figure).data
    monkeypatch.delenv("ULTRAFEEDBACK_SAMPLE")
    with pytest.raises(SystemExit, match="ULTRAFEEDBACK_SAMPLE"):
        ultrafeedback.all_folds(record, asked)


def test_a_method_is_trained_and_judged_along_its_training(knobs, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "POINTS", (2, 4))  # the first step moves nothing
    small = {"max_train": 16, "max_val": 4, "compare_prompts": 2, "learning_rate": 1e-2} | knobs | {"max_steps": 4}
    found = {}
    for method in ("sigmoid", "ipo"):
        _, task = methods.task_of(method, 1)
        found[method] = methods.measure(task | {"knobs": task["knobs"] | small}, tmp_path)["points"]
        for point in found[method].values():
            assert len(point["kept"]) == point["tokens"]["n"] == point["kl"]["n"] == 2
    assert list(found["sigmoid"]) == [0, 2, 4] and list(found["ipo"]) == [2, 4]
    base = found["sigmoid"][0]
    assert base["accuracy"]["rate"] == 0.5 and base["kl"]["mean"] == base["nats"]["mean"] == 0
    ends = [found[method][step]["nats"]["mean"] for method in found for step in (2, 4)]
    assert len({0, *ends}) == 5, "each point is another adapter"


def far(kl, kept):
    """A judged point that went so far and keeps so many rules."""
    return {
        "kl": {"mean": kl}, "kept": [kept, kept], "accuracy": {"rate": 0.5 + kl}, "nats": {"mean": 200 * kl},
        "per_token": {"mean": 5 * kl}, "tokens": {"mean": 50}, "distinct_2": {"mean": 0.7},
    }  # fmt: skip


def test_methods_share_what_beta_means_and_are_compared_at_one_distance(tmp_path, monkeypatch):
    def child(script, task, env):
        whole = 0.01 if task["method"] == "hinge" else 0.2
        points = {str(step): far(whole * step / 20, 0.7 + whole * step / 20) for step in task["points"]}
        about = {"method": task["method"], "seed": task["knobs"]["seed"], "beta": task["knobs"].get("beta", 0.1)}
        return about | {"points": points}

    monkeypatch.setattr(harness, "child", child)
    record = begun(tmp_path, *methods.STAGES)
    with pytest.raises(SystemExit, match="sigmoid first"):
        methods.others(record, None)
    assert set(methods.tables(record.lines()).values()) == {harness.UNMEASURED}
    for stage in methods.STAGES.values():
        stage(record, None)
    runs = methods.by_method(methods.runs_of(record.lines()))
    assert runs["ipo"][6][0]["beta"] == pytest.approx(1 / 2), "1 / (2 beta) are sigmoid's 1 nat per token"
    assert runs["sigmoid_norm"][6][0]["beta"] == pytest.approx(4), "1 nat is sigmoid's margin of 4"
    tables = methods.tables(record.lines())
    assert tables["runs"].count("\n") == 1 + 1 + 2 * len(methods.METHODS)
    assert "| ipo | 3 of 3 | 0.10 (0.10 to 0.10) | 0.10" in tables["equal"], "read off at 0.1 nats, between two points"
    assert "| hinge | 0 of 3 | not so far | not so far |" in tables["equal"]
    assert "apo_zero" in tables["figure"] and figures.picture(*methods.drawn(record.lines()).values()).data
    end = methods.summary(methods.runs_of(record.lines()))["ipo"][-1]
    assert (end["KL"], end["rules kept"], len(end["seeds"])) == (pytest.approx(0.2), pytest.approx(0.2), 3)
    done = len(record.lines())
    methods.sigmoid(record, None)
    assert len(record.lines()) == done


def test_the_losses_that_notebook_05_draws_are_those_of_the_record():
    record = harness.Record(harness.HERE / "methods.jsonl")
    found = methods.summary(methods.runs_of(record.lines()))
    assert json.loads(methods.COPY.read_text()) == json.loads(json.dumps(found))
    assert all(len(points[-1]["seeds"]) == len(methods.SEEDS) for points in found.values())
    assert all(f"{name} rules kept" in show.other_losses().get_label() for name in methods.METHODS)


def test_faults_are_what_they_say(pairs, tokenizer, monkeypatch):
    ten = Dataset.from_list(list(pairs) * 3).select(range(10))
    swapped = failures.swap_three_in_ten(ten, tokenizer)
    assert [row["chosen"] == old["rejected"] for row, old in zip(swapped, ten, strict=True)] == [True] * 3 + [False] * 7
    assert swapped[0]["rejected"] == ten[0]["chosen"] and swapped[3] == ten[3]
    longer = failures.chosen_is_longer(ten, tokenizer)
    assert longer["prompt_id"] == [row["prompt_id"] for row in ten if row["chosen_tokens"] > row["rejected_tokens"]]
    for row in failures.eos_twice(pairs, tokenizer):
        for side in ("chosen", "rejected"):
            assert encoding.encode(tokenizer, row["prompt"], row[side])[1].count(tokenizer.eos_token_id) == 2
    other = copy.deepcopy(tokenizer)
    before, after = encoding.encode(other, pairs[0]["prompt"], failures.wrong_template(pairs, other)[0]["chosen"])
    assert before != encoding.encode(tokenizer, pairs[0]["prompt"], pairs[0]["chosen"])[0]
    assert after.count(tokenizer.eos_token_id) == 1, "nothing else is wrong with it"
    kinds = {row["prompt_id"]: "base sample" if n % 2 else "form" for n, row in enumerate(pairs)}
    monkeypatch.setattr(sources, "rejected_kinds", lambda: kinds)
    parts = [
        made(pairs, tokenizer)["prompt_id"] for made in (failures.rejected_by_others, failures.rejected_by_the_base)
    ]
    assert parts == [pairs["prompt_id"][::2], pairs["prompt_id"][1::2]]


def test_a_fault_and_its_remedy_are_measured_and_shown(knobs, tmp_path, monkeypatch, one_at_a_time):
    def child(script, task, env):
        small = {"max_val": 2, "learning_rate": 1e-4, "max_steps": 5}  # A has no gradient until B has left 0
        return failures.measure(task | {"knobs": knobs | small}, tmp_path)

    few = ("bf16", "bf16, in float32")
    monkeypatch.setattr(failures, "RUNS", {name: failures.RUNS[name] for name in few})
    monkeypatch.setattr(failures, "FAULTS", {"bf16": failures.RUNS["bf16"]})
    monkeypatch.setattr(harness, "child", child)
    record = begun(tmp_path, "failures")
    failures.failures(record, None)
    found = harness.newest(record.lines(), "failures")
    assert found["bf16"]["untouched"] > 2 * found["bf16, in float32"]["untouched"], "steps too small for bfloat16"
    tables = failures.tables(record.lines())
    assert "![bf16. fault: loss 0.69" in tables["bf16"] and "| remedy | 0.693" in tables["bf16"]
    assert list(failures.drawn(record.lines())) == ["failures/bf16.png"]


def test_the_gallery_shows_how_each_fault_is_made():
    tables = failures.tables([])
    assert all(tables[f"{name}, made"].startswith("```") for name in failures.FAULTS)
    assert "LEARNING_RATE 1.5e-05" in tables["bf16, made"] and "def bf16_adapter" in tables["bf16, made"]
    assert "def" not in tables["swapped, cured"] and "LOSS_TYPE robust" in tables["swapped, cured"]
