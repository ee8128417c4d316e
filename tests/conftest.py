"""A tiny random Llama and a tiny tokenizer, made here: tests need seconds and no download."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import os
from pathlib import Path

import nbformat
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, settings
from IPython.core.inputtransformer2 import TransformerManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_tutorial import knobs
from dpo_tutorial.pairs import row_checks

for name in [
    n for n in os.environ if n.startswith("DPO_TUTORIAL_") and n not in ("DPO_TUTORIAL_CACHE", "DPO_TUTORIAL_WHEEL")
]:
    del os.environ[name]  # a test says what it depends on
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"):
    os.environ.pop(name, None)  # under `make test`, a test's own make would take itself for a part of that one

torch.set_num_threads(1)  # tiny models: two threads would only wait for each other

# Few examples for the quick loop; `pytest --hypothesis-profile=many` tries more.
for name, examples in (("few", 20), ("many", 500)):
    settings.register_profile(
        name, max_examples=examples, deadline=None, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )  # fmt: skip
settings.load_profile("few")


def pytest_collection_finish():
    """What the imports made is not searched for garbage again: each loading of a model would take a second more."""
    gc.freeze()


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = [
    ("How do I boil an egg?", "Put it into boiling water for seven minutes.", "Great question! Eggs are a food."),
    ("What is the capital of France?", "Paris.", "I would be happy to help you with that!"),
    ("Add 2 and 3.", "The sum is 5.", "Numbers are important in today's world, and there are many of them."),
    ("Why is the sky blue?", "Air scatters blue light more than red.", "The sky is a very nice place."),
]


def conversations() -> list[dict]:
    """`TEXTS` as TRL's conversational rows: prompt, chosen and rejected as lists of messages."""
    return [
        {
            "prompt": [{"role": "user", "content": ask}],
            "chosen": [{"role": "assistant", "content": good}],
            "rejected": [{"role": "assistant", "content": bad}],
        }
        for ask, good, bad in TEXTS
    ]


def script(path: str):
    """A program of benchmarks/ or scripts/, which no package holds, as a module; `path` is from the project's root."""
    file = Path(__file__).parents[1] / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(path: Path) -> list:
    """A notebook's code cells as plain Python: a magic such as %pip is the call that IPython makes of it."""
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    for cell in cells:
        cell.source = TransformerManager().transform_cell(cell.source).removesuffix("\n")
    return cells


def pair(prompt: str, chosen: str, rejected: str, **changes) -> dict:
    """One row in UltraFeedback-binarized's schema."""
    ask = {"role": "user", "content": prompt}
    row = {
        "prompt": prompt,
        "prompt_id": prompt,
        "chosen": [ask, {"role": "assistant", "content": chosen}],
        "rejected": [ask, {"role": "assistant", "content": rejected}],
        "score_chosen": 8.0,
        "score_rejected": 3.0,
    }
    return row | changes


@pytest.fixture(scope="session")
def tokenizer():
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([t for row in TEXTS for t in row], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = CHATML
    return made


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tokenizer):
    """A checkpoint folder of a 2-layer Llama with random weights, in transformers' format."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_config(model: Path, artifacts: Path) -> knobs.Config:
    """A config for the tiny model: fp32, two steps."""
    return dataclasses.replace(
        knobs.Config(), model=str(model), dtype="fp32", artifacts=str(artifacts), lora_r=4, lora_alpha=8,
        gradient_checkpointing=False, batch_size=2, grad_accum=1, max_steps=2, max_tokens=128, learning_rate=1e-2,
        max_new_tokens=8, instructions=4,
    )  # fmt: skip


def trained_run(model: Path, tokenizer, folder: Path, **changes):
    """A run in `folder`: 24 rows of a file, cut into splits by prompt, and an adapter that was trained on them."""
    from dpo_tutorial import run_folder
    from dpo_tutorial.loading import models
    from dpo_tutorial.pairs import store
    from dpo_tutorial.training import train

    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(pair(f"{t[0]} {i}", *t[1:])) for i in range(6) for t in TEXTS))
    run = run_folder.Run(dataclasses.replace(tiny_config(model, folder), data=str(path), **changes))
    splits = store.ensure_data(run, tokenizer).splits
    train.train(run.config, run, models.load_base(run.config), tokenizer, splits["train"], splits["val"])
    return run


@pytest.fixture
def cfg(tiny_folder, tmp_path):
    return tiny_config(tiny_folder, tmp_path / "artifacts")


@pytest.fixture
def pairs(tokenizer) -> Dataset:
    """Four prepared pairs, as `prepare.prepare` makes them."""
    from dpo_tutorial.pairs import encoding

    rows = []
    for row in (row_checks.extract(pair(*t)) for t in TEXTS):
        ids = {side: encoding.encode(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")}
        counts = {f"{side}_tokens": len(answer) for side, (_, answer) in ids.items()}
        rows.append(row | counts | {"prompt_tokens": len(ids["chosen"][0])})
    return Dataset.from_list(rows)
