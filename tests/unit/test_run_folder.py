"""The run folder: files appear whole or not at all, and each notebook finds what the one before it made."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
from unittest.mock import Mock

import datasets
import pytest
import torch
from conftest import pair
from safetensors.torch import save_file

from dpo_tutorial import run_folder
from dpo_tutorial.errors import ArtifactError, DataError
from dpo_tutorial.machine import hardware, session
from dpo_tutorial.pairs import prepare, row_checks, store
from dpo_tutorial.run_folder import Run
from dpo_tutorial.training import save


@pytest.fixture(scope="module", autouse=True)
def own_datasets_cache(tmp_path_factory):
    """Keep what `datasets` builds from these files out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets-cache")))
        yield


@pytest.fixture
def run(cfg):
    return Run(cfg)


def disk_full(*_, **__):
    raise OSError(28, "No space left on device")


def files_of(folder):
    """Every file and folder below `folder`, with the files' text."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


ADAPTER = {*save.ADAPTER_FILES, save.PAIRS_FILE, "training.json"}

# --- the folder ---------------------------------------------------------------------------------------------------


def test_the_run_folder_is_made_below_artifacts_and_profile(cfg, tmp_path):
    run = Run(dataclasses.replace(cfg, profile="smoke", artifacts=str(tmp_path / "mine")))
    assert run.dir == tmp_path / "mine" / "smoke"
    assert files_of(tmp_path / "mine") == {"smoke": None, "smoke/figures": None}


def test_a_run_folder_that_cannot_be_written_is_an_error_that_names_it(cfg, tmp_path):
    (tmp_path / "file").write_text("a file, so nothing can lie below it")
    with pytest.raises(ArtifactError, match="file/artifacts/cpu could not be written") as caught:
        Run(dataclasses.replace(cfg, artifacts=str(tmp_path / "file" / "artifacts")))
    assert "ARTIFACTS" in caught.value.fix


# --- small files --------------------------------------------------------------------------------------------------


def test_text_is_written_whole_with_folders_made_and_readable_by_others(run):
    path = run.write_text("results/answer.md", "é 漢 🙂\n")
    assert path == run.dir / "results" / "answer.md"
    assert path.read_text(encoding="utf-8") == "é 漢 🙂\n"
    assert path.stat().st_mode & 0o777 == 0o644
    run.write_text("results/answer.md", "new")
    assert files_of(run.dir / "results") == {"answer.md": "new"}


@pytest.mark.parametrize("call", ["os.replace", "os.fsync", "os.chmod", "tempfile.mkstemp"])
def test_a_write_that_fails_leaves_the_old_text_and_nothing_else(run, monkeypatch, call):
    run.write_text("answer.md", "old")
    before = files_of(run.dir)
    monkeypatch.setattr(call, disk_full)
    with pytest.raises(ArtifactError, match="answer.md could not be written .No space left on device") as caught:
        run.write_text("answer.md", "new")
    assert "ARTIFACTS" in caught.value.fix
    assert files_of(run.dir) == before


def test_what_a_kill_left_goes_once_it_is_a_day_old_and_never_the_only_copy(run):
    young, old = (run.dir / f".adapter-{name}" for name in ("young", "old"))
    for left in (young, old):
        left.mkdir()
    os.utime(old, (0, 0))
    with run.replacing(run.adapter):
        assert young.is_dir() and old.is_dir(), "there is no adapter: one of these may be all that is left of it"
    os.utime(old, (0, 0))
    with run.replacing(run.adapter):
        assert young.is_dir() and not old.exists()


def test_a_mount_without_modes_is_written_to_all_the_same(run, monkeypatch):
    monkeypatch.setattr("os.chmod", Mock(side_effect=PermissionError(1, "Operation not permitted")))
    assert run.write_text("answer.md", "new").read_text() == "new"
    with run.replacing(run.adapter) as folder:
        (folder / "file").write_text("in")
    assert files_of(run.adapter) == {"file": "in"}


def test_a_file_in_place_of_a_folder_is_an_artifact_error(run):
    run.write_text("results", "a file")
    with pytest.raises(ArtifactError, match="results/answer.md could not be written"):
        run.write_text("results/answer.md", "new")


def test_a_text_that_cannot_be_encoded_leaves_no_temporary_file(run):
    before = files_of(run.dir)
    with pytest.raises((ArtifactError, UnicodeEncodeError)):
        run.write_text("answer.md", "lone surrogate \ud800")
    assert files_of(run.dir) == before


def test_json_is_read_as_it_was_written(run):
    value = {"a": [1, 2.5, None], "é": "line separator \u2028 and next line \x85"}
    run.write_json("value.json", value)
    assert run.read_json("value.json") == value


def test_what_is_no_number_is_null_in_json(run):
    path = run.write_json("value.json", {"low": math.nan, "deep": [{"high": math.inf}, 0.5]})

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {"low": None, "deep": [{"high": None}, 0.5]}


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe"], ids=["empty", "cut short", "not utf-8"])
def test_a_damaged_json_file_is_an_error_that_names_it(run, content):
    (run.dir / "results.json").write_bytes(content)
    with pytest.raises(ArtifactError, match="results.json is not valid JSON") as caught:
        run.read_json("results.json")
    assert "Delete it" in caught.value.fix


def test_a_figure_is_saved_as_png_below_figures(run):
    import matplotlib.figure

    path = run.save_figure(matplotlib.figure.Figure(figsize=(1, 1)), "loss.png")
    assert path == run.dir / "figures" / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")


# --- manifest -----------------------------------------------------------------------------------------------------


def test_recording_a_step_keeps_the_earlier_ones_and_replaces_its_own(run):
    assert run.manifest() == {"steps": {}}
    run.record("04", rows=12)
    first = run.manifest()["steps"]["04"]
    Run(run.config).record("05", loss=0.5)
    steps = run.manifest()["steps"]
    assert list(steps) == ["04", "05"]
    assert steps["04"] == first and first["rows"] == 12 and steps["05"]["loss"] == 0.5
    run.record("04", kept=7)
    assert "rows" not in run.manifest()["steps"]["04"]


def test_a_step_is_recorded_with_config_versions_and_hardware(run):
    run.record("05")
    step = run.manifest()["steps"]["05"]
    assert step["config"] == run.config.identity()
    assert step["versions"] == session.versions() and {"python", "torch", "trl"} <= set(step["versions"])
    assert step["hardware"] == hardware.hardware()
    assert step["time"].endswith("Z")


def test_a_damaged_manifest_is_an_error_not_a_fresh_start(run):
    (run.dir / "manifest.json").write_text('{"steps": ')
    with pytest.raises(ArtifactError, match="manifest.json is not valid JSON"):
        run.record("05")
    assert (run.dir / "manifest.json").read_text() == '{"steps": '


# --- folders ------------------------------------------------------------------------------------------------------


@pytest.fixture
def old_adapter(run):
    run.adapter.mkdir()
    (run.adapter / "old.txt").write_text("old")
    return run.adapter


def test_a_filled_folder_replaces_the_old_one_whole(run, old_adapter):
    with run.replacing(run.adapter) as work:
        assert list(work.iterdir()) == []
        (work / "new.txt").write_text("new")
    assert files_of(run.dir) == {"adapter": None, "adapter/new.txt": "new", "figures": None}
    assert run.adapter.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError("bad weights"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failure_while_filling_leaves_the_old_folder_as_it_was(run, old_adapter, error):
    before = files_of(run.dir)
    with pytest.raises(type(error)), run.replacing(run.adapter) as work:
        (work / "new.txt").write_text("half")
        raise error
    assert files_of(run.dir) == before


def test_a_full_disk_while_filling_leaves_the_old_folder_and_is_an_artifact_error(run, old_adapter):
    before = files_of(run.dir)
    full = pytest.raises(ArtifactError, match="adapter could not be written .No space left on device")
    with full as caught, run.replacing(run.adapter) as work:
        (work / "new.txt").write_text("half")
        disk_full()
    assert "ARTIFACTS" in caught.value.fix
    assert files_of(run.dir) == before


@pytest.mark.parametrize("failing", [1, 2], ids=["moving the old away", "moving the new in"])
def test_a_failing_rename_leaves_the_old_folder_in_place(run, old_adapter, monkeypatch, failing):
    before, calls, real = files_of(run.dir), [], os.replace

    def replace(source, target):
        calls.append(target)
        if len(calls) == failing:
            disk_full()
        real(source, target)

    monkeypatch.setattr(run_folder.os, "replace", replace)
    with pytest.raises(ArtifactError), run.replacing(run.adapter) as work:
        (work / "new.txt").write_text("new")
    assert files_of(run.dir) == before


def test_a_stop_between_the_two_renames_brings_the_old_folder_back(run, old_adapter, monkeypatch):
    before, calls, real = files_of(run.dir), [], os.replace

    def replace(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(run_folder.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt), run.replacing(run.adapter) as work:
        (work / "new.txt").write_text("new")
    assert files_of(run.dir) == before


def test_weights_that_the_system_cuts_off_are_an_artifact_error(run, old_adapter):
    """A real refusal by the kernel; safetensors' error for it is no OSError."""
    before, (soft, hard) = files_of(run.dir), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(ArtifactError, match="File too large"), run.replacing(run.adapter) as work:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
            save_file({"weight": torch.zeros(1000)}, work / "adapter_model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files_of(run.dir) == before


# --- handoff ------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    """A JSONL file of 30 pairs that `cfg` can name as DATA."""

    def write(word="question", ending="."):
        path = tmp_path / "pairs.jsonl"
        rows = [pair(f"{word} {i}?", f"Yes {i}{ending}", f"No {i}{ending}") for i in range(30)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def rows_of(prepared):
    return {name: split.to_list() for name, split in prepared.splits.items()}


def refuse(*_):
    raise AssertionError("the data was prepared anew")


def test_saved_data_comes_back_equal_without_being_prepared_again(cfg, tokenizer, source, monkeypatch):
    run = Run(dataclasses.replace(cfg, data=source(ending=' é 漢 🙂 "quoted" \\ tab\t and\nline\u2028\u2029\x85.')))
    prepared = prepare.prepare(run.config, tokenizer)
    folder = store.save_data(run, prepared)
    assert folder == store.data_dir(run)
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "test.jsonl", "train.jsonl", "val.jsonl"]
    monkeypatch.setattr(prepare, "prepare", refuse)
    again = store.ensure_data(Run(run.config), tokenizer)
    assert rows_of(again) == rows_of(prepared)
    assert list(again.splits) == list(prepared.splits)
    assert again.report == prepared.report and again.choices == prepared.choices


@pytest.fixture
def tied_source(source):
    """`source` with two tied rows: enough sound ones for three splits, and something to report."""
    path = source()
    with open(path, "a") as stream:
        for i in range(2):
            stream.write(json.dumps(pair(f"tied {i}?", "Yes.", "No.", score_chosen=3.0)) + "\n")
    return path


def test_the_audit_lies_in_the_runs_folder_beside_the_prepared_data(cfg, tokenizer, tied_source):
    run = Run(dataclasses.replace(cfg, data=tied_source))
    prepared = prepare.prepare(run.config, tokenizer)
    store.save_data(run, prepared)
    report = run.read_json("data_report.json")
    assert report["prepared"] == store.data_dir(run).name and report["source"] == "pairs.jsonl"
    assert (report["rows"], report["kept"], report["dropped"]) == (32, 30, {"tied scores": 2})
    assert report["splits"] == prepared.report and report["choices"] == prepared.choices
    assert report["meaning"] == {"tied scores": row_checks.REASONS["tied scores"]} and report["strict"] is False
    ids = [name for split in report["splits"].values() for name in split["examples"].get("tied scores", [])]
    assert sorted(ids) == ["tied 0?", "tied 1?"]


def test_the_audit_is_that_of_the_data_read_last(cfg, tokenizer, source):
    """A run's folder may hold the prepared data of several configs."""
    one = Run(dataclasses.replace(cfg, data=source()))
    other = Run(dataclasses.replace(one.config, seed=43))
    store.ensure_data(one, tokenizer)
    store.ensure_data(other, tokenizer)
    assert one.read_json("data_report.json")["prepared"] == store.data_dir(other).name
    store.ensure_data(one, tokenizer)
    assert one.read_json("data_report.json")["prepared"] == store.data_dir(one).name


def test_strict_refuses_prepared_data_that_lost_rows_when_strict_was_off(cfg, tokenizer, tied_source):
    run = Run(dataclasses.replace(cfg, data=tied_source))
    store.ensure_data(run, tokenizer)
    strict = Run(dataclasses.replace(run.config, strict=True))
    assert store.data_dir(strict) == store.data_dir(run)
    with pytest.raises(DataError, match="STRICT is on"):
        store.ensure_data(strict, tokenizer)


def test_missing_data_is_prepared_saved_and_said(cfg, tokenizer, source, capsys):
    run = Run(dataclasses.replace(cfg, data=source()))
    made = store.ensure_data(run, tokenizer)
    assert "making it now" in capsys.readouterr().out
    assert rows_of(made) == rows_of(prepare.prepare(run.config, tokenizer))
    assert (store.data_dir(run) / "report.json").is_file()
    assert rows_of(store.ensure_data(run, tokenizer)) == rows_of(made)
    assert "making it now" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        dict(seed=43), dict(max_train=7), dict(max_val=7), dict(max_test=7), dict(max_tokens=64),
        dict(data="someone/pairs"), dict(data_revision="a"), dict(model="other/model"), dict(model_revision="a"),
    ],
)  # fmt: skip
def test_a_change_that_alters_the_data_gives_another_data_folder(run, change):
    assert store.data_dir(Run(dataclasses.replace(run.config, **change))) != store.data_dir(run)


@pytest.mark.parametrize("change", [dict(beta=0.5), dict(learning_rate=1e-3), dict(lora_r=8)])
def test_a_change_that_leaves_the_data_alone_keeps_the_data_folder(run, change):
    assert store.data_dir(Run(dataclasses.replace(run.config, **change))) == store.data_dir(run)


def test_a_changed_source_file_is_prepared_anew(cfg, tokenizer, source):
    run = Run(dataclasses.replace(cfg, data=source("old")))
    store.ensure_data(run, tokenizer)
    source("new")
    prompts = [row["prompt"][0]["content"] for row in store.ensure_data(run, tokenizer).splits["train"]]
    assert all(text.startswith("new") for text in prompts)


@pytest.mark.parametrize("name", ["report.json", "train.jsonl"])
@pytest.mark.parametrize("harm", ["cut short", "missing"])
def test_harmed_prepared_data_is_an_error_that_names_the_file_or_is_made_anew(cfg, tokenizer, source, name, harm):
    run = Run(dataclasses.replace(cfg, data=source()))
    made = store.ensure_data(run, tokenizer)
    path = store.data_dir(run) / name
    path.unlink() if harm == "missing" else path.write_text(path.read_text()[:-20])
    try:
        again = store.ensure_data(run, tokenizer)
    except ArtifactError as error:
        assert name in error.cause
    else:
        assert rows_of(again) == rows_of(made)


def test_no_adapter_is_an_error_that_names_the_notebook_that_makes_one(run):
    with pytest.raises(ArtifactError) as caught:
        save.read_training_record(run.adapter)
    assert str(run.adapter) in caught.value.cause
    assert "05_train_dpo" in caught.value.fix and "TRAIN_IF_MISSING" in caught.value.fix


@pytest.mark.parametrize("missing", sorted(ADAPTER))
def test_an_adapter_that_lacks_a_file_counts_as_none(run, missing):
    run.adapter.mkdir()
    for name in ADAPTER - {missing}:
        (run.adapter / name).write_text("{}")
    with pytest.raises(ArtifactError, match="no trained adapter"):
        save.read_training_record(run.adapter)


RECORD = {
    "config": {"beta": 0.1, "dtype": "fp32"}, "base": {"name": "tiny"}, "history": {"train": []}, "seconds": 1.0,
    "versions": {}, "hardware": {},
}  # fmt: skip


def adapter_with(run, record):
    run.adapter.mkdir(exist_ok=True)
    for name in ADAPTER:
        (run.adapter / name).write_text(json.dumps(record))
    return run.adapter


def test_the_record_of_a_whole_adapter_is_given_back(run):
    assert save.read_training_record(adapter_with(run, RECORD)) == RECORD


@pytest.mark.parametrize(
    ("record", "lacks"),
    [
        (RECORD | {"config": {"dtype": "fp32"}}, "config.beta"),
        (RECORD | {"config": "none"}, "config.beta, config.dtype"),
        (RECORD | {"history": []}, "history.train"),
        ({name: part for name, part in RECORD.items() if name != "seconds"}, "seconds"),
        ([], "config.beta, config.dtype, base.name"),
    ],
)
def test_a_record_that_lacks_something_is_refused_and_says_what(run, record, lacks):
    with pytest.raises(ArtifactError, match=f"it lacks {lacks}"):
        save.read_training_record(adapter_with(run, record))


def test_pairs_whose_prompt_was_trained_on_are_not_held_out(run, pairs):
    """Case and spaces of a prompt do not count, nor do the answers."""
    adapter = adapter_with(run, RECORD)
    (adapter / save.PAIRS_FILE).write_text("\n".join(save.pair_digests(pairs.select([1, 3]))))
    loud = pairs.map(lambda row: {"prompt": [m | {"content": f" {m['content'].upper()} "} for m in row["prompt"]]})
    for same in (pairs, loud, pairs.map(lambda row: {"chosen": row["rejected"]})):
        assert save.held_out(adapter, same)["prompt_id"] == [pairs["prompt_id"][i] for i in (0, 2)]
    save.check_held_out(adapter, pairs.select([0, 2]))
    with pytest.raises(ArtifactError, match="trained on 2 of these 4 test pairs"):
        save.check_held_out(adapter, pairs)
