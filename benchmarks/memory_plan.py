"""Predicted against measured peak memory on a CPU: `python benchmarks/memory_plan.py` writes memory_plan.json and .md.

Each setting is a process of its own: two optimizer steps through `train.build_trainer`, every pair of full length, the
rejected answer 8 tokens shorter so that batches are padded, as real ones are. The plan is made before the model is
loaded; the measured figure is the peak resident set of the whole process, load included.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

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


def qwen2(tokenizer, folder: Path) -> str:
    """A checkpoint with biases, an untied head and a feed-forward part five times as wide as the rest."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=384, intermediate_size=1920, num_hidden_layers=12, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen2ForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def one(name: str, folder: Path) -> dict:
    import dataclasses

    from training_speed import full_length

    from dpo_tutorial import config, environment, models, planner, train

    asked = dict(gradient_checkpointing=False) | SETTINGS[name]
    knobs = dict(asked)
    cfg = dataclasses.replace(config.Config(**config.PROFILES["cpu"] | dict(profile="cpu")), grad_accum=1)
    tokenizer = models.load_tokenizer(cfg)
    if knobs.get("model") == "qwen2":
        knobs["model"] = str(folder / "qwen2")
        if sys.argv[2] == "make":
            qwen2(tokenizer, folder / "qwen2")
            return {}
    cfg = dataclasses.replace(cfg, **knobs, max_steps=STEPS)
    pairs = full_length(tokenizer, cfg.max_tokens, STEPS * cfg.batch_size)
    answer = pairs[0]["chosen_tokens"]
    evaluates = "evaluation" in name
    planned = planner.plan(cfg, answer=answer, evaluates=evaluates)
    val = pairs.select(range(2 * cfg.batch_size)) if evaluates else None
    trainer = train.build_trainer(cfg, models.load_base(cfg), tokenizer, pairs, val, folder / "out", disable_tqdm=True)
    trainer.train()
    measured = round(environment.peak_memory_gib() * 2**30)
    return {
        "settings": asked | {"answer_tokens": answer, "evaluates": evaluates},
        "phases": planned.phases, "peak": planned.peak, "predicted": planned.total, "measured": measured,
        "ratio": round(planned.total / measured, 3),
    }  # fmt: skip


def page(record: dict) -> str:
    found, hardware = record["results"], record["hardware"]
    terms = list(dict.fromkeys(term for r in found.values() for term in r["phases"][r["peak"]]))
    head = ["setting (pairs x tokens)", *terms, "predicted", "measured", "ratio"]
    rows = [
        [name, *(f"{r['phases'][r['peak']].get(t, 0) / 2**20:,.0f}" for t in terms),
         f"{r['predicted'] / 2**20:,.0f}", f"{r['measured'] / 2**20:,.0f}", f"{r['ratio']:.2f}"]
        for name, r in found.items()
    ]  # fmt: skip
    from dpo_tutorial.report import markdown_table  # after the children, as below

    table = markdown_table(head, rows)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"""# Peak memory of training on a CPU: predicted before loading, and measured

`.venv/bin/python benchmarks/memory_plan.py`: SmolLM2-135M-Instruct in NF4 where nothing else is said. MiB by term of
the largest phase; ratio = predicted / measured.

{table}

{hardware["cpu"]}, {hardware["cores"]} cores, {hardware["memory_gib"]} GiB, {record["libc"]}; {versions}.

No run took more than was predicted. The terms were counted first and compared with the first six rows; the held-out
rows were run after that. `heap` is a bound, set so that all ten lie below it: a plan that is never too low is worth
more than one that is right on average and short by a seventh now and then.

All batches of a setting have one length. In a real run lengths differ, and the heap grows beyond the plan on a CPU.
Measured before prefix sharing: in the first 22 steps of the `cpu` profile (predicted 2.4 GiB) the resident set stood at
2.4 GiB up to step 10 and at 3.3 from step 11 on, where the sampler starts again with the longest pairs, which do not
fit into what short ones left. Without glibc's per-thread cache
(`GLIBC_TUNABLES=glibc.malloc.tcache_count=0`, as `make run` starts its kernels) it was 2.1 and 2.7. Handing all free
memory back after each step held the peak at 2.8 in 13 steps, and 8 steps took 85 s instead of 75. One run each; not
kept in `memory_plan.json`.

On CUDA six settings of a 0.5B shape are measured ([gpu.md](gpu.md)). The formulae differ there
where the code does: no process, no heap, and a head that works inside one tile of logits (`footprint.logit_bytes`).

- **Exact:** weights, adapters, gradients, optimizer; `tests/test_planner.py` compares them with tensors.
- **Counted:** activations and logits, from what autograd keeps and what TRL's head allocates.
- **Bounded:** heap. glibc cannot give freed, aligned memory to the next request of the same size once a small object
  sits in its slack. How much that wastes varies; the plan takes nine of the widest tensors for each block
  (`planner.HEAP`). Where evaluation is the peak, the term also has what training freed and the heap keeps.
- Logits stay small: without Triton, TRL's backward pass holds eight copies of a tile, which we make 512 tokens x 4,096
  words (`faster.cpu_head`); at TRL's own 32,768 words they were the largest term.
"""


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print("RESULT " + json.dumps(one(sys.argv[1], Path(sys.argv[3]))))
        raise SystemExit

    def child(name: str, what: str, folder: str) -> dict:
        done = subprocess.run([sys.executable, __file__, name, what, folder], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        return json.loads(next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))[7:])

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, knobs in SETTINGS.items():
            if "model" in knobs:  # made in a process of its own: it must not count in the measured one
                child(name, "make", folder)
            results[name] = child(name, "run", folder)
            print(name, results[name]["ratio"], file=sys.stderr, flush=True)
    import platform

    from dpo_tutorial import environment  # after the children: a peak counts from the parent's size on

    record = {
        "versions": environment.versions(), "hardware": environment.hardware(), "libc": " ".join(platform.libc_ver()),
        "results": results,
    }  # fmt: skip
    Path(__file__).with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    Path(__file__).with_suffix(".md").write_text(page(record), encoding="utf-8")
