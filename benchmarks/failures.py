"""Eight ways in which DPO fails, each made on purpose, and the remedy of each tried: `docs/failures.md`.

    python benchmarks/failures.py failures         # 13 runs, about 55 CPU-minutes, two at a time on one core each

A run is 24 steps of 8 pairs of the `cpu` profile, judged on 32 validation pairs and on answers to 8 of their prompts.
It takes about 4 CPU-minutes, of which the training takes 3.3. What is recorded is not run again.
"""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from harness import UNMEASURED, Record, image, in_turn, interval, machines, main, newest, table

PAGE = "../docs/failures.md"
STEPS = 24
SIZES = {
    "max_train": 1000, "max_val": 32, "compare_prompts": 8, "max_new_tokens": 96, "max_steps": STEPS, "sft_weight": 0.0,
}  # fmt: skip


# --- how each is made -----------------------------------------------------------------------------------------------


def swap_three_in_ten(pairs, tokenizer):
    def swapped(row, i):
        return {"chosen": row["rejected"], "rejected": row["chosen"]} if i % 10 < 3 else {}

    return pairs.map(swapped, with_indices=True)


def chosen_is_longer(pairs, tokenizer):
    return pairs.filter(lambda row: row["chosen_tokens"] > row["rejected_tokens"])


def eos_twice(pairs, tokenizer):
    def ended(answer):  # the template writes an EOS behind the answer too
        return [turn | {"content": turn["content"] + tokenizer.eos_token} for turn in answer]

    return pairs.map(lambda row: {side: ended(row[side]) for side in ("chosen", "rejected")})


def wrong_template(pairs, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    )
    return pairs


def bf16_adapter(trainer):
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


def rejected_by_others(pairs, tokenizer):
    from dpo_tutorial.pairs import sources

    kinds = sources.rejected_kinds()  # all but the base's own samples were written by another, larger model
    return pairs.filter(lambda row: kinds[row["prompt_id"]] != "base sample")


def rejected_by_the_base(pairs, tokenizer):
    from dpo_tutorial.pairs import sources

    kinds = sources.rejected_kinds()
    return pairs.filter(lambda row: kinds[row["prompt_id"]] == "base sample")


@dataclass(frozen=True)
class Run:
    """A training: knobs that differ from the profile's, what is done to its pairs and its trainer, and its remedy."""

    knobs: dict = field(default_factory=dict)
    pairs: Callable | None = None
    trainer: Callable | None = None
    most: int = 8 * STEPS  # pairs; where they are fewer, they come again
    remedy: str = ""  # the run that cures it; a remedy itself has none


SLOW = {"learning_rate": 1.5e-5}  # a tenth of the profile's, as is usual for larger models
RUNS = {
    "sound": Run(),
    "rate": Run({"learning_rate": 1.5e-3}, remedy="sound"),
    "beta": Run({"beta": 0.005}, remedy="sound"),
    "swapped": Run(pairs=swap_three_in_ten, remedy="swapped, robust"),
    "swapped, robust": Run({"loss_type": "robust", "label_smoothing": 0.3}, swap_three_in_ten),
    "longer": Run(pairs=chosen_is_longer, remedy="longer, LD-DPO"),
    "longer, LD-DPO": Run({"ld_alpha": 0.3}, chosen_is_longer),
    "eos": Run(pairs=eos_twice, remedy="sound"),
    "template": Run(pairs=wrong_template, remedy="sound"),
    "bf16": Run(SLOW, trainer=bf16_adapter, remedy="bf16, in float32"),
    "bf16, in float32": Run(SLOW),
    "others": Run(pairs=rejected_by_others, most=120, remedy="others, by the base"),
    "others, by the base": Run(pairs=rejected_by_the_base, most=120),
}
FAULTS = {name: run for name, run in RUNS.items() if run.remedy}


# --- measurements ---------------------------------------------------------------------------------------------------


def measure(task: dict, folder: Path) -> dict:
    """One of `RUNS`, about 4 CPU-minutes; judged with the tokenizer as it should be, whatever the training did to it.

    Returns:
        `loss`, `chosen` and `rejected` reward by step; `nll` of a chosen answer, nats, at the first step; `untouched`,
        the share of the values of the adapter's A that training left as they were; and what `methods.judged` finds.
    """
    import methods
    import torch
    import trainings

    from dpo_tutorial import config
    from dpo_tutorial.loading import models
    from dpo_tutorial.machine import hardware
    from dpo_tutorial.pairs import prepare
    from dpo_tutorial.training import save

    run = RUNS[task["run"]]
    cfg = config.resolve(profile="cpu", **SIZES | run.knobs | task.get("knobs", {}))
    tokenizer, given = models.load_tokenizer(cfg), models.load_tokenizer(cfg)
    splits = prepare.prepare(cfg, tokenizer).splits
    pairs = run.pairs(splits["train"], given) if run.pairs else splits["train"]
    hardware.seed_everything(cfg.seed)
    some = pairs.select(range(min(run.most, len(pairs))))
    trainer = trainings.our_trainer(cfg, models.load_base(cfg), given, some, None, folder)
    if run.trainer:
        run.trainer(trainer)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_A" in name}
    hardware.seed_everything(cfg.seed)
    trainer.train()
    log = save.history(trainer)["train"]
    same = torch.cat([(p == before[n]).flatten() for n, p in trainer.model.named_parameters() if n in before])
    return {
        "loss": [row["loss"] for row in log],
        "chosen": [row["rewards/chosen"] for row in log],
        "rejected": [row["rewards/rejected"] for row in log],
        "nll": -log[0]["logps/chosen"],
        "untouched": same.float().mean().item(),
    } | methods.judged(cfg, trainer.model, tokenizer, splits["val"])


def failures(record: Record, options) -> None:
    in_turn(__file__, record, "failures", {name: {"kind": "measure", "run": name} for name in RUNS})


# --- the page -------------------------------------------------------------------------------------------------------


def code(run: Run) -> str:
    """What a reader has to do: set knobs of a command, and put pairs or trainer through a function before it trains.

    Of a remedy that sets knobs, these alone: what is done to its pairs is done to those of its fault.
    """
    pairs = 1000 if run.pairs else run.most  # what a function leaves is cut to `most` after it
    knobs = "".join(f" -p {name.upper()} {value}" for name, value in run.knobs.items())
    does = [inspect.getsource(part) for part in (run.pairs, run.trainer) if part and (run.remedy or not knobs)]
    where = "-p PROFILE cpu -p ARTIFACTS runs/failure"  # not over a good adapter
    words = f"dpo-tutorial train {where} -p SFT_WEIGHT 0 -p MAX_TRAIN {pairs} -p MAX_STEPS {STEPS}{knobs}"
    command = [words] if knobs or not does else []
    parts = [f"```\n{line}\n```" for line in command] + [f"```python\n{source.rstrip()}\n```" for source in does]
    return "\n\n".join(parts)


def end(values: list[float]) -> float:
    """Mean of the last five steps."""
    return statistics.mean(values[-5:])


COLUMNS: dict[str, Callable[[dict], str]] = {
    "loss": lambda r: f"{r['loss'][0]:.3f} → {end(r['loss']):.3f}",
    "chosen reward": lambda r: f"{end(r['chosen']):+.2f}",
    "rejected reward": lambda r: f"{end(r['rejected']):+.2f}",
    "accuracy": lambda r: interval(r["accuracy"]),
    "nats apart": lambda r: f"{r['nats']['mean']:.1f}",
    "KL per token": lambda r: f"{r['kl']['mean']:.3f}",
    "rules kept": lambda r: f"{statistics.mean(r['kept']):.2f}",
    "tokens": lambda r: f"{r['tokens']['mean']:.0f}",
    "distinct-2": lambda r: f"{r['distinct_2']['mean']:.2f}",
    "A untouched": lambda r: f"{r['untouched']:.0%}",
    "NLL at step 1": lambda r: f"{r['nll']:.0f}",
}


def curves(name: str, fault: dict, cured: dict):
    """Loss, and rewards of chosen and rejected, by step: the fault's full lines, its remedy's dotted."""
    from dpo_tutorial.show import figures

    said = [
        f"{who}: loss {run['loss'][0]:.2f} to {end(run['loss']):.2f}, chosen reward to {end(run['chosen']):.2f}, "
        f"rejected to {end(run['rejected']):.2f}"
        for who, run in (("fault", fault), ("remedy", cured))
    ]
    figure, (left, right) = figures.new_figure(width=5.5, height=2.6, columns=2, alt=f"{name}. {'; '.join(said)}")
    for run, style, label in ((fault, "-", ""), (cured, ":", ", cured")):
        steps = range(1, len(run["loss"]) + 1)
        left.plot(steps, run["loss"], style, color=figures.BLUE, label=f"loss{label}")
        right.plot(steps, run["chosen"], style, color=figures.GREEN, label=f"chosen{label}")
        right.plot(steps, run["rejected"], style, color=figures.ORANGE, label=f"rejected{label}")
    for axis, title in ((left, "Loss"), (right, "Reward")):
        axis.set(title=title, xlabel="step")
        axis.legend(fontsize=7)
    return figure


def measured(lines: list[dict]) -> dict[str, tuple[dict, dict]]:
    """Fault → (its run, its remedy's), of those that have both."""
    runs = newest(lines, "failures")
    return {name: (runs[name], runs[run.remedy]) for name, run in FAULTS.items() if {name, run.remedy} <= runs.keys()}


def path_of(name: str) -> str:
    return f"failures/{name}.png"


def drawn(lines: list[dict]) -> dict:
    return {path_of(name): curves(name, *both) for name, both in measured(lines).items()}


def quoted(text: str) -> str:
    return "> " + " ".join(text.split()).replace("<", "&lt;").replace("|", "\\|")


def tables(lines: list[dict]) -> dict[str, str]:
    made = {f"{name}, made": code(run) for name, run in FAULTS.items()}
    made |= {f"{name}, cured": code(RUNS[run.remedy]) for name, run in FAULTS.items() if run.remedy != "sound"}
    made |= {name: UNMEASURED for name in FAULTS} | {"failures on": machines(lines, "failures") or UNMEASURED}
    for name, both in measured(lines).items():
        named = dict(zip(("fault", "remedy"), both, strict=True))
        rows = [[who, *(cell(run) for cell in COLUMNS.values())] for who, run in named.items()]
        samples = [f"The {who} writes:\n\n{quoted(run['samples'][0])}" for who, run in named.items()]
        parts = [image(curves(name, *both), path_of(name)), table(["", *COLUMNS], rows), *samples]
        made[name] = "\n\n".join(parts)
    return made


if __name__ == "__main__":
    main(__file__, {"failures": failures}, tables, {"measure": measure}, figures=drawn, page=PAGE)
