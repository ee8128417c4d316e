"""Colab as far as a machine without it can show: its versions, our first cell, every notebook alone (`make colab`)."""

import shutil

import colab
import harness
import pytest

pytestmark = pytest.mark.colab


@pytest.fixture(scope="module")
def record(tmp_path_factory, pytestconfig):
    folder = tmp_path_factory.mktemp("colab")
    record = harness.Record(tmp_path_factory.mktemp("record") / "colab.jsonl")
    record.begin("stand-in")
    colab.rehearse(colab.Colab(folder), record)
    shutil.rmtree(folder)
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n" + "\n\n".join(colab.tables(record.lines()).values()))
    return colab.newest(record.lines())


def test_the_first_cell_keeps_torch_and_numpy_and_downgrades_nothing(record):
    assert record["packages"]["changes"]["added"].keys() >= {"dpo-tutorial", "trl", "bitsandbytes", "papermill"}
    assert not record["packages"]["changes"]["downgraded"] and not record["packages"]["changes"]["removed"]
    assert not {"torch", "numpy"} & record["packages"]["changes"]["upgraded"].keys()


@pytest.mark.parametrize("name", [p.stem for p in colab.NOTEBOOKS if p.stem != colab.NEEDS_ADAPTER])
def test_a_notebook_runs_alone_in_an_empty_folder(record, name):
    error = record[name]["error"]
    assert error is None, error


def test_the_embedded_model_comes_out_of_its_wheel_there_too(record):
    assert record["the embedded model"]["error"] is None


def test_06_before_05_gives_its_choices_and_no_traceback(record):
    error = record[colab.NEEDS_ADAPTER]["error"]
    assert error.startswith("ArtifactError: There is no trained adapter in ") and "Traceback" not in error
    for choice in ("05_train_dpo.ipynb", "TRAIN_IF_MISSING", "ADAPTER"):
        assert choice in error
    assert len(error.splitlines()) == 2, "the cause and what to do, and no line of code"


def test_06_alone_trains_if_it_is_told_to_and_runs_to_its_end(record):
    error = record[colab.TRAINS]["error"]
    assert error is None, error


def test_a_session_that_holds_what_pip_replaced_is_told_which_and_what_to_press(record):
    held = record[colab.HELD]
    assert held["error"].startswith("SessionError: ") and "Restart session" in held["error"]
    old, new = record["packages"]["changes"]["upgraded"]["pyarrow"]
    assert f"pyarrow {new} (this session still holds {old})" in held["error"]
    assert held["cell"] <= 3, "before any cell could fail over it"


def test_where_pip_fails_the_first_cell_says_what_to_switch_on(record):
    (last,) = record["where pip fails"]["said"]
    assert "Kaggle: Settings > Turn on internet" in last
