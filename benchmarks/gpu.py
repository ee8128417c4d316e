"""What a GPU does: `python benchmarks/gpu.py A B C D` appends to gpu.jsonl as it goes; `page` makes gpu.md of it.

A  no model needed: the tests marked gpu, five steps in fp16 and bf16, the doctor, predicted and measured memory
B  speed: ours beside stock TRL on random weights of the GPU profiles' shapes, four ways of prefix sharing, one profile
C  the notebooks, executed: the embedded model, and UltraFeedback rows in fp16
D  UltraFeedback: the embedded model trained on all rows at hand, each row held out once, several rates and seeds

Each stage is meant for less than eight minutes on an H100. A stage that is stopped has written what it measured.
`--tiny` takes tiny shapes, for a test without a GPU. ULTRAFEEDBACK_SAMPLE names a folder laid out as the hub serves it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PrinterCallback
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

sys.path.insert(0, str(Path(__file__).parent))
import training_speed as speed  # noqa: E402  the shapes, the stock trainer, and what counts tokens and steps

from dpo_tutorial import config, data, environment, evaluate, faster, models, planner, prefix, statistics, train  # noqa: E402

ROOT = Path(__file__).parents[1]
TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)


class Record:
    """A file of JSON lines: one per measurement, written at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, stage: str, name: str, **values) -> None:
        line = {"stage": stage, "name": name, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **values}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}
        print(stage, name, str(shown)[:400], flush=True)


# --- shared ---------------------------------------------------------------------------------------------------------


def settings(options, **knobs) -> config.Config:
    """The `cpu` profile's config on whatever device is here; checkpointing only where a measurement asks for it."""
    knobs = {"gradient_checkpointing": False} | knobs
    if options.tiny:
        knobs = {"dtype": "fp32"} | knobs
    return dataclasses.replace(config.resolve(profile="cpu"), **knobs)


def llama(shape: dict, tokenizer):
    from transformers import LlamaConfig

    more = dict(vocab_size=len(tokenizer), tie_word_embeddings=True, max_position_embeddings=4096)
    return LlamaConfig(eos_token_id=2, bos_token_id=None, pad_token_id=2, **more | shape)


def random_base(shape: dict, cfg, tokenizer):
    """A model of that shape with random weights, its linear layers in NF4, loaded as a checkpoint would be."""
    from transformers import LlamaForCausalLM

    made = llama(shape, tokenizer)
    torch.manual_seed(0)
    with torch.device(environment.device()):
        weights = LlamaForCausalLM(made).to(environment.torch_dtype(cfg.dtype)).state_dict()
    base = LlamaForCausalLM.from_pretrained(
        None, config=made, state_dict=weights, dtype=environment.torch_dtype(cfg.dtype),
        quantization_config=models.quantization_config(cfg), device_map={"": environment.device()},
    )  # fmt: skip
    base.config.use_cache = False
    models.keep_gradients(base)
    return base


def plain_again(base) -> None:
    """Undo what a trainer leaves on its base, so that the next one finds a plain model."""
    base.gradient_checkpointing_disable()
    base.__dict__.pop("forward", None)
    base.set_attn_implementation("sdpa")
    free()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def ultrafeedback(tokenizer, options) -> list[dict]:
    """All usable rows of the sample, of all its splits, in one list; made-up rows in a tiny run without a sample."""
    folder = os.environ.get("ULTRAFEEDBACK_SAMPLE")
    if not folder and not options.tiny:
        raise SystemExit("Set ULTRAFEEDBACK_SAMPLE to a folder of UltraFeedback-binarized rows.")
    cfg = settings(
        options,
        data=folder or config.EMBEDDED,
        max_tokens=128 if options.tiny else 1024,
        max_train=10**6,
        max_val=10**6,
        max_test=10**6,
    )
    splits = data.prepare(cfg, tokenizer).splits
    rows = [row for name in ("train", "val", "test") for row in splits[name]]
    return rows[:24] if options.tiny else rows


def run_steps(trainer, seed: int) -> dict:
    """Train to the end: seconds of each optimizer step, tokens, positions computed, peak memory, first and last loss.

    The first step also compiles and fills caches, so rates are over the others.
    """
    seen = speed.counted(trainer)
    marks = [(time.perf_counter(), 0, 0)]

    class Clock(train.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            environment.synchronize()
            marks.append((time.perf_counter(), seen["tokens"], seen["pairs"]))

    trainer.add_callback(Clock())
    trainer.remove_callback(PrinterCallback)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    environment.seed_everything(seed)
    trainer.train()
    (start, tokens, pairs), (end, tokens_end, pairs_end) = marks[1], marks[-1]
    losses = [row["loss"] for row in train.history(trainer)["train"]]
    return {
        "tokens_per_second": (tokens_end - tokens) / (end - start),
        "pairs_per_second": (pairs_end - pairs) / (end - start),
        "steps": [round(b[0] - a[0], 4) for a, b in zip(marks, marks[1:], strict=False)], "tokens": seen["tokens"],
        "positions": seen["positions"], "padding": 1 - seen["tokens"] / seen["slots"],
        "peak_gib": environment.peak_memory_gib(), "first_loss": losses[0], "last_loss": losses[-1],
    }  # fmt: skip


@contextmanager
def sharing(how: str) -> Iterator[None]:
    """Prefix sharing by another attention: `mask` is the package's; `apart` and `flex` are tried beside it."""
    plain = prefix._forward_packed

    def packed_forward(decoder, packed: prefix.Packed, **kwargs):
        inputs = dict(input_ids=packed.input_ids, position_ids=packed.position_ids)
        if how == "apart":
            decoder.config._attn_implementation = "apart"
            unused = packed.input_ids.new_ones((1, 1, 1, 1), dtype=torch.bool)  # a finished mask is left as it is
            inputs |= {"attention_mask": unused, "packed": packed}
        else:
            decoder.config._attn_implementation = "flex_attention"
            inputs["attention_mask"] = flex_mask(packed.attention_mask[:, 0])
        outputs = type(decoder).forward(decoder, **inputs, **kwargs)
        rows = torch.arange(len(packed.input_ids), device=packed.columns.device).repeat(2)[:, None]
        outputs.last_hidden_state = outputs.last_hidden_state[rows, packed.columns]
        return outputs

    if how != "mask":
        prefix._forward_packed = packed_forward
    try:
        yield
    finally:
        prefix._forward_packed = plain


def flex_mask(sees: torch.Tensor):
    """FlexAttention's block mask of `[pairs, packed, packed]`, true where a token (row) sees another (column)."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b, h, q, kv):
        return sees[b, q, kv]

    return create_block_mask(visible, len(sees), None, sees.shape[1], sees.shape[2], device=str(sees.device))


def attend_apart(module, query, key, value, attention_mask, packed: prefix.Packed | None = None, **kwargs):
    """No mask: in attention alone, both sequences of a pair are laid out apart, each behind its copy of the prompt.

    Args:
        query, key, value: `[pairs, heads, packed, width]`.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    pairs, length = len(packed.input_ids), packed.columns.shape[1]
    apart = (take(x, packed.columns) for x in (query, key, value))  # [2 x pairs, heads, length, width]
    out, _ = sdpa_attention_forward(module, *apart, None, **kwargs | {"is_causal": True})
    beside = torch.cat([out[:pairs], out[pairs:]], dim=1).transpose(1, 2)  # [pairs, heads, 2 x length, width]
    place = torch.arange(packed.input_ids.shape[1], device=query.device)
    own = packed.columns[:pairs, :, None] == place  # in the chosen sequence, where it holds this token
    chosen = own.any(1) & (packed.position_ids == place)
    return take(beside, torch.where(chosen, place, length + packed.position_ids)).transpose(1, 2), None


def take(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """`x[pair, :, column]` of `[pairs, heads, tokens, width]`, for every entry of `columns`, `[n x pairs, length]`."""
    pairs, heads, tokens, width = x.shape
    row = torch.arange(len(columns), device=x.device)[:, None] % pairs
    flat = x.transpose(1, 2).reshape(pairs * tokens, heads, width)
    taken = flat.index_select(0, (row * tokens + columns).flatten())  # its backward adds, without sorting first
    return taken.view(*columns.shape, heads, width).transpose(1, 2)


AttentionInterface.register("apart", attend_apart)
AttentionMaskInterface.register("apart", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


# --- A: what needs no model -----------------------------------------------------------------------------------------


def stage_a(options, record: Record) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", "-m", "gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    record.write("A", "gpu-marked tests", code=done.returncode, said=done.stdout.strip().splitlines()[-12:])
    for profile in ("cpu",) if options.tiny else ("cpu", "t4", "gpu80"):
        done = subprocess.run(
            [sys.executable, "-m", "dpo_tutorial", "doctor", "-p", "PROFILE", profile], cwd=ROOT, capture_output=True,
            text=True,
        )  # fmt: skip
        record.write("A", f"doctor, profile {profile}", code=done.returncode, said=done.stdout.splitlines())
    tokenizer = models.load_tokenizer(settings(options))
    shape = TINY if options.tiny else speed.SHAPES["0.5B"]
    for dtype in ("fp32",) if options.tiny else ("fp16", "bf16"):
        cfg = settings(options, dtype=dtype, max_steps=5, max_tokens=512)
        base = random_base(shape, cfg, tokenizer)
        for cast in (True, False):
            five_steps(options, record, cfg, base, tokenizer, cast)
        del base
        free()
    predicted_and_measured(options, record, tokenizer, shape)


def five_steps(options, record: Record, cfg, base, tokenizer, cast: bool) -> None:
    """Five steps with the adapter in float32, and as TRL leaves it: in fp16 that fails (trl#4901)."""
    length = 64 if options.tiny else 256
    pairs = speed.full_length(tokenizer, length, 40, asked=" b" * (length // 4))
    ours, types, said = faster.cast_trainable_to_fp32, [], ""
    if not cast:
        faster.cast_trainable_to_fp32 = lambda model: None
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = train.build_trainer(cfg, base, tokenizer, pairs, None, folder, disable_tqdm=True)
            types = sorted({str(p.dtype) for p in trainer.model.parameters() if p.requires_grad})
            found = run_steps(trainer, cfg.seed)
            rows = train.history(trainer)["train"]
            finite = all(torch.isfinite(p).all().item() for p in trainer.model.parameters() if p.requires_grad)
            found |= {
                "losses": [r["loss"] for r in rows],
                "grad_norms": [r["grad_norm"] for r in rows],
                "finite": finite,
            }
    except Exception as error:  # this is what is measured
        found, said = {}, f"{type(error).__name__}: {error}"[:300]
    finally:
        faster.cast_trainable_to_fp32 = ours
    base = trainer.model.unload()
    plain_again(base)
    name = f"five steps in {cfg.dtype}, {'adapter in float32' if cast else 'without our cast'}"
    record.write("A", name, adapter=types, failed=said, **found)


def predicted_and_measured(options, record: Record, tokenizer, shape: dict) -> None:
    """Six settings: the planner's peak beside the measured one."""
    dtype = "fp32" if options.tiny else "bf16"
    with tempfile.TemporaryDirectory() as folder:
        llama(shape, tokenizer).save_pretrained(folder)
        base = None
        for length in (48, 64) if options.tiny else (512, 1024):
            for size, checkpointing in ((8, False), (8, True), (1, False)):
                cfg = settings(
                    options, model=folder, dtype=dtype, batch_size=size, grad_accum=8 // size, max_steps=2,
                    max_tokens=length, gradient_checkpointing=checkpointing,
                )  # fmt: skip
                base = base or random_base(shape, cfg, tokenizer)
                pairs = speed.full_length(tokenizer, length, 16, asked=" b" * (length // 4))
                answer = pairs[0]["chosen_tokens"]
                plan = planner.plan(cfg, length=length, answer=answer, process=0, evaluates=False)
                trainer = train.build_trainer(cfg, base, tokenizer, pairs, None, folder + "/out", disable_tqdm=True)
                found = run_steps(trainer, cfg.seed)
                base = trainer.model.unload()
                plain_again(base)
                record.write(
                    "A", f"memory: {length} tokens, {size} at a time{', checkpointing' if checkpointing else ''}",
                    predicted_gib=plan.total / 2**30, measured_gib=found["peak_gib"], terms=plan.terms, peak=plan.peak,
                )  # fmt: skip


# --- B: speed -------------------------------------------------------------------------------------------------------

#: Who trains: (trainer, attention of prefix sharing or "off", pairs at a time, checkpointing, layers compiled).
TRAINERS = {
    "stock TRL": ("stock", "off", 8, True, False),
    "ours": ("ours", "mask", 8, True, False),
    "ours, 2 pairs at a time, no checkpointing": ("ours", "mask", 2, False, False),
    "ours, no prefix sharing": ("ours", "off", 8, True, False),
    "ours, attention apart": ("ours", "apart", 8, True, False),
    "ours, FlexAttention": ("ours", "flex", 8, True, False),
    "ours, no checkpointing": ("ours", "mask", 8, False, False),
    "ours, no checkpointing, layers compiled": ("ours", "apart", 8, False, True),
}
IN_TURN = ("stock TRL", "ours")  # measured in every round; the others in the first


def stage_b(options, record: Record) -> None:
    ceiling = {}
    for dtype in ("fp32",) if options.tiny else ("bf16", "fp16"):
        found = speed.matmul_once({"size": 64 if options.tiny else 8192, "dtype": dtype}, Path())
        ceiling[dtype] = found["flops"]
        record.write("B", f"matrix product, {dtype}", flops=found["flops"])
    tokenizer = models.load_tokenizer(settings(options))
    dtype = "fp32" if options.tiny else "bf16"
    rows = ultrafeedback(tokenizer, options)
    for name in options.shapes or (("tiny",) if options.tiny else ("0.5B", "7B")):
        shape = TINY if name == "tiny" else speed.SHAPES[name]
        cfg = settings(options, dtype=dtype, max_tokens=1024)
        base = random_base(shape, cfg, tokenizer)
        weights = sum(models.weight_bytes(base).values()) / 2**30
        record.write("B", f"{name}, weights", gib=weights)
        for who in IN_TURN:  # compile the kernels of both before either is timed
            base, _ = one_training(cfg, base, tokenizer, pairs_of(rows, None, tokenizer, 16), *TRAINERS[who])
        for about, length in options.sets.items():
            pairs = pairs_of(rows, length, tokenizer, options.pairs)
            for turn in range(options.rounds):
                for who in options.trainers or TRAINERS:
                    if turn and who not in IN_TURN:
                        continue
                    base, found = one_training(cfg, base, tokenizer, pairs, *TRAINERS[who])
                    if "failed" not in found:
                        flops = flops_of(shape, found["tokens_per_second"])
                        found |= {"flops": flops, "utilisation": flops / ceiling[dtype]}
                    record.write("B", "training", shape=name, data=about, who=who, turn=turn, **found)
        profile_step(options, record, cfg, base, tokenizer, rows, name)
        del base
        free()


def pairs_of(rows: list[dict], length: int | None, tokenizer, n: int):
    """`n` pairs: UltraFeedback's own rows, or pairs of one length whose prompt is a quarter of it."""
    from datasets import Dataset

    if length is None:
        return Dataset.from_list(rows[:n])
    return speed.full_length(tokenizer, length, n, asked=" b" * (length // 4))


def flops_of(shape: dict, tokens_per_second: float) -> float:
    """Multiplications and additions per second that a step needs; recomputation, sharing and padding not counted.

    Per token: 2 per weight for each forward pass (policy, reference) and 2 for the gradient of the inputs; weights of
    the base have no gradient of their own, and what the adapter adds is below 3%.
    """
    head = shape["hidden_size"] // shape["num_attention_heads"] * shape["num_key_value_heads"]
    block = shape["hidden_size"] * (2 * shape["hidden_size"] + 2 * head + 3 * shape["intermediate_size"])
    return 3 * 2 * shape["num_hidden_layers"] * block * tokens_per_second


def build(cfg, base, tokenizer, pairs, folder, kind, attention, size, checkpointing):
    cfg = dataclasses.replace(
        cfg, batch_size=size, grad_accum=8 // size, prefix_sharing=attention != "off",
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    if kind == "stock":
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        return speed.stock_trainer(cfg, base, tokenizer, pairs, None, folder, disable_tqdm=True, **changes)
    return train.build_trainer(cfg, base, tokenizer, pairs, None, folder, disable_tqdm=True)


def one_training(cfg, base, tokenizer, pairs, kind, attention, size, checkpointing, compiled) -> tuple:
    """(the base, plain again; what was measured, or why it failed)."""
    layers = base.base_model.layers
    with tempfile.TemporaryDirectory() as folder, sharing(attention if attention != "off" else "mask"):
        environment.seed_everything(cfg.seed)
        trainer = build(cfg, base, tokenizer, pairs, folder, kind, attention, size, checkpointing)
        try:
            if compiled:
                for layer in layers:
                    layer.compile(dynamic=True)
            found = run_steps(trainer, cfg.seed) | {"pairs_at_a_time": size, "checkpointing": checkpointing}
        except Exception as error:  # out of memory, or a kernel that this card lacks: a row of the table
            found = {"failed": f"{type(error).__name__}: {error}"[:300]}
        for layer in layers:
            layer._compiled_call_impl = None
        base = trainer.model.unload()
        del trainer
    plain_again(base)
    return base, found


#: Kernel names by what they do, first hit wins.
KINDS = (
    ("attention", ("flash", "fmha", "attention", "softmax")),
    ("dequantize", ("quantize", "kdequant", "4bit")),
    ("matrix product", ("gemm", "cutlass", "nvjet", "cublas", "sm90_xmma", "_mm", "wgmma")),
    ("head", ("logprob", "triton")),
    ("optimizer", ("multi_tensor", "adam", "foreach")),
    ("gather", ("index", "gather", "scatter")),
    ("elementwise and copies", ("elementwise", "copy", "memcpy", "memset", "reduce", "cat", "vectorized")),
)


def profile_step(options, record: Record, cfg, base, tokenizer, rows, name: str) -> None:
    """Where the time of one training goes: device time by kind of kernel, and the largest kernels."""
    from torch.profiler import ProfilerActivity, profile

    pairs = pairs_of(rows, None, tokenizer, 16)
    cuda = torch.cuda.is_available()
    for who in ("ours", "stock TRL"):
        kind, attention, size, checkpointing, _ = TRAINERS[who]
        with tempfile.TemporaryDirectory() as folder:
            trainer = build(cfg, base, tokenizer, pairs, folder, kind, attention, size, checkpointing)
            batches = iter(trainer.get_train_dataloader())
            first, second = next(batches), next(batches, None)
            trainer.model.train()
            trainer.create_optimizer()

            def step(batch, trainer=trainer):
                batch = trainer._prepare_inputs(batch)
                with trainer.compute_loss_context_manager():
                    loss = trainer.compute_loss(trainer.model, batch)
                loss.backward()
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()

            step(first)
            environment.synchronize()
            with profile(activities=[ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]) as seen:
                started = time.perf_counter()
                step(second or first)
                environment.synchronize()
                seconds = time.perf_counter() - started
            base = trainer.model.unload()
            del trainer
        plain_again(base)
        events = [
            (e.key, (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e6, e.count)
            for e in seen.key_averages()
        ]
        kinds: Counter[str] = Counter()
        for key, spent, _ in events:
            low = key.lower()
            kinds[next((k for k, words in KINDS if any(w in low for w in words)), "other")] += spent
        top = sorted(events, key=lambda e: -e[1])[:25]
        record.write(
            "B", f"{name}, profile of a step, {who}", seconds=seconds, device_seconds=sum(e[1] for e in events),
            kernels=sum(e[2] for e in events), kinds=dict(kinds),
            top=[{"kernel": k[:110], "seconds": round(s, 5), "count": c} for k, s, c in top],
        )  # fmt: skip


# --- C: the notebooks -----------------------------------------------------------------------------------------------


def stage_c(options, record: Record) -> None:
    """The notebooks as `make run` executes them, side by side; copies go into `executed/` beside the record."""
    sample = os.environ.get("ULTRAFEEDBACK_SAMPLE") or config.EMBEDDED
    keep = record.path.parent / "executed"
    keep.mkdir(parents=True, exist_ok=True)
    python = sys.executable
    t4 = ["MAX_TOKENS", "512", "MAX_TRAIN", "600", "DTYPE", "fp16"]
    runs = {
        "embedded": ("embedded model and pairs", [python, "-m", "dpo_tutorial", "run", *p("PROFILE", "cpu")]),
        "ultrafeedback-fp16": (
            "UltraFeedback rows, fp16 as on a T4 (not a T4)",
            [python, "-m", "dpo_tutorial", "run", *p("PROFILE", "cpu", "DATA", sample, *t4)],
        ),
        "quickstart": (
            "quickstart",
            [
                python,
                "-m",
                "papermill",
                "-k",
                "python3",
                "QUICKSTART",
                "TARGET",
                *p("MODEL", "embedded", "DATA", "embedded", flag="-r"),
            ],
        ),
    }
    if options.tiny:
        runs = {"smoke": ("smoke", [python, "-m", "dpo_tutorial", "run", *p("PROFILE", "smoke")])}
    quickstart = next((ROOT / "notebooks").glob("00_*.ipynb"), None)
    started, going = time.perf_counter(), {}
    for folder, (_, command) in runs.items():
        out = keep / folder
        out.mkdir(exist_ok=True)
        if folder == "quickstart" and quickstart is None:
            continue
        places = {"QUICKSTART": str(quickstart), "TARGET": str(out / "00_quickstart.ipynb")}
        command = [places.get(word, word) for word in command]
        log = (keep / f"{folder}.log").open("w")
        artifacts = p("ARTIFACTS", str(out), flag="-r" if folder == "quickstart" else "-p")
        going[folder] = subprocess.Popen([*command, *artifacts], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    while going:
        for folder in [f for f, process in going.items() if process.poll() is not None]:
            code = going.pop(folder).returncode
            found = {"code": code, "minutes": (time.perf_counter() - started) / 60}
            for name, wanted in (("summary", None), ("training", ("seconds", "peak_memory_gib"))):
                file = next((keep / folder).rglob(f"{name}.json"), None)
                if file:
                    values = json.loads(file.read_text())
                    found[name] = {k: values[k] for k in wanted or values if k not in ("adapter", "executed")}
            said = (keep / f"{folder}.log").read_text().splitlines()[-15:]
            record.write("C", runs[folder][0], **found, said=[environment.without_paths(x)[-300:] for x in said])
        time.sleep(0.5)


def p(*words: str, flag: str = "-p") -> list[str]:
    """Names and values as the options of a command line."""
    return [part for name, value in zip(words[::2], words[1::2], strict=True) for part in (flag, name, value)]


# --- D: UltraFeedback -----------------------------------------------------------------------------------------------

FOLDS = 5
RATES = (5e-6, 1.5e-5, 5e-5, 1.5e-4)


def tasks(options) -> list[dict]:
    """Most wanted first: all rates once, then other seeds, then three epochs."""
    if options.tiny:
        return [{"rate": 1e-3, "epochs": 1, "seed": 42, "fold": fold} for fold in range(2)]
    plan = [(rate, 1, 42) for rate in RATES] + [(1.5e-4, 3, 42), (5e-5, 3, 42)]
    plan += [(rate, 1, seed) for rate in RATES[::-1] for seed in (1, 2)] + [(3e-4, 1, 42)]
    plan += [(1.5e-4, 3, 1), (1.5e-4, 3, 2), (5e-5, 3, 1), (5e-5, 3, 2)]
    plan = [step for step in plan if not options.seeds or step[2] in options.seeds]
    return [{"rate": r, "epochs": e, "seed": s, "fold": fold} for r, e, s in plan for fold in range(FOLDS)]


def stage_d(options, record: Record) -> None:
    tokenizer = models.load_tokenizer(settings(options))
    rows = ultrafeedback(tokenizer, options)
    record.write("D", "rows", usable=len(rows), max_tokens=1024, folds=2 if options.tiny else FOLDS)
    record.write("D", "baselines", **baselines(rows))
    queue = tasks(options)
    if options.workers == 1:
        worker(options, queue, record.path, rows)
        return
    context = multiprocessing.get_context("spawn")
    line = context.Queue()
    for task in queue:
        line.put(task)
    working = [context.Process(target=worker, args=(options, line, record.path, rows)) for _ in range(options.workers)]
    for process in working:
        process.start()
    for process in working:
        process.join()


def baselines(rows: list[dict]) -> dict:
    """What needs no training: the longer answer, and word counts learnt on the other folds."""
    from datasets import Dataset

    words = []
    for fold in range(FOLDS):
        held, rest = split(rows, 42, fold)
        words += statistics.bag_of_words(Dataset.from_list(rest), Dataset.from_list(held))
    gaps = [row["chosen_tokens"] - row["rejected_tokens"] for row in rows]
    return {"longer": statistics.accuracy(gaps), "words": statistics.rate(sum(words), len(words))}


def split(rows: list[dict], seed: int, fold: int, folds: int = FOLDS) -> tuple[list[dict], list[dict]]:
    """(held out, the rest), cut by prompt: each prompt is held out in exactly one fold of a seed."""
    import random

    prompts = sorted({json.dumps(row["prompt"]) for row in rows})
    random.Random(seed).shuffle(prompts)
    held = set(prompts[fold::folds])
    sides = ([], [])
    for row in rows:
        sides[json.dumps(row["prompt"]) not in held].append(row)
    return sides


def worker(options, queue, path: Path, rows: list[dict]) -> None:
    """Train and score one task after another: trained in the GPU's type, scored in float32, which hides no margin."""
    import queue as queues

    started = time.perf_counter()
    cfg = settings(options, batch_size=8, grad_accum=1, max_tokens=1024, save_steps=10**6)
    tokenizer = models.load_tokenizer(cfg)
    exact = dataclasses.replace(cfg, dtype="fp32")
    if options.tiny:
        base, judge = (random_base(TINY, c, tokenizer) for c in (cfg, exact))
    else:
        base, judge = models.load_base(cfg), models.load_base(exact)
    from peft import get_peft_model

    scorer = get_peft_model(judge, models.lora_config(exact))
    record = Record(path)
    while True:
        try:
            task = queue.pop(0) if isinstance(queue, list) else queue.get_nowait()
        except (IndexError, queues.Empty):
            return
        if time.perf_counter() - started > options.seconds:
            return
        begun = time.perf_counter()
        base, found = one_fold(options, cfg, exact, base, scorer, tokenizer, rows, task)
        record.write("D", "fold", **task, **found, seconds=time.perf_counter() - begun)


def one_fold(options, cfg, exact, base, scorer, tokenizer, rows, task) -> tuple:
    from datasets import Dataset
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    held, rest = split(rows, task["seed"], task["fold"], 2 if options.tiny else FOLDS)
    ours = dataclasses.replace(cfg, learning_rate=task["rate"], epochs=float(task["epochs"]), seed=task["seed"])
    environment.seed_everything(ours.seed)
    with tempfile.TemporaryDirectory() as folder:
        shuffled = Dataset.from_list(rest).shuffle(seed=ours.seed)
        trainer = train.build_trainer(ours, base, tokenizer, shuffled, None, folder, disable_tqdm=True)
        trainer.remove_callback(PrinterCallback)
        environment.seed_everything(ours.seed)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    log = train.history(trainer)["train"]
    free()
    set_peft_model_state_dict(scorer, get_peft_model_state_dict(trainer.model))
    records = evaluate.score_pairs(exact, scorer, tokenizer, Dataset.from_list(held))
    found = {
        "train_seconds": seconds, "steps": len(log), "first_loss": log[0]["loss"], "n": len(records),
        "margins": [round(r["margin"], 5) for r in records],
        "reward_chosen": statistics.mean([r["reward_chosen"] for r in records])["mean"],
        "reward_rejected": statistics.mean([r["reward_rejected"] for r in records])["mean"],
        "reference": [round(r["reference_chosen"] - r["reference_rejected"], 3) for r in records],
        "reference_per_token": [
            round(r["reference_chosen"] / r["chosen_tokens"] - r["reference_rejected"] / r["rejected_tokens"], 4)
            for r in records
        ],
    }  # fmt: skip
    if task["fold"] == 0:
        prompts = [row["prompt"] for row in held[: 2 if options.tiny else 24]]
        limit = 8 if options.tiny else 128
        kl = evaluate.kl_from_reference(ours, trainer.model, tokenizer, prompts, limit)
        found["kl"] = {name: kl[name] for name in ("per_answer", "per_token")}
        before, after = evaluate.answers_of_both(
            dataclasses.replace(ours, max_new_tokens=limit), trainer.model, tokenizer, prompts
        )
        found["tokens"] = {when: statistics.mean([a["tokens"] for a in answers])["mean"]
                           for when, answers in (("before", before), ("after", after))}  # fmt: skip
        found["same_answers"] = sum(a["text"] == b["text"] for a, b in zip(before, after, strict=True)) / len(prompts)
    base = trainer.model.unload()
    del trainer
    plain_again(base)
    return base, found


# --- the page -------------------------------------------------------------------------------------------------------


def page(path: Path, lines: list[dict]) -> None:
    """Put today's tables between their marks in gpu.md; the sentences around them are written by hand."""
    from dpo_tutorial.report import markdown_table

    text = path.read_text(encoding="utf-8")
    for name, (head, rows) in {"steps": steps_rows(lines), "memory": memory_rows(lines), "speed": speed_rows(lines),
                               "ultrafeedback": fold_rows(lines)}.items():  # fmt: skip
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, after = text.split(start)[0], text.split(end)[1]
        text = f"{before}{start}\n{markdown_table(head, rows)}\n{end}{after}"
    path.write_text(text, encoding="utf-8")


def steps_rows(lines: list[dict]) -> tuple[list, list]:
    rows = [
        [r["name"], " ".join(f"{x:.3f}" for x in r.get("losses", [])), r["failed"] or "none"]
        for r in lines
        if r["name"].startswith("five steps")
    ]
    return ["", "losses", "error"], rows


def memory_rows(lines: list[dict]) -> tuple[list, list]:
    rows = [
        [r["name"].removeprefix("memory: "), f"{r['predicted_gib']:.1f}", f"{r['measured_gib']:.1f}",
         f"{r['predicted_gib'] / r['measured_gib']:.2f}"]
        for r in lines if r["name"].startswith("memory")
    ]  # fmt: skip
    return ["", "predicted GiB", "measured GiB", "predicted / measured"], rows


def speed_rows(lines: list[dict]) -> tuple[list, list]:
    rows = [
        [r["shape"], r["data"], r["who"], str(r["turn"] + 1), f"{r['pairs_per_second']:.2f}",
         f"{r['tokens_per_second']:,.0f}", f"{r['peak_gib']:.1f}", f"{r['utilisation']:.0%}", f"{r['padding']:.0%}"]
        if "failed" not in r
        else [r["shape"], r["data"], r["who"], str(r["turn"] + 1), r["failed"].split(":")[0], "", "", "", ""]
        for r in lines if r["name"] == "training"
    ]  # fmt: skip
    return ["shape", "pairs", "", "turn", "pairs/s", "tokens/s", "peak GiB", "utilisation", "padding"], rows


def fold_rows(lines: list[dict]) -> tuple[list, list]:
    runs: dict[tuple, list[dict]] = {}
    for r in lines:
        if r["name"] == "fold":
            runs.setdefault((r["epochs"], r["rate"], r["seed"]), []).append(r)
    rows = []
    for (epochs, rate, seed), folds in sorted(runs.items()):
        margins = [m for r in folds for m in r["margins"]]
        found, mean = statistics.accuracy(margins), statistics.mean(margins)
        kl = next((r["kl"]["per_answer"] for r in folds if "kl" in r), None)
        rows.append(
            [f"{rate:g}", str(epochs), str(seed), f"{len(folds)} of {FOLDS}", str(len(margins)),
             f"{found['rate']:.3f} ({found['low']:.3f} to {found['high']:.3f})",
             f"{mean['mean']:.3f} ({mean['standard_error']:.3f})",
             f"{kl['mean']:.1f} ({kl['standard_error']:.1f})" if kl else ""]
        )  # fmt: skip
    return ["rate", "epochs", "seed", "folds", "held out", "accuracy (95%)", "margin (s.e.)", "KL (s.e.)"], rows


# --- main -----------------------------------------------------------------------------------------------------------

STAGES = {"A": stage_a, "B": stage_b, "C": stage_c, "D": stage_d}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "page"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of gpu.jsonl")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a test without a GPU")
    parser.add_argument("--shapes", nargs="*", choices=list(speed.SHAPES), help="of stage B")
    parser.add_argument("--trainers", nargs="*", choices=list(TRAINERS), help="of stage B")
    parser.add_argument("--pairs", type=int, default=48, help="pairs of each training of stage B")
    parser.add_argument("--rounds", type=int, default=2, help="stage B measures stock and ours so often, in turn")
    parser.add_argument("--lengths", nargs="*", type=int, default=[1024], help="stage B: pairs of so many tokens too")
    parser.add_argument("--workers", type=int, default=1, help="processes of stage D")
    parser.add_argument("--seeds", nargs="*", type=int, help="of stage D; default: 42, 1, 2")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stage D starts no training after so many")
    options = parser.parse_args(argv)
    if options.tiny:
        options.pairs, options.lengths, options.rounds = 24, [64], 1
    options.sets = {"UltraFeedback": None} | {f"{n:,} tokens": n for n in options.lengths}
    record = Record(options.out / "gpu.jsonl")
    if not torch.cuda.is_available() and not options.tiny and options.stages != ["page"]:
        raise SystemExit("No CUDA device here. --tiny runs every stage on tiny shapes.")
    for stage in options.stages:
        if stage == "page":
            lines = [json.loads(line) for line in record.path.read_text(encoding="utf-8").splitlines()]
            page(options.out / "gpu.md", lines)
            continue
        hardware, started = environment.hardware(), time.perf_counter()
        record.write(stage, "machine", hardware=hardware, versions=environment.versions(), cuda=torch.version.cuda)
        STAGES[stage](options, record)
        record.write(stage, "done", minutes=(time.perf_counter() - started) / 60)


if __name__ == "__main__":
    main()
