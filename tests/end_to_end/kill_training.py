"""Train once undisturbed and once under SIGKILL after SIGKILL, and compare: for test_resume.py and reliability.md.

`python tests/end_to_end/kill_training.py MODEL PAIRS.jsonl FOLDER KILLS SEED` prints what it did as JSON.
One parent imports the libraries; every training is a fork of it, made before any thread has started, so that a start
costs little.
"""

import dataclasses
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset

from dpo_tutorial import knobs, run_folder
from dpo_tutorial.loading import models
from dpo_tutorial.training import train

torch.set_num_threads(1)


def settings(model: str, where: Path, epochs: int) -> knobs.Config:
    """Several epochs, an odd number of batches and a short last accumulation: the order of batches has to hold."""
    return dataclasses.replace(
        knobs.Config(), model=model, dtype="fp32", artifacts=str(where), lora_r=4, lora_alpha=8, batch_size=2,
        grad_accum=2, epochs=epochs, gradient_checkpointing=False, max_tokens=128, learning_rate=1e-2, save_steps=1,
    )  # fmt: skip


def start(cfg: knobs.Config, rows: list[dict], log: Path) -> int:
    """The process id of a fork that trains and saves, or resumes."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        pairs = Dataset.from_list(rows)
        train.train(
            cfg, run_folder.Run(cfg), models.load_base(cfg), models.load_tokenizer(cfg), pairs, pairs.select(range(2))
        )
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def steps_done(run: run_folder.Run) -> int:
    """The step of the newest sealed checkpoint."""
    seals = (run.dir / "trainer").glob("checkpoint-*/whole.json")
    return max((int(seal.parent.name.rpartition("-")[2]) for seal in seals), default=0)


def unsealed(run: run_folder.Run) -> int:
    """The step of a checkpoint without seal, 0 where there is none."""
    open_ones = [p for p in (run.dir / "trainer").glob("checkpoint-*") if not (p / "whole.json").exists()]
    return max((int(p.name.rpartition("-")[2]) for p in open_ones), default=0)


def kill_once(child: int, run: run_folder.Run, step: int, in_a_write: bool, chance: random.Random) -> dict | None:
    """SIGKILL the child once it has reached a step, at a random moment of a write or after it; `None`: it was done."""
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if (unsealed(run) if in_a_write else steps_done(run)) >= step:
            time.sleep(chance.uniform(0, 0.02 if in_a_write else 0.1))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status):
                return None
            return {"step": steps_done(run), "hit": "write" if unsealed(run) else "step"}
        time.sleep(0.0005)
    return None


def outcome(run: run_folder.Run) -> tuple[bytes, list[dict]]:
    """The adapter's bytes, and loss and rewards of every step."""
    record = json.loads((run.adapter / "training.json").read_text(encoding="utf-8"))
    rows = [{k: v for k, v in row.items() if k != "num_tokens"} for row in record["history"]["train"]]
    return (run.adapter / "adapter_model.safetensors").read_bytes(), rows


def main(model: str, pairs: str, folder: str, kills: int, seed: int) -> dict:
    rows = [json.loads(line) for line in Path(pairs).read_text(encoding="utf-8").splitlines()]
    chance, began = random.Random(seed), time.perf_counter()
    per_epoch = -(-len(rows) // 4)
    epochs = -(-max(30, 3 * kills) // per_epoch)
    total = epochs * per_epoch
    runs = {}
    for name in ("undisturbed", "killed"):
        cfg = settings(model, Path(folder) / name, epochs)
        runs[name] = run_folder.Run(cfg)
        hits = []
        while name == "killed" and len(hits) < kills:
            step = min(steps_done(runs[name]) + chance.randint(1, 2 * total // kills - 1), total - 1)
            child = start(cfg, rows, Path(folder) / f"{name}.log")
            hit = kill_once(child, runs[name], step, in_a_write=len(hits) % 2 == 0, chance=chance)
            if hit is None:
                break
            hits.append(hit)
        child = start(cfg, rows, Path(folder) / f"{name}.log")
        assert os.waitpid(child, 0)[1] == 0, (Path(folder) / f"{name}.log").read_text(encoding="utf-8")[-3000:]
    (adapter, history), (other, other_history) = (outcome(run) for run in runs.values())
    return {
        "kills": hits,
        "steps": len(history),
        "same adapter": adapter == other,
        "same history": history == other_history,
        "left over": [p.name for p in (runs["killed"].dir / "trainer").glob("checkpoint-*")],
        "seconds": round(time.perf_counter() - began, 1),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5]))))
