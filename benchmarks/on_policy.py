"""A further round on the policy's own answers, against as many further steps on the pairs that are there already.

    python benchmarks/on_policy.py                 # about 50 minutes on one core; --seeds 42 1 2 for more than one

The training pairs are halved. Round one trains on the first half. From its adapter, which is the reference, two second
rounds go on for as many steps, both on the prompts of the second half: one with the pairs of the set, one with the best
and the worst of four answers that the policy of round one gives, by the number of rules kept. Each is judged on the
test pairs with the base as the reference, so that all stand on one scale.
"""

from __future__ import annotations

from pathlib import Path

from effect_page import OF_RECIPES, columns
from harness import Record, child, machines, main, newest

SETTINGS = {"max_train": 192, "max_test": 96, "max_steps": 12, "compare_prompts": 24}
ROUNDS = ("base", "round one", "then the set's pairs", "then its own answers")


def rounds(task: dict, folder: Path) -> dict:
    """All rounds of one seed, by name; each with `pairs`, the number trained on."""
    import dataclasses

    import effect
    import trainings
    from datasets import Dataset

    from dpo_tutorial import config
    from dpo_tutorial.comparing import stats
    from dpo_tutorial.loading import models
    from dpo_tutorial.machine import hardware
    from dpo_tutorial.pairs import prepare, row_checks, shapes
    from dpo_tutorial.training import scoring
    from dpo_tutorial.using import new_pairs

    cfg = config.resolve(profile=task.get("profile", "cpu"), **SETTINGS | task["knobs"])
    tokenizer = models.load_tokenizer(cfg)
    splits, found = prepare.prepare(cfg, tokenizer).splits, {}
    half = len(splits["train"]) // 2
    first, second = splits["train"].select(range(half)), splits["train"].select(range(half, 2 * half))

    def judged(name: str, model, pairs: int) -> None:
        scored = stats.summarise(scoring.score_pairs(cfg, model, tokenizer, splits["test"]))
        found[name] = {"pairs": pairs} | scored | effect.answers(cfg, model, tokenizer, splits["test"])

    def trained(name: str, pairs: Dataset, start: str = ""):
        now = dataclasses.replace(cfg, start_from=start)
        hardware.seed_everything(cfg.seed)
        trainer = trainings.our_trainer(now, models.load_base(now), tokenizer, pairs, None, folder)
        if not start:
            judged("base", trainer.model, 0)
            hardware.seed_everything(cfg.seed)
        trainer.train()
        if start:
            trainer.model.delete_adapter("ref")  # from here on the base is the reference
        judged(name, trainer.model, len(pairs))
        return trainer.model

    policy = trained("round one", first)
    start = trainings.save_to_go_on(cfg, policy, folder / "first")
    rows, account = new_pairs.make(cfg, policy, tokenizer, second["prompt"], seed=cfg.seed)
    del policy
    own = [row_checks.prepared_row(tokenizer, shapes.to_pair(row)[0]) for row in rows]
    trained("then the set's pairs", second, start)
    trained("then its own answers", Dataset.from_list(own), start)
    return {name: result | {"account": account} for name, result in found.items()}


def second_round(record: Record, options) -> None:
    for seed in options.seeds:
        task = {"kind": "rounds", "knobs": {"seed": seed}}
        for name, found in child(__file__, task, {"OMP_NUM_THREADS": "1"}).items():
            record.write("rounds", f"{name}, seed {seed}", **found)


def tables(lines: list[dict]) -> dict[str, str]:
    found, on = newest(lines, "rounds"), machines(lines, "rounds")
    named = {name: result for start in ROUNDS for name, result in found.items() if name.startswith(f"{start}, seed")}
    return {"rounds": columns(named, {"pairs": lambda r: r["pairs"]} | OF_RECIPES), "rounds on": on} if found else {}


def options(parser) -> None:
    parser.add_argument("--seeds", nargs="*", type=int, default=[42])


STAGES = {"rounds": second_round}

if __name__ == "__main__":
    main(__file__, STAGES, tables, kinds={"rounds": rounds}, options=options)
