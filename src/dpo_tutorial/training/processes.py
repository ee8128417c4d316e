"""Several processes that train together, started and watched by torch's own launcher."""

import logging
import os
import sys
import tempfile

from ..errors import ConfigError
from ..machine import hardware

#: What torchrun tells each process that it starts.
_TOLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


def train(parameters: dict[str, str], asked: int | None = None) -> int:
    """`dpo-tutorial train`: in this process, in `asked` new ones, or as the one of several that this process is.

    Where `asked` is None, that is one process, or as many as torchrun has started.

    Returns:
        The exit code. What stopped one of the new processes is printed once.

    Raises:
        ConfigError: as `check`; and what `train.train_headless` raises where one process trains.
    """
    check(asked)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _one_of_several(parameters)
    if asked and asked > 1:
        return _launch(parameters, asked)
    from . import train

    train.train_headless(parameters)
    return 0


def check(asked: int | None) -> None:
    """Compare what is asked for with what the environment says of this process.

    Raises:
        ConfigError: fewer GPUs or other processes than asked for; accelerate's FSDP or DeepSpeed; or variables of a
            launcher without the launcher, under which torch would wait for processes that nobody has started.
    """
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() not in ("", "0", "false"):
            raise ConfigError(
                f"ACCELERATE_USE_{name} is set, and this command does not shard a model.",
                "Unset it, or train by a script of your own: docs/scale.md says how, with the files of configs/.",
            )
    told = [name for name in _TOLD if name in os.environ]
    if told == ["MASTER_ADDR", "MASTER_PORT"] and "ACCELERATE_MIXED_PRECISION" in os.environ:
        raise ConfigError(
            "`accelerate launch` was asked for several processes, and without a GPU it has started one.",
            "Type `dpo-tutorial train --processes N` in its place.",
        )
    if {"RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"} & set(told) and len(told) < len(_TOLD):
        raise ConfigError(
            f"{', '.join(told)} {'is' if len(told) == 1 else 'are'} set, but torchrun has not started this process.",
            f"Type `unset {' '.join(told)}`, then `dpo-tutorial train --processes N`, or start it by torchrun.",
        )
    started = int(os.environ["WORLD_SIZE"]) if told == list(_TOLD) else None
    if asked is not None and asked < 1:
        raise ConfigError(f"--processes {asked} is out of range.", "Set it to 1 or more.")
    if asked and started and asked != started:
        raise ConfigError(f"--processes is {asked}, but {started} were started.", "Leave --processes out here.")
    if asked and not started and hardware.device() == "cuda":
        import torch

        if asked > (gpus := torch.cuda.device_count()):
            raise ConfigError(f"--processes is {asked}, but there are {gpus} GPUs.", f"Set it to {gpus} or less.")


def _one_of_several(parameters: dict[str, str]) -> int:
    """Train as one of them. Only the first speaks; what stops one is written down for the launcher."""
    if os.environ["RANK"] != "0":
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the process ends
    if hardware.device() == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # else accelerate looks for GPUs and finds one process
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        from . import train

        train.train_headless(parameters)
        hardware.processes().destroy_process_group()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        get_error_handler().record_exception(error)
        return 1


def _launch(parameters: dict[str, str], number: int) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // number)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it warns of is told below
    words = [word for name, value in parameters.items() for word in ("-p", name, value)]
    try:
        with tempfile.TemporaryDirectory() as folder:  # where they write down what stopped them
            here = LaunchConfig(
                1, 1, number, DefaultLogsSpecs(folder), run_id="dpo-tutorial", rdzv_backend="c10d",
                rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=0,
            )  # fmt: skip
            elastic_launch(here, sys.executable)("-m", "dpo_tutorial", "train", "--processes", str(number), *words)
        return 0
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        print(f"\n{_told(error, number)}", file=sys.stderr)
        return 1


def _told(error, number: int) -> str:
    """What stopped the training: an error of ours, else the process that was killed, else the error that came first."""
    failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
    recorded = [failure.message for _, failure in failures if isinstance(failure.message, dict)]
    ours = [message["message"] for message in recorded if "\n  Fix: " in message["message"]]
    ended = [(rank, failure.signal_name()) for rank, failure in failures if failure.exitcode < 0]
    killed = [end for end in ended if end[1] != "SIGTERM"]  # by which the launcher stops the others
    if not ours and (killed or (ended and not recorded)):
        rank, name = (killed or ended)[0]
        cause = f"Process {rank} of {number} was killed ({name}), and the others were stopped."
        return f"{cause}\n  Fix: Give the same command again: it goes on from the last checkpoint."
    return (ours or [message["extraInfo"]["py_callstack"] for message in recorded] or [str(error)])[0]
