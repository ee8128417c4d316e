"""Stage D of `gpu.py`: the embedded model trained on UltraFeedback, each row held out once, several rates and seeds.

The rows are those of `folds`.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import queue
import tempfile
import time
from pathlib import Path

import folds
import trainings
from harness import Record, interval, table

from dpo_tutorial import knobs
from dpo_tutorial.comparing import generation, stats
from dpo_tutorial.loading import models

FOLDS = 5
RATES = (5e-6, 1.5e-5, 5e-5, 1.5e-4)


def usable_rows(tokenizer, options) -> list[dict]:
    """All usable rows of the sample; a few of them, or of our own, in a tiny run."""
    if not options.tiny:
        return folds.usable_rows(trainings.config_of(data=folds.sample(), max_tokens=1024), tokenizer)
    cfg = trainings.config_of(True, data=folds.sample(knobs.EMBEDDED), max_tokens=128)
    return folds.usable_rows(cfg, tokenizer)[:24]


def trainings_to_do(options) -> list[dict]:
    """Most wanted first: all rates once, then other seeds, then three epochs."""
    if options.tiny:
        return [{"rate": 1e-3, "epochs": 1, "seed": 42, "fold": fold} for fold in range(2)]
    plan = [(rate, 1, 42) for rate in RATES] + [(1.5e-4, 3, 42), (5e-5, 3, 42)]
    plan += [(rate, 1, seed) for rate in RATES[::-1] for seed in (1, 2)] + [(3e-4, 1, 42)]
    plan += [(1.5e-4, 3, 1), (1.5e-4, 3, 2), (5e-5, 3, 1), (5e-5, 3, 2)]
    plan = [step for step in plan if not options.seeds or step[2] in options.seeds]
    return [{"rate": r, "epochs": e, "seed": s, "fold": fold} for r, e, s in plan for fold in range(FOLDS)]


def key(of: dict) -> tuple:
    """What tells a training apart, of a task or of its record: (epochs, rate, seed, fold)."""
    return of["epochs"], of["rate"], of["seed"], of["fold"]


def measured(lines: list[dict]) -> dict[tuple, dict]:
    """`key` → its newest record."""
    return {key(r): r for r in lines if r["name"] == "fold"}


def stage_d(record: Record, options) -> None:
    rows = usable_rows(models.load_tokenizer(trainings.config_of(options.tiny)), options)
    record.write("D", "rows", usable=len(rows), max_tokens=1024, folds=2 if options.tiny else FOLDS)
    record.write("D", "baselines", **baselines(rows))
    context = multiprocessing.get_context("spawn")
    waiting = queue.Queue() if options.workers == 1 else context.Queue()
    done = measured(record.lines())  # of a run that was stopped
    for task in trainings_to_do(options):
        if key(task) not in done:
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
    words = [word for fold in range(FOLDS) for word in folds.words(*folds.split(rows, 42, fold, FOLDS))]
    return {"longer": stats.accuracy(folds.longer(rows)), "words": stats.rate(sum(words), len(words))}


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
    scorer = folds.scorer_of(exact, judge)
    while time.perf_counter() - started < options.seconds:
        try:
            task = waiting.get_nowait()
        except queue.Empty:
            return
        held, rest = folds.split(rows, task["seed"], task["fold"], 2 if options.tiny else FOLDS)
        ours = dataclasses.replace(cfg, learning_rate=task["rate"], epochs=float(task["epochs"]), seed=task["seed"])
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            trainer, found = folds.one(ours, base, scorer, tokenizer, held, rest, Path(folder))
        if task["fold"] == 0:
            found |= what_it_writes(options, ours, trainer.model, tokenizer, [row["prompt"] for row in held])
        base = trainings.plain_again(trainer)
        record.write("D", "fold", **task, **found, seconds=time.perf_counter() - begun)


def what_it_writes(options, cfg, model, tokenizer, prompts) -> dict:
    """KL from the base, and how the answers of both differ in length and text."""
    prompts, limit = (prompts[:2], 8) if options.tiny else (prompts[:24], 128)
    limited = dataclasses.replace(cfg, max_new_tokens=limit)
    (kl,) = generation.kl_from_base(limited, model, tokenizer, prompts)
    before, after = generation.answers_of_both(limited, model, tokenizer, prompts)
    both = (("before", before), ("after", after))
    return {
        "kl": {name: kl[name] for name in ("per_answer", "per_token")},
        "tokens": {when: stats.mean([a["tokens"] for a in answers])["mean"] for when, answers in both},
        "samples": [{when: answers[i]["text"][:300] for when, answers in both} for i in range(min(3, len(prompts)))],
        "same_answers": sum(a["text"] == b["text"] for a, b in zip(before, after, strict=True)) / len(prompts),
    }


def runs_of(lines: list[dict]) -> dict[tuple, list[dict]]:
    """(epochs, rate, seed) → its folds. The first ones have the lengths of their rows from a line of its own."""
    runs: dict[tuple, list[dict]] = {}
    known = {(r["seed"], r["fold"]): {k: r[k] for k in ("lengths", "longer")} for r in lines if r["name"] == "lengths"}
    for (*run, _), r in measured(lines).items():
        runs.setdefault(tuple(run), []).append(known.get((r["seed"], r["fold"]), {}) | r)
    return runs


def lengths_table(runs: dict[tuple, list[dict]]) -> str:
    named = {(f"{rate:g}", epochs, seed): parts for (epochs, rate, seed), parts in sorted(runs.items())}
    return folds.by_length(named, ["rate", "epochs", "seed"])


def tables(lines: list[dict]) -> dict[str, str]:
    runs = runs_of(lines)
    rows = []
    for (epochs, rate, seed), parts in sorted(runs.items()):
        margins = [m for r in parts for m in r["margins"]]
        mean = stats.mean(margins)
        kl = next((r["kl"]["per_answer"] for r in parts if "kl" in r), None)
        rows.append(
            [f"{rate:g}", epochs, seed, f"{len(parts)} of {FOLDS}", len(margins),
             interval(stats.accuracy(margins), 3), f"{mean['mean']:.3f} ({mean['standard_error']:.3f})",
             f"{kl['mean']:.1f} ({kl['standard_error']:.1f})" if kl else "",
             " and ".join(sorted({r["at"][:10] for r in parts}))]
        )  # fmt: skip
    head = ["rate", "epochs", "seed", "folds", "held out", "accuracy (95%)", "margin (s.e.)", "KL (s.e.)", "measured"]
    return {"ultrafeedback": table(head, rows), "by length": lengths_table(runs)}
