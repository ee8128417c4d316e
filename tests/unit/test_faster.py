"""FastDPOTrainer beside the stock one in one process: neither changes the other."""

import dataclasses
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import trl.kernels.chunked_logprob
import trl.trainer.utils
from conftest import conversations
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from dpo_tutorial.loading import models
from dpo_tutorial.machine import hardware
from dpo_tutorial.pairs import encoding
from dpo_tutorial.training import faster, train


def built(kind, folder: str, **kwargs):
    """A trainer over the tiny model in its folder, written as a reader would write it."""
    args = DPOConfig(
        f"{folder}-trained", per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2, use_cpu=True, bf16=False,
        logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return kind(
        model=model, args=args, train_dataset=Dataset.from_list(conversations()), peft_config=lora,
        processing_class=AutoTokenizer.from_pretrained(folder), **kwargs,
    )  # fmt: skip


def trained(kind, folder: str) -> list[float]:
    """The losses of four steps."""
    trainer = built(kind, folder)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def of_trl():
    utils, kernel = trl.trainer.utils, trl.kernels.chunked_logprob
    return utils._use_triton, utils._CHUNKED_LOGPROB_CHUNK_SIZE, kernel.TOKEN_CHUNK_SIZE


@pytest.fixture(scope="module")
def alone(tiny_folder):
    """Stock TRL's losses in a process that never built ours."""
    code = "import json, sys; sys.path.append('..'); import test_faster as t; "
    code += "print(json.dumps(t.trained(t.DPOTrainer, sys.argv[1])))"
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code, tiny_folder], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.end_to_end
@pytest.mark.parametrize("ours_first", [True, False])
def test_in_either_order_the_stock_trainer_is_stock(tiny_folder, alone, ours_first):
    before = of_trl()
    order = [faster.FastDPOTrainer, DPOTrainer] if ours_first else [DPOTrainer, faster.FastDPOTrainer]
    found = {kind: trained(kind, str(tiny_folder)) for kind in order}
    assert found[DPOTrainer] == alone and len(set(alone)) == 4
    assert found[faster.FastDPOTrainer] == pytest.approx(alone, abs=1e-5)
    assert of_trl() == before


def test_patches_last_as_long_as_the_call_and_are_undone_where_it_fails(tiny_folder):
    trainer, before, seen = built(faster.FastDPOTrainer, str(tiny_folder)), of_trl(), []
    decoder = trainer.model.get_base_model().base_model
    batch = next(iter(trainer.get_train_dataloader()))

    def fail(module, args, kwargs):
        seen.append((of_trl() != before, "forward" in vars(decoder), "position_ids" in kwargs))
        raise ZeroDivisionError

    assert trainer.shares_prefixes
    with decoder.layers[0].register_forward_pre_hook(fail, with_kwargs=True), pytest.raises(ZeroDivisionError):
        trainer.training_step(trainer.model, batch)
    assert seen == [(True, True, True)]
    assert of_trl() == before and "forward" not in vars(decoder) and not trainer.times._open
    assert not trainer.model._forward_hooks and not trainer.model._forward_pre_hooks


def test_a_column_of_lengths_is_added_and_one_that_is_there_stays(tiny_folder, cfg, tokenizer, pairs, tmp_path):
    trainer = train.build_trainer(cfg, models.load_base(cfg), tokenizer, pairs, pairs, tmp_path)
    assert trainer.train_dataset["length"] == trainer.eval_dataset["length"] == encoding.token_lengths(pairs)
    given = pairs.add_column("length", [1, 2, 3, 4])
    trainer = train.build_trainer(cfg, models.load_base(cfg), tokenizer, given, None, tmp_path)
    assert trainer.train_dataset["length"][:] == [1, 2, 3, 4]


def test_prefix_sharing_can_be_left_off(tiny_folder):
    assert not built(faster.FastDPOTrainer, str(tiny_folder), share_prefixes=False).shares_prefixes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_that_read_their_input_as_it_is_learn_the_same_bits(
    cfg, tokenizer, pairs, tmp_path, monkeypatch, checkpointing
):
    cfg = dataclasses.replace(cfg, dtype="bf16", max_steps=3, learning_rate=1e-2, gradient_checkpointing=checkpointing)

    def run(folder):
        hardware.seed_everything(0)
        trainer = train.build_trainer(cfg, models.load_base(cfg), tokenizer, pairs, None, tmp_path / folder)
        trainer.train()
        return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]

    ours = run("ours")
    monkeypatch.setattr(faster.FastDPOTrainer, "_inputs", lambda self: nullcontext())  # PEFT's copies in float32
    assert all(map(torch.equal, ours, run("copies")))
    moved = [p for p in ours if p.abs().max() > 0]
    assert len(moved) == len(ours), "the Bs have left zero"
