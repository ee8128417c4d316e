"""The reference's log-probabilities, computed before training and kept for the next one.

The reference never changes, so its forward passes need not be in the training loop. Off by default: in one epoch it
saves only the evaluations' share, and in 16 bits other batches round differently, so that policy and reference are no
longer equal to the last bit at step 0. It pays (`PRECOMPUTE_REFERENCE`) with several epochs, or with several trainings
on the same pairs.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from trl import DPOTrainer

from . import artifacts, checkpoints, environment
from .config import Config
from .errors import ArtifactError

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")  # as TRL's collator knows them


def precompute(trainer: DPOTrainer, config: Config, run: artifacts.Run) -> None:
    """Give the trainer's pairs log π_ref(y|x), from the run's folder where it is there, and have the loss read it.

    Kept in `reference-<key>.json`; the key is a digest of what the numbers depend on: weights of the base, pairs, and
    the knobs `DTYPE`, `LD_ALPHA` and `PREFIX_SHARING`. Changed, they are computed anew.
    """
    trainer.train_dataset = _with_reference(trainer, trainer.train_dataset, config, run)
    if trainer.eval_dataset is not None:
        trainer.eval_dataset = _with_reference(trainer, trainer.eval_dataset, config, run)
    trainer.precompute_ref_logps = True


def _with_reference(trainer: DPOTrainer, pairs: Dataset, config: Config, run: artifacts.Run) -> Dataset:
    if COLUMNS[0] in pairs.column_names:  # the cell was run before
        return pairs
    of = {name: getattr(config, name) for name in ("dtype", "ld_alpha", "prefix_sharing")}
    of |= {"base": checkpoints.digest_of_base(trainer.model), "pairs": checkpoints.digest_of_pairs(pairs)}
    name = f"reference-{hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]}.json"
    found = _read(run, name, len(pairs))
    environment.processes().wait_for_everyone()  # all have looked before one writes
    if found is None:
        found = _compute(trainer, pairs)
        if trainer.is_world_process_zero():
            run.write_json(name, found)
    for column in COLUMNS:
        pairs = pairs.add_column(column, found[column])
    return pairs


def _read(run: artifacts.Run, name: str, pairs: int) -> dict[str, list[float]] | None:
    try:
        found = run.read_json(name)
        if all(np.isfinite(found[c]).all() and len(found[c]) == pairs for c in COLUMNS):
            print(f"Reference log-probabilities of {pairs} pairs read from {name}.")
            return found
    except (ArtifactError, KeyError, TypeError):  # none yet, or damaged: computed anew
        pass
    return None


def _compute(trainer: DPOTrainer, pairs: Dataset) -> dict[str, list[float]]:
    """By TRL's own function, in batches of similar length, the longest first: memory peaks at once."""
    size = trainer.args.per_device_eval_batch_size
    order = np.argsort(-np.array(pairs["length"]), kind="stable")
    batches = [order[i : i + size].tolist() for i in range(0, len(order), size)]
    training, mine = trainer.model.training, []
    trainer.model.eval()
    with environment.processes().split_between_processes(batches) as own:
        for rows in tqdm(own, desc="reference", leave=False):
            batch = trainer._prepare_inputs(trainer.data_collator([pairs[i] for i in rows]))
            sides = (values.tolist() for values in trainer.compute_ref_log_probs(trainer.model, batch))
            mine += zip(rows, *sides, strict=True)
    trainer.model.train(training)
    return dict(zip(COLUMNS, list(zip(*sorted(gather_object(mine)), strict=True))[1:], strict=True))
