"""Where the seconds of a training go: policy, reference, backward, optimizer, evaluation, the rest."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import TrainerCallback

from ..machine import memory

POLICY, REFERENCE, BACKWARD = "policy, forward", "reference, forward", "backward"
OPTIMIZER, EVALUATION, REST = "optimizer", "evaluation", "batches, logs, checkpoints"
PHASES = (POLICY, REFERENCE, BACKWARD, OPTIMIZER, EVALUATION, REST)


class TimeSplit(TrainerCallback):
    """Seconds by phase. Each counts once: of a phase inside another, only for the inner one.

    On a GPU the clock waits at each border until queued work is done, which costs a little speed.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.counting = True  # False: no phase begins, and no clock waits
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of the block for `name`; inside an evaluation all is evaluation, outside training none."""
        if not self.counting or not self._open and name != REST or EVALUATION in self._open:
            yield
            return
        depth = len(self._open)
        self._enter(name)
        try:
            yield
        finally:
            self._turn()
            del self._open[depth:]  # an optimizer step that failed is still open

    @contextmanager
    def loss(self, model: torch.nn.Module) -> Iterator[None]:
        """Count the block for the policy, but for passes of `model` without a gradient: those are the reference's."""

        def enter(*_):
            if not torch.is_grad_enabled() and self._open[-1:] == [POLICY]:
                self._enter(REFERENCE)

        def leave(*_):
            if self._open[-1:] == [REFERENCE]:
                self._leave()

        hooks = model.register_forward_pre_hook(enter), model.register_forward_hook(leave)
        try:
            with self.phase(POLICY):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _turn(self) -> None:
        memory.synchronize()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def _enter(self, name: str) -> None:
        self._turn()
        self._open.append(name)

    def _leave(self) -> None:
        self._turn()
        self._open.pop()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if self._open:
            self._enter(OPTIMIZER)

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        if self._open:
            self._leave()

    def rows(self) -> list[dict]:
        """One row per phase, for `show.table`: seconds, and share of the whole."""
        whole = sum(self.seconds.values()) or 1.0
        return [
            {"phase": name, "seconds": self.seconds[name], "share": f"{self.seconds[name] / whole:.0%}"}
            for name in PHASES
        ]


class Timed:
    """Mixed into a trainer, it keeps the split: `class Watched(Timed, DPOTrainer)`, train, then read `times`."""

    def __init__(self, *args, **kwargs) -> None:
        self.times = TimeSplit()
        super().__init__(*args, **kwargs)
        self.add_callback(self.times)  # type: ignore[attr-defined]  # of the trainer it is mixed into

    def train(self, *args, **kwargs):
        with self.times.phase(REST):
            return super().train(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        with self.times.phase(EVALUATION):
            return super().evaluate(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        with self.times.phase(BACKWARD):  # what the step does beside the loss
            return super().training_step(*args, **kwargs)

    def compute_loss(self, *args, **kwargs):
        with self.times.loss(self.model):
            return super().compute_loss(*args, **kwargs)
