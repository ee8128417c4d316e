"""Is peak memory on a CPU what was planned before loading? `python benchmarks/memory_plan.py [settings|page]`.

Each setting is a process of its own: two optimizer steps of our trainer, every pair of full length, the rejected answer
8 tokens shorter so that batches are padded, as real ones are. The plan is made before the model is loaded; measured is
the peak resident set of the whole process, load included.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from harness import Record, child, latest, machine, main, table

#: The first six were looked at while the formulae were written; those held out only after that.
SETTINGS = {
    "2 x 256, fp32": dict(dtype="fp32", batch_size=2, max_tokens=256),
    "2 x 256, bf16": dict(dtype="bf16", batch_size=2, max_tokens=256),
    "4 x 256, bf16": dict(dtype="bf16", batch_size=4, max_tokens=256),
    "4 x 384, bf16, checkpointing": dict(dtype="bf16", batch_size=4, max_tokens=384, gradient_checkpointing=True),
    "2 x 128, fp32, rank 64": dict(dtype="fp32", batch_size=2, max_tokens=128, lora_r=64),
    "1 x 384, fp32, checkpointing, rank 8, with evaluation": dict(
        dtype="fp32", batch_size=1, max_tokens=384, gradient_checkpointing=True, lora_r=8
    ),
    "held out: 3 x 192, bf16, rank 32": dict(dtype="bf16", batch_size=3, max_tokens=192, lora_r=32),
    "held out: 3 x 320, bf16, checkpointing, rank 32, with evaluation": dict(
        dtype="bf16", batch_size=3, max_tokens=320, gradient_checkpointing=True, lora_r=32
    ),
    "held out: 2 x 160, fp32, checkpointing": dict(
        dtype="fp32", batch_size=2, max_tokens=160, gradient_checkpointing=True
    ),
    "held out: 2 x 256, fp32, Qwen2 of other proportions, random weights": dict(
        dtype="fp32", batch_size=2, max_tokens=256, model="qwen2"
    ),
}
STEPS = 2


def make(task: dict, folder: Path) -> dict:
    """Save a Qwen2 with biases, an untied head and a feed-forward part five times as wide as the rest."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from dpo_tutorial import config
    from dpo_tutorial.loading import models

    tokenizer = models.load_tokenizer(config.resolve(profile="cpu"))
    shape = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=384, intermediate_size=1920, num_hidden_layers=12, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen2ForCausalLM(shape).save_pretrained(task["path"])
    tokenizer.save_pretrained(task["path"])
    return {}


def measure(task: dict, folder: Path) -> dict:
    """The plan of a setting and its measured peak, in bytes."""
    import trainings

    from dpo_tutorial.loading import models
    from dpo_tutorial.machine import memory
    from dpo_tutorial.training import memory_plan

    knobs, evaluates = task["knobs"], task["evaluates"]
    cfg = trainings.config_of(grad_accum=1, max_steps=STEPS, **knobs)
    tokenizer = models.load_tokenizer(cfg)
    pairs = trainings.full_length(tokenizer, cfg.max_tokens, STEPS * cfg.batch_size)
    answer = pairs[0]["chosen_tokens"]
    planned = memory_plan.plan(cfg, answer=answer, evaluates=evaluates)
    val = pairs.select(range(2 * cfg.batch_size)) if evaluates else None
    trainings.our_trainer(cfg, models.load_base(cfg), tokenizer, pairs, val, folder / "out").train()
    measured = round(memory.peak_memory_gib() * 2**30)
    return {
        "settings": {"gradient_checkpointing": False} | knobs | {"answer_tokens": answer, "evaluates": evaluates},
        "phases": planned.phases, "peak": planned.peak, "predicted": planned.total, "measured": measured,
        "ratio": round(planned.total / measured, 3),
    }  # fmt: skip


def all_settings(record: Record, options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        child(__file__, {"kind": "make", "path": f"{folder}/qwen2"})  # apart: it must not count in what is measured
        for name, knobs in SETTINGS.items():
            model = {"model": f"{folder}/{knobs['model']}"} if "model" in knobs else {}
            task = {"kind": "measure", "knobs": knobs | model, "evaluates": "evaluation" in name}
            found = child(__file__, task)
            found["settings"] |= {"model": knobs["model"]} if model else {}  # its name, not where it lay
            record.write("settings", name, **found)


def tables(lines: list[dict]) -> dict[str, str]:
    about, found = latest(lines, "settings")
    found = {name: run for name, (run,) in found.items()}
    terms = list(dict.fromkeys(term for r in found.values() for term in r["phases"][r["peak"]]))
    rows = [
        [name, *(f"{r['phases'][r['peak']].get(t, 0) / 2**20:,.0f}" for t in terms),
         f"{r['predicted'] / 2**20:,.0f}", f"{r['measured'] / 2**20:,.0f}", f"{r['ratio']:.2f}"]
        for name, r in found.items()
    ]  # fmt: skip
    head = ["setting (pairs x tokens)", *terms, "predicted", "measured", "ratio"]
    return {"settings": table(head, rows), "machine": machine(about)}


if __name__ == "__main__":
    main(__file__, {"settings": all_settings}, tables, kinds={"make": make, "measure": measure})
