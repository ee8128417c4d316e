"""`dpo-tutorial train --processes 2`: the adapter of one process, also after SIGKILL; one sentence for each fault."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import TEXTS, pair
from safetensors.torch import load_file

from dpo_tutorial import config, errors, run_folder
from dpo_tutorial.cli import main as cli
from dpo_tutorial.training import checkpoints, save

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def given(tiny_folder, tmp_path_factory) -> dict[str, str]:
    """Eight steps in two epochs of 16 pairs, a checkpoint after each; the base in NF4, its adapter in float32."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [(f"{ask} {i}", good * (1 + i % 4), bad) for i in range(8) for ask, good, bad in TEXTS]
    rows.write_text("\n".join(json.dumps(pair(*text)) for text in texts), encoding="utf-8")
    knobs = {
        "PROFILE": "cpu", "MODEL": tiny_folder, "DATA": rows, "DTYPE": "fp32", "MAX_TOKENS": 128, "MAX_TRAIN": 16,
        "MAX_VAL": 2, "MAX_TEST": 2, "LORA_R": 4, "BATCH_SIZE": 2, "GRAD_ACCUM": 2, "EPOCHS": 2, "SAVE_STEPS": 1,
        "LEARNING_RATE": 0.01, "KEEP_16BIT": "none",
    }  # fmt: skip
    return {name: str(value) for name, value in knobs.items()}


def words(given: dict[str, str], artifacts: Path, processes: int | None = None) -> list[str]:
    named = [word for item in (given | {"ARTIFACTS": str(artifacts)}).items() for word in ("-p", *item)]
    return ["train", *(["--processes", str(processes)] if processes else []), *named]


def start(given: dict[str, str], artifacts: Path, **env: str) -> subprocess.Popen:
    """Two processes."""
    command = [sys.executable, "-m", "dpo_tutorial", *words(given, artifacts, 2)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | env, **pipes)


def difference(artifacts: Path, other: Path) -> float:
    """The largest between two adapters' weights, which are up to 0.2."""
    files = [load_file(path / "cpu" / "adapter" / "adapter_model.safetensors") for path in (artifacts, other)]
    return max((files[0][name] - files[1][name]).abs().max().item() for name in files[0])


@pytest.fixture(scope="module")
def alone(given, tmp_path_factory) -> Path:
    """The run of one process, undisturbed."""
    artifacts = tmp_path_factory.mktemp("alone")
    assert cli.main(words(given, artifacts)) == 0
    return artifacts


def test_two_processes_train_the_adapter_of_one_and_only_the_first_speaks(given, alone, tmp_path):
    started = start(given, tmp_path)
    said, warned = started.communicate(timeout=300)
    assert started.returncode == 0, warned[-3000:]
    assert difference(tmp_path, alone) < 1e-5
    assert said.count("adapter saved in") == said.count("profile 'cpu'") == 1
    assert "2 processes train together. A step has GRAD_ACCUM=2 batches of BATCH_SIZE=2 pairs: each takes 1" in said
    assert warned.count("Tokenizing train dataset:   0%") == warned.count("Loading weights:   0%") == 1
    record = save.read_training_record(tmp_path / "cpu" / "adapter")
    assert record["processes"] == 2 and len(record["history"]["train"]) == 8
    assert "| Processes | 2 |" in (tmp_path / "cpu" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert save.read_training_record(alone / "cpu" / "adapter")["processes"] == 1


@pytest.fixture
def killed(request, given, tmp_path) -> Path:
    """A run of two of which the one of this rank was killed after the third step; rank 0 is the one that writes."""
    victim = request.param
    artifacts = tmp_path / "killed"
    folder = run_folder.Run(config.resolve(**{n.lower(): v for n, v in given.items()} | {"artifacts": str(artifacts)}))
    started = start(given, artifacts)
    try:
        trainer = artifacts / "cpu" / "trainer"
        while not (trainer / "checkpoint-3" / checkpoints.SEAL).exists():
            assert started.poll() is None, started.communicate()
            time.sleep(0.01)
        ranks = {child.environ().get("RANK"): child for child in psutil.Process(started.pid).children()}
        with pytest.raises(errors.ArtifactError, match="Another process is using"):
            folder.lock()
        ranks[victim].send_signal(signal.SIGKILL)
        said, warned = started.communicate(timeout=300)
    finally:
        started.kill()
    assert started.returncode == 1 and "adapter saved" not in said
    cause = f"Process {victim} of 2 was killed (SIGKILL), and the others were stopped.\n  Fix: Give the same command"
    assert cause in warned and "Traceback" not in warned and "Error" not in warned
    assert not any(process.is_running() for process in ranks.values())
    folder.lock()
    folder.unlock()
    return artifacts


@pytest.mark.parametrize(("killed", "processes"), [("1", 2), ("0", 1)], indirect=["killed"])
def test_a_run_with_a_killed_process_goes_on_with_as_many_or_with_one(given, alone, killed, processes):
    if processes == 2:
        started = start(given, killed)
        said, warned = started.communicate(timeout=300)
        assert started.returncode == 0, warned[-3000:]
        assert said.count("Resuming after step") == 1
    else:
        assert cli.main(words(given, killed)) == 0
    assert difference(killed, alone) < 1e-5
    history = save.read_training_record(killed / "cpu" / "adapter")["history"]
    assert [row["step"] for row in history["train"]] == list(range(1, 9))


def test_two_go_on_where_one_was_stopped_and_share_the_reference_they_compute(given, alone, tmp_path, monkeypatch):
    given = given | {"PRECOMPUTE_REFERENCE": "true"}
    with monkeypatch.context() as patch:
        seal = checkpoints.Seal.on_save

        def on_save(self, args, state, control, **kwargs):
            seal(self, args, state, control, **kwargs)
            if state.global_step == 3:
                raise KeyboardInterrupt

        patch.setattr(checkpoints.Seal, "on_save", on_save)
        assert cli.main(words(given, tmp_path)) == 130
    started = start(given, tmp_path)
    said, warned = started.communicate(timeout=300)
    assert started.returncode == 0, warned[-3000:]
    assert "Resuming after step 3 of 8" in said and difference(tmp_path, alone) < 1e-5


def test_what_both_processes_refuse_is_said_once(given, tmp_path):
    started = start(given | {"GRAD_ACCUM": "3"}, tmp_path)
    said, warned = started.communicate(timeout=300)
    assert started.returncode == 1
    cause = "ConfigError: 2 processes cannot share GRAD_ACCUM=3 batches evenly."
    assert warned.count(cause + "\n  Fix: Set BATCH_SIZE=1 GRAD_ACCUM=6: still 6 pairs a step.") == 1
    assert "Traceback" not in warned
