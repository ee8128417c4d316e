"""UltraFeedback in folds: each row is held out once, and scored by an adapter that never saw its prompt.

ULTRAFEEDBACK_SAMPLE names a folder of UltraFeedback-binarized rows, laid out as the hub serves it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
from pathlib import Path

import numpy as np
import trainings
from datasets import Dataset
from harness import UNMEASURED, interval, signed, table
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOTrainer

from dpo_tutorial.adapter import lora
from dpo_tutorial.comparing import stats
from dpo_tutorial.comparing.baselines import bag_of_words
from dpo_tutorial.knobs import Config
from dpo_tutorial.machine import hardware
from dpo_tutorial.pairs import encoding, prepare
from dpo_tutorial.training import scoring


def sample(default: str = "") -> str:
    """The folder of rows, else the default.

    Raises:
        SystemExit: there is neither.
    """
    if found := os.environ.get("ULTRAFEEDBACK_SAMPLE") or default:
        return found
    raise SystemExit("Set ULTRAFEEDBACK_SAMPLE to a folder of UltraFeedback-binarized rows.")


def usable_rows(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """All usable rows of `cfg.data` up to `cfg.max_tokens`, of all its splits, in one list."""
    every = dataclasses.replace(cfg, **dict.fromkeys(("max_train", "max_val", "max_test"), 10**6))
    splits = prepare.prepare(every, tokenizer).splits
    return [row for name in ("train", "val", "test") for row in splits[name]]


def split(rows: list[dict], seed: int, fold: int, folds: int) -> tuple[list[dict], list[dict]]:
    """(held out, the rest), cut by prompt: each prompt is held out in exactly one fold of a seed."""
    prompts = sorted({json.dumps(row["prompt"]) for row in rows})
    random.Random(seed).shuffle(prompts)
    held = set(prompts[fold::folds])
    sides = ([], [])
    for row in rows:
        sides[json.dumps(row["prompt"]) not in held].append(row)
    return sides


def words(held: list[dict], rest: list[dict]) -> list[float]:
    """Whether word counts learnt on `rest` find the chosen answer of each row of `held`, as `stats.right`."""
    return bag_of_words(Dataset.from_list(rest), Dataset.from_list(held))


def longer(rows: list[dict]) -> list[int]:
    """By how many tokens the chosen answer is the longer one."""
    return [row["chosen_tokens"] - row["rejected_tokens"] for row in rows]


def scorer_of(cfg: Config, base: PreTrainedModel) -> PeftModel:
    """A base in float32 with an adapter that `one` fills: scores in float32 hide no margin."""
    return get_peft_model(base, lora.lora_config(cfg))


def one(
    cfg: Config, base: PreTrainedModel, scorer: PeftModel, tokenizer, held: list[dict], rest: list[dict], folder: Path
) -> tuple[DPOTrainer, dict]:
    """Train on the rest of a fold in the type of `cfg`, and score what is held out in float32.

    Returns:
        The trainer; and `train_seconds`, `steps`, `first_loss`, what `held_out` finds; and of the held-out
        rows `longer`, and as `lengths` their tokens as the limit counts them.
    """
    hardware.seed_everything(cfg.seed)
    shuffled = Dataset.from_list(rest).shuffle(seed=cfg.seed)
    trainer = trainings.our_trainer(cfg, base, tokenizer, shuffled, None, folder)
    ran = trainings.run(trainer, cfg.seed)
    set_peft_model_state_dict(scorer, get_peft_model_state_dict(trainer.model))
    exact, pairs = dataclasses.replace(cfg, dtype="fp32"), Dataset.from_list(held)
    found = held_out(scoring.score_pairs(exact, scorer, tokenizer, pairs))
    about = {"train_seconds": ran["seconds"], "steps": len(ran["losses"]), "first_loss": ran["losses"][0]}
    return trainer, about | {"lengths": encoding.token_lengths(pairs), "longer": longer(held)} | found


def held_out(records: list[dict]) -> dict:
    """Margins and rewards of scored pairs, and by how much the base prefers their chosen answers."""
    return {
        "n": len(records), "margins": [round(r["margin"], 5) for r in records],
        "reward_chosen": stats.mean([r["reward_chosen"] for r in records])["mean"],
        "reward_rejected": stats.mean([r["reward_rejected"] for r in records])["mean"],
        "reference": [round(r["reference_chosen"] - r["reference_rejected"], 3) for r in records],
        "reference_per_token": [
            round(r["reference_chosen"] / r["chosen_tokens"] - r["reference_rejected"] / r["rejected_tokens"], 4)
            for r in records
        ],
    }  # fmt: skip


def by_length(runs: dict[tuple, list[dict]], head: list[str]) -> str:
    """Short pairs and long ones: accuracy, what it is above "take the longer answer", and margins beside length.

    Args:
        runs: the folds of each run that is a row, by what its first cells say; without `lengths` a fold is left out.
        head: of those first cells.
    """
    rows = []
    for said, parts in runs.items():
        every = np.array([
            row for r in parts if "lengths" in r for row in zip(r["lengths"], r["longer"], r["margins"], strict=True)
        ])  # fmt: skip
        for limits, some in (("up to 512", lambda n: n <= 512), ("513 to 1,024", lambda n: n > 512)):
            _, more, margins = every[some(every[:, 0])].T if len(every) else np.empty((3, 0))
            if len(margins):
                gap = stats.paired_difference(stats.right(more), stats.right(margins))
                sides = [stats.right(margins[side]) for side in (more > 0, more < 0)]
                rows.append([
                    *said, limits, len(margins), interval(stats.accuracy(margins), 3),
                    signed(gap, 3),
                    *(f"{side.mean():.2f}" if len(side) else "" for side in sides),
                    f"{np.corrcoef(more, margins)[0, 1]:.2f}",
                ])  # fmt: skip
    if not rows:
        return UNMEASURED
    return table(
        [*head, "tokens of the pair", "held out", "accuracy (95%)", "above the longer answer",
         "where the chosen is longer", "where it is shorter", "margin and length correlate"], rows
    )  # fmt: skip
