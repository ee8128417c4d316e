"""Does DPO learn UltraFeedback's preferences on a CPU, at which rate, and on each seed?

    ULTRAFEEDBACK_SAMPLE=folder python benchmarks/ultrafeedback.py folds --rates 1.5e-4 --folds 0 1
    ULTRAFEEDBACK_SAMPLE=folder python benchmarks/ultrafeedback.py folds        # what is missing of the rest
    ULTRAFEEDBACK_SAMPLE=folder python benchmarks/ultrafeedback.py every-layer  # one fold, no layer in 16 bits

Each row is held out once a seed, and scored in float32 by an adapter that never saw its prompt. A fold is one record,
and one that is there is not measured again, so the second command goes on where it was stopped.

With 512 tokens a sample of 1,000 rows has 467 usable ones. On one core without AMX a fold takes 46 minutes: 31 to 35
for the training on 311 pairs, the rest for the scores of 156 in float32 and for KL. With AMX it was not recorded. The
first command is six folds. It is the smallest part that answers "above chance on each of three seeds?": with 311 rows a
seed and an accuracy of 0.635, as on a GPU, the interval leaves 0.5 out 499 times in 500; with one fold a seed 14 times
in 15, and on all three seeds less often. All of it is 36 folds. With 1,024 tokens it is 60, and each
trains on about three times as many tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness import UNMEASURED, Record, image, in_turn, interval, machines, main, newest, signed, table

#: Limit in tokens → how many folds. Five leave 637 or 638 pairs of up to 1,024 tokens to train on, as in `gpu.py`.
FOLDS = {512: 3, 1024: 5}
RATES = (1.5e-4, 5e-5, 3e-4, 5e-6)  # in the order in which they are measured
SEEDS = (42, 1, 2)
MAIN = 1.5e-4  # the rate of the cpu profile, which a first run used: 0.664 of 152 held-out pairs
#: The accuracy of SmolLM2-135M-Instruct's own DPO on UltraFeedback, as its makers' card gives it.
MAKERS = 0.615


def measure(task: dict, folder: Path) -> dict:
    """One fold: trained on the rest, scored on what it holds out, with the verdicts of simple judges beside it.

    A `fold` of 0 also has the `kl` from the base, on 24 of its prompts.

    Returns:
        As `folds.one`; `words` of each held-out row, as `folds` gives them; numbers only, no row's text.
    """
    import dataclasses

    import folds

    from dpo_tutorial import config
    from dpo_tutorial.comparing import generation
    from dpo_tutorial.loading import models

    cfg = config.resolve(profile="cpu", **{"sft_weight": 0.0, "compare_prompts": 24} | task["knobs"])
    exact = dataclasses.replace(cfg, dtype="fp32")
    tokenizer = models.load_tokenizer(cfg)
    rows = folds.usable_rows(cfg, tokenizer)
    held, rest = folds.split(rows, cfg.seed, task["fold"], FOLDS[cfg.max_tokens])
    scorer = folds.scorer_of(exact, models.load_base(exact))
    trainer, found = folds.one(cfg, models.load_base(cfg), scorer, tokenizer, held, rest, folder)
    if task["fold"] == 0:
        prompts = [row["prompt"] for row in held[: cfg.compare_prompts]]
        (kl,) = generation.kl_from_base(cfg, trainer.model, tokenizer, prompts)
        found["kl"] = {name: kl[name] for name in ("per_answer", "per_token")}
    about = {"rate": cfg.learning_rate, "seed": cfg.seed, "max_tokens": cfg.max_tokens, "fold": task["fold"]}
    return about | found | {"words": folds.words(held, rest)}


def all_folds(record: Record, options) -> None:
    """Every fold of every rate and seed that is asked for, two at a time; all seeds of a fold before the next."""
    import folds

    tasks, folds_of = {}, FOLDS[options.max_tokens]
    if not set(options.folds or ()) <= set(range(folds_of)):
        raise SystemExit(f"With {options.max_tokens} tokens folds are 0 to {folds_of - 1}.")
    for rate in options.rates:
        for fold in range(folds_of) if options.folds is None else options.folds:
            for seed in options.seeds:
                knobs = {"learning_rate": rate, "seed": seed, "max_tokens": options.max_tokens, "data": folds.sample()}
                name = f"{options.max_tokens} tokens, {rate:g}, seed {seed}, fold {fold} of {folds_of}"
                tasks[name] = {"kind": "measure", "knobs": knobs, "fold": fold}
    in_turn(__file__, record, "folds", tasks)


def every_layer(record: Record, options) -> None:
    """The first fold of the first seed once more, with every linear layer in 4 bits, as on the GPU of `gpu.md`."""
    import folds

    knobs = {"learning_rate": MAIN, "seed": SEEDS[0], "max_tokens": 512, "data": folds.sample(), "keep_16bit": "none"}
    task = {"kind": "measure", "knobs": knobs, "fold": 0}
    in_turn(__file__, record, "every layer", {f"512 tokens, {MAIN:g}, seed {SEEDS[0]}, every layer in 4 bits": task})


# --- tables ---------------------------------------------------------------------------------------------------------

#: Simple judge → by how much it prefers the chosen answer, from one fold; word counts give verdicts of 0, ½ and 1.
JUDGES: dict[str, Callable[[dict], list[float]]] = {
    "the longer answer": lambda r: r["longer"],
    "likelier for the base": lambda r: r["reference"],
    "likelier per token": lambda r: r["reference_per_token"],
    "word counts": lambda r: [word - 0.5 for word in r["words"]],
}
Runs = dict[tuple[int, float, int], list[dict]]


def runs_of(lines: list[dict]) -> Runs:
    """(limit in tokens, rate, seed) → its folds, in order."""
    found: Runs = {}
    for fold in sorted(newest(lines, "folds").values(), key=lambda r: r["fold"]):
        found.setdefault((fold["max_tokens"], fold["rate"], fold["seed"]), []).append(fold)
    return dict(sorted(found.items()))


def margins(parts: list[dict]) -> list[float]:
    return [margin for part in parts for margin in part["margins"]]


def judged(judge: str, parts: list[dict]) -> list[float]:
    return [value for part in parts for value in JUDGES[judge](part)]


def trained_table(runs: Runs) -> str:
    from dpo_tutorial.comparing import stats

    rows = []
    for (limit, rate, seed), parts in runs.items():
        right, margin = stats.accuracy(margins(parts)), stats.mean(margins(parts))
        n = sum(part["n"] for part in parts)
        rewards = (sum(p[f"reward_{side}"] * p["n"] for p in parts) / n for side in ("chosen", "rejected"))
        kl = next((f"{p['kl']['per_token']['mean']:.3f}" for p in parts if "kl" in p), "")
        rows.append([
            limit, f"{rate:g}", seed, f"{len(parts)} of {FOLDS[limit]}", n, interval(right, 3),
            "yes" if right["low"] > 0.5 else "no", f"{margin['mean']:.3f} ({margin['standard_error']:.3f})",
            *(f"{reward:.2f}" for reward in rewards), kl, f"{sum(p['train_seconds'] for p in parts) / 60:.0f}",
        ])  # fmt: skip
    head = ["tokens", "rate", "seed", "folds", "held out", "accuracy (95%)", "above chance", "margin (s.e.)"]
    return table([*head, "chosen reward", "rejected reward", "KL per token", "minutes of training"], rows)


def judges_table(runs: Runs) -> str:
    """Each judge on the rows that were held out, and the policy's accuracy above it on the same rows, paired."""
    from dpo_tutorial.comparing import stats

    made = []
    for limit in sorted({limit for limit, *_ in runs}):
        mains = {seed: parts for (tokens, rate, seed), parts in runs.items() if (tokens, rate) == (limit, MAIN)}
        rows = []
        for judge in JUDGES:
            row = [judge]
            for parts in mains.values():
                verdicts = stats.right(judged(judge, parts))
                gap = stats.paired_difference(verdicts, stats.right(margins(parts)))
                row += [interval(stats.share(verdicts), 3), signed(gap, 3)]
            rows.append(row)
        head = [cell for seed in mains for cell in (f"seed {seed}", "policy above it")]
        made.append(f"Rows of up to {limit:,} tokens:\n\n" + table(["judge", *head], rows))
    return "\n\n".join(made)


def lengths_table(runs: Runs) -> str:
    import folds

    longest = max(limit for limit, *_ in runs)
    named = {(f"{rate:g}", seed): parts for (limit, rate, seed), parts in runs.items() if limit == longest}
    return folds.by_length(named, ["rate", "seed"])


def accuracies(runs: Runs):
    """Accuracy with its interval, a point per seed: each limit and rate, and simple judges on the longest rows."""
    import numpy as np

    from dpo_tutorial.comparing import stats
    from dpo_tutorial.show import figures
    from dpo_tutorial.show.result_figures import points

    longest, trained, judges = max(limit for limit, *_ in runs), {}, {}
    for (limit, rate, _), parts in runs.items():
        trained.setdefault(f"up to {limit:,} tokens, {rate:g}", []).append(stats.accuracy(margins(parts)))
        if (limit, rate) == (longest, MAIN):
            for judge in JUDGES:
                judges.setdefault(f"{judge}, {longest:,}", []).append(stats.accuracy(judged(judge, parts)))
    rows = trained | judges
    said = "; ".join(f"{name} {' and '.join(interval(found, 3) for found in some)}" for name, some in rows.items())
    alt = f"Accuracy on held-out rows of UltraFeedback, by seed: {said}; the makers' own DPO {MAKERS}"
    figure, (axis,) = figures.new_figure(width=6, height=1.6 + 0.5 * len(rows), alt=alt)
    for row, (name, some) in enumerate(rows.items()):
        places = row + 0.2 * (np.arange(len(some)) - (len(some) - 1) / 2)
        points(axis, places, some, figures.BLUE if name in trained else figures.GREY, "", across=True)
    axis.axvline(0.5, color=figures.GREY, linestyle=":", label="chance")
    axis.axvline(MAKERS, color=figures.ORANGE, linestyle="--", label=f"the makers' own DPO, {MAKERS}")
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()
    axis.set(xlabel="accuracy, 95% interval; a point per seed", title="On held-out rows")
    figure.legend(fontsize=9, ncols=2, frameon=False, loc="outside lower center")
    return figure


def drawn(lines: list[dict]) -> dict:
    runs = runs_of(lines)
    return {"ultrafeedback.png": accuracies(runs)} if runs else {}


def tables(lines: list[dict]) -> dict[str, str]:
    runs = runs_of(lines)
    if not runs:
        return dict.fromkeys(("trained", "judges", "figure", "by length", "folds on"), UNMEASURED)
    ((path, figure),) = drawn(lines).items()
    return {
        "trained": trained_table(runs), "judges": judges_table(runs), "figure": image(figure, path),
        "by length": lengths_table(runs), "folds on": machines(lines, "folds"),
    }  # fmt: skip


def options(parser) -> None:
    parser.add_argument("--rates", nargs="*", type=float, default=RATES, help="learning rates")
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS, help="of folds and training")
    parser.add_argument("--folds", nargs="*", type=int, help="of 0 to 2 with 512 tokens, of 0 to 4 with 1,024; all")
    parser.add_argument("--max-tokens", type=int, default=512, choices=FOLDS, help="longest prompt + answer kept")


if __name__ == "__main__":
    stages = {"folds": all_folds, "every-layer": every_layer}
    main(__file__, stages, tables, {"measure": measure}, options, figures=drawn)
