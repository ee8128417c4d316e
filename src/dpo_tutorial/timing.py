"""Where the seconds of a training go: policy, reference, backward, optimizer, evaluation, the rest."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import TrainerCallback
from trl import DPOTrainer

from . import environment

POLICY, REFERENCE, BACKWARD = "policy, forward", "reference, forward", "backward"
OPTIMIZER, EVALUATION, REST = "optimizer", "evaluation", "batches, logs, checkpoints"
PHASES = (POLICY, REFERENCE, BACKWARD, OPTIMIZER, EVALUATION, REST)


class TimeSplit(TrainerCallback):
    """Watch a trainer: `split = TimeSplit(trainer)`, train, then read `split.seconds`.

    Every second counts once: of a phase inside another, only for the inner one. On a GPU the clock waits at each
    border until queued work is done, which costs a little speed.
    """

    def __init__(self, trainer: DPOTrainer) -> None:
        self.seconds: Counter[str] = Counter()
        self._open: list[str] = []
        self._since = 0.0
        causal = trainer.model.get_base_model()

        def scoring() -> str:  # only the reference is scored without a gradient
            return POLICY if torch.is_grad_enabled() else REFERENCE

        for owner, name, phase in (
            (trainer, "train", lambda: REST),
            (trainer, "evaluate", lambda: EVALUATION),
            (trainer, "compute_loss", lambda: POLICY),
            (causal, "forward", scoring),
            (trainer.accelerator, "backward", lambda: BACKWARD),
        ):
            setattr(owner, name, self._watched(getattr(owner, name), phase))
        trainer.add_callback(self)

    def _watched(self, plain, phase):
        @functools.wraps(plain)  # `generate` reads the signature of forward
        def run(*args, **kwargs):
            with self.phase(phase()):
                return plain(*args, **kwargs)

        return run

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of the block for `name`; inside an evaluation all is evaluation, outside training none."""
        if not self._open and name != REST or EVALUATION in self._open:
            yield
            return
        depth = len(self._open)
        self._enter(name)
        try:
            yield
        finally:
            self._turn()
            del self._open[depth:]  # an optimizer step that failed is still open

    def _turn(self) -> None:
        environment.synchronize()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def _enter(self, name: str) -> None:
        self._turn()
        self._open.append(name)

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._enter(OPTIMIZER)

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._turn()
        self._open.pop()

    def rows(self) -> list[dict]:
        """One row per phase, for `show.table`: seconds, and share of the whole."""
        whole = sum(self.seconds.values()) or 1.0
        return [
            {"phase": name, "seconds": self.seconds[name], "share": f"{self.seconds[name] / whole:.0%}"}
            for name in PHASES
        ]
