"""What the benchmarks train, and how it is watched: shapes, pairs, our trainer, stock TRL's, and what is taken away.

The package's parts that a benchmark replaces or looks into are named here only: `PARTS`, `our_trainer`, `StockTrainer`.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from dpo_tutorial import config, knobs
from dpo_tutorial.adapter import lora
from dpo_tutorial.loading import models
from dpo_tutorial.machine import hardware, memory
from dpo_tutorial.pairs import encoding
from dpo_tutorial.training import faster, save, timing, train

#: Architectures with random weights, for speed only. The last two are those of the GPU profiles.
SHAPES = {
    name: dict(
        hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, **more,
    )
    for name, hidden, wide, layers, heads, groups, more in (
        ("tiny", 32, 64, 2, 2, 1, {}),
        ("30M", 384, 1024, 8, 6, 3, {}),
        ("135M", 576, 1536, 30, 9, 3, {}),
        ("360M", 960, 2560, 32, 15, 5, {}),
        ("0.5B", 896, 4864, 24, 14, 2, {"vocab_size": 151936}),
        ("7B", 3584, 18944, 28, 28, 4, {"vocab_size": 152064, "tie_word_embeddings": False}),
    )
}  # fmt: skip

#: Parts of ours that a measurement can do without: whose attribute it is, its name, and what stands in for it.
PARTS = {
    "head": (faster, "cpu_head", nullcontext),
    "allocator": (memory, "tune_allocator", lambda: False),
    "cast": (faster, "cast_trainable_to_fp32", lambda model: None),
}


@contextmanager
def without(*parts: str) -> Iterator[None]:
    """Inside the block ours is built and trained without these `PARTS`."""
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(mock.patch.object(*PARTS[part]))
        yield


# --- config, pairs, models ------------------------------------------------------------------------------------------


def config_of(tiny: bool = False, **knobs) -> knobs.Config:
    """The `cpu` profile's config; gradient checkpointing only where a measurement asks for it, float32 if `tiny`."""
    always = {"dtype": "fp32"} if tiny else {}
    plain = {"gradient_checkpointing": False, "sft_weight": 0.0}  # DPO alone
    return dataclasses.replace(config.resolve(profile="cpu"), **plain | knobs | always)


def full_length(tokenizer, tokens: int, pairs: int, asked: str = "") -> Dataset:
    """`pairs` equal pairs whose prompt and chosen answer fill `tokens`; the rejected answer is 8 tokens shorter.

    Args:
        asked: what the prompt has beside its shortest form.
    """
    prompt = [{"role": "user", "content": "Say a." + asked}]

    def answer(first: str, words: int) -> tuple[list[dict], int, int]:
        turn = [{"role": "assistant", "content": first + " a" * words}]
        before, after = encoding.encode(tokenizer, prompt, turn)
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


def quarter_prompt(tokenizer, tokens: int, pairs: int) -> Dataset:
    """As `full_length`, a quarter of it prompt."""
    return full_length(tokenizer, tokens, pairs, asked=" b" * (tokens // 4))


def llama(shape: str, tokenizer) -> LlamaConfig:
    more = dict(vocab_size=len(tokenizer), tie_word_embeddings=True, max_position_embeddings=4096)
    return LlamaConfig(eos_token_id=2, bos_token_id=None, pad_token_id=2, **more | SHAPES[shape])


def random_base(shape: str, cfg: knobs.Config, tokenizer) -> LlamaForCausalLM:
    """A model of that shape with random weights, its linear layers in NF4, loaded as a checkpoint would be."""
    made, dtype = llama(shape, tokenizer), hardware.torch_dtype(cfg.dtype)
    torch.manual_seed(0)
    with torch.device(hardware.device()):
        weights = LlamaForCausalLM(made).to(dtype).state_dict()
    base = LlamaForCausalLM.from_pretrained(
        None, config=made, state_dict=weights, dtype=dtype, quantization_config=models.quantization_config(cfg),
        device_map={"": hardware.device()},
    )  # fmt: skip
    base.config.use_cache = False
    models.keep_gradients(base)
    return base


def plain_again(trainer: DPOTrainer) -> LlamaForCausalLM:
    """A trainer's base without adapter and without what the trainer left on it: the next one finds a plain model."""
    base = trainer.model.unload()
    base.gradient_checkpointing_disable()
    for layer in base.base_model.layers:
        layer._compiled_call_impl = None
    return base


# --- trainers -------------------------------------------------------------------------------------------------------


def our_trainer(cfg, base, tokenizer, pairs, val, folder, **changes) -> DPOTrainer:
    return train.build_trainer(cfg, base, tokenizer, pairs, val, folder, disable_tqdm=True, **changes)


def save_to_go_on(cfg: knobs.Config, model: PeftModel, folder: Path) -> str:
    """Save an adapter with the name of its base, as `save.saving` does; what START_FROM takes."""
    for found in model.peft_config.values():
        found.base_model_name_or_path, found.revision = models.source(cfg).name, models.source(cfg).revision
    model.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


class StockTrainer(timing.Timed, DPOTrainer):
    """TRL's own trainer, with the clock that ours has."""


def stock_trainer(cfg, base, tokenizer, pairs, val, folder, **changes) -> DPOTrainer:
    """`DPOTrainer` with its documented defaults; only what decides the result is set as in `cfg`.

    Default are batches of 8 pairs, which is the effective batch here, in random order, and gradient checkpointing.
    """
    assert cfg.batch_size * cfg.grad_accum == DPOConfig.__dataclass_fields__["per_device_train_batch_size"].default
    arguments = dict(
        output_dir=str(folder), beta=cfg.beta, learning_rate=cfg.learning_rate, lr_scheduler_type=cfg.lr_scheduler,
        warmup_steps=cfg.warmup_ratio, num_train_epochs=cfg.epochs, max_steps=cfg.max_steps, seed=cfg.seed,
        bf16=cfg.dtype == "bf16", fp16=cfg.dtype == "fp16", use_cpu=hardware.device() == "cpu", report_to="none",
        save_strategy="no", logging_steps=1, eval_strategy="no" if val is None else "steps", eval_steps=0.5,
        disable_tqdm=True,
    )  # fmt: skip
    columns = ["prompt", "chosen", "rejected"]
    return StockTrainer(
        model=base, args=DPOConfig(**arguments | changes), train_dataset=pairs.select_columns(columns),
        eval_dataset=None if val is None else val.select_columns(columns), processing_class=tokenizer,
        peft_config=lora.lora_config(cfg),
    )  # fmt: skip


def compile_layers(trainer: DPOTrainer) -> None:
    for layer in trainer.model.get_base_model().base_model.layers:
        layer.compile(dynamic=True)  # one program for all layers and lengths


def counted(trainer: DPOTrainer) -> dict[str, int]:
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


def run(trainer: DPOTrainer, seed: int) -> dict:
    """Train to the end.

    Returns:
        `seconds` of all and of each of the `steps`; `pairs`, `tokens`, `positions` computed, share of `padding`;
        `peak_gib`; `losses`, chosen `rewards` and `grad_norms` by step; `phases`, of ours: seconds by phase; and rates:
        `pairs_per_second` and `tokens_per_second` of all, `steady` the same without the first step, in which kernels
        compile and caches fill. Where lengths differ the two do not compare: ours takes the longest pairs first.
    """
    seen, marks = counted(trainer), []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            memory.synchronize()
            marks.append((time.perf_counter(), seen["tokens"], seen["pairs"]))

    trainer.add_callback(Clock())
    trainer.remove_callback(PrinterCallback)
    gc.collect()  # an earlier trainer, which must not count in the peak
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    hardware.seed_everything(seed)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    log = save.history(trainer)["train"]
    ends = [started, *(end for end, _, _ in marks)]
    (first, tokens, pairs), (last, all_tokens, all_pairs) = marks[0], marks[-1]
    rest = last - first or float("nan")  # of a training of one step nothing is steady
    return {
        "seconds": seconds, "pairs": seen["pairs"], "tokens": seen["tokens"], "positions": seen["positions"],
        "padding": 1 - seen["tokens"] / seen["slots"], "peak_gib": memory.peak_memory_gib(),
        "steps": [round(b - a, 4) for a, b in zip(ends, ends[1:], strict=False)],
        "losses": [row["loss"] for row in log], "rewards": [row["rewards/chosen"] for row in log],
        "grad_norms": [row["grad_norm"] for row in log],
        "pairs_per_second": seen["pairs"] / seconds, "tokens_per_second": seen["tokens"] / seconds,
        "phases": dict(trainer.times.seconds) if hasattr(trainer, "times") else {},
        "steady": {"pairs_per_second": (all_pairs - pairs) / rest, "tokens_per_second": (all_tokens - tokens) / rest},
    }  # fmt: skip
