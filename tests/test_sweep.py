"""One knob, several values: checked before anything runs, a folder for each, a table that survives a failure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_tutorial import run, sweep
from dpo_tutorial.errors import ConfigError, NotebookError

ROOT = Path(__file__).parents[1]


def summary(rate: float) -> dict:
    return {
        "held_out": {"rate": rate, "low": rate - 0.1, "high": rate + 0.1, "n": 98},
        "rewards": {"chosen": 1.0, "rejected": -0.5}, "kl_per_answer": 9.9, "minutes": {"05": 3.0, "06": 1.5},
    }  # fmt: skip


@pytest.fixture
def ran(monkeypatch):
    """What `run_all` was asked for; it answers with a summary."""
    asked = []

    def run_all(parameters, paths):
        asked.append((parameters, [path.stem for path in paths]))
        return summary(0.5 + len(asked) / 10)

    monkeypatch.setattr(run, "run_all", run_all)
    return asked


def test_each_value_runs_05_and_06_in_a_folder_of_its_own(ran, tmp_path, capsys):
    rows = sweep.sweep("BETA", ["0.1", "0.3"], {"PROFILE": "smoke", "ARTIFACTS": str(tmp_path), "SEED": "3"})
    assert [parameters["BETA"] for parameters, _ in ran] == ["0.1", "0.3"]
    assert {names for _, both in ran for names in both} == {"05_train_dpo", "06_compare"}
    folders = [parameters["ARTIFACTS"] for parameters, _ in ran]
    assert len(set(folders)) == 2 and all(folder.startswith(str(tmp_path)) for folder in folders)
    assert all(parameters["SEED"] == "3" for parameters, _ in ran)
    assert [row["BETA"] for row in rows] == ["0.1", "0.3"] and rows[1]["accuracy"].startswith("0.70 (0.60 to 0.80")
    written = tmp_path / "sweep-beta" / "smoke"
    assert json.loads((written / "sweep.json").read_text()) == rows
    assert (written / "sweep.md").read_text() in capsys.readouterr().out
    assert "| 0.3 | 0.70 (0.60 to 0.80, n = 98) | +1.00 | -0.50 | 9.9 | 4.5 |" in (written / "sweep.md").read_text()


@pytest.mark.parametrize(
    ("knob", "values", "more", "says"),
    [
        ("BTEA", ["1"], {}, "Unknown parameter BTEA"),
        ("BETA", ["0.1", "-1"], {}, "out of range"),
        ("BETA", ["0.1", "much"], {}, "is not of type"),
        ("BETA", ["0.1", "0.1"], {}, "twice"),
        ("BETA", ["0.1"], {"BETA": "0.3"}, "twice"),
    ],
)
def test_a_wrong_sweep_ends_before_anything_runs(ran, tmp_path, knob, values, more, says):
    with pytest.raises(ConfigError, match=says):
        sweep.sweep(knob, values, {"PROFILE": "smoke", "ARTIFACTS": str(tmp_path)} | more)
    assert not ran


def test_a_run_that_fails_keeps_the_rows_before_it(ran, tmp_path, monkeypatch):
    answer = run.run_all

    def second_fails(parameters, paths):
        if ran:
            raise NotebookError("05 stopped.", "Look at it.")
        return answer(parameters, paths)

    monkeypatch.setattr(run, "run_all", second_fails)
    with pytest.raises(NotebookError):
        sweep.sweep("BETA", ["0.1", "0.3"], {"PROFILE": "smoke", "ARTIFACTS": str(tmp_path)})
    (row,) = json.loads((tmp_path / "sweep-beta" / "smoke" / "sweep.json").read_text())
    assert row["BETA"] == "0.1"


@pytest.mark.slow
def test_a_sweep_in_smoke(tmp_path):
    command = [sys.executable, "-m", "dpo_tutorial.sweep", "BETA", "0.1", "1", "-p", "PROFILE", "smoke"]
    done = subprocess.run(
        [*command, "-p", "ARTIFACTS", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "sweep-beta" / "smoke" / "sweep.json").read_text())
    assert [row["BETA"] for row in rows] == ["0.1", "1"]
    assert all(Path(tmp_path / "sweep-beta" / value / "smoke" / "adapter").is_dir() for value in ("0.1", "1"))
