"""Does DPO work on the embedded set, by which recipe, on which seeds, and against which simpler explanation?

    python benchmarks/effect.py recipes                   # on the validation pairs only, about two hours on two cores
    for s in 42 1 2; do dpo-tutorial train -p PROFILE cpu -p SEED $s -p ARTIFACTS artifacts/seed$s; done
    python benchmarks/effect.py seeds --runs artifacts/seed42 artifacts/seed1 artifacts/seed2      # on the test pairs
    python benchmarks/effect.py swapped                   # the same training with every label swapped: it must fail

`page` writes the tables of effect.md again.
"""

from __future__ import annotations

from pathlib import Path

from harness import Record, child, in_turn, interval, machines, main, newest, table

RATES = (5e-5, 1.5e-4, 3e-4)
#: What is compared: plain DPO, DPO with the NLL of the chosen answers beside it, SFT on them alone, and SFT first.
RECIPES = {
    f"{name}, {rate:g}": {"learning_rate": rate, "sft_weight": 0.0} | knobs
    for name, knobs in (
        ("DPO", {}),
        ("DPO + SFT", {"sft_weight": 1.0}),
        ("SFT", {"loss_type": "sft"}),
        ("SFT, then DPO", {"start_from": "SFT"}),
    )
    for rate in RATES
}
BEFORE = {"learning_rate": 1.5e-4, "loss_type": "sft", "sft_weight": 0.0}  # the SFT of "SFT, then DPO"
WHOLE = {"compare_prompts": 1000, "max_new_tokens": 256, "instructions": 126}  # every prompt, and a limit that cuts few


# --- measurements, each in a process of its own ---------------------------------------------------------------------


def train(task: dict, folder: Path) -> dict:
    """A training of the `cpu` profile, judged on `split`.

    The task's `knobs` differ from the profile's; with `start_from` an SFT of `BEFORE` comes first. `swapped` exchanges
    chosen and rejected of the training pairs; `untrained` judges the base; `answers` generates too.
    """
    import trainings

    from dpo_tutorial import config
    from dpo_tutorial.comparing import stats
    from dpo_tutorial.loading import models
    from dpo_tutorial.machine import hardware
    from dpo_tutorial.pairs import prepare
    from dpo_tutorial.training import scoring

    def trained(**knobs):
        cfg = config.resolve(profile=task.get("profile", "cpu"), **knobs)
        hardware.seed_everything(cfg.seed)
        trainer = trainings.our_trainer(cfg, models.load_base(cfg), tokenizer, pairs, None, folder)
        if not task.get("untrained"):
            hardware.seed_everything(cfg.seed)
            trainer.train()
        return cfg, trainer.model

    cfg = config.resolve(profile=task.get("profile", "cpu"), **task["knobs"] | {"start_from": ""})
    tokenizer = models.load_tokenizer(cfg)
    splits = prepare.prepare(cfg, tokenizer).splits
    pairs, judged = splits["train"], splits[task["split"]]
    if task.get("swapped"):
        sides = {"chosen": "rejected", "rejected": "chosen"}
        pairs = pairs.rename_columns(sides | {f"{a}_tokens": f"{b}_tokens" for a, b in sides.items()})
    knobs = dict(task["knobs"])
    if knobs.get("start_from"):
        _, first = trained(**knobs | BEFORE | {"start_from": ""})
        knobs["start_from"] = trainings.save_to_go_on(cfg, first, folder / "sft")
        del first
    cfg, model = trained(**knobs)
    found = stats.summarise(scoring.score_pairs(cfg, model, tokenizer, judged))
    return found | (answers(cfg, model, tokenizer, judged) if task.get("answers") else {})


def answers(cfg, model, tokenizer, pairs) -> dict:
    """KL, rules, repetition and instructions: what the policy writes to the first prompts of the pairs."""
    from dpo_tutorial.comparing import answer_form, generation, instructions, stats
    from dpo_tutorial.pairs import house_style

    prompts = pairs["prompt"][: cfg.compare_prompts]
    greedy = generation.generate(cfg, model, tokenizer, prompts)
    requests = instructions.load()
    asked = [[{"role": "user", "content": request["prompt"]}] for request in requests]
    followed = instructions.followed(requests, generation.generate(cfg, model, tokenizer, asked))
    kept = [[float(check(answer)) for check in house_style.RULES.values()] for answer in greedy]
    return {
        "kl": generation.kl_from_base(cfg, model, tokenizer, prompts),
        "rules": {name: stats.share([k[i] for k in kept]) for i, name in enumerate(house_style.RULES)},
        "kept": [sum(k) / len(k) for k in kept],
        "tokens": stats.mean([a["tokens"] for a in greedy]),
        "distinct_2": stats.mean([answer_form.distinct(a["text"]) for a in greedy]),
        "followed": [int(f) for f in followed],
        "samples": [a["text"] for a in greedy[:3]],
    }


def judge(task: dict, folder: Path) -> dict:
    """A run's adapter on all test pairs and requests: what `dpo-tutorial compare` reports, and what training took."""
    from dpo_tutorial import config, run_folder
    from dpo_tutorial.adapter import lora
    from dpo_tutorial.comparing import compare
    from dpo_tutorial.loading import models
    from dpo_tutorial.machine import hardware
    from dpo_tutorial.pairs import prepare
    from dpo_tutorial.training import save

    run = run_folder.Run(config.resolve(profile="cpu", artifacts=task["run"]))
    about = save.read_training_record(run.adapter)
    trained = about["config"]
    cfg = config.resolve(profile="cpu", **{"dtype": trained["dtype"]} | WHOLE | task.get("knobs", {}))
    hardware.seed_everything(cfg.seed)
    tokenizer = models.load_tokenizer(cfg)
    splits = prepare.prepare(cfg, tokenizer).splits
    policy = lora.load_policy(cfg, run.adapter)
    _, found = compare.compare(cfg, policy, tokenizer, splits, trained["beta"])
    after, checked = found["held_out"]["after"], found["instructions"]
    return {
        **{name: after[name] for name in ("accuracy", "reward_chosen", "reward_rejected", "margin")},
        **{name: found[name] for name in ("against", "by_kind", "kl", "rules", "form", "same_length", "same_form")},
        "instructions": {
            name: checked[name]
            for name in ("before", "after", "gained", "lost", "p", "smallest", "against_style", "within_style")
        },
        **{name: about[name] for name in ("seconds", "peak_memory_gib")},
        "seed": trained["seed"],
        "samples": found["answers"][:3],
    }


# --- stages ---------------------------------------------------------------------------------------------------------


def recipes(record: Record, options) -> None:
    """Every recipe in a process of its own, two at a time on one core each; the untrained base beside them."""
    task = {"kind": "train", "split": "val", "answers": True}
    settings = {"compare_prompts": 48, "max_new_tokens": 128}
    names = options.only or sorted(("base", *RECIPES), key=lambda name: "then" not in name)
    tasks = {n: task | {"knobs": RECIPES.get(n, {}) | settings, "untrained": n == "base"} for n in names}
    in_turn(__file__, record, "recipes", tasks)


def seeds(record: Record, options) -> None:
    for run in given(options.runs, "--runs"):
        found = child(__file__, {"kind": "judge", "run": run})
        record.write("seeds", f"seed {found.pop('seed')}", **found)


def swapped(record: Record, options) -> None:
    found = child(__file__, {"kind": "train", "knobs": {"seed": 42}, "split": "test", "swapped": True})
    record.write("swapped", "seed 42", **found)


# --- the choice -----------------------------------------------------------------------------------------------------


def choose(results: dict) -> str | None:
    """The rule of choice, written before any figure of a trained recipe was seen. Validation pairs only.

    Sound is a recipe whose answers repeat themselves no more than the base's do (mean distinct-2), and that loses no
    more instructions than chance (McNemar, p < 0.05). Of the sound ones, those whose answers keep as many rules of the
    style as the best of them, within 1.96 standard errors paired by prompt, count as equal; of these the smallest KL
    per token wins. Accuracy is not asked. SFT alone is the control, and no candidate.
    """
    from dpo_tutorial.comparing import significance, stats

    base = results["base"]
    tried = {name: r for name, r in results.items() if name != "base" and not name.startswith("SFT, 0")}

    def loses(result: dict) -> bool:
        fewer = sum(result["followed"]) < sum(base["followed"])
        return fewer and significance.sign_test(base["followed"], result["followed"]) < 0.05

    sound = {
        name: r for name, r in tried.items() if r["distinct_2"]["mean"] >= base["distinct_2"]["mean"] and not loses(r)
    }
    if not sound:
        return None
    best = max(sound.values(), key=lambda r: sum(r["kept"]))

    def equal(result: dict) -> bool:
        gap = stats.mean([b - r for b, r in zip(best["kept"], result["kept"], strict=True)])
        return result is best or gap["mean"] <= 1.96 * gap["standard_error"]

    return min((n for n in sound if equal(sound[n])), key=lambda name: sound[name]["kl"]["per_token"]["mean"])


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
OF_RECIPES = REWARDS | {
    "KL per token": lambda r: plus_minus(r["kl"]["per_token"]),
    "rules kept": lambda r: f"{sum(r['kept']) / len(r['kept']):.3f}",
    "ends complete": lambda r: f"{r['rules']['ends complete']['rate']:.0%}",
    "tokens": lambda r: plus_minus(r["tokens"], 0),
    "distinct-2": lambda r: plus_minus(r["distinct_2"]),
    "instructions": lambda r: f"{sum(r['followed'])} of {len(r['followed'])}",
}
OF_SEEDS = REWARDS | {
    "KL per answer": lambda r: plus_minus(r["kl"]["inside"]["per_answer"], 1),
    "KL per token": lambda r: plus_minus(r["kl"]["inside"]["per_token"]),
    "tokens": lambda r: f"{r['form']['before']['tokens']['mean']:.0f} → {r['form']['after']['tokens']['mean']:.0f}",
    "minutes of training": lambda r: f"{r['seconds'] / 60:.1f}",
    "peak GiB": lambda r: f"{r['peak_memory_gib']:.1f}",
}


def moved(change: dict) -> str:
    from dpo_tutorial.comparing import stats

    return " **moved**" if stats.moved(change) else ""


def rules_table(runs: dict[str, dict]) -> str:
    first = next(iter(runs.values()))["rules"]
    rows = []
    for rule, target in first["target"].items():
        cells = [
            f"{r['rules']['before'][rule]['rate']:.0%} → {r['rules']['after'][rule]['rate']:.0%}"
            f" ({r['rules']['change'][rule]['corrected']:.2g}){moved(r['rules']['change'][rule])}"
            for r in runs.values()
        ]
        rows.append([rule, *cells, f"{target['rate']:.0%}"])
    return table(["", *runs, "chosen answers"], rows)


def signed(change: dict) -> str:
    return f"{change['difference']:+.2f} ({change['low']:+.2f} to {change['high']:+.2f})"


def against_table(runs: dict[str, dict]) -> str:
    """Each judge's accuracy, and the policy's above it on each seed."""
    names = list(dict.fromkeys(name for r in runs.values() for name in r["against"]))
    rows = []
    for name in names:
        found = [r["against"].get(name) for r in runs.values()]
        cells = [signed(f["difference"]) if f else "" for f in found]
        rows.append([name, interval(next(f for f in found if f)["share"]), *cells])
    return table(["judge", "accuracy", *(f"policy, {seed}" for seed in runs)], rows)


def kinds_table(runs: dict[str, dict]) -> str:
    first = next(iter(runs.values()))["by_kind"]

    def policy(run: dict, kind: str) -> str:
        return f"{run['by_kind'][kind]['policy']['rate']:.2f}"

    rows = [
        [kind, row["n"], f"{row['word counts']['rate']:.2f}", *(policy(r, kind) for r in runs.values())]
        for kind, row in first.items()
    ]
    return table(["rejected answer", "pairs", "word counts", *(f"policy, {seed}" for seed in runs)], rows)


def instructions_table(runs: dict[str, dict]) -> str:
    rows = []
    for seed, r in runs.items():
        for part in ("all", "within_style", "against_style"):
            found = r["instructions"] if part == "all" else r["instructions"][part]
            seen = found["smallest"]["power_80"]
            rows.append([
                seed, part.replace("_", " "), found["before"]["n"], interval(found["before"]), interval(found["after"]),
                found["gained"], found["lost"], f"{found['p']:.2g}", "" if seen is None else f"{seen:.2f}",
            ])  # fmt: skip
    head = ["", "requests", "n", "base", "policy", "gained", "lost", "p", "would find, 4 times in 5"]
    return table(head, rows)


def of_stage(lines: list[dict], stage: str) -> tuple[dict[str, dict], str]:
    """The newest result by name, and the machines in words."""
    return newest(lines, stage), machines(lines, stage)


def tables(lines: list[dict]) -> dict[str, str]:
    tried, tried_on = of_stage(lines, "recipes")
    runs, ran_on = of_stage(lines, "seeds")
    opposite, opposite_on = of_stage(lines, "swapped")
    made = {}
    if tried:
        tried = {name: tried[name] for name in ("base", *RECIPES) if name in tried}
        made |= {"recipes": columns(tried, OF_RECIPES), "recipes on": tried_on}
    if runs:
        made |= {
            "seeds": columns(runs, OF_SEEDS), "against": against_table(runs), "kinds": kinds_table(runs),
            "rules": rules_table(runs), "instructions": instructions_table(runs), "seeds on": ran_on,
        }  # fmt: skip
    if opposite:
        made |= {"swapped": columns(opposite, REWARDS), "swapped on": opposite_on}
    return made


def options(parser) -> None:
    parser.add_argument("--runs", nargs="*", default=[], help="folders that `dpo-tutorial train -p ARTIFACTS …` wrote")
    parser.add_argument("--only", nargs="*", default=[], help="recipes by name, or base")


def given(value, name: str):
    if not value:
        raise SystemExit(f"This stage needs {name}; see --help.")
    return value


STAGES = {"recipes": recipes, "seeds": seeds, "swapped": swapped}

if __name__ == "__main__":
    main(__file__, STAGES, tables, kinds={"train": train, "judge": judge}, options=options)
