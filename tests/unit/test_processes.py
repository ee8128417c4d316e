"""Several processes: what the environment says of them, and how they share a step."""

import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dpo_tutorial import knobs
from dpo_tutorial.cli import main as cli
from dpo_tutorial.errors import ConfigError
from dpo_tutorial.machine import hardware, memory
from dpo_tutorial.training import memory_plan, processes, train

TORCHRUN = dict(
    RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="29500", TORCHELASTIC_RUN_ID="1"
)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in (*TORCHRUN, *(f"ACCELERATE_{name}" for name in ("USE_FSDP", "USE_DEEPSPEED", "MIXED_PRECISION"))):
        monkeypatch.delenv(name, raising=False)


def given(monkeypatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "left",
    [
        dict(RANK="0", WORLD_SIZE="2"),
        dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="29500"),
        dict(WORLD_SIZE="1"),
        dict(TORCHELASTIC_RUN_ID="1"),
    ],
)
def test_variables_without_their_launcher_are_one_sentence_that_names_them(monkeypatch, left):
    given(monkeypatch, **left)
    with pytest.raises(ConfigError, match="torchrun has not started this process") as caught:
        processes.check(None)
    assert f"unset {' '.join(left)}`" in caught.value.fix


def test_a_stale_rank_ends_the_command_at_once_and_without_a_traceback():
    left = dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", MASTER_ADDR="10.0.0.1", MASTER_PORT="29500")
    command = [sys.executable, "-m", "dpo_tutorial", "train", "-p", "PROFILE", "smoke"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | left, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("\nConfigError: RANK, LOCAL_RANK") and "Traceback" not in done.stderr


def test_what_torchrun_has_started_is_as_many_as_it_says(monkeypatch):
    given(monkeypatch, **TORCHRUN)
    processes.check(None)
    processes.check(2)
    with pytest.raises(ConfigError, match="--processes is 4, but 2 were started"):
        processes.check(4)


def test_accelerate_launch_on_a_cpu_is_told_from_a_shell_that_has_an_address(monkeypatch):
    given(monkeypatch, MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    processes.check(None)
    given(monkeypatch, ACCELERATE_MIXED_PRECISION="no")
    with pytest.raises(ConfigError, match="asked for several processes, and without a GPU it has started one"):
        processes.check(None)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharding_is_left_to_a_script_of_ones_own(monkeypatch, name):
    given(monkeypatch, **{f"ACCELERATE_USE_{name}": "false"})
    processes.check(None)
    given(monkeypatch, **{f"ACCELERATE_USE_{name}": "true"})
    with pytest.raises(ConfigError, match=f"ACCELERATE_USE_{name} is set") as caught:
        processes.check(None)
    assert "docs/scale.md" in caught.value.fix and "configs/" in caught.value.fix


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(hardware, "device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    processes.check(2)
    with pytest.raises(ConfigError, match="--processes is 4, but there are 2 GPUs"):
        processes.check(4)


def test_no_process_is_too_few(capsys):
    assert cli.main(["train", "--processes", "0"]) == 1
    assert "--processes 0 is out of range" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "size", "batches", "each"), [(1, 4, 2, 2), (2, 4, 2, 1), (4, 2, 8, 2), (3, 2, 9, 3)]
)
def test_a_step_has_the_same_pairs_however_many_processes_share_it(monkeypatch, number, size, batches, each):
    monkeypatch.setattr(hardware, "processes", lambda: SimpleNamespace(num_processes=number))
    cfg = dataclasses.replace(knobs.Config(), batch_size=size, grad_accum=batches)
    assert train.share(cfg) == each == train.dpo_config(cfg, "out").gradient_accumulation_steps


@pytest.mark.parametrize(
    ("number", "size", "batches", "fix"),
    [
        (4, 4, 2, "Set BATCH_SIZE=2 GRAD_ACCUM=4: still 8 pairs a step."),
        (8, 8, 4, "Set BATCH_SIZE=4 GRAD_ACCUM=8: still 32 pairs a step."),
        (2, 6, 3, "Set BATCH_SIZE=3 GRAD_ACCUM=6: still 18 pairs a step."),
        (3, 4, 2, "Set GRAD_ACCUM=3: 12 pairs a step."),
    ],
)
def test_where_they_cannot_share_it_evenly_the_nearest_values_are_named(monkeypatch, number, size, batches, fix):
    monkeypatch.setattr(hardware, "processes", lambda: SimpleNamespace(num_processes=number))
    cfg = dataclasses.replace(knobs.Config(), batch_size=size, grad_accum=batches)
    with pytest.raises(ConfigError, match=f"{number} processes cannot share GRAD_ACCUM={batches} ") as caught:
        train.share(cfg)
    assert caught.value.fix == fix


@pytest.mark.parametrize(("device", "each"), [("cpu", 2 * 2**30), ("cuda", 4 * 2**30)])
def test_processes_share_the_main_memory_that_is_free_and_each_has_a_gpu_of_its_own(monkeypatch, device, each):
    model = torch.nn.Linear(8, 8, bias=False)  # is loaded already, and the plan counts it

    def stop(config, free):
        assert free == (each + 4 * 8 * 8) / 2
        raise InterruptedError

    monkeypatch.setattr(hardware, "processes", lambda: SimpleNamespace(num_processes=2))
    monkeypatch.setattr(train, "gather_object", lambda mine: [*mine, mine[0] / 2])  # the other has less
    monkeypatch.setattr(hardware, "device", lambda: device)
    monkeypatch.setattr(memory, "free_memory_gib", lambda: 4)
    monkeypatch.setattr(memory_plan, "choose_checkpointing", stop)
    with pytest.raises(InterruptedError):
        train.train(knobs.Config(), None, model, None, None, None)


def test_what_is_told_of_a_failure_is_its_cause_and_not_what_followed():
    def failed(rank, code, said="", at=1):
        message = {"message": said, "extraInfo": {"py_callstack": f"Traceback of {rank}"}} if said else "Signal"
        name = {-9: "SIGKILL", -15: "SIGTERM"}.get(code)
        return rank, SimpleNamespace(exitcode=code, message=message, timestamp=at, signal_name=lambda: name)

    def told(*failures):
        return processes._told(SimpleNamespace(failures=dict(failures)), 2)

    followed = failed(0, 1, "RuntimeError: Connection closed by peer")
    assert told(followed, failed(1, -9, at=2)).startswith("Process 1 of 2 was killed (SIGKILL), and the others")
    assert told(failed(0, -15), failed(1, -9)).startswith("Process 1 of 2 was killed (SIGKILL)")
    assert (
        told(failed(0, -15), failed(1, 1, "TrainingError: loss\n  Fix: lower", 2))
        == "TrainingError: loss\n  Fix: lower"
    )
    assert told(failed(0, -15), failed(1, 1, "ValueError: odd")) == "Traceback of 1"
    assert told(failed(1, -15)).startswith("Process 1 of 2 was killed (SIGTERM)")
