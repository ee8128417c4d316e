"""Does DPO work on the embedded set, and with which hyper-parameters? The record behind `benchmarks/effect.md`.

    python benchmarks/effect.py sweep                  # settings compared on the validation pairs only (an hour)
    python benchmarks/effect.py seeds 42 1 2           # `make run` for each seed, reported on the test pairs
    python benchmarks/effect.py ultrafeedback FOLDER   # the adapter of seed 42 on rows of UltraFeedback
    python benchmarks/effect.py table                  # write effect.md from effect.json

Each part adds its own entry to `effect.json`, with versions and hardware; `table` makes the page from it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dpo_tutorial import config, data, environment, evaluate, house_style, models, train

HERE = Path(__file__).parent
RECORD = HERE / "effect.json"

#: What was tried, around the first guess: one thing changed at a time.
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
    cfg = config.resolve(profile="cpu", **SWEEP.get(name, {}))
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


if __name__ == "__main__":
    part, *rest = sys.argv[1:] or ["help"]
    if part == "one":
        print(json.dumps(one(*rest)))
    elif part == "sweep":
        sweep()
    else:
        print(__doc__)
