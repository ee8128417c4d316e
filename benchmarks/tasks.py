"""One measurement in a process of its own: `harness.child("tasks.py", {"kind": …})`, a kind being one of `KINDS`."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import harness
import psutil
import torch
import trainings
from datasets import Dataset
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM
from trl import DPOTrainer

from dpo_tutorial.adapter import lora
from dpo_tutorial.comparing import generation
from dpo_tutorial.loading import models
from dpo_tutorial.machine import hardware, memory
from dpo_tutorial.pairs import prepare
from dpo_tutorial.training import scoring


def train_task(task: dict, folder: Path) -> dict:
    """A whole training by ours or by stock TRL, as `run`, with the seconds by phase from the process's start on."""
    spent = {"import": time.time() - psutil.Process().create_time()}
    cfg, stock = trainings.config_of(**task.get("knobs", {})), task["trainer"] == "stock"
    arguments, marks = task.get("arguments", {}), [time.perf_counter()]

    def mark(name: str) -> float:
        memory.synchronize()
        marks.append(time.perf_counter())
        spent[name] = marks[-1] - marks[-2]
        return spent[name]

    with trainings.without(*task.get("without", ["allocator"] if stock else [])):
        tokenizer = models.load_tokenizer(cfg)
        base = models.load_base(cfg, quantize=task.get("quantize", True))
        mark("load")
        splits = splits_of(task, cfg, tokenizer)
        val = splits["val"] if task.get("val") else None
        hardware.seed_everything(cfg.seed)
        build = trainings.stock_trainer if stock else trainings.our_trainer
        trainer = build(cfg, base, tokenizer, splits["train"], val, folder / "trainer", **arguments)
        if task.get("compiled"):
            trainings.compile_layers(trainer)
        built = mark("tokenize")
        found = trainings.run(trainer, cfg.seed)
        marks.append(time.perf_counter())
        if task.get("generate"):
            prompts = [row["prompt"] for row in splits["test"].select(range(task["generate"]))]
            generation.generate(cfg, trainer.model, tokenizer, prompts, max_new_tokens=48)
            mark("generate")
        if task.get("untouched"):
            found["untouched"] = untouched(trainer)
    if arguments.get("precompute_ref_log_probs"):  # TRL does it while it builds the trainer
        found["seconds"] += built
        found |= {f"{of}_per_second": found[of] / found["seconds"] for of in ("pairs", "tokens")}
    return found | {"phases": spent | dict(trainer.times.seconds), "checkpointing": trainer.args.gradient_checkpointing}


def untouched(trainer: DPOTrainer) -> float:
    """Share of the linear layers' outputs that stay as the base made them when the adapter's is added, on one pair."""
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


def splits_of(task: dict, cfg, tokenizer) -> dict[str, Dataset]:
    """Pairs of one `length`, or the config's own: `pairs` to train on, `val` to evaluate on."""
    if "length" in task:
        pairs = trainings.quarter_prompt(tokenizer, task["length"], task["pairs"])
        return {"train": pairs, "val": pairs.select(range(task.get("val", 0))), "test": pairs}
    found = prepare.prepare(cfg, tokenizer).splits
    wanted = {"train": task.get("pairs"), "val": task.get("val"), "test": None}
    return {n: found[n].select(range(min(most or len(found[n]), len(found[n])))) for n, most in wanted.items()}


def raw_task(task: dict, folder: Path) -> dict:
    """Forward and backward pass of the model with its adapter on full batches of 8 x 256 tokens, and nothing else."""
    cfg = trainings.config_of(**task.get("knobs", {}))
    model = get_peft_model(models.load_base(cfg), lora.lora_config(cfg)).train()
    rows, length = task.get("shape", (8, 256))
    torch.manual_seed(0)
    seconds = []
    for _ in range(4):
        ids = torch.randint(0, 2**8, (rows, length), device=model.device)
        memory.synchronize()
        started = time.perf_counter()
        with scoring.autocast(cfg):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        memory.synchronize()
        seconds.append(time.perf_counter() - started)
    best = statistics.median(seconds[1:])
    return {"seconds": best, "tokens_per_second": rows * length / best}


def prepare_task(task: dict, folder: Path) -> dict:
    """Audit a source of so many rows and keep 400: does memory depend on the rows?"""
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
    cfg = trainings.config_of(data=str(source), **task.get("knobs", {}))
    tokenizer = models.load_tokenizer(cfg)
    before, started = psutil.Process().memory_info().rss, time.perf_counter()
    kept = prepare.prepare(cfg, tokenizer).splits["train"]
    return {
        "rows": task["rows"], "kept": len(kept), "seconds": time.perf_counter() - started,
        "peak_mib": memory.peak_memory_gib() * 2**10 - before / 2**20,
    }  # fmt: skip


def make_task(task: dict, folder: Path) -> dict:
    """Save a checkpoint of random weights, with the model's tokenizer and, where not given, its vocabulary."""
    tokenizer = models.load_tokenizer(trainings.config_of(**task.get("knobs", {})))
    torch.manual_seed(0)
    with torch.device(hardware.device()):
        model = AutoModelForCausalLM.from_config(trainings.llama(task["shape"], tokenizer), dtype=torch.bfloat16)
    model.save_pretrained(task["path"])
    tokenizer.save_pretrained(task["path"])
    return {"weights": sum(p.numel() for p in model.parameters())}


def matmul_task(task: dict, folder: Path) -> dict:
    """What the device reaches at best: one large product of dense matrices, again and again."""
    n, seconds = task["size"], []
    a = torch.randn(n, n, device=hardware.device()).to(hardware.torch_dtype(task["dtype"]))
    for _ in range(10):
        memory.synchronize()
        started = time.perf_counter()
        a @ a
        memory.synchronize()
        seconds.append(time.perf_counter() - started)
    return {"seconds": min(seconds), "flops": 2 * n**3 / min(seconds)}


KINDS = {"train": train_task, "raw": raw_task, "prepare": prepare_task, "make": make_task, "matmul": matmul_task}

if __name__ == "__main__":
    harness.answer(KINDS)
