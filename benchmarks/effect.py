"""Does DPO work on the embedded set, and with which hyper-parameters?

    python benchmarks/effect.py sweep                     # settings compared on the validation pairs only, an hour
    for s in 42 1 2; do make run PROFILE=cpu SEED=$s ARTIFACTS=artifacts/seed$s; done
    python benchmarks/effect.py seeds --runs artifacts/seed*                     # those runs, on the test pairs
    python benchmarks/effect.py ultrafeedback --runs artifacts/seed42 --rows FOLDER    # on other people's preferences
    python benchmarks/effect.py swapped                   # the same training with every label swapped: it must fail

`page` writes the tables of effect.md again.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import Record, child, interval, latest, machine, main, table

#: The first guess, and what was tried around it: one thing changed at a time.
START = {"learning_rate": 1.5e-4, "epochs": 1, "beta": 0.1}
SWEEP = {
    "1.5e-4, 1 epoch, beta 0.1": {},
    "3e-4": {"learning_rate": 3e-4},
    "5e-5": {"learning_rate": 5e-5},
    "beta 0.3": {"beta": 0.3},
    "2 epochs": {"epochs": 2},
}


# --- measurements, each in a process of its own ---------------------------------------------------------------------


def train(task: dict, folder: Path) -> dict:
    """A training of the `cpu` profile, judged on `split`.

    The task's `knobs` differ from the profile's; `swapped` exchanges chosen and rejected of the training pairs;
    `untrained` judges the base; `answers` generates too.
    """
    import trainings

    from dpo_tutorial import config
    from dpo_tutorial.comparing import stats
    from dpo_tutorial.loading import models
    from dpo_tutorial.machine import hardware
    from dpo_tutorial.pairs import prepare
    from dpo_tutorial.training import scoring

    cfg = config.resolve(profile=task.get("profile", "cpu"), **task["knobs"])
    hardware.seed_everything(cfg.seed)
    tokenizer = models.load_tokenizer(cfg)
    splits = prepare.prepare(cfg, tokenizer).splits
    pairs, judged = splits["train"], splits[task["split"]]
    if task.get("swapped"):
        sides = {"chosen": "rejected", "rejected": "chosen"}
        pairs = pairs.rename_columns(sides | {f"{a}_tokens": f"{b}_tokens" for a, b in sides.items()})
    trainer = trainings.our_trainer(cfg, models.load_base(cfg), tokenizer, pairs, None, folder)
    if not task.get("untrained"):
        hardware.seed_everything(cfg.seed)
        trainer.train()
    found = stats.summarise(scoring.score_pairs(cfg, trainer.model, tokenizer, judged))
    return found | (answers(cfg, trainer.model, tokenizer, judged) if task.get("answers") else {})


def answers(cfg, model, tokenizer, pairs) -> dict:
    """KL, style rules and repetition of answers to the first prompts of the pairs."""
    from dpo_tutorial.comparing import generation, stats
    from dpo_tutorial.pairs import house_style

    prompts = pairs["prompt"][: cfg.compare_prompts]
    greedy = generation.generate(cfg, model, tokenizer, prompts)
    return {
        "kl": generation.kl_from_base(cfg, model, tokenizer, prompts),
        "rules": {name: stats.rate(sum(map(check, greedy)), len(greedy)) for name, check in house_style.RULES.items()},
        "tokens": stats.mean([a["tokens"] for a in greedy]),
        "distinct_2": stats.mean([stats.distinct(a["text"]) for a in greedy]),
    }


def score(task: dict, folder: Path) -> dict:
    """A run's adapter on the test pairs: what the report says of them, and the account of what was dropped."""
    from dpo_tutorial import config, run_folder
    from dpo_tutorial.adapter import lora
    from dpo_tutorial.comparing import stats
    from dpo_tutorial.loading import models
    from dpo_tutorial.pairs import prepare
    from dpo_tutorial.training import save, scoring

    run = run_folder.Run(config.resolve(profile="cpu", artifacts=task["run"]))
    trained = save.read_training_record(run.adapter)["config"]
    cfg = config.resolve(profile="cpu", **{"dtype": trained["dtype"]} | task["knobs"])
    tokenizer = models.load_tokenizer(cfg)
    prepared = prepare.prepare(cfg, tokenizer)
    policy = lora.load_policy(cfg, run.adapter)
    records = scoring.score_pairs(cfg, policy, tokenizer, prepared.splits["test"], trained["beta"])
    return stats.summarise(records) | {"report": prepared.report["test"], "seed": trained["seed"]}


def read(task: dict, folder: Path) -> dict:
    """What `make run` saved in a folder: the comparison, and what the run took."""
    from dpo_tutorial import config, run_folder
    from dpo_tutorial.training import save

    run = run_folder.Run(config.resolve(profile="cpu", artifacts=task["run"]))
    comparison, summary = run.read_json("comparison.json"), run.read_json("summary.json")
    trained = save.read_training_record(run.adapter)
    after = comparison["held_out"]["after"]
    return {
        **{name: after[name] for name in ("accuracy", "reward_chosen", "reward_rejected", "margin")},
        **{name: comparison[name] for name in ("kl", "rules", "form")},
        "outside": comparison["outside"]["kept"],
        **{name: summary[name] for name in ("minutes", "peak_memory_gib", "versions", "hardware")},
        "settings": {name: trained["config"][name] for name in (*START, "dtype")},
    }


# --- stages ---------------------------------------------------------------------------------------------------------


def sweep(record: Record, options) -> None:
    """Every setting in a process of its own, two at a time on one core each; the untrained base beside them."""

    def one(name: str) -> None:
        task = {"kind": "train", "knobs": START | SWEEP.get(name, {}), "split": "val", "answers": True}
        found = child(__file__, task | {"untrained": name == "base"}, {"OMP_NUM_THREADS": "1"})
        record.write("sweep", name, **found)

    longest_first = sorted(("base", *SWEEP), key=lambda name: -SWEEP.get(name, {}).get("epochs", 1))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, longest_first))


def seeds(record: Record, options) -> None:
    """What `make run` saved in each folder, and its adapter on the same pairs in float32."""
    for run in given(options.runs, "--runs"):
        exact = child(__file__, {"kind": "score", "run": run, "knobs": {"dtype": "fp32"}})
        found = child(__file__, {"kind": "read", "run": run})
        record.write("seeds", f"seed {exact.pop('seed')}", float32=exact, **found)


def ultrafeedback(record: Record, options) -> None:
    """Adapters of the embedded set on test pairs of UltraFeedback up to 1,024 tokens."""
    for run in given(options.runs, "--runs"):
        knobs = {"data": given(options.rows, "--rows"), "max_tokens": 1024, "max_test": 1000}
        found = child(__file__, {"kind": "score", "run": run, "knobs": knobs})
        record.write("ultrafeedback", f"seed {found.pop('seed')}", **found)


def swapped(record: Record, options) -> None:
    found = child(__file__, {"kind": "train", "knobs": {"seed": 42}, "split": "test", "swapped": True})
    record.write("swapped", "seed 42", **found)


# --- the choice -----------------------------------------------------------------------------------------------------


def choose(results: dict) -> str | None:
    """The rule of choice, written before any figure of a trained setting was seen. Validation pairs only.

    Sound is a setting whose accuracy is not below the interval of the best, whose chosen reward has not fallen, and
    whose answers repeat themselves no more than the base's do. Of the sound ones, those whose answers keep as many
    rules of the style as the best of them, within its standard error, count as equal; of these the smallest KL wins.
    """
    base, tried = results["base"], {name: r for name, r in results.items() if name != "base"}
    floor = max((r["accuracy"] for r in tried.values()), key=lambda a: a["rate"])["low"]
    sound = {
        name: r
        for name, r in tried.items()
        if r["accuracy"]["rate"] >= floor
        and r["reward_chosen"]["mean"] > 0
        and r["distinct_2"]["mean"] >= base["distinct_2"]["mean"]
    }
    if not sound:
        return None
    best = max((rules_kept(r) for r in sound.values()), key=lambda kept: kept["mean"])
    equal = [n for n, r in sound.items() if rules_kept(r)["mean"] >= best["mean"] - best["standard_error"]]
    return min(equal, key=lambda name: sound[name]["kl"]["per_answer"]["mean"])


def rules_kept(result: dict) -> dict:
    """Mean share of rules kept; its standard error takes the rules as independent."""
    rates, n = [rule["rate"] for rule in result["rules"].values()], next(iter(result["rules"].values()))["n"]
    error = math.sqrt(sum(rate * (1 - rate) / n for rate in rates)) / len(rates)
    return {"mean": sum(rates) / len(rates), "standard_error": error, "n": n}


# --- tables ---------------------------------------------------------------------------------------------------------


def plus_minus(mean: dict, digits: int = 2) -> str:
    return f"{mean['mean']:.{digits}f} ± {1.96 * mean['standard_error']:.{digits}f}"


def columns(results: dict[str, dict], write: dict) -> str:
    """One row per result; `write` says how the cell of each column is written."""
    return table(["", *write], [[name, *(cell(result) for cell in write.values())] for name, result in results.items()])


REWARDS = {
    "accuracy": lambda r: interval(r["accuracy"]),
    "chosen reward": lambda r: plus_minus(r["reward_chosen"]),
    "rejected reward": lambda r: plus_minus(r["reward_rejected"]),
}
OF_SETTINGS = REWARDS | {
    "KL per answer": lambda r: plus_minus(r["kl"]["per_answer"], 1),
    "rules kept": lambda r: plus_minus(rules_kept(r)),
    "ends complete": lambda r: f"{r['rules']['ends complete']['rate']:.0%}",
    "tokens": lambda r: plus_minus(r["tokens"], 0),
    "distinct-2": lambda r: plus_minus(r["distinct_2"]),
}
OF_SEEDS = REWARDS | {
    "KL per answer": lambda r: plus_minus(r["kl"]["inside"]["per_answer"], 1),
    "KL per token": lambda r: plus_minus(r["kl"]["inside"]["per_token"]),
    "outside the style": lambda r: plus_minus(r["kl"]["outside"]["per_token"]),
    "requests kept outside": lambda r: f"{sum(r['outside']['before'])} → {sum(r['outside']['after'])} of 10",
    "minutes": lambda r: f"{sum(r['minutes'].values()):.1f}",
    "peak GiB": lambda r: f"{r['peak_memory_gib']:.1f}",
}
OF_OTHERS = REWARDS | {
    "pick the longer": lambda r: interval(r["pick_the_longer"]),
    "pick the shorter": lambda r: interval(r["pick_the_shorter"]),
    "pairs, of rows": lambda r: f"{r['accuracy']['n']} of {r['report']['rows']}",
    "dropped": lambda r: ", ".join(f"{n} {why}" for why, n in r["report"]["dropped"].items()),
}


def rules_table(runs: dict[str, dict]) -> str:
    rates = [(run["rules"]["before"], run["rules"]["after"]) for run in runs.values()]
    rows = [[rule, *(f"{b[rule]['rate']:.0%} → {a[rule]['rate']:.0%}" for b, a in rates)] for rule in rates[0][0]]
    return table(["", *runs], rows)


def of_stage(lines: list[dict], stage: str) -> tuple[dict[str, dict], str]:
    """The results by name, and the machine in words."""
    about, found = latest(lines, stage)
    said = machine(about).removesuffix(".") + (f"; {about['step']}." if "step" in about else ".")
    return {name: runs[-1] for name, runs in found.items()}, said


def tables(lines: list[dict]) -> dict[str, str]:
    tried, tried_on = of_stage(lines, "sweep")
    tried = {name: tried[name] for name in ("base", *SWEEP) if name in tried}
    runs, ran_on = of_stage(lines, "seeds")
    others, others_on = of_stage(lines, "ultrafeedback")
    opposite, opposite_on = of_stage(lines, "swapped")
    exact = {name: run["float32"] for name, run in runs.items()}
    return {
        "sweep": columns(tried, OF_SETTINGS), "sweep on": tried_on,
        "seeds": columns(runs, OF_SEEDS), "rules": rules_table(runs), "float32": columns(exact, REWARDS),
        "seeds on": ran_on, "ultrafeedback": columns(others, OF_OTHERS), "ultrafeedback on": others_on,
        "swapped": columns(opposite, REWARDS), "swapped on": opposite_on,
    }  # fmt: skip


def options(parser) -> None:
    parser.add_argument("--runs", nargs="*", default=[], help="folders that `make run ARTIFACTS=…` wrote")
    parser.add_argument("--rows", help="folder of UltraFeedback-binarized rows")


def given(value, name: str):
    if not value:
        raise SystemExit(f"This stage needs {name}; see --help.")
    return value


STAGES = {"sweep": sweep, "seeds": seeds, "ultrafeedback": ultrafeedback, "swapped": swapped}

if __name__ == "__main__":
    main(__file__, STAGES, tables, kinds={"train": train, "score": score, "read": read}, options=options)
