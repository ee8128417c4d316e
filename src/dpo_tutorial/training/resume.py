"""Train, or go on from the newest whole checkpoint of the same training."""

from __future__ import annotations

from trl import DPOTrainer

from .. import run_folder
from ..knobs import Config
from . import train


def resume_or_start(trainer: DPOTrainer, config: Config, run: run_folder.Run) -> float:
    """Train, from the newest whole checkpoint where there is one: `resumable` around `trainer.train`.

    Returns:
        Seconds of training, those before the stop included.
    """
    with train.resumable(trainer, config, run) as start:
        if not start.finished:
            trainer.train(resume_from_checkpoint=start.checkpoint)
    return start.seconds()
