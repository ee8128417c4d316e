"""Does DPO work on the embedded set, and with which hyper-parameters? The record behind `benchmarks/effect.md`.

    python benchmarks/effect.py sweep                     # settings compared on the validation pairs only (an hour)
    for s in 42 1 2; do make run PROFILE=cpu SEED=$s ARTIFACTS=artifacts/seed$s; done
    python benchmarks/effect.py seeds artifacts/seed*     # those runs, reported on the test pairs
    python benchmarks/effect.py ultrafeedback FOLDER artifacts/seed42   # its adapter on other people's preferences
    python benchmarks/effect.py swapped                   # the same training with every label swapped: it must fail

Each part adds its entry to `effect.json`, with versions and hardware, and writes `effect.md` from all of it.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dpo_tutorial import artifacts, config, data, environment, evaluate, house_style, models, statistics, train

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


def keep(part: str, results: dict, trained: dict, versions: dict | None = None, hardware: dict | None = None) -> None:
    """Add a part to the record. `trained` is the config that was trained with, from which the page has the step."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    made = {
        "versions": versions or environment.versions(),
        "hardware": hardware or environment.hardware(),
        "step": f"{trained['batch_size']} pairs at a time, {trained['grad_accum']} times a step, "
        f"{'' if trained['prefix_sharing'] else 'no '}prefix sharing",
    }
    record[part] = made | {"results": results}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(page(record))


def judge(cfg, model, tokenizer, pairs) -> dict:
    """Rewards on pairs; KL, style rules and repetition of answers to the first 24 of their prompts."""
    prompts = pairs["prompt"][: cfg.compare_prompts]
    answers = evaluate.generate(cfg, model, tokenizer, prompts)
    held_out = statistics.summarise(evaluate.score_pairs(cfg, model, tokenizer, pairs))
    return {
        "accuracy": held_out["accuracy"],
        "reward_chosen": held_out["reward_chosen"],
        "reward_rejected": held_out["reward_rejected"],
        "kl": evaluate.kl_from_reference(cfg, model, tokenizer, prompts),
        "rules": {
            name: statistics.rate(sum(map(check, answers)), len(answers)) for name, check in house_style.RULES.items()
        },
        "tokens": statistics.mean([a["tokens"] for a in answers]),
        "distinct_2": statistics.mean([statistics.distinct(a["text"]) for a in answers]),
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
    return judge(cfg, trainer.model, tokenizer, splits["val"])


def sweep() -> None:
    """Every setting in a process of its own, two at a time on one core each; the untrained base beside them."""
    alone = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(name: str) -> tuple[str, dict]:
        command = [sys.executable, __file__, "one", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=alone)
        result = json.loads(done.stdout.splitlines()[-1])
        print(name, result["accuracy"], file=sys.stderr, flush=True)
        return name, result

    longest_first = sorted(("base", *SWEEP), key=lambda name: -SWEEP.get(name, {}).get("epochs", 1))
    with ThreadPoolExecutor(2) as pool:
        results = dict(pool.map(run, longest_first))
    keep("sweep", {name: results[name] for name in ("base", *SWEEP)}, config.resolve(profile="cpu").identity())


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


def score_adapter(cfg, adapter: Path, beta: float) -> tuple[dict, dict]:
    """An adapter on the test pairs of `cfg`: what the report says of them, and the account of what was dropped."""
    tokenizer = models.load_tokenizer(cfg)
    prepared = data.prepare(cfg, tokenizer)
    policy = models.load_policy(cfg, adapter)
    records = evaluate.score_pairs(cfg, policy, tokenizer, prepared.splits["test"], beta)
    return statistics.summarise(records), prepared.report["test"]


def seeds(folders: list[str]) -> None:
    """What `make run` saved in each folder."""
    results, machines = {}, []
    exact = config.resolve(profile="cpu", dtype="fp32")
    for folder in folders:
        run = artifacts.Run(config.resolve(profile="cpu", artifacts=folder))
        comparison, summary = run.read_json("comparison.json"), run.read_json("summary.json")
        trained = run.require_adapter()["config"]
        after = comparison["held_out"]["after"]
        results[str(trained["seed"])] = {
            "float32": score_adapter(exact, run.adapter, trained["beta"])[0],
            **{name: after[name] for name in ("accuracy", "reward_chosen", "reward_rejected", "margin")},
            **{name: comparison[name] for name in ("kl", "rules", "form")},
            "outside": comparison["outside"]["kept"],
            "minutes": summary["minutes"],
            "peak_memory_gib": summary["peak_memory_gib"],
            "settings": {name: trained[name] for name in (*START, "dtype")},
        }
        machines.append((summary["versions"], summary["hardware"]))
    assert len(results) == len(folders), "two folders hold the same seed"
    assert all(versions == machines[0][0] for versions, _ in machines), "the runs used different versions"
    keep("seeds", results, trained, *machines[0])


def ultrafeedback(rows: str, folder: str) -> None:
    """Accuracy of an adapter of the embedded set on test pairs of UltraFeedback up to 1,024 tokens."""
    run = artifacts.Run(config.resolve(profile="cpu", artifacts=folder))
    trained = run.require_adapter()["config"]
    cfg = config.resolve(profile="cpu", data=rows, max_tokens=1024, max_test=1000, dtype=trained["dtype"])
    found, report = score_adapter(cfg, run.adapter, trained["beta"])
    keep("ultrafeedback", found | {"report": report, "seed": trained["seed"]}, trained)


def swapped() -> None:
    """The cpu profile's own training with chosen and rejected exchanged, judged on the test pairs as they are."""
    cfg = config.resolve(profile="cpu")
    environment.seed_everything(cfg.seed)
    tokenizer = models.load_tokenizer(cfg)
    splits = data.prepare(cfg, tokenizer).splits
    sides = {"chosen": "rejected", "rejected": "chosen"}
    sides |= {f"{a}_tokens": f"{b}_tokens" for a, b in sides.items()}
    trainer = train.build_trainer(cfg, models.load_base(cfg), tokenizer, splits["train"].rename_columns(sides))
    environment.seed_everything(cfg.seed)
    trainer.train()
    found = statistics.summarise(evaluate.score_pairs(cfg, trainer.model, tokenizer, splits["test"]))
    keep("swapped", found | {"seed": cfg.seed}, cfg.identity())


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
    bf16 = hardware.get("cpu_bf16") or "without bfloat16"
    if "cpu_bf16_speedup" in hardware:  # of records made while the compute type went by a measured speed
        bf16 = f"matrices multiplied {hardware['cpu_bf16_speedup']} times as fast in bfloat16 as in float32"
    return f"{hardware['cores']} cores, {hardware['memory_gib']:g} GiB, {bf16}; {packages}; {part['step']}."


REWARDS = {
    "accuracy": lambda r: span(r["accuracy"]),
    "chosen reward": lambda r: plus_minus(r["reward_chosen"]),
    "rejected reward": lambda r: plus_minus(r["reward_rejected"]),
}


def sweep_section(part: dict) -> list[str]:
    columns = REWARDS | {
        "KL per answer": lambda r: plus_minus(r["kl"]["per_answer"], 1),
        "rules kept": lambda r: plus_minus(rules_kept(r)),
        "ends complete": lambda r: f"{r['rules']['ends complete']['rate']:.0%}",
        "tokens": lambda r: plus_minus(r["tokens"], 0),
        "distinct-2": lambda r: plus_minus(r["distinct_2"]),
    }
    return [
        "## Settings, on the 48 validation pairs",
        "One thing changed at a time from the first setting, one seed each; 24 greedy answers and 24 drawn ones. "
        "Accuracy with its 95% Wilson interval, means ± 1.96 standard errors, KL in nats. A reward is a multiple of "
        "beta: divide by it before you compare rewards of two betas.",
        table(part["results"], columns),
        f"**Choice:** {choose(part['results']) or 'none of them was sound'}. {' '.join(choose.__doc__.split())}",
        made_on(part),
    ]


def seeds_section(part: dict) -> list[str]:
    results = part["results"]
    any_run = next(iter(results.values()))
    columns = REWARDS | {
        "KL per answer": lambda r: plus_minus(r["kl"]["inside"]["per_answer"], 1),
        "KL per token": lambda r: plus_minus(r["kl"]["inside"]["per_token"]),
        "outside the style": lambda r: plus_minus(r["kl"]["outside"]["per_token"]),
        "requests kept outside": lambda r: f"{sum(r['outside']['before'])} → {sum(r['outside']['after'])} of 10",
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
        "The base scores 0.50 by construction. The seed changes the adapter's start, the order of training, and which "
        "24 of the test prompts are answered, not the pairs: the three intervals are not independent. Minutes are of "
        "all six notebooks after set-up; the peak is that of the largest notebook's process.",
        table({f"seed {seed}": r for seed, r in results.items()}, columns),
        "Share of 24 greedy answers that keep each rule, base → policy (intervals are in notebook 06):",
        table(rules, by_seed),
        "The same adapters on the same pairs, all computed in float32. What bfloat16 hides of an adapter in its first "
        "steps ([training_speed.md](training_speed.md)) is mostly gone when training ends:",
        table({f"seed {seed}": r["float32"] for seed, r in results.items()}, REWARDS),
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
        "## The adapter on other people's preferences",
        f"{r['accuracy']['n']} test pairs of `HuggingFaceH4/ultrafeedback_binarized` up to 1,024 tokens, of "
        f"{r['report']['rows']} rows in a sample (dropped: {dropped}).",
        table({f"seed {r['seed']}": r}, columns),
        made_on(part),
    ]


def swapped_section(part: dict) -> list[str]:
    return [
        "## Every label swapped",
        "The same settings, trained to prefer the rejected answers, on the test pairs as they are labelled. An "
        "evaluation that could not fail would still report success here.",
        table({f"seed {part['results']['seed']}": part["results"]}, REWARDS),
        made_on(part),
    ]


SECTIONS = {
    "sweep": sweep_section, "seeds": seeds_section, "ultrafeedback": ultrafeedback_section, "swapped": swapped_section,
}  # fmt: skip


def page(record: dict) -> str:
    parts = [
        "# Does it work, and with which settings?",
        "Written by `benchmarks/effect.py`, which has the commands. Pairs a step are the same everywhere; where they "
        "went through in another way than now, the loss is the same up to rounding "
        "([training_speed.md](training_speed.md)).",
    ]
    for name in SECTIONS:
        if name in record:
            parts += SECTIONS[name](record[name])
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    part, *rest = sys.argv[1:] or ["help"]
    if part == "one":
        print(json.dumps(one(*rest)))
    elif part in ("sweep", "swapped"):
        {"sweep": sweep, "swapped": swapped}[part]()
    elif part == "seeds" and rest:
        seeds(rest)
    elif part == "ultrafeedback" and len(rest) == 2:
        ultrafeedback(*rest)
    else:
        raise SystemExit(__doc__)
