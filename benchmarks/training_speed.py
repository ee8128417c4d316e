"""Training speed beside stock TRL: `python benchmarks/training_speed.py [section …]` writes its .json, .md and .png.

Every measurement is a process of its own (allocator and peak memory belong to a process), and what is compared takes
turns, because timings of shared machines drift: read the ratios. Sections:
compare, whole, switches, order, growth. What a GPU does is in `gpu.py`.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPEATS = 3
#: Architectures with random weights, for speed only. The last two are those of the GPU profiles (`gpu.py`).
SHAPES = {
    name: dict(
        hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, **more,
    )
    for name, hidden, wide, layers, heads, groups, more in (
        ("30M", 384, 1024, 8, 6, 3, {}),
        ("135M", 576, 1536, 30, 9, 3, {}),
        ("360M", 960, 2560, 32, 15, 5, {}),
        ("0.5B", 896, 4864, 24, 14, 2, {"vocab_size": 151936}),
        ("7B", 3584, 18944, 28, 28, 4, {"vocab_size": 152064, "tie_word_embeddings": False}),
    )
}  # fmt: skip

#: What `ours` is made of, one switch turned back at a time: (knobs of Config, arguments of DPOConfig, other switches).
SWITCHES = {
    "ours": ({}, {}, []),
    "prompt computed once per answer": ({"prefix_sharing": False}, {}, []),
    "TRL's LM head as it comes": ({}, {}, ["head"]),
    "allocator as it comes": ({}, {}, ["allocator"]),
    "2 pairs at a time, 4 times": ({"batch_size": 2, "grad_accum": 4}, {}, []),
    "batches in random order": ({}, {"train_sampling_strategy": "random"}, []),
    "gradient checkpointing": ({"gradient_checkpointing": True}, {}, []),
    "reference precomputed": ({"precompute_reference": True}, {}, []),
    "base not quantized": ({}, {}, ["16 bits"]),
    "blocks compiled": ({}, {}, ["compiled"]),
}


# --- one measurement, in a process of its own -----------------------------------------------------------------------


def settings(task: dict):
    """The config of a task: the `cpu` profile's own, but for what the task sets."""
    import dataclasses

    from dpo_tutorial import config

    cfg = config.resolve(profile="cpu")
    return dataclasses.replace(cfg, **{"gradient_checkpointing": False} | task.get("knobs", {}))


def full_length(tokenizer, tokens: int, pairs: int, asked: str = ""):
    """`pairs` equal pairs whose prompt and chosen answer fill `tokens`; the rejected answer is 8 tokens shorter.

    Args:
        asked: what the prompt has beside its shortest form.
    """
    from datasets import Dataset

    from dpo_tutorial import data

    prompt = [{"role": "user", "content": "Say a." + asked}]

    def answer(first: str, words: int) -> tuple[list[dict], int, int]:
        turn = [{"role": "assistant", "content": first + " a" * words}]
        before, after = data.encode(tokenizer, prompt, turn)
        return turn, len(before), len(after)

    _, before, shortest = answer("a", 0)
    words = tokens - before - shortest
    (chosen, _, longer), (rejected, _, shorter) = answer("a", words), answer("b", words - 8)
    assert before + longer == tokens and longer - shorter == 8
    row = dict(
        prompt=prompt, chosen=chosen, rejected=rejected, prompt_tokens=before, chosen_tokens=longer,
        rejected_tokens=shorter,
    )  # fmt: skip
    return Dataset.from_list([row] * pairs)


def splits_of(task: dict, cfg, tokenizer) -> dict:
    from dpo_tutorial import data

    if "length" in task:
        train = full_length(tokenizer, task["length"], task["pairs"], asked=" b" * (task["length"] // 4))
        return {"train": train, "val": train.select(range(task["val"])), "test": train}
    found = data.prepare(cfg, tokenizer).splits
    part = {name: split.select(range(min(task.get(name, len(split)), len(split)))) for name, split in found.items()}
    return part | {"train": part["train"].select(range(min(task.get("pairs", 10**9), len(part["train"]))))}


def stock_trainer(cfg, base, tokenizer, train_split, val, folder, **changes):
    """`DPOTrainer` with its documented defaults; only what decides the result is set as in `cfg`.

    Default are batches of 8 pairs, which is the effective batch here, in random order, and gradient checkpointing.
    """
    from trl import DPOConfig, DPOTrainer

    from dpo_tutorial import environment, models, timing

    class Stock(timing.Timed, DPOTrainer):
        pass

    assert cfg.batch_size * cfg.grad_accum == DPOConfig.__dataclass_fields__["per_device_train_batch_size"].default
    arguments = dict(
        output_dir=str(folder), beta=cfg.beta, learning_rate=cfg.learning_rate, lr_scheduler_type=cfg.lr_scheduler,
        warmup_steps=cfg.warmup_ratio, num_train_epochs=cfg.epochs, max_steps=cfg.max_steps, seed=cfg.seed,
        bf16=cfg.dtype == "bf16", fp16=cfg.dtype == "fp16", use_cpu=environment.device() == "cpu", report_to="none",
        save_strategy="no", logging_steps=1, eval_strategy="no" if val is None else "steps", eval_steps=0.5,
    )  # fmt: skip
    columns = ["prompt", "chosen", "rejected"]
    return Stock(
        model=base, args=DPOConfig(**arguments | changes), train_dataset=train_split.select_columns(columns),
        eval_dataset=None if val is None else val.select_columns(columns), processing_class=tokenizer,
        peft_config=models.lora_config(cfg),
    )  # fmt: skip


def counted(trainer) -> dict:
    """Count what the training batches hold, and how many positions the decoder computes for them."""
    seen, at_work = {"tokens": 0, "slots": 0, "positions": 0, "pairs": 0}, []
    step = trainer.training_step

    def training_step(model, inputs, *args, **kwargs):
        seen["tokens"] += int(inputs["attention_mask"].sum())
        seen["slots"] += inputs["attention_mask"].numel()
        seen["pairs"] += len(inputs["input_ids"]) // 2
        at_work.append(True)
        try:
            return step(model, inputs, *args, **kwargs)
        finally:
            at_work.clear()

    def embedded(module, args, output):
        seen["positions"] += args[0].numel() if at_work else 0

    trainer.training_step = training_step
    trainer.model.get_base_model().get_input_embeddings().register_forward_hook(embedded)
    return seen


def step_ends(trainer) -> list[float]:
    """The time at the end of each optimizer step, filled in while the trainer runs."""
    from transformers import TrainerCallback

    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    return ends


def train_once(task: dict, folder: Path) -> dict:
    """A whole training by ours or by stock TRL: seconds by phase, tokens, memory, losses."""
    import psutil
    import torch

    from dpo_tutorial import environment, evaluate, faster, models, planner, train

    phases = {"import": time.time() - psutil.Process().create_time()}
    stock, switches = task["trainer"] == "stock", task.get("switches", [])
    cfg = settings(task)
    if stock or "allocator" in switches:
        environment.tune_allocator = lambda: False
    if "head" in switches:
        faster.cpu_head = contextlib.nullcontext
    marks = [time.perf_counter()]

    def mark(name: str) -> None:
        environment.synchronize()
        marks.append(time.perf_counter())
        phases[name] = marks[-1] - marks[-2]

    tokenizer = models.load_tokenizer(settings(task | {"knobs": {}}))
    base = models.load_base(cfg, quantize="16 bits" not in switches)
    mark("load")
    splits = splits_of(task, cfg, tokenizer)
    val = splits["val"] if task.get("val") else None
    environment.seed_everything(cfg.seed)
    if "planned" in switches:
        cfg, _ = planner.choose_checkpointing(cfg, environment.free_memory_gib() * 2**30)
    build = stock_trainer if stock else train.build_trainer
    trainer = build(
        cfg, base, tokenizer, splits["train"], val, folder / "trainer", disable_tqdm=True, **task.get("arguments", {})
    )
    if "compiled" in switches:
        for layer in trainer.model.get_base_model().base_model.layers:
            layer.compile(dynamic=True)  # one program for all layers and lengths
    mark("tokenize")
    phases["reference, before"] = phases["tokenize"] if cfg.precompute_reference else 0  # TRL does both at once
    seen, ends = counted(trainer), step_ends(trainer)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    environment.seed_everything(cfg.seed)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started + phases["reference, before"]
    steps = [b - a for a, b in zip([started, *ends], ends, strict=False)]
    marks.append(time.perf_counter())
    peak = environment.peak_memory_gib()
    if task.get("generate"):
        prompts = [row["prompt"] for row in splits["test"].select(range(task["generate"]))]
        evaluate.generate(cfg, trainer.model, tokenizer, prompts, max_new_tokens=48)
        mark("generate")
    return {
        "seconds": seconds, "pairs": seen["pairs"], "tokens": seen["tokens"], "positions": seen["positions"],
        "padding": 1 - seen["tokens"] / seen["slots"], "peak_gib": peak, "steps": steps,
        "phases": phases | dict(trainer.times.seconds),
        "losses": [row["loss"] for row in train.history(trainer)["train"]],
        "rewards": [row["rewards/chosen"] for row in train.history(trainer)["train"]],
        "checkpointing": trainer.args.gradient_checkpointing,
        **({"untouched": untouched(trainer)} if task.get("untouched") else {}),
        "pairs_per_second": seen["pairs"] / seconds, "tokens_per_second": seen["tokens"] / seconds,
    }  # fmt: skip


def untouched(trainer) -> float:
    """Share of the linear layers' outputs that stay as the base made them when the adapter's is added, on one pair."""
    import torch
    from peft.tuners.lora import LoraLayer

    shares = []

    def compare(layer, args, output):
        shares.append((output == layer.base_layer(args[0])).float().mean().item())

    watched = [m.register_forward_hook(compare) for m in trainer.model.modules() if isinstance(m, LoraLayer)]
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[0]]))
    with torch.no_grad(), trainer.compute_loss_context_manager():
        trainer.model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in watched:
        handle.remove()
    return statistics.mean(shares)


def raw_once(task: dict, folder: Path) -> dict:
    """Forward and backward pass of the model with its adapter on full batches of 8 x 256 tokens, and nothing else."""
    import torch
    from peft import get_peft_model

    from dpo_tutorial import environment, evaluate, models

    cfg = settings(task)
    model = get_peft_model(models.load_base(cfg), models.lora_config(cfg)).train()
    rows, length = 8, 256
    torch.manual_seed(0)
    seconds = []
    for _ in range(4):
        ids = torch.randint(0, 2**8, (rows, length), device=model.device)
        environment.synchronize()
        started = time.perf_counter()
        with evaluate.autocast(cfg):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        environment.synchronize()
        seconds.append(time.perf_counter() - started)
    return {
        "seconds": statistics.median(seconds[1:]),
        "tokens_per_second": rows * length / statistics.median(seconds[1:]),
    }


def prepare_once(task: dict, folder: Path) -> dict:
    """Audit a source of so many rows and keep 400: does memory depend on the rows?"""
    import psutil

    from dpo_tutorial import data, environment, models

    source = folder / f"rows-{task['rows']}.jsonl"
    with source.open("w", encoding="utf-8") as stream:
        for n in range(task["rows"]):
            ask = {"role": "user", "content": f"Question {n}: " + "why is that so " * 20}
            sides = {
                side: [ask, {"role": "assistant", "content": f"{side} {n} " + "because it is " * 40}]
                for side in ("chosen", "rejected")
            }
            row = {"prompt": ask["content"], "prompt_id": str(n), "score_chosen": 8.0, "score_rejected": 3.0} | sides
            stream.write(json.dumps(row) + "\n")
    cfg = settings(task | {"knobs": {"data": str(source)}})
    tokenizer = models.load_tokenizer(cfg)
    before, started = psutil.Process().memory_info().rss, time.perf_counter()
    kept = data.prepare(cfg, tokenizer).splits["train"]
    return {
        "rows": task["rows"], "kept": len(kept), "seconds": time.perf_counter() - started,
        "peak_mib": environment.peak_memory_gib() * 2**10 - before / 2**20,
    }  # fmt: skip


def make_once(task: dict, folder: Path) -> dict:
    """Save a checkpoint of random weights, with the embedded model's tokenizer and, where not given, its vocabulary."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from dpo_tutorial import environment, models

    tokenizer = models.load_tokenizer(settings(task))
    shape = dict(vocab_size=len(tokenizer), tie_word_embeddings=True, max_position_embeddings=4096) | task["make"]
    torch.manual_seed(0)
    with torch.device(environment.device()):
        found = LlamaConfig(eos_token_id=2, bos_token_id=None, pad_token_id=2, **shape)
        model = AutoModelForCausalLM.from_config(found, dtype=torch.bfloat16)
    model.save_pretrained(task["path"])
    tokenizer.save_pretrained(task["path"])
    return {"weights": sum(p.numel() for p in model.parameters())}


def matmul_once(task: dict, folder: Path) -> dict:
    """What the device reaches at best: one large product of dense matrices, again and again."""
    import torch

    from dpo_tutorial import environment

    n, dtype = task["size"], {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[task["dtype"]]
    a = torch.randn(n, n, device=environment.device()).to(dtype)
    seconds = []
    for _ in range(10):
        environment.synchronize()
        started = time.perf_counter()
        a @ a
        environment.synchronize()
        seconds.append(time.perf_counter() - started)
    return {"seconds": min(seconds), "flops": 2 * n**3 / min(seconds)}


KINDS = {"train": train_once, "raw": raw_once, "prepare": prepare_once, "make": make_once, "matmul": matmul_once}


def child(task: dict) -> dict:
    """Run one task in a process of its own; what it prints last is its result."""
    # as `make run` has it; not imported from there, because a child's peak memory counts from its parent's size on
    env = os.environ | {"TOKENIZERS_PARALLELISM": "false", "DPO_TUTORIAL_HEADLESS": "1"}
    env["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # what compiling costs a first run
    if task.get("trainer") != "stock":
        env["GLIBC_TUNABLES"] = "glibc.malloc.tcache_count=0"
    done = subprocess.run(
        [sys.executable, __file__, "--task", json.dumps(task)], capture_output=True, text=True, env=env,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{task}\n{done.stderr[-4000:]}")
    result = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
    about = {k: v for k, v in task.items() if k not in ("path", "make")}
    said = f"{result.get('pairs_per_second', result.get('seconds', 0)):.2f}"
    print(f"{about} {said}", file=sys.stderr, flush=True)
    return result


# --- sections -------------------------------------------------------------------------------------------------------


def in_turn(pairs: int | None, repeats: int) -> dict:
    """Ours, stock TRL and the raw passes in turn, on so many pairs of the profile; None: on all."""
    share = 1 if pairs is None else pairs / 329
    task = {"kind": "train", "pairs": pairs or 10**9, "val": round(48 * share) or 1, "generate": 4}
    found = {"ours": [], "stock": [], "raw": []}
    for _ in range(repeats):
        found["ours"].append(child(task | {"trainer": "ours"}))
        found["stock"].append(child(task | {"trainer": "stock"}))
        found["raw"].append(child({"kind": "raw"}))
    return found


def compare(options) -> dict:
    return in_turn(options.pairs, options.repeats)


def whole(options) -> dict:
    return in_turn(None, 1)


def switches(options) -> dict:
    """Ours with one switch turned back, each beside a run of ours."""
    found = {name: [] for name in SWITCHES}
    for _ in range(2):
        for name, (knobs, arguments, other) in SWITCHES.items():
            found[name].append(
                child(
                    {"kind": "train", "trainer": "ours", "pairs": 48, "knobs": knobs, "arguments": arguments}
                    | {"switches": other, "val": 8}
                )
            )
    return found


def order(options) -> dict:
    """Losses step by step on the same batches in the same order: ours, without our hooks, and what rounding does."""
    plain = {"kind": "train", "trainer": "ours", "pairs": 48, "untouched": True}
    stock = plain | {
        "knobs": {"prefix_sharing": False, "gradient_checkpointing": True},
        "switches": ["head", "allocator"],
    }
    return {
        "ours": child(plain),
        "stock": child(stock),
        "stock, padded to a multiple of 64": child(stock | {"arguments": {"pad_to_multiple_of": 64}}),
        "ours, float32": child(plain | {"knobs": {"dtype": "fp32"}}),
        "ours, blocks compiled": child(plain | {"switches": ["compiled"], "untouched": False}),
    }


def growth(options) -> dict:
    """Seconds and memory by pairs, by length, by size of the model, and memory by rows of the source."""
    found = {"pairs": [], "length": [], "size": [], "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        weights = {}
        for name in ("30M", "135M", "360M"):
            weights[name] = child({"kind": "make", "make": SHAPES[name], "path": f"{folder}/{name}"})["weights"]

        def run(name: str, pairs: int, length: int) -> dict:
            knobs = {"model": f"{folder}/{name}", "max_tokens": length}
            result = child(
                {"kind": "train", "trainer": "ours", "pairs": pairs, "val": 0, "length": length, "knobs": knobs}
            )
            steady = statistics.mean(result["steps"][1:])  # the first step also fills caches
            return {
                "weights": weights[name], "pairs": pairs, "length": length, "tokens": result["tokens"],
                "seconds": steady * len(result["steps"]), "peak_gib": result["peak_gib"],
            }  # fmt: skip

        for _ in range(2):
            found["pairs"] += [run("30M", pairs, 128) for pairs in (32, 128, 512)]
            found["length"] += [run("30M", 32, length) for length in (128, 256, 512)]
            found["size"] += [run(name, 24, 256) for name in ("30M", "135M", "360M")]
    found["rows"] = [child({"kind": "prepare", "rows": rows}) for rows in (1000, 4000, 16000)]
    return found


SECTIONS = {"compare": compare, "whole": whole, "switches": switches, "order": order, "growth": growth}


# --- what is shown --------------------------------------------------------------------------------------------------


def slope(rows: list[dict], x: str, y: str) -> float:
    """Exponent of y in x, by least squares on logarithms: 1 is in proportion.

    Of repeats the smallest y counts: other work on the machine only ever adds.
    """
    import numpy as np

    rows = [min((r for r in rows if r[x] == value), key=lambda r: r[y]) for value in sorted({r[x] for r in rows})]
    return float(np.polyfit(np.log([row[x] for row in rows]), np.log([row[y] for row in rows]), 1)[0])


def table(head: list[str], rows: list[list]) -> str:
    from dpo_tutorial.report import markdown_table  # after the measurements: it would make the parent larger

    return markdown_table(head, rows)


def middle(runs: list[dict], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def spread(values: list[float], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def by_repeat(runs: list[dict], others: list[dict], key: str) -> list[float]:
    """run / other, repeat by repeat."""
    return [a[key] / b[key] for a, b in zip(runs, others, strict=True)]


def compare_page(found: dict) -> str:
    ours, stock, raw = found["ours"], found["stock"], found["raw"]
    rows = [
        [
            name, f"{middle(runs, 'pairs_per_second'):.2f}", f"{middle(runs, 'tokens_per_second'):,.0f}",
            f"{middle(runs, 'padding'):.0%}", f"{middle(runs, 'positions') / middle(runs, 'tokens'):.2f}",
            f"{middle(runs, 'peak_gib'):.1f}",
        ]
        for name, runs in (("ours", ours), ("stock TRL", stock))
    ]  # fmt: skip
    names = list(dict.fromkeys(phase for run in ours + stock for phase in run["phases"]))
    seconds = [
        [n, *(f"{statistics.median(r['phases'].get(n, 0) for r in runs):.1f}" for runs in (ours, stock))] for n in names
    ]
    near = spread(by_repeat(ours, raw, "tokens_per_second"), 2)
    columns = ["", "pairs/s", "tokens/s", "padding", "positions computed per token", "peak GiB"]
    return f"""## Ours and stock TRL

{len(ours)} trainings each, in turn, of {ours[0]["pairs"]} pairs of the `cpu` profile, two evaluations included.
Medians:

{table(columns, rows)}

**Pairs per second, ours / stock: {spread(by_repeat(ours, stock, "pairs_per_second"))}.**
Peak memory, ours / stock: {spread(by_repeat(ours, stock, "peak_gib"), 2)}.

The bare forward and backward pass on full batches of 8 x 256 tokens, measured between them, makes
{middle(raw, "tokens_per_second"):,.0f} tokens/s. Our training, everything included, runs at {near}
of that rate. A token counts as often as it stands in a sequence; a pair's prompt is computed once, and the LM head on
answers only, which is how a training with two forward passes can come near a bare loop with one.

Seconds by phase; both compute the reference in the loop.

{table(["phase", "ours", "stock TRL"], seconds)}"""


def whole_page(found: dict) -> str:
    (ours,), (stock,), (raw,) = (found[name] for name in ("ours", "stock", "raw"))
    speed, memory = (ours[key] / stock[key] for key in ("pairs_per_second", "peak_gib"))
    near = ours["tokens_per_second"] / raw["tokens_per_second"]
    return f"""## The whole profile

All {ours["pairs"]} pairs, each trained on once, evaluations included; ours, stock TRL, then the bare passes, one run
each. Ours / stock: {speed:.1f} in pairs per second, {memory:.2f} in peak memory ({ours["peak_gib"]:.1f} and
{stock["peak_gib"]:.1f} GiB). Ours / bare passes: {near:.2f} in tokens per second."""


def fastest(runs: list[dict]) -> float:
    """Pairs per second of the best run: other work on the machine only ever slows."""
    return max(run["pairs_per_second"] for run in runs)


def switches_page(found: dict) -> str:
    rows = [
        [
            name, f"{fastest(runs):.2f}", f"{fastest(runs) / fastest(found['ours']):.2f}",
            f"{middle(runs, 'peak_gib'):.1f}", " ".join(f"{run['pairs_per_second']:.2f}" for run in runs),
        ]
        for name, runs in found.items()
    ]  # fmt: skip
    ours, compiled = (
        statistics.median(step for run in found[name] for step in run["steps"][1:])
        for name in ("ours", "blocks compiled")
    )
    extra = statistics.median(run["steps"][0] for run in found["blocks compiled"]) - ours
    return f"""## What each part brings

Ours with one part changed, trainings of {found["ours"][0]["pairs"]} pairs, in turn,
{len(found["ours"])} each; the faster counts.

{table(["", "pairs/s", "of ours", "peak GiB", "all runs"], rows)}

- The head brings most, because answers are scored twice and a vocabulary is wide; prefix sharing comes next.
- Differences of a few hundredths are noise: the order of the batches shows none here. How much the allocator brings
  differs by machine; it mattered more while the head's tiles were large ([cpu_step.md](cpu_step.md)).
- "Reference precomputed" pays even in one epoch, because its batches are larger. It stays off: in 16 bits it is not
  exact.
- "Base not quantized" is the most that dequantizing each weight once, and keeping it, could bring, for four times the
  memory of the linear layers. Not kept.
- "Blocks compiled" is `torch.compile` on each decoder layer: a step takes {compiled / ours:.2f} of the time, the
  first one {extra:.0f} seconds longer, which {extra / (ours - compiled):.0f} steps win back; the `cpu` profile has 42.
  It also needs a C++ compiler. Not kept."""


def order_page(found: dict) -> str:
    stock, padded = found["stock"], "stock, padded to a multiple of 64"

    def apart(name: str, key: str) -> str:
        return f"{max(abs(a - b) for a, b in zip(stock[key], found[name][key], strict=True)):.4f}"

    rows = [[name, apart(name, "losses"), apart(name, "rewards")] for name in ("ours", padded)]
    return f"""## The same training

{len(stock["losses"])} steps of 8 pairs, the same batches in the same order, in this machine's compute type.
Largest difference of a step from a training without our hooks (the prompt twice, TRL's head, checkpointing on):

{table(["", "loss", "chosen reward"], rows)}

The second row is what other padding alone does: rounding. In float32 the difference is below 1e-4
(`tests/test_trajectory.py`, `tests/test_prefix.py`).
{young_adapter(found)}"""


def young_adapter(found: dict) -> str:
    rows = [
        [
            name, f"{run['losses'][-1]:.3f}", f"{run['rewards'][-1]:.3f}",
            f"{run['untouched']:.0%}" if "untouched" in run else "",
        ]
        for name, run in found.items()
    ]  # fmt: skip
    offset = found["ours, blocks compiled"]["rewards"][1]
    return f"""
What rounding hides, at step {len(found["ours"]["losses"])}:

{table(["", "loss", "chosen reward", "outputs untouched"], rows)}

A layer's output is rounded before the adapter's is added, and in bfloat16 a sum less than half a step away falls back
to it: "untouched" is the share of outputs that stay as the base made them. So the first steps show less reward than
the weights hold, in stock TRL as in ours; the gradient passes all the same. Float32 shows it. Compiled blocks add
before they round, but their policy and reference are two programs: the chosen reward is {offset:+.3f} at step 2,
before anything is learnt. After a whole training little is left of it ([effect.md](effect.md), the float32 table)."""


def growth_page(found: dict) -> str:
    less, more = (statistics.mean(r["peak_gib"] for r in found["pairs"] if r["pairs"] == n) for n in (32, 512))
    rows = [
        [what, values, y, f"{slope(found[group], x, key):.2f}"]
        for what, values, y, group, x, key in (
            ("pairs", "32, 128, 512", "seconds", "pairs", "tokens", "seconds"),
            ("length", "128, 256, 512 tokens", "seconds", "length", "tokens", "seconds"),
            ("weights", "30M, 135M, 360M", "seconds", "size", "weights", "seconds"),
            ("rows of the source", "1,000, 4,000, 16,000", "seconds", "rows", "rows", "seconds"),
            ("pairs", "32, 128, 512", "peak memory", "pairs", "pairs", "peak_gib"),
        )
    ]
    audit = ", ".join(f"{row['peak_mib']:,.0f}" for row in found["rows"])
    return f"""## How cost grows

Random weights, pairs of equal length. Exponent fitted on logarithms: 1 is in proportion, 0 is not at all.

{table(["grows with", "values", "what", "exponent"], rows)}

![Seconds and memory by pairs, length and weights, with the fitted lines](training_speed.png)

Sixteen times the pairs take {more - less:+.2f} GiB of memory ({less:.2f} to {more:.2f}).
The audit of 1,000, 4,000 and 16,000 rows, of which 400 are kept for training, takes {audit} MiB:
rows stay on disk, whose mapped pages count here, and digests of 64 bytes each in memory."""


PAGES = {
    "compare": compare_page, "whole": whole_page, "switches": switches_page, "order": order_page,
    "growth": growth_page,
}  # fmt: skip


def page(record: dict) -> str:
    hardware, sections = record["hardware"], record["sections"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    where = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB"
    parts = [write(sections.get(name)) for name, write in PAGES.items() if name in sections]
    return "\n\n".join(
        [
            "# Training speed, beside stock TRL",
            "`make bench`. SmolLM2-135M-Instruct in NF4, LoRA on all linear layers, where nothing else is said.\n"
            "Timings of shared machines drift: read the ratios.",
            *parts,
            f"{where}; {versions}.\n",
        ]
    )


def figure(found: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        ("pairs", "tokens", "seconds", "Seconds by tokens of more pairs"),
        ("length", "tokens", "seconds", "Seconds by tokens of longer pairs"),
        ("size", "weights", "seconds", "Seconds by weights"),
        ("pairs", "pairs", "peak_gib", "Peak GiB by pairs"),
    ]  # fmt: skip
    fig, axes = plt.subplots(1, len(panels), figsize=(13, 3.2), layout="constrained")
    for axis, (group, x, y, title) in zip(axes, panels, strict=True):
        rows = sorted(found[group], key=lambda row: row[x])
        xs, ys = [row[x] for row in rows], [row[y] for row in rows]
        power = slope(rows, x, y)
        scale = statistics.geometric_mean(b / a**power for a, b in zip(xs, ys, strict=True))
        axis.loglog(xs, ys, "o", color="#0072B2")
        axis.loglog([xs[0], xs[-1]], [scale * v**power for v in (xs[0], xs[-1])], "-", color="#D55E00")
        axis.set(title=f"{title}\nexponent {power:.2f}", xlabel=x)
        axis.set_ylim(min(ys) / 2, max(ys) * 2)
        axis.minorticks_off()
        seen = sorted(set(xs))
        axis.set_xticks(seen, [f"{v / 1e6:.0f}M" if v > 1e6 else f"{v:,}" for v in seen])
        ends = [min(ys), max(ys)] if max(ys) > 1.5 * min(ys) else [max(ys)]
        axis.set_yticks(ends, [f"{v:.3g}" for v in ends])
    fig.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="default: all")
    parser.add_argument("--task", help="one measurement; for the processes this one starts")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--pairs", type=int, default=64, help="training pairs of `compare`; 0: the whole profile")
    options = parser.parse_args()
    options.pairs = options.pairs or None
    if options.task:
        task = json.loads(options.task)
        with tempfile.TemporaryDirectory() as folder:
            print("RESULT " + json.dumps(KINDS[task["kind"]](task, Path(folder))))
        return
    from dpo_tutorial import environment

    target = Path(__file__).with_suffix(".json")
    record = json.loads(target.read_text()) if target.exists() else {"sections": {}}
    for name in options.sections or SECTIONS:
        record["sections"][name] = SECTIONS[name](options)
        record |= {"versions": environment.versions(), "hardware": environment.hardware()}
        target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(page(record), encoding="utf-8")
    if "growth" in (options.sections or SECTIONS):
        figure(record["sections"]["growth"], target.with_suffix(".png"))
    print(page(record))


if __name__ == "__main__":
    main()
