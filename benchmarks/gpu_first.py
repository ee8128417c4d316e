"""Stage A of `gpu.py`, no trained model needed: the tests marked gpu, the doctor, fp16 and bf16, and memory."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile

import torch
import trainings
from harness import ROOT, Record, command, table

from dpo_tutorial.loading import models
from dpo_tutorial.training import memory_plan


def stage_a(record: Record, options) -> None:
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", "-m", "gpu"]
    record.write("A", "gpu-marked tests", **said(tests, last=12))
    for profile in ("cpu",) if options.tiny else ("cpu", "t4", "gpu80"):
        record.write("A", f"doctor, profile {profile}", **said(command("doctor", PROFILE=profile)))
    shape = "tiny" if options.tiny else "0.5B"
    five_steps(options, record, shape)
    predicted_and_measured(options, record, shape)


def said(words: list[str], last: int = 0) -> dict:
    """A command's exit code, and what it said: all, or the last lines."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    return {"code": done.returncode, "said": done.stdout.strip().splitlines()[-last:]}


def five_steps(options, record: Record, shape: str) -> None:
    """Five steps with the adapter in float32, and as TRL leaves it: in fp16 that fails (trl#4901)."""
    length = 64 if options.tiny else 256
    for dtype in ("fp32",) if options.tiny else ("fp16", "bf16"):
        cfg = trainings.config_of(options.tiny, dtype=dtype, max_steps=5, max_tokens=512)
        tokenizer = models.load_tokenizer(cfg)
        base = trainings.random_base(shape, cfg, tokenizer)
        pairs = trainings.quarter_prompt(tokenizer, length, 40)
        for left_out in ((), ("cast",)):
            found, failed = {}, ""
            with tempfile.TemporaryDirectory() as folder, trainings.without(*left_out):
                trainer = trainings.our_trainer(cfg, base, tokenizer, pairs, None, folder)
                trained = [p for p in trainer.model.parameters() if p.requires_grad]
                try:
                    found = trainings.run(trainer, cfg.seed)
                    found["finite"] = all(torch.isfinite(p).all().item() for p in trained)
                except Exception as error:  # this is what is measured
                    failed = f"{type(error).__name__}: {error}"[:300]
                base = trainings.plain_again(trainer)
            name = f"five steps in {dtype}, {'without our cast' if left_out else 'adapter in float32'}"
            record.write("A", name, adapter=sorted({str(p.dtype) for p in trained}), failed=failed, **found)


def predicted_and_measured(options, record: Record, shape: str) -> None:
    """Six settings: the planner's peak beside the measured one."""
    cfg = trainings.config_of(options.tiny, dtype="bf16", max_steps=2)
    tokenizer = models.load_tokenizer(cfg)
    base = trainings.random_base(shape, cfg, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        trainings.llama(shape, tokenizer).save_pretrained(folder)  # what the plan is made from
        for length in (64,) if options.tiny else (512, 1024):
            pairs = trainings.quarter_prompt(tokenizer, length, 16)
            answer = pairs[0]["chosen_tokens"]
            for size, checkpointing in ((8, False), (8, True), (1, False)):
                cfg = dataclasses.replace(
                    cfg, model=folder, batch_size=size, grad_accum=8 // size, max_tokens=length,
                    gradient_checkpointing=checkpointing,
                )  # fmt: skip
                plan = memory_plan.plan(cfg, length=length, answer=answer, process=0, evaluates=False)
                trainer = trainings.our_trainer(cfg, base, tokenizer, pairs, None, folder + "/out")
                found = trainings.run(trainer, cfg.seed)
                base = trainings.plain_again(trainer)
                record.write(
                    "A", f"memory: {length} tokens, {size} at a time{', checkpointing' if checkpointing else ''}",
                    predicted_gib=plan.total / 2**30, measured_gib=found["peak_gib"], terms=plan.terms, peak=plan.peak,
                )  # fmt: skip


def tables(lines: list[dict]) -> dict[str, str]:
    steps = [
        [r["name"], " ".join(f"{x:.3f}" for x in r.get("losses", [])), r["failed"] or "none", r["at"][:10]]
        for r in lines
        if r["name"].startswith("five steps")
    ]
    memory = [
        [r["name"].removeprefix("memory: "), f"{r['predicted_gib']:.1f}", f"{r['measured_gib']:.1f}",
         f"{r['predicted_gib'] / r['measured_gib']:.2f}", r["at"][:10]]
        for r in lines if r["name"].startswith("memory")
    ]  # fmt: skip
    return {
        "steps": table(["", "losses", "error", "measured"], steps),
        "memory": table(["", "predicted GiB", "measured GiB", "predicted / measured", "measured"], memory),
    }
