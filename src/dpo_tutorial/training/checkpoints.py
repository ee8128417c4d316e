"""Which checkpoints of an interrupted training are whole, and whether they belong to the run that asks.

transformers writes checkpoints and resumes from them; this module adds a seal. A checkpoint is whole once it holds
`whole.json`, written last and in one step, with the SHA-256 of every other file. What a kill tore has no valid seal.
"""

import hashlib
import json
import shutil
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback

from .. import run_folder
from ..errors import ArtifactError
from ..knobs import Config
from ..loading import digests
from ..loading.embedded import sha256
from ..machine import hardware

SEAL = "whole.json"


def folder(run: run_folder.Run) -> Path:
    """Where the trainer of this run keeps its checkpoints."""
    return run.dir / "trainer"


def fingerprint(config: Config, trainer) -> dict:
    """What decides the adapter: config, pairs as the trainer reads them, the base. Not how many processes share it."""
    return {
        "config": config.training_identity(),
        "pairs": digest_of_pairs(trainer.train_dataset),
        "base": digest_of_base(trainer.model),
    }


def digest_of_pairs(pairs: Dataset) -> str:
    """SHA-256 of the pairs as the trainer reads them, in order."""
    digest = hashlib.sha256()
    for row in pairs.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]):
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def digest_of_base(model: PreTrainedModel) -> str:
    """SHA-256 of the model's config and a sample of the frozen weights, as they are in memory.

    They count and not the name: a model folder can be filled anew, or moved.
    """
    digest = hashlib.sha256(digests.of_config(model.config.to_dict()))
    for weight in (p for p in model.parameters() if not p.requires_grad):
        digest.update(digests.sample(weight))
    return digest.hexdigest()


def changes(then: dict, now: dict) -> list[str]:
    """Names of what differs between two fingerprints."""
    old, new = then["config"], now["config"]
    names = [f"{n.upper()} ({old.get(n)!r}, now {new.get(n)!r})" for n in new if old.get(n) != new[n]]
    names += ["the training pairs"] * (then["pairs"] != now["pairs"])
    return names + ["the weights or the config of the base model"] * (then["base"] != now["base"])


def _sums(checkpoint: Path) -> dict[str, str]:
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != SEAL)
    return {path.relative_to(checkpoint).as_posix(): sha256(path) for path in files}


def read_seal(checkpoint: Path) -> dict | None:
    """The seal of a whole checkpoint; `None` where it is torn: no seal, or a file that is not the one sealed."""
    try:
        seal = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        return seal if seal["files"] == _sums(checkpoint) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def saved(run: run_folder.Run) -> list[Path]:
    """Every checkpoint of the run, whole or torn, newest first."""
    found = [p for p in folder(run).glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)


def remove_torn(run: run_folder.Run) -> tuple[list[tuple[Path, dict]], list[Path]]:
    """Delete what a kill or a full disk left half-written: it must not count among the checkpoints that are kept.

    Returns:
        The whole ones with their seals, newest first; and those that were deleted.
    """
    seals = {checkpoint: read_seal(checkpoint) for checkpoint in saved(run)}
    torn = [checkpoint for checkpoint, seal in seals.items() if seal is None]
    for checkpoint in torn:
        shutil.rmtree(checkpoint)
    return [(checkpoint, seal) for checkpoint, seal in seals.items() if seal], torn


def clear(run: run_folder.Run) -> None:
    """Delete every checkpoint: nothing to resume from.

    Raises:
        ArtifactError: one cannot be deleted.
    """
    for checkpoint in reversed(saved(run)):  # oldest first, so that a kill in between leaves the newest
        try:
            shutil.rmtree(checkpoint)
        except OSError as error:
            raise run_folder.unwritable(checkpoint, error) from error


def newest(run: run_folder.Run, now: dict) -> tuple[Path, dict] | None:
    """The newest whole checkpoint and its seal, after torn ones are removed; `None` where there is none.

    Raises:
        ArtifactError: it belongs to another config, other pairs or another base (names what changed).
    """
    whole, torn = remove_torn(run)
    if torn:
        print(f"Ignored, because it was torn by a stop: {', '.join(path.name for path in torn)}.")
    if not whole:
        return None
    checkpoint, seal = whole[0]
    changed = changes(seal["fingerprint"], now)
    if changed:
        raise ArtifactError(
            f"{checkpoint} is of an unfinished training with other settings. Changed: {', '.join(changed)}.",
            "To go on with it, set these back; to start over, set FRESH = True (make run FRESH=True); "
            "to keep it for later, set ARTIFACTS to another folder.",
        )
    return checkpoint, seal


class Seal(TrainerCallback):
    """Seal each checkpoint once it is written, and give a resumed epoch its order of batches back.

    transformers draws the order from torch's random numbers when an epoch begins, but keeps only their state at the
    checkpoint. So in any epoch but the first, a resumed run would skip as many batches of another order. And it finds
    that state only where as many processes go on as had stopped. `seal` is that of the checkpoint resumed from.
    """

    def __init__(self, run: run_folder.Run, fingerprint: dict, seal: dict | None) -> None:
        self.run, self.fingerprint, self.seal = run, fingerprint, dict(seal or {})
        self.order: torch.Tensor | None = None
        self.started = 0.0

    def seconds(self) -> float:
        """Seconds of training so far, those before the stop included."""
        here = time.perf_counter() - self.started if self.started else 0
        return here + self.seal.get("seconds", 0)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.started = time.perf_counter()
        state.save_steps = args.save_steps  # a resumed state brings the old one

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        if self.order is None and self.seal:
            torch.set_rng_state(torch.frombuffer(bytearray.fromhex(self.seal["order"]), dtype=torch.uint8))
        self.order = torch.get_rng_state()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        random = self.seal.pop("random", None)  # taken out: only the first step goes on from there
        if random and random != self.seal["order"]:
            torch.set_rng_state(torch.frombuffer(bytearray.fromhex(random), dtype=torch.uint8))

    def on_save(self, args, state, control, **kwargs) -> None:
        hardware.processes().wait_for_everyone()  # each process writes the state of its own random numbers
        if not state.is_world_process_zero:
            return
        order = torch.get_rng_state() if float(state.epoch).is_integer() else self.order  # at its end: the next epoch's
        checkpoint = folder(self.run) / f"checkpoint-{state.global_step}"
        assert order is not None, "read when the epoch began"
        seal = {
            "fingerprint": self.fingerprint,
            "seconds": self.seconds(),
            "order": order.numpy().tobytes().hex(),
            "random": torch.get_rng_state().numpy().tobytes().hex(),
            "files": _sums(checkpoint),
        }
        self.run.write_json(checkpoint.relative_to(self.run.dir) / SEAL, seal)
