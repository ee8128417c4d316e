"""Does DPO work on the embedded set, by which recipe, on which seeds, and against which simpler explanation?

    python benchmarks/effect.py recipes                   # on the validation pairs only, about two hours on two cores
    for s in 42 1 2; do dpo-tutorial train -p PROFILE cpu -p SEED $s -p ARTIFACTS artifacts/seed$s; done
    python benchmarks/effect.py seeds --runs artifacts/seed42 artifacts/seed1 artifacts/seed2      # on the test pairs
    for s in 42 1 2; do
        dpo-tutorial train -p PROFILE cpu -p LOSS_TYPE sft -p SFT_WEIGHT 0 -p SEED $s -p ARTIFACTS artifacts/sft$s
    done
    python benchmarks/effect.py control --runs artifacts/sft42 artifacts/sft1 artifacts/sft2     # the same of SFT alone
    python benchmarks/effect.py fewer                     # the chosen recipe on fewer pairs, on the validation pairs
    python benchmarks/effect.py swapped                   # the same training with every label swapped: it must fail

`page` writes the tables of effect.md again.
"""

from __future__ import annotations

from pathlib import Path

from effect_page import ALL, CHOSEN, drawn, tables
from harness import Record, child, in_turn, main

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
FEWER = (160, 240)  # pairs that the recipe of the profile was tried with
ON_VALIDATION = {"kind": "train", "split": "val", "answers": True}
SHORT = {"max_train": ALL, "max_val": 90, "compare_prompts": 48, "max_new_tokens": 128}  # of all recipes
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
    found["pairs"] = len(pairs)
    return found | (answers(cfg, model, tokenizer, judged) if task.get("answers") else {})


def by_rule(written: list[dict]) -> dict[str, list[int]]:
    """For each rule of the style: 1 for an answer that keeps it, else 0."""
    from dpo_tutorial.pairs import house_style

    return {rule: [int(check(answer)) for answer in written] for rule, check in house_style.RULES.items()}


def answers(cfg, model, tokenizer, pairs) -> dict:
    """KL, rules, repetition and instructions: what the policy writes to the first prompts of the pairs."""
    from dpo_tutorial.comparing import answer_form, generation, instructions, stats

    prompts = pairs["prompt"][: cfg.compare_prompts]
    greedy = generation.generate(cfg, model, tokenizer, prompts)
    requests = instructions.load()
    asked = instructions.conversations(requests)
    followed = instructions.followed(requests, generation.generate(cfg, model, tokenizer, asked))
    kept = by_rule(greedy)
    return {
        "kl": generation.kl_from_base(cfg, model, tokenizer, prompts)[0],
        "rules": {rule: stats.share(answered) for rule, answered in kept.items()},
        "kept": [sum(of_one) / len(of_one) for of_one in zip(*kept.values(), strict=True)],
        "tokens": stats.mean([a["tokens"] for a in greedy]),
        "distinct_2": stats.mean([answer_form.distinct(a["text"]) for a in greedy]),
        "followed": [int(f) for f in followed],
        "samples": [a["text"] for a in greedy[:3]],
    }


def judge(task: dict, folder: Path) -> dict:
    """A run's adapter on all test pairs and requests: what `dpo-tutorial compare` reports, and what training took.

    `each` has what pairs two runs: the margin of each pair, for each prompt its tokens and 0 or 1 by rule, and 0 or 1
    for each request.
    """
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
    records, found = compare.compare(cfg, policy, tokenizer, splits, trained["beta"])
    after, checked = found["held_out"]["after"], found["instructions"]
    each = by_rule([answer["after"] for answer in found["answers"]])
    each["tokens"] = [answer["after"]["tokens"] for answer in found["answers"]]
    each["followed"] = [int(done) for done in checked["followed"]["after"]]
    each["margin"] = [round(r["margin"], 4) for r in records]
    return {
        **{name: after[name] for name in ("accuracy", "reward_chosen", "reward_rejected", "margin")},
        **{name: found[name] for name in ("against", "by_kind", "kl", "rules", "form", "same_length", "same_form")},
        "instructions": {
            name: checked[name]
            for name in ("before", "after", "gained", "lost", "p", "smallest", "against_style", "within_style")
        },
        **{name: about[name] for name in ("seconds", "peak_memory_gib")},
        "pairs": trained["max_train"],
        "samples": found["answers"][:3],
        "each": each,
    }


# --- stages ---------------------------------------------------------------------------------------------------------


def recipes(record: Record, options) -> None:
    """Every recipe in a process of its own, two at a time on one core each; the untrained base beside them."""
    names = options.only or sorted(("base", *RECIPES), key=lambda name: "then" not in name)
    tasks = {n: ON_VALIDATION | {"knobs": RECIPES.get(n, {}) | SHORT, "untrained": n == "base"} for n in names}
    in_turn(__file__, record, "recipes", tasks)


def fewer(record: Record, options) -> None:
    """The chosen recipe on its first pairs only, judged as the recipes are."""
    knobs = RECIPES[CHOSEN] | SHORT
    tasks = {f"{n} pairs": ON_VALIDATION | {"knobs": knobs | {"max_train": n}} for n in reversed(FEWER)}
    in_turn(__file__, record, "fewer", tasks)


def seeds(record: Record, options, stage: str = "seeds") -> None:
    """Every run by its seed, in a process of its own, two at a time on one core each."""
    from dpo_tutorial.training import save

    tasks = {}
    for run in given(options.runs, "--runs"):
        trained = save.read_training_record(Path(run) / "cpu" / "adapter")["config"]
        tasks[f"seed {trained['seed']}"] = {"kind": "judge", "run": run}
        if (trained["loss_type"] == "sft") != (stage == "control"):
            raise SystemExit(f"{run} is of loss {trained['loss_type']}: `control` takes SFT alone, `seeds` the rest.")
    in_turn(__file__, record, stage, tasks)


def control(record: Record, options) -> None:
    """SFT on the chosen answers alone, judged as the seeds are."""
    seeds(record, options, "control")


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
    tried = {
        name: r for name, r in results.items() if name != "base" and RECIPES.get(name, {}).get("loss_type") != "sft"
    }

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


# --- the command line -------------------------------------------------------------------------------------------------


def options(parser) -> None:
    parser.add_argument("--runs", nargs="*", default=[], help="folders that `dpo-tutorial train -p ARTIFACTS …` wrote")
    parser.add_argument("--only", nargs="*", default=[], help="recipes by name, or base")


def given(value, name: str):
    if not value:
        raise SystemExit(f"This stage needs {name}; see --help.")
    return value


STAGES = {"recipes": recipes, "seeds": seeds, "control": control, "fewer": fewer, "swapped": swapped}

if __name__ == "__main__":
    main(__file__, STAGES, tables, {"train": train, "judge": judge}, options=options, figures=drawn)
