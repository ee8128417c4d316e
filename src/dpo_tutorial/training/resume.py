"""Train, or go on from the newest whole checkpoint of the same training."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from transformers import TrainerState
from trl import DPOTrainer

from .. import run_folder
from ..adapter import lora
from ..errors import ArtifactError, causes, disk_error
from ..knobs import Config
from ..machine import hardware
from . import checkpoints


@dataclass
class Start:
    """Where a training begins."""

    checkpoint: str | None  # of one that was stopped; what `trainer.train(resume_from_checkpoint=…)` takes
    finished: bool  # stopped between the last step and saving: the trainer has the adapter, nothing is left to train
    seconds: Callable[[], float]  # of training so far, those before the stop included


@contextlib.contextmanager
def resumable(trainer: DPOTrainer, config: Config, run: run_folder.Run) -> Iterator[Start]:
    """Around `trainer.train`: find the newest whole checkpoint of the same training, and seal those that it writes.

    The run's folder stays locked to this process until `saving`.

    Raises:
        ArtifactError: config, pairs or base changed since the checkpoint; another process trains in this folder; or a
            checkpoint cannot be written (the ones before it stay).
    """
    if trainer.is_world_process_zero():
        run.lock()
    try:
        if trainer.is_world_process_zero():
            run.fix_adapter()
        now = checkpoints.fingerprint(config, trainer)
        with hardware.processes().main_process_first():
            if config.fresh:
                checkpoints.clear(run)
            found = checkpoints.newest(run, now)
        yield _start(trainer, config, run, now, found)
    except BaseException as error:
        refused = next(filter(None, map(disk_error, causes(error))), None)
        if refused and trainer.is_world_process_zero():
            with contextlib.suppress(OSError):
                checkpoints.remove_torn(run)  # it may be what fills the disk
        run.unlock()
        if refused:
            raise run_folder.unwritable(checkpoints.folder(run), refused) from error
        raise


def _start(trainer: DPOTrainer, config: Config, run: run_folder.Run, now: dict, found: tuple | None) -> Start:
    checkpoint, seal = found or (None, None)
    sealing, finished = checkpoints.Seal(run, now, seal), False
    if found:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        print(f"Resuming after step {state.global_step} of {state.max_steps}, from {checkpoint.name}.", flush=True)
        finished = state.global_step >= state.max_steps  # Trainer would add a step
        if finished:
            lora.give_adapter(trainer.model, checkpoint)
            trainer.state = state
    elif trainer.state.global_step:
        raise ArtifactError(
            f"This trainer has already trained {trainer.state.global_step} steps, and there is no checkpoint of them.",
            "Restart the kernel and run the notebook from the top: a fresh adapter needs a fresh base.",
        )
    trainer.remove_callback(checkpoints.Seal)  # of a cell run before
    trainer.add_callback(sealing)
    hardware.seed_everything(config.seed)  # the order of the batches follows the seed, whatever was drawn before
    # The adapter in a checkpoint is safetensors; optimizer, scheduler and random numbers are files of torch.save, which
    # transformers reads with weights_only. They are this run's own, sealed by it, and never come from a download.
    return Start(checkpoint and str(checkpoint), finished, sealing.seconds)


def resume_or_start(trainer: DPOTrainer, config: Config, run: run_folder.Run) -> float:
    """Train, from the newest whole checkpoint where there is one: `resumable` around `trainer.train`.

    Returns:
        Seconds of training, those before the stop included.
    """
    with resumable(trainer, config, run) as start:
        if not start.finished:
            trainer.train(resume_from_checkpoint=start.checkpoint)
    return start.seconds()
