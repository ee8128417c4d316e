"""Which layers mind 4 bits? Loss and samples of the untrained base on validation pairs, and what each choice costs.

    python benchmarks/four_bit.py search samples

The rule, written before any figure was seen (`choose`): of the choices that take at most a fifth more memory than all
layers in 4 bits, the one with the lowest loss; where a cheaper one is within 1.96 standard errors of it, paired by
answer, the cheapest of those.
"""

from __future__ import annotations

from pathlib import Path

from harness import Record, child, latest, machine, main, table

BLOCK = r"model\.layers\.({})\."  # with the last dot: older transformers would take 0 for 01 too
DOWN = r"model\.layers\.({})\.mlp\.down_proj"

#: What stays in 16 bits. First kinds of layers, then blocks, then what these suggest together.
CHOICES: dict[str, list[str] | None] = {
    "all in 4 bits": [],
    **{f"{kind}_proj": [f"{kind}_proj"] for kind in ("q", "k", "v", "o", "gate", "up", "down")},
    "first block": [BLOCK.format("0")],
    "last block": [BLOCK.format("29")],
    "first and last block": [BLOCK.format("0|29")],
    "v_proj, first and last block": ["v_proj", BLOCK.format("0|29")],
    "k_proj, v_proj": ["k_proj", "v_proj"],
    "k_proj, v_proj, down_proj of blocks 0, 1, 28, 29": ["k_proj", "v_proj", DOWN.format("0|1|28|29")],
    "k_proj, v_proj, first and last block": ["k_proj", "v_proj", BLOCK.format("0|29")],
    "v_proj, down_proj": ["v_proj", "down_proj"],
    "all in 16 bits": None,
}


def measure(task: dict, folder: Path) -> dict:
    """The untrained base on the validation pairs' chosen answers.

    Returns:
        `mb` of its weights; `nll` per token, nats, and `nlls` of each answer (sums) with their `tokens`. Where the task
        asks for `answers`, of so many greedy ones: mean `distinct_2`, the share `finished`, and three `samples`.
    """
    import dataclasses

    import torch

    from dpo_tutorial import config
    from dpo_tutorial.comparing import answer_form, generation, stats
    from dpo_tutorial.loading import models, sizes
    from dpo_tutorial.machine import hardware
    from dpo_tutorial.pairs import encoding, prepare
    from dpo_tutorial.training import scoring

    keep = task["keep"]
    cfg = dataclasses.replace(config.resolve(profile="cpu", **task.get("knobs", {})), keep_16bit=tuple(keep or ()))
    hardware.seed_everything(cfg.seed)
    tokenizer = models.load_tokenizer(cfg)
    val = prepare.prepare(cfg, tokenizer).splits["val"]
    model = models.load_base(cfg, quantize=keep is not None).eval()
    encoded = [encoding.encode(tokenizer, pair["prompt"], pair["chosen"]) for pair in val]
    nlls = []
    with torch.no_grad():
        for start in range(0, len(encoded), 8):
            batch = scoring.collate(encoded[start : start + 8], tokenizer.pad_token_id, model.device)
            nlls += [-log_probs.sum().item() for log_probs in scoring.log_probs_of(cfg, model, batch)]
    tokens = [len(answer) for _, answer in encoded]
    found = {
        "mb": sum(sizes.weight_bytes(model).values()) / 1e6,
        "nll": sum(nlls) / sum(tokens), "nlls": [round(n, 3) for n in nlls], "tokens": tokens,
    }  # fmt: skip
    if not task["answers"]:
        return found
    answers = generation.generate(cfg, model, tokenizer, val["prompt"][: task["answers"]])
    return found | {
        "distinct_2": stats.mean([answer_form.distinct(a["text"]) for a in answers])["mean"],
        "finished": sum(a["finished"] for a in answers) / len(answers),
        "samples": [a["text"] for a in answers[:3]],
    }


def search(record: Record, options) -> None:
    """The loss of every choice."""
    for name, keep in CHOICES.items():
        record.write("search", name, **child(__file__, {"kind": "measure", "keep": keep, "answers": 0}))


def samples(record: Record, options) -> None:
    """Answers of all in 4 bits, of the choice, and of all in 16 bits."""
    found = {name: runs[-1] for name, runs in latest(record.lines(), "search")[1].items()}
    for name in ("all in 4 bits", choose(found), "all in 16 bits"):
        task = {"kind": "measure", "keep": CHOICES[name], "answers": 24}
        record.write("samples", name, **child(__file__, task))


def difference(one: dict, other: dict) -> dict:
    """Loss per token of `one` above that of `other`, with its interval over the same answers."""
    from dpo_tutorial.comparing import stats

    return stats.ratio([a - b for a, b in zip(one["nlls"], other["nlls"], strict=True)], one["tokens"])


def choose(found: dict[str, dict]) -> str:
    """The rule above."""
    limit = 1.2 * found["all in 4 bits"]["mb"]
    affordable = {name: one for name, one in found.items() if one["mb"] <= limit}
    best = min(affordable.values(), key=lambda one: one["nll"])
    equal = [
        name
        for name, one in affordable.items()
        if one is best or (gap := difference(one, best))["mean"] <= 1.96 * gap["standard_error"]
    ]
    return min(equal, key=lambda name: affordable[name]["mb"])


def tables(lines: list[dict]) -> dict[str, str]:
    about, runs = latest(lines, "search")
    found = {name: measured[-1] for name, measured in runs.items()}
    exact, chosen = found["all in 16 bits"], choose(found)
    rows = []
    for name, one in found.items():
        gap = difference(one, exact) if one is not exact else None
        above = f"{gap['mean']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f})" if gap else ""
        rows.append([f"**{name}**" if name == chosen else name, f"{one['mb']:.0f}", f"{one['nll']:.3f}", above])
    made = {"search": table(["in 16 bits", "MB", "nats per token", "above 16 bits"], rows), "search on": machine(about)}
    answered = {name: runs[-1] for name, runs in latest(lines, "samples")[1].items()}
    made["samples"] = table(
        ["in 16 bits", "finished", "distinct-2", "first answer"],
        [
            [name, f"{one['finished']:.0%}", f"{one['distinct_2']:.2f}", " ".join(one["samples"][0].split())]
            for name, one in answered.items()
        ],
    )
    return made


STAGES = {"search": search, "samples": samples}

if __name__ == "__main__":
    main(__file__, STAGES, tables, {"measure": measure})
