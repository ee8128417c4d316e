"""Stage B of `gpu.py`: ours beside stock TRL on random weights of the GPU profiles' shapes, and one step's profile."""

from __future__ import annotations

import dataclasses
import gc
import tempfile
import time
from collections import Counter
from pathlib import Path

import tasks
import torch
import trainings
from datasets import Dataset
from gpu_ultrafeedback import usable_rows
from harness import UNMEASURED, Record, table, turns

from dpo_tutorial.loading import models, sizes
from dpo_tutorial.machine import hardware, memory

#: Who trains, by what differs from ours with 8 pairs at a time and checkpointing: the arguments of `build`.
TRAINERS = {
    "stock TRL": {"stock": True},
    "ours": {},
    "ours, 2 pairs at a time, no checkpointing": {"size": 2, "checkpointing": False},
    "ours, no prefix sharing": {"sharing": False},
    "ours, no checkpointing": {"checkpointing": False},
    "ours, no checkpointing, layers compiled": {"checkpointing": False, "compiled": True},
    "ours, 16 pairs at a time": {"size": 16},  # does it fit? Its speed compares on pairs of one length only
}
IN_TURN = ("stock TRL", "ours")  # measured in every round; the others in the first


def stage_b(record: Record, options) -> None:
    """Most wanted first: the large shape, its profile, its trainings in turn.

    After `options.seconds` no timed training and no other shape begins.
    """
    started, ceiling = time.perf_counter(), {}
    for dtype in ("fp32",) if options.tiny else ("bf16", "fp16"):
        found = tasks.matmul_task({"size": 64 if options.tiny else 8192, "dtype": dtype}, Path())
        ceiling[dtype] = found["flops"]
        record.write("B", f"matrix product, {dtype}", flops=found["flops"])
    cfg = trainings.config_of(options.tiny, dtype="bf16", max_tokens=1024)
    tokenizer = models.load_tokenizer(cfg)
    rows = usable_rows(tokenizer, options)
    sets = {"UltraFeedback": Dataset.from_list(rows[: options.pairs])}
    for n in [64] if options.tiny else options.lengths:
        sets[f"{n:,} tokens"] = trainings.quarter_prompt(tokenizer, n, options.pairs)
    few = Dataset.from_list(rows[:16])
    shapes = options.shapes or (["tiny"] if options.tiny else ["7B", "0.5B"])

    def late(before: str) -> bool:
        if time.perf_counter() - started <= options.seconds:
            return False
        record.write("B", "stopped", before=before, seconds=options.seconds)
        return True

    for name in shapes:
        if name != shapes[0] and late(name):
            return
        base = trainings.random_base(name, cfg, tokenizer)
        record.write("B", f"{name}, weights", gib=sum(sizes.weight_bytes(base).values()) / 2**30)
        for who in IN_TURN:  # compile the kernels of both before either is timed
            base, _ = one_training(cfg, base, tokenizer, few, **TRAINERS[who])
        for who in reversed(IN_TURN):
            try:
                base, found = profile_step(cfg, base, tokenizer, few, **TRAINERS[who])
            except torch.OutOfMemoryError as error:
                base, found = None, {"failed": str(error)[:300]}
            if base is None:  # what was left on the other is unknown; it has to be gone before the next is made
                gc.collect()
                torch.cuda.empty_cache()
                base = trainings.random_base(name, cfg, tokenizer)
            record.write("B", f"{name}, profile of a step, {who}", **found)
        for about, pairs in sets.items():
            for turn, who in turns(options.trainers or TRAINERS, options.rounds):
                if turn and who not in IN_TURN:
                    continue
                if late(f"{name}, {about}, {who}"):
                    return
                base, found = one_training(cfg, base, tokenizer, pairs, **TRAINERS[who])
                if "failed" not in found:
                    flops = flops_of(trainings.SHAPES[name], found["tokens_per_second"])
                    found |= {"flops": flops, "utilisation": flops / ceiling[cfg.dtype]}
                record.write("B", "training", shape=name, data=about, who=who, turn=turn, **found)
        del base


def build(cfg, base, tokenizer, pairs, folder, stock=False, size=8, checkpointing=True, sharing=True):
    cfg = dataclasses.replace(
        cfg, batch_size=size, grad_accum=max(8 // size, 1), prefix_sharing=sharing, gradient_checkpointing=checkpointing
    )
    make = trainings.stock_trainer if stock else trainings.our_trainer
    return make(cfg, base, tokenizer, pairs, None, folder)


def one_training(cfg, base, tokenizer, pairs, compiled: bool = False, **how) -> tuple:
    """(the base, plain again; what was measured, or why it failed)."""
    with tempfile.TemporaryDirectory() as folder:
        hardware.seed_everything(cfg.seed)
        trainer = build(cfg, base, tokenizer, pairs, folder, **how)
        try:
            if compiled:
                trainings.compile_layers(trainer)
            found = trainings.run(trainer, cfg.seed)
            found |= found.pop("steady")
        except Exception as error:  # out of memory, or a kernel that this card lacks: a row of the table
            found = {"failed": f"{type(error).__name__}: {error}"[:300]}
        return trainings.plain_again(trainer), found


def flops_of(shape: dict, tokens_per_second: float) -> float:
    """Multiplications and additions per second that a step needs; recomputation, sharing and padding not counted.

    Per token: 2 per weight for each forward pass (policy, reference) and 2 for the gradient of the inputs; weights of
    the base have no gradient of their own, and what the adapter adds is below 3%.
    """
    head = shape["hidden_size"] // shape["num_attention_heads"] * shape["num_key_value_heads"]
    block = shape["hidden_size"] * (2 * shape["hidden_size"] + 2 * head + 3 * shape["intermediate_size"])
    return 3 * 2 * shape["num_hidden_layers"] * block * tokens_per_second


#: Kernel names by what they do, first hit wins. The first two names are those of TRL's kernels for log-probabilities.
KINDS = (
    ("head", ("_forward_kernel", "_backward_kernel", "logprob")),
    ("attention", ("flash", "fmha", "attention", "softmax")),
    ("dequantize", ("quantize", "kdequant", "4bit")),
    ("matrix product", ("gemm", "cutlass", "nvjet", "cublas", "sm90_xmma", "_mm", "wgmma")),
    ("optimizer", ("multi_tensor", "adam", "foreach")),
    ("gather", ("index", "gather", "scatter")),
    ("elementwise and copies", ("elementwise", "copy", "memcpy", "memset", "reduce", "cat", "vectorized")),
)


def profile_step(cfg, base, tokenizer, pairs, **how) -> tuple:
    """(the base, plain again; device time of one step by kind of kernel, and the largest kernels)."""
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(cfg, base, tokenizer, pairs, folder, **how)
        batches = iter(trainer.get_train_dataloader())
        first, second = next(batches), next(batches)
        trainer.model.train()
        if trainer.args.gradient_checkpointing:  # `Trainer.train` switches it on, and this is a step by hand
            trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        trainer.create_optimizer()

        def step(batch) -> None:
            batch = trainer._prepare_inputs(batch)
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()

        step(first)
        memory.synchronize()
        with profile(activities=[ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]) as seen:
            started = time.perf_counter()
            step(second)
            memory.synchronize()
            seconds = time.perf_counter() - started
        checkpointing = trainer.model.is_gradient_checkpointing
        base = trainings.plain_again(trainer)
    events = [
        (e.key, (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e6, e.count)
        for e in seen.key_averages()
    ]
    kinds: Counter[str] = Counter()
    for key, spent, _ in events:
        low = key.lower()
        kinds[next((k for k, words in KINDS if any(w in low for w in words)), "other")] += spent
    top = sorted(events, key=lambda e: -e[1])[:25]
    return base, {
        "seconds": seconds, "checkpointing": checkpointing,
        "device_seconds": sum(e[1] for e in events), "kernels": sum(e[2] for e in events),
        "kinds": dict(kinds), "top": [{"kernel": k[:110], "seconds": round(s, 5), "count": c} for k, s, c in top],
    }  # fmt: skip


def tables(lines: list[dict]) -> dict[str, str]:
    rows = []
    for r in (line for line in lines if line["name"] == "training"):
        row = [r["shape"], r["data"], r["who"], r["turn"] + 1]
        if "failed" in r:
            rows.append([*row, r["failed"].split(":")[0], "", "", "", "", r["at"][:10]])
        else:
            rows.append(
                [*row, f"{r['pairs_per_second']:.2f}", f"{r['tokens_per_second']:,.0f}", f"{r['peak_gib']:.1f}",
                 f"{r['utilisation']:.0%}", f"{r['padding']:.0%}", r["at"][:10]]
            )  # fmt: skip
    head = ["shape", "pairs", "", "turn", "pairs/s", "tokens/s", "peak GiB", "utilisation", "padding", "measured"]
    return {"speed": table(head, rows), "profile": profile_table(lines)}


def profile_table(lines: list[dict]) -> str:
    """Seconds of one step, and the share of each kind of kernel."""
    seen = {line["name"]: line for line in lines if "profile of a step" in line["name"]}
    if not seen:
        return UNMEASURED
    kinds = [*(kind for kind, _ in KINDS), "other"]
    rows = [
        [name.replace(", profile of a step", ""), r["at"][:10],
         *([r["failed"].split(".")[0], *[""] * len(kinds)] if "failed" in r else
           [f"{r['seconds']:.3f}", *(f"{r['kinds'].get(kind, 0) / r['device_seconds']:.0%}" for kind in kinds)])]
        for name, r in seen.items()
    ]  # fmt: skip
    return table(["", "measured", "seconds", *kinds], rows)
