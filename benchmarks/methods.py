"""Which loss gains most for the same distance from the base?

    python benchmarks/methods.py sigmoid others        # 24 runs, about 180 CPU-minutes, two at a time on one core each

Every method with three seeds: 160 training pairs in 20 steps, judged after 6 steps and at the end, on 64 validation
pairs and on the answers to 16 of their prompts. The seed decides which pairs and prompts, for all methods alike. A run
takes about 7 CPU-minutes: 2.8 for the training, and twice 0.7 for the scores and 1.6 for answers and KL. What is
recorded is not run again, so a stage that was stopped goes on.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from harness import HERE, ROOT, UNMEASURED, Record, image, in_turn, machines, main, newest, table

FIGURE = "methods.png"
COPY = ROOT / "src" / "dpo_tutorial" / "show" / "other_losses.json"  # of `summary`, for notebook 05
SEEDS = (42, 1, 2)
#: After how many steps a training is judged. The rate falls to 0, so two fifths of the way are made in 6.
POINTS = (6, 20)
SIZES = {
    "max_train": 160, "max_val": 64, "compare_prompts": 16, "max_new_tokens": 96, "sft_weight": 0.0,
    "learning_rate": 2e-4, "max_steps": POINTS[-1],
}  # fmt: skip
#: Method → knobs. The betas of the two that divide by tokens follow from what sigmoid reached (`betas`).
METHODS: dict[str, dict] = {
    "sigmoid": {},
    "sigmoid + sft": {"sft_weight": 1.0},
    "ipo": {"loss_type": "ipo"},
    "sigmoid_norm": {"loss_type": "sigmoid_norm"},
    "apo_zero": {"loss_type": "apo_zero"},
    "hinge": {"loss_type": "hinge"},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "LD-DPO": {"ld_alpha": 0.5},
}


# --- measurements ---------------------------------------------------------------------------------------------------


def measure(task: dict, folder: Path) -> dict:
    """One training with the task's `knobs`, judged on validation pairs after each of its `points` (steps).

    Returns:
        `points`: `step` → as `judged`. Step 0 is the base.
    """
    import trainings
    from transformers import TrainerCallback

    from dpo_tutorial import config
    from dpo_tutorial.loading import models
    from dpo_tutorial.machine import hardware
    from dpo_tutorial.pairs import prepare

    class Keep(TrainerCallback):
        """Keeps the adapter as it is after some steps."""

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in task["points"]:
                kept[state.global_step] = adapter()

    def adapter() -> dict:
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}

    cfg = config.resolve(profile="cpu", **task["knobs"])
    tokenizer = models.load_tokenizer(cfg)
    splits = prepare.prepare(cfg, tokenizer).splits
    hardware.seed_everything(cfg.seed)
    trainer = trainings.our_trainer(cfg, models.load_base(cfg), tokenizer, splits["train"], None, folder)
    kept = {0: adapter()} if 0 in task["points"] else {}
    trainer.add_callback(Keep())
    hardware.seed_everything(cfg.seed)
    trainer.train()
    points = {}
    for step, state in kept.items():
        trainer.model.load_state_dict(state, strict=False)
        points[step] = judged(cfg, trainer.model, tokenizer, splits["val"])
    return {"method": task["method"], "seed": cfg.seed, "beta": cfg.beta, "points": points}


def judged(cfg, model, tokenizer, pairs) -> dict:
    """What a policy makes of held-out pairs, and what it writes to the first prompts of them.

    Returns:
        `accuracy`; `nats` by which the log-ratios of chosen and rejected answers lie apart, the margin over beta, and
        `per_token` the same of log-ratios per token; `kl` per token; `kept`, the share of the style's rules that each
        answer keeps; `tokens` and `distinct_2` of the answers; the first two as `samples`.
    """
    from dpo_tutorial.comparing import answer_form, generation, stats
    from dpo_tutorial.pairs import house_style
    from dpo_tutorial.training import scoring

    records = scoring.score_pairs(cfg, model, tokenizer, pairs, beta=1.0)  # rewards are log-ratios then
    per_token = [r["reward_chosen"] / r["chosen_tokens"] - r["reward_rejected"] / r["rejected_tokens"] for r in records]
    prompts = pairs["prompt"][: cfg.compare_prompts]
    answers = generation.generate(cfg, model, tokenizer, prompts)
    return {
        "accuracy": stats.accuracy([r["margin"] for r in records]),
        "nats": stats.mean([r["margin"] for r in records]),
        "per_token": stats.mean(per_token),
        "kl": generation.kl_from_base(cfg, model, tokenizer, prompts)[0]["per_token"],
        "kept": [statistics.mean(float(keeps(a)) for keeps in house_style.RULES.values()) for a in answers],
        "tokens": stats.mean([a["tokens"] for a in answers]),
        "distinct_2": stats.mean([answer_form.distinct(a["text"]) for a in answers]),
        "samples": [a["text"] for a in answers[:2]],
    }


# --- stages ---------------------------------------------------------------------------------------------------------


def task_of(method: str, seed: int, **knobs) -> tuple[str, dict]:
    """(name of the measurement, task). Along with `sigmoid` the base is judged, once for all methods."""
    knobs = SIZES | METHODS[method] | {"seed": seed} | knobs
    points = (0, *POINTS) if method == "sigmoid" else POINTS
    return f"{method}, seed {seed}", {"kind": "measure", "method": method, "knobs": knobs, "points": points}


def sigmoid(record: Record, options) -> None:
    """DPO itself, and the base: 3 runs, 29 CPU-minutes."""
    in_turn(__file__, record, "sigmoid", dict(task_of("sigmoid", seed) for seed in SEEDS))


def others(record: Record, options) -> None:
    """The other methods: 21 runs, 155 CPU-minutes."""
    reached = by_method(runs_of(record.lines())).get("sigmoid", {}).get(POINTS[-1], [])
    if len(reached) < len(SEEDS):
        raise SystemExit("Run the stage sigmoid first: two betas follow from what it reaches.")
    own = {method: {"beta": beta} for method, beta in betas(reached).items()}
    every = [(seed, name) for seed in SEEDS for name in METHODS if name != "sigmoid"]
    in_turn(__file__, record, "others", dict(task_of(m, seed, **own.get(m, {})) for seed, m in every))


def betas(sigmoid: list[dict]) -> dict[str, float]:
    """The beta that means what sigmoid's means, where TRL takes log-ratios per token.

    Let sigmoid have brought the log-ratios per token d nats apart, with a margin of m, on average over pairs and runs.
    ipo pulls their difference to 1 / (2 beta): at 0.1 that is 5 nats a token, which no run reaches, and its loss is as
    good as linear. With beta = 1 / (2 d) it pulls to d. sigmoid_norm's margin is beta · d, so with beta = m / d its
    loss flattens where sigmoid's does.
    """
    apart = statistics.mean(r["per_token"]["mean"] for r in sigmoid)
    margin = statistics.mean(r["beta"] * r["nats"]["mean"] for r in sigmoid)
    return {"ipo": 1 / (2 * apart), "sigmoid_norm": margin / apart}


# --- tables ---------------------------------------------------------------------------------------------------------

GAINS = {"rules kept": lambda r: statistics.mean(r["kept"]), "accuracy": lambda r: r["accuracy"]["rate"]}


def kl(run: dict) -> float:
    return run["kl"]["mean"]


def runs_of(lines: list[dict]) -> list[dict]:
    """Every point of every training, as a run of its own; at step 0 its method is "base"."""
    return [
        run | point | {"step": int(step), "method": run["method"] if int(step) else "base"}
        for stage in STAGES
        for run in newest(lines, stage).values()
        for step, point in run["points"].items()
    ]


def by_method(runs: list[dict]) -> dict[str, dict[int, list[dict]]]:
    """Method → step → its runs, one a seed; without the base."""
    found: dict[str, dict[int, list[dict]]] = {}
    for run in sorted(runs, key=lambda r: r["step"]):
        found.setdefault(run["method"], {}).setdefault(run["step"], []).append(run)
    return {method: found[method] for method in METHODS if method in found}


def over_seeds(values: list[float], digits: int = 2) -> str:
    """Mean (least to most); of a single value, that."""
    mean, *ends = (f"{v:.{digits}f}" for v in (statistics.mean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({' to '.join(ends)})"


def runs_table(runs: list[dict]) -> str:
    columns = {
        "seeds": lambda rs: len(rs),
        "accuracy": lambda rs: over_seeds([GAINS["accuracy"](r) for r in rs]),
        "nats apart": lambda rs: over_seeds([r["nats"]["mean"] for r in rs], 1),
        "nats apart per token": lambda rs: over_seeds([r["per_token"]["mean"] for r in rs]),
        "KL per token": lambda rs: over_seeds([kl(r) for r in rs], 3),
        "rules kept": lambda rs: over_seeds([GAINS["rules kept"](r) for r in rs]),
        "tokens": lambda rs: over_seeds([r["tokens"]["mean"] for r in rs], 0),
        "distinct-2": lambda rs: over_seeds([r["distinct_2"]["mean"] for r in rs]),
    }
    bases = [r for r in runs if r["method"] == "base"]
    rows = [["base", "", "", *(cell(bases) for cell in columns.values())]] if bases else []
    for method, steps in by_method(runs).items():
        for step, some in steps.items():
            rows.append([method, f"{some[0]['beta']:.2g}", step, *(cell(some) for cell in columns.values())])
    return table(["method", "beta", "steps", *columns], rows)


def at_distance(base: dict, runs: list[dict], distance: float, gain) -> float | None:
    """A gain above the base where the line from it, through one seed's runs, has that KL; None where it ends before."""
    import numpy as np

    points = sorted([(0.0, 0.0), *((kl(r), gain(r) - gain(base)) for r in runs)])
    return float(np.interp(distance, *zip(*points, strict=True))) if points[-1][0] >= distance else None


def equal_table(runs: list[dict]) -> str:
    """Each gain above the base at half the KL that sigmoid ends at, seed by seed."""
    bases = {r["seed"]: r for r in runs if r["method"] == "base"}
    methods = by_method(runs)
    distances = {r["seed"]: kl(r) / 2 for r in methods["sigmoid"].get(POINTS[-1], []) if r["seed"] in bases}
    rows = []
    for method, steps in methods.items():
        cells = []
        for gain in GAINS.values():
            found = [
                at_distance(bases[s], [r for rs in steps.values() for r in rs if r["seed"] == s], distance, gain)
                for s, distance in distances.items()
            ]
            reached = [value for value in found if value is not None]
            cells.append(over_seeds(reached) if reached else "not so far")
        rows.append([method, f"{len(reached)} of {len(distances)}", *cells])
    return table(["method", "seeds that went so far", *GAINS], rows)


def summary(runs: list[dict]) -> dict[str, list[dict]]:
    """Method → a point for each step: `KL` and each of `GAINS` above the base, means over `seeds`, which has each."""
    bases = {r["seed"]: r for r in runs if r["method"] == "base"}
    found: dict[str, list[dict]] = {}
    for method, steps in by_method(runs).items():
        for some in steps.values():
            each = [{"KL": kl(r)} | {g: of(r) - of(bases[r["seed"]]) for g, of in GAINS.items()} for r in some]
            means = {name: statistics.mean(e[name] for e in each) for name in each[0]}
            found.setdefault(method, []).append(means | {"seeds": each})
    return found


def drawn(lines: list[dict]) -> dict:
    from dpo_tutorial import show

    runs = runs_of(lines)
    return {FIGURE: show.other_losses(summary(runs))} if by_method(runs) else {}


def tables(lines: list[dict]) -> dict[str, str]:
    made, runs = dict.fromkeys(("runs", "equal", "figure", "runs on"), UNMEASURED), runs_of(lines)
    if by_method(runs):
        on = dict.fromkeys(machines(lines, stage) for stage in STAGES if newest(lines, stage))
        made |= {"runs": runs_table(runs), "equal": equal_table(runs), "runs on": "\n\n".join(on)}
        made["figure"] = image(drawn(lines)[FIGURE], FIGURE)
    return made


STAGES = {"sigmoid": sigmoid, "others": others}

if __name__ == "__main__":
    main(__file__, STAGES, tables, {"measure": measure}, figures=drawn)
    kept = Record(HERE / "methods.jsonl").lines()  # wherever --out has written
    COPY.write_text(json.dumps(summary(runs_of(kept))) + "\n", encoding="utf-8")
