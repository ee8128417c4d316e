"""What one DPO step costs on a CPU, switch by switch: `python benchmarks/cpu_step.py > benchmarks/cpu_step.json`.

Each setting runs in a process of its own (allocator settings last for a process), on batches of 4 pairs of `cpu` data.
Compare ratios within one run: timings of shared machines drift.
"""

import json
import statistics
import subprocess
import sys
import time

SETTINGS = {
    "bf16, stock": ["bf16"],
    "fp32, stock": ["fp32"],
    "fp32, allocator": ["fp32", "allocator"],
    "fp32, allocator, head on answers only": ["fp32", "allocator", "head"],
    "bf16, allocator, head on answers only": ["bf16", "allocator", "head"],
}
STEPS = 4


def one(switches: list[str]) -> dict:
    import torch
    import trl.trainer.utils

    from dpo_tutorial import config, data, environment, models, train

    if "allocator" not in switches:
        environment.tune_allocator = lambda: False
    cfg = config.resolve(profile="cpu", dtype=switches[0], batch_size=4)
    tokenizer = models.load_tokenizer(cfg)
    rows = data.prepare(cfg, tokenizer).splits["train"]
    stock_order = dict(train_sampling_strategy="random")
    trainer = train.build_trainer(cfg, models.load_base(cfg), tokenizer, rows, None, "artifacts/bench", **stock_order)
    trl.trainer.utils._use_triton = lambda device: "head" in switches
    batches = iter(trainer.get_train_dataloader())
    model = trainer.accelerator.prepare(trainer.model)
    model.train()
    seconds, loss = [], None
    for _ in range(STEPS):
        batch = next(batches)
        started = time.perf_counter()
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, batch)
        loss.backward()
        seconds.append(time.perf_counter() - started)
    pairs = cfg.batch_size
    return {
        "pairs": pairs,
        "seconds": [round(s, 2) for s in seconds],
        "median": statistics.median(seconds[1:]),
        "peak_memory_gib": round(environment.peak_memory_gib(), 2),
        "torch_threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print("RESULT " + json.dumps(one(sys.argv[1:])))
        raise SystemExit
    from dpo_tutorial import environment

    results = {}
    for name, switches in SETTINGS.items():
        done = subprocess.run([sys.executable, __file__, *switches], capture_output=True, text=True, check=True)
        results[name] = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))[7:])
        print(name, results[name]["median"], file=sys.stderr)
    record = {"versions": environment.versions(), "hardware": environment.hardware(), "results": results}
    print(json.dumps(record, indent=2))
