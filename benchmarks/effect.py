"""Does DPO work on the embedded set, and with which hyper-parameters? The record behind `benchmarks/effect.md`.

    python benchmarks/effect.py sweep                     # settings compared on the validation pairs only (an hour)
    for s in 42 1 2; do make run PROFILE=cpu SEED=$s ARTIFACTS=artifacts/seed$s; done
    python benchmarks/effect.py seeds artifacts/seed*     # those runs, reported on the test pairs
    python benchmarks/effect.py ultrafeedback FOLDER artifacts/seed42   # its adapter on other people's preferences

Each part adds its entry to `effect.json`, with versions and hardware, and writes `effect.md` from all of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dpo_tutorial import artifacts, config, data, environment, evaluate, house_style, models, train

HERE = Path(__file__).parent
RECORD, PAGE = HERE / "effect.json", HERE / "effect.md"

#: The first guess, and what was tried around it: one thing changed at a time.
START = {"learning_rate": 1.5e-4, "epochs": 1, "beta": 0.1}
SWEEP = {
    "1.5e-4, 1 epoch, beta 0.1": {},
    "3e-4": {"learning_rate": 3e-4},
    "5e-5": {"learning_rate": 5e-5},
    "beta 0.3": {"beta": 0.3},
    "2 epochs": {"epochs": 2},
}


def keep(part: str, value: object) -> None:
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record[part] = {"versions": environment.versions(), "hardware": environment.hardware(), "results": value}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(page(record))


def judge(cfg, model, tokenizer, pairs) -> dict:
    """Rewards on pairs; KL, style rules and repetition of answers to the first 24 of their prompts."""
    prompts = pairs["prompt"][: cfg.compare_prompts]
    answers = evaluate.generate(cfg, model, tokenizer, prompts)
    held_out = evaluate.summarise(evaluate.score_pairs(cfg, model, tokenizer, pairs))
    return {
        "accuracy": held_out["accuracy"],
        "reward_chosen": held_out["reward_chosen"],
        "reward_rejected": held_out["reward_rejected"],
        "kl": evaluate.kl_from_reference(cfg, model, tokenizer, prompts),
        "rules": evaluate.rule_rates(answers, house_style.RULES),
        "tokens": evaluate.mean([a["tokens"] for a in answers]),
        "distinct_2": evaluate.mean([evaluate.distinct(a["text"]) for a in answers]),
    }


def one(name: str) -> dict:
    """Train one setting and judge it on the validation pairs."""
    cfg = config.resolve(profile="cpu", **(START | SWEEP.get(name, {})))
    environment.seed_everything(cfg.seed)
    tokenizer, base = models.load_tokenizer(cfg), models.load_base(cfg)
    splits = data.prepare(cfg, tokenizer).splits
    trainer = train.build_trainer(cfg, base, tokenizer, splits["train"], None, f"artifacts/sweep/{name}")
    if name == "base":
        return judge(cfg, trainer.model, tokenizer, splits["val"])
    environment.seed_everything(cfg.seed)
    trainer.train()
    return judge(cfg, trainer.model, tokenizer, splits["val"]) | {"last_losses": losses(trainer)}


def losses(trainer) -> list[float]:
    return [row["loss"] for row in train.history(trainer)["train"][-5:]]


def sweep() -> None:
    """Every setting in a process of its own, two at a time on one core each; the untrained base beside them."""
    results = {}

    def run(name: str) -> None:
        command, alone = [sys.executable, __file__, "one", name], os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=alone)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, results[name]["accuracy"], file=sys.stderr, flush=True)
        keep("sweep", {n: results[n] for n in ("base", *SWEEP) if n in results})

    longest_first = sorted(("base", *SWEEP), key=lambda name: -SWEEP.get(name, {}).get("epochs", 1))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, longest_first))


def choose(results: dict) -> str:
    """The rule of choice, written before the figures were seen: validation pairs only.

    Of the settings whose accuracy is not below the interval of the best, whose chosen reward has not fallen, and
    whose answers repeat themselves no more than the base's do, take the one whose answers keep most rules of the
    style; between equals the smaller KL.
    """
    base, tried = results["base"], {name: results[name] for name in SWEEP if name in results}
    floor = max((r["accuracy"] for r in tried.values()), key=lambda a: a["rate"])["low"]
    sound = {
        name: r
        for name, r in tried.items()
        if r["accuracy"]["rate"] >= floor
        and r["reward_chosen"]["mean"] > 0
        and r["distinct_2"]["mean"] >= base["distinct_2"]["mean"] - 2 * base["distinct_2"]["standard_error"]
    }
    return max(sound, key=lambda name: (rules_kept(sound[name]), -sound[name]["kl"]["per_answer"]["mean"]))


def rules_kept(result: dict) -> float:
    return round(sum(rule["rate"] for rule in result["rules"].values()) / len(result["rules"]), 3)


def seeds(folders: list[str]) -> None:
    """What `make run` saved in each folder."""
    results = {}
    for folder in sorted(folders):
        run = artifacts.Run(config.resolve(profile="cpu", artifacts=folder))
        comparison, summary, record = (
            run.read_json("comparison.json"),
            run.read_json("summary.json"),
            run.require_adapter(),
        )
        after = comparison["held_out"]["after"]
        results[str(record["config"]["seed"])] = {
            **{name: after[name] for name in ("accuracy", "reward_chosen", "reward_rejected", "margin")},
            "validation": {k: v for k, v in record["history"]["eval"][-1].items() if "rewards" in k},
            "kl": comparison["kl"],
            "rules": comparison["rules"],
            "form": comparison["form"],
            "minutes": summary["minutes"],
            "peak_memory_gib": summary["peak_memory_gib"],
            "dtype": record["config"]["dtype"],
        }
    keep("seeds", results)


def ultrafeedback(rows: str, folder: str) -> None:
    """Accuracy of an adapter of the embedded set on test pairs of UltraFeedback up to 1,024 tokens."""
    run = artifacts.Run(config.resolve(profile="cpu", artifacts=folder))
    beta = run.require_adapter()["config"]["beta"]
    cfg = config.resolve(profile="cpu", data=rows, max_tokens=1024, max_test=1000)
    tokenizer = models.load_tokenizer(cfg)
    prepared = data.prepare(cfg, tokenizer)
    policy = models.load_policy(cfg, run.adapter)
    found = evaluate.summarise(evaluate.score_pairs(cfg, policy, tokenizer, prepared.splits["test"], beta))
    keep("ultrafeedback", found | {"report": prepared.report["test"]})


# --- the page -----------------------------------------------------------------------------------------------------


def span(rate: dict) -> str:
    return f"{rate['rate']:.2f} ({rate['low']:.2f} to {rate['high']:.2f})"


def plus_minus(mean: dict, digits: int = 2) -> str:
    return f"{mean['mean']:.{digits}f} ± {1.96 * mean['standard_error']:.{digits}f}"


def table(results: dict, columns: dict) -> str:
    """One line per result; `columns` says how each cell is written."""
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(write(result) for write in columns.values())] for name, result in results.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def made_on(part: dict) -> str:
    hardware, versions = part["hardware"], part["versions"]
    packages = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "transformers", "trl", "peft", "bitsandbytes")
    )
    return (
        f"{hardware['cores']} cores, {hardware['memory_gib']:g} GiB, matrices multiplied {hardware['cpu_bf16_speedup']:g} "
        f"times as fast in bfloat16 as in float32; {packages}."
    )


REWARDS = {
    "accuracy": lambda r: span(r["accuracy"]),
    "chosen reward": lambda r: plus_minus(r["reward_chosen"]),
    "rejected reward": lambda r: plus_minus(r["reward_rejected"]),
}


def sweep_section(part: dict) -> list[str]:
    columns = REWARDS | {
        "KL per answer": lambda r: plus_minus(r["kl"]["per_answer"], 1),
        "rules kept": lambda r: f"{rules_kept(r):.2f}",
        "ends complete": lambda r: f"{r['rules']['ends complete']['rate']:.0%}",
        "tokens": lambda r: plus_minus(r["tokens"], 0),
        "distinct-2": lambda r: plus_minus(r["distinct_2"]),
    }
    return [
        "## Settings, on the 48 validation pairs",
        "One thing changed at a time from the first setting; 24 greedy answers and 24 drawn ones each. Accuracy with "
        "its 95% Wilson interval, means ± 1.96 standard errors, KL in nats.",
        table(part["results"], columns),
        f"**Choice:** {choose(part['results'])}. " + " ".join(choose.__doc__.split("\n\n", 1)[1].split()),
        made_on(part),
    ]


def seeds_section(part: dict) -> list[str]:
    results = part["results"]
    any_run = next(iter(results.values()))
    columns = REWARDS | {
        "KL per answer": lambda r: plus_minus(r["kl"]["inside"]["per_answer"], 1),
        "KL per token": lambda r: plus_minus(r["kl"]["inside"]["per_token"]),
        "outside the style": lambda r: plus_minus(r["kl"]["outside"]["per_token"]),
        "minutes": lambda r: f"{sum(r['minutes'].values()):.1f}",
        "peak GiB": lambda r: f"{r['peak_memory_gib']:.1f}",
    }
    rules = {
        rule: [(r["rules"]["before"][rule], r["rules"]["after"][rule]) for r in results.values()]
        for rule in any_run["rules"]["before"]
    }
    by_seed = {
        f"seed {seed}": lambda pairs, i=i: f"{pairs[i][0]['rate']:.0%} → {pairs[i][1]['rate']:.0%}"
        for i, seed in enumerate(results)
    }
    return [
        f"## `make run` with three seeds, on the {any_run['accuracy']['n']} test pairs",
        "The base scores 0.50 by construction. Minutes are of all six notebooks after set-up; the peak is that of the "
        "largest notebook.",
        table({f"seed {seed}": r for seed, r in results.items()}, columns),
        "Share of 24 greedy answers that keep each rule, base → policy (intervals are in notebook 06):",
        table(rules, by_seed),
        made_on(part),
    ]


def ultrafeedback_section(part: dict) -> list[str]:
    r = part["results"]
    dropped = ", ".join(f"{n} {why}" for why, n in r["report"]["dropped"].items())
    columns = REWARDS | {
        "pick the longer": lambda r: span(r["pick_the_longer"]),
        "pick the shorter": lambda r: span(r["pick_the_shorter"]),
    }
    return [
        "## The same adapter on UltraFeedback",
        f"{r['accuracy']['n']} test pairs of `HuggingFaceH4/ultrafeedback_binarized` up to 1,024 tokens, of "
        f"{r['report']['rows']} rows in a sample (dropped: {dropped}).",
        table({"seed 42": r}, columns),
        made_on(part),
    ]


def page(record: dict) -> str:
    parts = ["# Does it work, and with which settings?", "Written by `benchmarks/effect.py`, which has the commands."]
    for name, section in (("sweep", sweep_section), ("seeds", seeds_section), ("ultrafeedback", ultrafeedback_section)):
        if name in record:
            parts += section(record[name])
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    part, *rest = sys.argv[1:] or ["help"]
    if part == "one":
        print(json.dumps(one(*rest)))
    elif part == "sweep":
        sweep()
    elif part == "seeds" and rest:
        seeds(rest)
    elif part == "ultrafeedback" and len(rest) == 2:
        ultrafeedback(*rest)
    else:
        raise SystemExit(__doc__)
