"""Stage D of `gpu.py`: the embedded model trained on UltraFeedback, each row held out once, several rates and seeds.

ULTRAFEEDBACK_SAMPLE names a folder of rows, laid out as the hub serves it.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import queue
import random
import tempfile
import time
from pathlib import Path

import trainings
from datasets import Dataset
from harness import Record, interval, table
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from dpo_tutorial import knobs
from dpo_tutorial.adapter import lora
from dpo_tutorial.comparing import generation, stats
from dpo_tutorial.comparing.baselines import bag_of_words
from dpo_tutorial.loading import models
from dpo_tutorial.machine import hardware
from dpo_tutorial.pairs import prepare
from dpo_tutorial.training import scoring

FOLDS = 5
RATES = (5e-6, 1.5e-5, 5e-5, 1.5e-4)


def usable_rows(tokenizer, options) -> list[dict]:
    """All usable rows of the sample, of all its splits, in one list; a few of them, or of our own, in a tiny run."""
    folder = os.environ.get("ULTRAFEEDBACK_SAMPLE")
    if not folder and not options.tiny:
        raise SystemExit("Set ULTRAFEEDBACK_SAMPLE to a folder of UltraFeedback-binarized rows.")
    most = dict.fromkeys(("max_train", "max_val", "max_test"), 10**6)
    length = 128 if options.tiny else 1024
    cfg = trainings.config_of(options.tiny, data=folder or knobs.EMBEDDED, max_tokens=length, **most)
    splits = prepare.prepare(cfg, tokenizer).splits
    rows = [row for name in ("train", "val", "test") for row in splits[name]]
    return rows[:24] if options.tiny else rows


def trainings_to_do(options) -> list[dict]:
    """Most wanted first: all rates once, then other seeds, then three epochs."""
    if options.tiny:
        return [{"rate": 1e-3, "epochs": 1, "seed": 42, "fold": fold} for fold in range(2)]
    plan = [(rate, 1, 42) for rate in RATES] + [(1.5e-4, 3, 42), (5e-5, 3, 42)]
    plan += [(rate, 1, seed) for rate in RATES[::-1] for seed in (1, 2)] + [(3e-4, 1, 42)]
    plan += [(1.5e-4, 3, 1), (1.5e-4, 3, 2), (5e-5, 3, 1), (5e-5, 3, 2)]
    plan = [step for step in plan if not options.seeds or step[2] in options.seeds]
    return [{"rate": r, "epochs": e, "seed": s, "fold": fold} for r, e, s in plan for fold in range(FOLDS)]


def stage_d(record: Record, options) -> None:
    rows = usable_rows(models.load_tokenizer(trainings.config_of(options.tiny)), options)
    record.write("D", "rows", usable=len(rows), max_tokens=1024, folds=2 if options.tiny else FOLDS)
    record.write("D", "baselines", **baselines(rows))
    context = multiprocessing.get_context("spawn")
    waiting = queue.Queue() if options.workers == 1 else context.Queue()
    for task in trainings_to_do(options):
        waiting.put(task)
    if options.workers == 1:
        worker(options, waiting, record.path, rows)
        return
    with_all = (options, waiting, record.path, rows)
    working = [context.Process(target=worker, args=with_all) for _ in range(options.workers)]
    for process in working:
        process.start()
    for process in working:
        process.join()


def baselines(rows: list[dict]) -> dict:
    """What needs no training: the longer answer, and word counts learnt on the other folds."""
    words = []
    for fold in range(FOLDS):
        held, rest = split(rows, 42, fold)
        words += bag_of_words(Dataset.from_list(rest), Dataset.from_list(held))
    gaps = [row["chosen_tokens"] - row["rejected_tokens"] for row in rows]
    return {"longer": stats.accuracy(gaps), "words": stats.rate(sum(words), len(words))}


def split(rows: list[dict], seed: int, fold: int, folds: int = FOLDS) -> tuple[list[dict], list[dict]]:
    """(held out, the rest), cut by prompt: each prompt is held out in exactly one fold of a seed."""
    prompts = sorted({json.dumps(row["prompt"]) for row in rows})
    random.Random(seed).shuffle(prompts)
    held = set(prompts[fold::folds])
    sides = ([], [])
    for row in rows:
        sides[json.dumps(row["prompt"]) not in held].append(row)
    return sides


def worker(options, waiting, path: Path, rows: list[dict]) -> None:
    """Train and score one task after another: trained in the GPU's type, scored in float32, which hides no margin."""
    started, record = time.perf_counter(), Record(path)
    cfg = trainings.config_of(options.tiny, batch_size=8, grad_accum=1, max_tokens=1024, save_steps=10**6)
    exact = dataclasses.replace(cfg, dtype="fp32")
    tokenizer = models.load_tokenizer(cfg)
    if options.tiny:
        base, judge = (trainings.random_base("tiny", c, tokenizer) for c in (cfg, exact))
    else:
        base, judge = models.load_base(cfg), models.load_base(exact)
    scorer = get_peft_model(judge, lora.lora_config(exact))
    while time.perf_counter() - started < options.seconds:
        try:
            task = waiting.get_nowait()
        except queue.Empty:
            return
        held, rest = split(rows, task["seed"], task["fold"], 2 if options.tiny else FOLDS)
        ours = dataclasses.replace(cfg, learning_rate=task["rate"], epochs=float(task["epochs"]), seed=task["seed"])
        hardware.seed_everything(ours.seed)
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            shuffled = Dataset.from_list(rest).shuffle(seed=ours.seed)
            trainer = trainings.our_trainer(ours, base, tokenizer, shuffled, None, folder)
            ran = trainings.run(trainer, ours.seed)
        set_peft_model_state_dict(scorer, get_peft_model_state_dict(trainer.model))
        found = held_out(scoring.score_pairs(exact, scorer, tokenizer, Dataset.from_list(held)))
        if task["fold"] == 0:
            found |= what_it_writes(options, ours, trainer.model, tokenizer, [row["prompt"] for row in held])
        base = trainings.plain_again(trainer)
        record.write(
            "D", "fold", **task, train_seconds=ran["seconds"], steps=len(ran["losses"]), first_loss=ran["losses"][0],
            **found, seconds=time.perf_counter() - begun,
        )  # fmt: skip


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


def what_it_writes(options, cfg, model, tokenizer, prompts) -> dict:
    """KL from the base, and how the answers of both differ in length and text."""
    prompts, limit = (prompts[:2], 8) if options.tiny else (prompts[:24], 128)
    kl = generation.kl_from_base(cfg, model, tokenizer, prompts, limit)
    limited = dataclasses.replace(cfg, max_new_tokens=limit)
    before, after = generation.answers_of_both(limited, model, tokenizer, prompts)
    both = (("before", before), ("after", after))
    return {
        "kl": {name: kl[name] for name in ("per_answer", "per_token")},
        "tokens": {when: stats.mean([a["tokens"] for a in answers])["mean"] for when, answers in both},
        "same_answers": sum(a["text"] == b["text"] for a, b in zip(before, after, strict=True)) / len(prompts),
    }


def tables(lines: list[dict]) -> dict[str, str]:
    runs: dict[tuple, list[dict]] = {}
    for r in lines:
        if r["name"] == "fold":
            runs.setdefault((r["epochs"], r["rate"], r["seed"]), []).append(r)
    rows = []
    for (epochs, rate, seed), folds in sorted(runs.items()):
        margins = [m for r in folds for m in r["margins"]]
        mean = stats.mean(margins)
        kl = next((r["kl"]["per_answer"] for r in folds if "kl" in r), None)
        rows.append(
            [f"{rate:g}", epochs, seed, f"{len(folds)} of {FOLDS}", len(margins),
             interval(stats.accuracy(margins), 3), f"{mean['mean']:.3f} ({mean['standard_error']:.3f})",
             f"{kl['mean']:.1f} ({kl['standard_error']:.1f})" if kl else ""]
        )  # fmt: skip
    head = ["rate", "epochs", "seed", "folds", "held out", "accuracy (95%)", "margin (s.e.)", "KL (s.e.)"]
    return {"ultrafeedback": table(head, rows)}
