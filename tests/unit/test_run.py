"""The headless run: parameters, the first failure, and what is left of an executed notebook in the repository."""

import base64
import contextlib
import io
import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import pytest
from conftest import script
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from dpo_tutorial import knobs
from dpo_tutorial.cli import main as cli
from dpo_tutorial.cli import run
from dpo_tutorial.errors import ArtifactError, ConfigError, NotebookError
from dpo_tutorial.machine import paths

ROOT = Path(__file__).parents[2]
refresh = script("scripts/refresh_notebooks.py")
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
PARAMETERS = 'PROFILE = ""\nARTIFACTS = ""  # folder'
SHOWN = """from dpo_tutorial import config
cfg = config.from_notebook(globals())
print("artifacts:", cfg.artifacts)
print("trains:", cfg.train_if_missing)"""


def write(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=list(cells), metadata=KERNEL), path)
    return path


def tiny(folder):
    """Three notebooks: one that takes parameters, one that stops in its second cell, one behind it."""
    tagged = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    return [
        write(folder / "01_a.ipynb", new_markdown_cell("# A"), tagged, new_code_cell(SHOWN)),
        write(folder / "02_b.ipynb", new_code_cell("print('ready')"), new_code_cell("raise ValueError('boom')")),
        write(folder / "03_c.ipynb", new_code_cell("print('third')")),
    ]


def printed(path):
    cells = nbformat.read(path, as_version=4).cells
    return "".join(o.text for c in cells if c.cell_type == "code" for o in c.outputs if o.output_type == "stream")


def run_quietly(parameters, paths=None):
    """`run_all` with its screen and its error caught, and the environment put back."""
    screen, saved, error, summary = io.StringIO(), dict(os.environ), None, None
    try:
        with contextlib.redirect_stdout(screen):
            summary = run.run_all(parameters, paths)
    except Exception as caught:
        error = caught
    finally:
        os.environ.clear()
        os.environ.update(saved)
    return SimpleNamespace(screen=screen.getvalue(), error=error, summary=summary)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of the three notebooks, which stops at the second."""
    folder = tmp_path_factory.mktemp("stopped")
    paths = tiny(folder / "notebooks")
    given = {"PROFILE": "smoke", "ARTIFACTS": str(folder / "results"), "TRAIN_IF_MISSING": "False"}
    result = run_quietly(given, paths)
    result.executed, result.artifacts = folder / "results" / "smoke" / "executed", folder / "results"
    return result


@pytest.fixture
def no_kernel(monkeypatch):
    """Papermill replaced by a list of what it would have executed."""
    calls = []
    monkeypatch.setattr(papermill, "execute_notebook", lambda *a, **k: calls.append((a, k)))
    return calls


# --- parameters ----


def test_an_unknown_parameter_stops_the_run_before_anything_is_executed(tmp_path, no_kernel):
    with pytest.raises(ConfigError):
        run.run_all({"BTEA": "1", "ARTIFACTS": str(tmp_path / "results")}, tiny(tmp_path))
    assert no_kernel == [] and not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "wrong", "listed"),
    [
        (["-p", "PROFILE", "huge"], "huge", list(knobs.PROFILES)),
        (["-p", "BTEA", "1"], "BTEA", ["PROFILE", "BETA", "ADAPTER"]),
    ],
    ids=["profile", "parameter"],
)
def test_a_wrong_profile_or_parameter_exits_with_1_lists_the_known_ones_and_runs_nothing(
    arguments, wrong, listed, tmp_path, monkeypatch, no_kernel, capsys
):
    monkeypatch.chdir(ROOT)
    code = cli.main(["run", *arguments, "-p", "ARTIFACTS", str(tmp_path / "results")])
    screen = capsys.readouterr()
    assert code == 1
    assert "ConfigError" in screen.err and wrong in screen.err
    for name in listed:
        assert name in screen.err and name not in screen.out
    assert no_kernel == [] and not (tmp_path / "results").exists()


def test_each_notebook_gets_every_parameter_as_the_text_that_was_typed(tmp_path, no_kernel):
    given = {"PROFILE": "smoke", "ARTIFACTS": str(tmp_path / "results"), "TRAIN_IF_MISSING": "True", "BETA": "1e-1"}
    result = run_quietly(given, tiny(tmp_path))
    assert result.error is None
    handed = {Path(a[0]).name: k["parameters"] for a, k in no_kernel}
    assert handed == dict.fromkeys(("01_a.ipynb", "02_b.ipynb", "03_c.ipynb"), given)


def test_an_empty_parameter_means_not_set(tmp_path, no_kernel, monkeypatch):
    monkeypatch.setenv("DPO_TUTORIAL_PROFILE", "smoke")
    result = run_quietly({"PROFILE": "", "ARTIFACTS": str(tmp_path / "results")}, tiny(tmp_path))
    assert result.error is None and result.summary["profile"] == "smoke"
    assert all(k["parameters"]["PROFILE"] == "smoke" for _, k in no_kernel)


def test_notebooks_are_the_numbered_ones_in_order(tmp_path):
    paths = tiny(tmp_path)
    write(tmp_path / "scratch.ipynb")
    assert run.notebooks(tmp_path) == paths


def test_a_folder_without_numbered_notebooks_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ArtifactError, match=re.escape(str(tmp_path))):
        run.notebooks(tmp_path)


# --- a run with kernels ----


@pytest.mark.end_to_end
def test_parameters_reach_the_kernel(stopped):
    text = printed(stopped.executed / "01_a.ipynb")
    assert "profile 'smoke'" in text
    assert f"artifacts: {stopped.artifacts}" in text


@pytest.mark.end_to_end
def test_a_switch_set_to_false_on_the_command_line_is_false_in_the_kernel(stopped):
    assert "trains: False" in printed(stopped.executed / "01_a.ipynb")


@pytest.mark.end_to_end
def test_the_first_notebook_that_fails_is_named_with_its_cell_error_and_partial_notebook(stopped):
    assert isinstance(stopped.error, NotebookError)
    message = str(stopped.error)
    assert "02_b.ipynb stopped in cell 2 " in message
    assert "ValueError: boom" in message
    assert str(stopped.executed / "02_b.ipynb") in message


@pytest.mark.end_to_end
def test_the_execution_number_in_the_error_finds_the_cell_in_the_partial_notebook(stopped):
    count = int(re.search(r"In \[(\d+)\]", str(stopped.error)).group(1))
    cells = nbformat.read(stopped.executed / "02_b.ipynb", as_version=4).cells
    (cell,) = [c for c in cells if c.get("execution_count") == count]
    assert cell.source == "raise ValueError('boom')"
    assert cell.outputs[-1].ename == "ValueError"
    assert "ready" in printed(stopped.executed / "02_b.ipynb"), "the cells before it keep their outputs"


@pytest.mark.end_to_end
def test_notebooks_behind_a_failed_one_are_not_executed(stopped):
    assert sorted(p.name for p in stopped.executed.iterdir()) == ["01_a.ipynb", "02_b.ipynb"]
    assert "03_c" not in stopped.screen
    assert not (stopped.executed.parent / "summary.json").exists()


@pytest.mark.end_to_end
def test_a_kernel_that_dies_is_a_notebook_error_that_names_the_notebook(tmp_path):
    path = write(tmp_path / "01_dies.ipynb", new_code_cell("import os\nos._exit(1)"))
    result = run_quietly({"PROFILE": "smoke", "ARTIFACTS": str(tmp_path / "results")}, [path, *tiny(tmp_path)[:1]])
    assert isinstance(result.error, NotebookError), repr(result.error)
    assert "01_dies.ipynb" in str(result.error)


@pytest.mark.end_to_end
def test_a_run_without_failure_executes_in_order_and_saves_its_summary(tmp_path):
    first, _, third = tiny(tmp_path)
    result = run_quietly({"PROFILE": "smoke", "ARTIFACTS": str(tmp_path / "results")}, [first, third])
    assert result.error is None
    folder = tmp_path / "results" / "smoke"
    assert json.loads((folder / "summary.json").read_text()) == result.summary
    assert list(result.summary["minutes"]) == ["01_a", "03_c"]
    assert result.summary["profile"] == "smoke" and result.summary["executed"] == str(folder / "executed")
    assert "[1/2] 01_a.ipynb" in result.screen and "[2/2] 03_c.ipynb done in" in result.screen
    assert "third" in printed(folder / "executed" / "03_c.ipynb")
    assert "boom" not in printed(first) and not nbformat.read(first, 4).cells[-1].outputs, "the source stays as it was"


# --- cleaning ----

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(range(256))).decode()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A made-up project root, home and cache folder."""
    places = SimpleNamespace(root=tmp_path / "prj" / "checkout", home=tmp_path / "me", cache=tmp_path / "me" / "kept")
    monkeypatch.setattr(paths, "project_root", lambda: places.root)
    monkeypatch.setenv("HOME", str(places.home))
    monkeypatch.setenv("DPO_TUTORIAL_CACHE", str(places.cache))
    return places


def cleaned(tmp_path, *cells, **metadata):
    source, target = tmp_path / "executed.ipynb", tmp_path / "clean.ipynb"
    notebook = new_notebook(cells=list(cells), metadata=KERNEL | metadata)
    nbformat.write(notebook, source)
    refresh.clean_notebook(source, target)
    result = nbformat.read(target, as_version=4)
    nbformat.validate(result)
    return result


def executed_cells(m):
    traces = {"papermill": {"duration": 1.0, "status": "completed"}, "execution": {"iopub.execute_input": "2026"}}
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": "Loading"}
    return [
        new_markdown_cell("# Text", metadata={"papermill": {}}),
        new_code_cell('PROFILE = ""', metadata={"tags": ["parameters"], **traces}, execution_count=1),
        new_code_cell('PROFILE = "cpu"', metadata={"tags": ["injected-parameters"], **traces}, execution_count=2),
        new_code_cell(
            "work()",
            execution_count=3,
            metadata=traces | {"jupyter": {"source_hidden": True}, "tags": []},
            outputs=[
                new_output("stream", name="stderr", text="warning: careful"),
                new_output("display_data", data=widget),
                new_output("stream", name="stdout", text=f"in {m.root}/artifacts, {m.cache}/model, {m.home}/x, 0.5\n"),
                new_output(
                    "display_data", {"image/png": PNG, "text/plain": "image"}, metadata={"image/png": {"alt": "seen"}}
                ),
                new_output(
                    "execute_result", {"text/html": "<b>kept</b>", "text/plain": f"'{m.root}'"}, execution_count=3
                ),
            ],
        ),
    ]


def test_cleaning_removes_the_traces_of_papermill_and_widgets(tmp_path, machine):
    result = cleaned(tmp_path, *executed_cells(machine), papermill={"parameters": {}}, widgets={"state": {}})
    assert [c.source for c in result.cells] == ["# Text", 'PROFILE = ""', "work()"]
    assert set(result.metadata) == {"kernelspec", "language_info", "dpo_tutorial"}
    assert [dict(c.metadata) for c in result.cells] == [{}, {"tags": ["parameters"]}, {}]


def test_cleaning_notes_the_digest_of_the_source_as_it_is_in_the_repository(tmp_path, machine):
    result = cleaned(tmp_path, *executed_cells(machine))
    source = new_notebook(cells=[new_code_cell('PROFILE = ""'), new_code_cell("work()")])
    assert result.metadata["dpo_tutorial"]["source_sha256"] == refresh.source_digest(source)


def test_cleaning_drops_stderr_and_widget_views_and_keeps_every_other_output(tmp_path, machine):
    stream, image, value = cleaned(tmp_path, *executed_cells(machine)).cells[2].outputs
    assert (stream.output_type, stream.name) == ("stream", "stdout")
    assert image.data == {"image/png": PNG, "text/plain": "image"} and image.metadata == {"image/png": {"alt": "seen"}}
    assert value.data["text/html"] == "<b>kept</b>" and value.execution_count == 3


def test_cleaning_replaces_the_folders_of_this_machine(tmp_path, machine):
    result = cleaned(tmp_path, *executed_cells(machine))
    stream, _, value = result.cells[2].outputs
    assert stream.text == "in ./artifacts, <cache>/model, ~/x, 0.5\n"
    assert value.data["text/plain"] == "'.'"
    assert str(tmp_path) not in (tmp_path / "clean.ipynb").read_text()


def test_cleaning_twice_changes_nothing_more(tmp_path, machine):
    cleaned(tmp_path, *executed_cells(machine))
    once = (tmp_path / "clean.ipynb").read_bytes()
    refresh.clean_notebook(tmp_path / "clean.ipynb", tmp_path / "again.ipynb")
    assert (tmp_path / "again.ipynb").read_bytes() == once


def test_cleaning_leaves_the_bytes_of_an_image_alone(tmp_path, machine, monkeypatch):
    monkeypatch.setenv("HOME", "/")
    picture = base64.b64encode(b"\xff" * 30).decode()
    assert "/" in picture
    output = new_output("display_data", {"image/png": picture})
    (cell,) = cleaned(tmp_path, new_code_cell("draw()", outputs=[output])).cells
    assert cell.outputs[0].data["image/png"] == picture


def test_cleaning_with_a_relative_cache_folder_leaves_ordinary_words_alone(tmp_path, machine, monkeypatch):
    monkeypatch.setenv("DPO_TUTORIAL_CACHE", "cache")
    output = new_output("stream", name="stdout", text="KV cache off: 0.5\n")
    (cell,) = cleaned(tmp_path, new_code_cell("say()", outputs=[output])).cells
    assert cell.outputs[0].text == "KV cache off: 0.5\n"


def checkout(tmp_path, monkeypatch):
    """A root of two notebooks for the script; its papermill writes an executed quickstart."""
    root = tmp_path / "checkout"
    paths = [
        write(root / "notebooks" / name, new_code_cell("work()")) for name in ("00_quickstart.ipynb", "01_a.ipynb")
    ]
    monkeypatch.setattr(refresh, "ROOT", root)

    def papermill(command, **_):
        write(Path(command[4]), new_code_cell("work()", outputs=[new_output("stream", text="quick\n")]))

    monkeypatch.setattr(refresh.subprocess, "run", papermill)
    return paths


def test_refresh_writes_the_cleaned_outputs_of_both_runs(tmp_path, machine, monkeypatch, capsys):
    paths = checkout(tmp_path, monkeypatch)
    executed = write(tmp_path / "executed" / "01_a.ipynb", *executed_cells(machine))
    docs, shown = tmp_path / "checkout" / "docs", tmp_path / "checkout" / "src" / "dpo_tutorial" / "show"
    docs.mkdir()
    shown.mkdir(parents=True)
    log = [{"step": 1, "loss": 0.69, "rewards/chosen": 0.12345, "rewards/rejected": 0.0}]
    log += [{"step": 1, "eval_loss": 0.6, "eval_rewards/chosen": 0.2, "eval_rewards/rejected": -0.1}]
    (tmp_path / "progress.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log), encoding="utf-8")
    ran = []
    summary = {"executed": str(executed.parent)}
    monkeypatch.setattr(run, "run_all", lambda given, paths=None: ran.append(paths) or summary)
    refresh.refresh()
    kept = json.loads((shown / "stored_run.json").read_text())
    assert kept["train"] == [{"step": 1, "rewards/chosen": 0.1235, "rewards/rejected": 0.0}]
    assert kept["eval"][0]["eval_rewards/chosen"] == 0.2
    assert ran[0] is None and len(ran[1]) == 1, "01, which shows that curve, runs once more"
    refresh.refresh()
    assert len(ran) == 3, "the curve is the same: once is enough"
    assert (docs / "method.png").read_bytes().startswith(b"\x89PNG")
    assert printed(paths[0]) == "quick\n"
    assert [c.source for c in nbformat.read(paths[1], 4).cells] == ["# Text", 'PROFILE = ""', "work()"]


def test_a_failed_run_writes_no_notebook(tmp_path, monkeypatch):
    def fail(parameters):
        raise NotebookError("02_b.ipynb stopped", "look")

    paths = checkout(tmp_path, monkeypatch)
    monkeypatch.setattr(run, "run_all", fail)
    with pytest.raises(NotebookError):
        refresh.refresh()
    assert [printed(path) for path in paths] == ["", ""]


@pytest.mark.end_to_end
def test_the_last_notebook_run_alone_names_the_one_that_makes_the_adapter(tiny_folder, tmp_path):
    given = {"PROFILE": "smoke", "MODEL": str(tiny_folder), "ARTIFACTS": str(tmp_path)}
    error = run_quietly(given, run.notebooks()[-1:]).error
    assert isinstance(error, NotebookError) and "05_train_dpo" in str(error)
    assert "TRAIN_IF_MISSING" in str(error), "and says what else can be done"


def test_a_long_training_cell_is_followed_line_by_line(tmp_path, capsys):
    progress, seen = tmp_path / "progress.jsonl", ""
    with run.training_lines(progress, every=0.02):
        progress.write_text('{"step": 1, "of": 42, "loss": 0.69}\n{"step": 2, "of": 42, "loss": 0.5}\n{"step": 3, "of')
        until = time.monotonic() + 60
        while not seen and time.monotonic() < until:
            time.sleep(0.01)
            seen += capsys.readouterr().out
        time.sleep(0.1)
    seen += capsys.readouterr().out
    assert seen == "  training step 2 of 42, loss 0.500\n", "once per step, torn lines left alone"


def test_a_training_shorter_than_the_wait_shows_its_last_step(tmp_path, capsys):
    progress = tmp_path / "progress.jsonl"
    with run.training_lines(progress, every=60):
        progress.write_text('{"step": 1, "of": 2, "loss": 0.69}\n{"step": 2, "of": 2, "loss": 0.5}\n')
    assert capsys.readouterr().out == "  training step 2 of 2, loss 0.500\n"


def test_a_log_whose_files_clock_is_behind_is_still_followed(tmp_path, capsys):
    """A kernel stamps files with a coarser clock than time.time(): up to 10 ms earlier than the start seen here."""
    progress = tmp_path / "progress.jsonl"
    with run.training_lines(progress, every=60):
        progress.write_text('{"step": 1, "of": 2, "loss": 0.69}\n')
        os.utime(progress, (time.time() - 5, time.time() - 5))
    assert capsys.readouterr().out == "  training step 1 of 2, loss 0.690\n"


def test_the_training_log_of_an_earlier_run_is_not_shown(tmp_path, capsys):
    progress = tmp_path / "progress.jsonl"
    progress.write_text('{"step": 1, "of": 42, "loss": 0.69}\n')
    with run.training_lines(progress, every=0.02):
        time.sleep(0.1)
    assert capsys.readouterr().out == ""
