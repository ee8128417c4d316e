"""The fast path trains what stock TRL trains: the same losses step by step, on the same batches in the same order."""

import dataclasses

import pytest
import torch
from datasets import concatenate_datasets
from trl import DPOTrainer

from dpo_tutorial.adapter import lora
from dpo_tutorial.loading import models
from dpo_tutorial.machine import hardware
from dpo_tutorial.pairs import encoding
from dpo_tutorial.training import faster, save, train

STEPS = 8


def stock_trainer(cfg, tokenizer, pairs, tmp_path, **changes) -> DPOTrainer:
    """TRL as it comes: its own head, prompts computed twice, checkpointing on as by its default."""
    changes |= {"gradient_checkpointing": True, "eval_strategy": "no", "save_strategy": "no"}
    trainer = DPOTrainer(
        model=models.load_base(cfg), args=train.dpo_config(cfg, tmp_path / "stock", **changes),
        train_dataset=pairs.add_column("length", encoding.token_lengths(pairs)), processing_class=tokenizer,
        peft_config=lora.lora_config(cfg),
    )  # fmt: skip
    faster.cast_trainable_to_fp32(trainer.model)  # rounded to bf16 by TRL, updates would be lost, nothing comparable
    return trainer


def trajectory(trainer, cfg) -> torch.Tensor:
    """Losses of all steps, then the reward of the chosen answers at each: what moves, not only its difference."""
    hardware.seed_everything(cfg.seed)
    trainer.train()
    rows = save.history(trainer)["train"]
    return torch.tensor([[row["loss"], row["rewards/chosen"]] for row in rows])


def adapter(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


@pytest.fixture
def longer(cfg, pairs):
    cfg = dataclasses.replace(cfg, max_steps=STEPS, lr_scheduler="constant", warmup_ratio=0.0, batch_size=4)
    return cfg, concatenate_datasets([pairs] * 6)


def built(build, cfg, *args, **kwargs):
    hardware.seed_everything(cfg.seed)  # the adapter's A is drawn when it is attached
    return build(cfg, *args, **kwargs)


@pytest.mark.parametrize("precomputed", [False, True], ids=["reference in the loop", "reference precomputed"])
def test_in_fp32_it_is_stock_trls_trajectory(longer, tokenizer, tmp_path, precomputed):
    cfg, pairs = longer
    stock = built(stock_trainer, cfg, tokenizer, pairs, tmp_path, precompute_ref_log_probs=precomputed)
    theirs = trajectory(stock, cfg)
    ours = built(train.build_trainer, cfg, models.load_base(cfg), tokenizer, pairs, None, tmp_path / "ours")
    found = trajectory(ours, cfg)
    assert len(found) == STEPS and theirs[-1, 0] < 0.9 * theirs[0, 0], "it learns, so there is something to compare"
    assert torch.allclose(found, theirs, atol=1e-4, rtol=0)
    assert (adapter(ours) - adapter(stock)).norm() < 1e-3 * adapter(stock).norm()


def test_in_bf16_it_is_stock_trls_trajectory_within_rounding(longer, tokenizer, tmp_path):
    cfg, pairs = longer
    cfg = dataclasses.replace(cfg, dtype="bf16", learning_rate=3e-3, max_steps=4)
    stock = {
        padding: trajectory(built(stock_trainer, cfg, tokenizer, pairs, tmp_path, pad_to_multiple_of=padding), cfg)
        for padding in (None, 48)
    }
    floor = (stock[48] - stock[None]).abs().max()  # what other padding alone does to stock TRL
    ours = built(train.build_trainer, cfg, models.load_base(cfg), tokenizer, pairs, None, tmp_path / "ours")
    assert 0 < floor < 0.05
    assert (trajectory(ours, cfg) - stock[None]).abs().max() < 3 * floor


def test_a_wrong_mask_would_be_seen(longer, tokenizer, tmp_path, monkeypatch):
    """The comparison can fail: let the rejected answer see the chosen one."""
    from dpo_tutorial.training import prefix

    cfg, pairs = dataclasses.replace(longer[0], max_steps=3), longer[1]
    theirs = trajectory(built(stock_trainer, cfg, tokenizer, pairs, tmp_path), cfg)
    honest = prefix.pack
    monkeypatch.setattr(
        prefix,
        "pack",
        lambda *batch: dataclasses.replace(p := honest(*batch), attention_mask=p.attention_mask | causal(p)),
    )
    monkeypatch.setattr(prefix, "obstacle", lambda causal: "")

    def causal(packed):
        return torch.ones_like(packed.attention_mask[0, 0]).tril()

    ours = built(train.build_trainer, cfg, models.load_base(cfg), tokenizer, pairs, None, tmp_path / "ours")
    assert not torch.allclose(trajectory(ours, cfg), theirs, atol=1e-4, rtol=0)
