"""The real DPOTrainer on a tiny model: loss, reference, precision, saving."""

import dataclasses
import json
import math
import shutil
from contextlib import nullcontext

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from conftest import TEXTS, pair
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file, save_file
from test_families import tiny
from test_stats import told
from transformers import TrainerCallback
from trl import DPOTrainer

from dpo_tutorial import config, run_folder
from dpo_tutorial.adapter import lora
from dpo_tutorial.comparing import stats
from dpo_tutorial.errors import ArtifactError, TrainingError
from dpo_tutorial.loading import models
from dpo_tutorial.machine import hardware
from dpo_tutorial.pairs import encoding, row_checks, store
from dpo_tutorial.training import checkpoints, dpo, faster, footprint, resume, save, scoring, train


def trainer_for(cfg, tokenizer, pairs, tmp_path, **changes):
    return train.build_trainer(cfg, models.load_base(cfg), tokenizer, pairs, None, tmp_path / "trainer", **changes)


def our_loss(trainer, batch, beta):
    """The loss of `dpo.py` on a TRL batch, and the reference by switching the adapter off."""
    model = trainer.model

    def log_probs():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return dpo.sequence_log_prob(logits, batch["input_ids"], batch["completion_mask"]).chunk(2)

    with torch.no_grad():
        policy = log_probs()
        with model.disable_adapter():
            reference = log_probs()
    return dpo.dpo_loss(*policy, *reference, beta)[0].item()


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_our_loss_equals_trls_on_the_same_batch(cfg, tokenizer, pairs, tmp_path, beta):
    trainer = trainer_for(dataclasses.replace(cfg, beta=beta), tokenizer, pairs, tmp_path)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # policy and reference must differ, or both are ln 2
    trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        theirs = trainer.compute_loss(trainer.model, batch).item()
    assert abs(theirs - math.log(2)) > 1e-3
    assert abs(our_loss(trainer, batch, beta) - theirs) < 1e-4


def test_answers_only_and_narrow_tiles_leave_loss_and_gradient_as_they_were(
    cfg, tokenizer, pairs, tmp_path, monkeypatch
):
    monkeypatch.setitem(footprint.TILE, "cpu", (8, 64))
    results = {}
    for name in ("stock", "ours"):
        trainer = trainer_for(cfg, tokenizer, pairs, tmp_path)
        batch = next(iter(trainer.get_train_dataloader()))
        with faster.cpu_head() if name == "ours" else nullcontext():
            loss = DPOTrainer.compute_loss(trainer, trainer.model, batch)
            loss.backward()
        grads = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
        results[name] = (loss.item(), grads)
    assert results["ours"][0] == pytest.approx(results["stock"][0], abs=1e-6)
    assert torch.allclose(results["ours"][1], results["stock"][1], atol=1e-6)
    assert results["ours"][1].norm() > 0


def test_batches_hold_pairs_of_similar_length_and_every_pair_once(cfg, tokenizer, pairs, tmp_path):
    many = concatenate_datasets([pairs] * 16)
    trainer = trainer_for(dataclasses.replace(cfg, batch_size=4, max_steps=-1), tokenizer, many, tmp_path)
    lengths = encoding.token_lengths(many)
    order = list(trainer._get_train_sampler(trainer.train_dataset))
    assert sorted(order) == list(range(len(many)))

    def padding(indices):
        batches = [[lengths[i] for i in indices[b : b + 4]] for b in range(0, len(indices), 4)]
        return sum(max(batch) - n for batch in batches for n in batch)

    assert padding(order) < 0.5 * padding(range(len(many)))


def test_the_order_of_the_batches_follows_the_seed_alone(cfg, tokenizer, pairs, monkeypatch):
    def log_probs(seed, drawn_before):
        """Of the chosen answers, step by step; so many random numbers are drawn after the trainer is built."""

        def build(*args, **changes):
            trainer = stock(*args, **changes)
            torch.rand(drawn_before)
            return trainer

        monkeypatch.setattr(train, "build_trainer", build)
        seeded, many = dataclasses.replace(cfg, seed=seed), concatenate_datasets([pairs] * 4)
        trainer = train.train(seeded, run_folder.Run(cfg), models.load_base(cfg), tokenizer, many, pairs)
        return [row["logps/chosen"] for row in save.history(trainer)["train"]]

    stock = train.build_trainer
    assert log_probs(1, drawn_before=0) == log_probs(1, drawn_before=3) != log_probs(2, drawn_before=0)


def test_one_adapter_no_reference_model_and_ln_2_at_step_0(cfg, tokenizer, pairs, tmp_path):
    trainer = trainer_for(cfg, tokenizer, pairs, tmp_path)
    assert trainer.ref_model is None and list(trainer.model.peft_config) == ["default"]
    trainer.train()
    assert train.check_first_loss(trainer) == pytest.approx(math.log(2), abs=1e-4)
    assert trainer.state.global_step == 2


def other_base(cfg, folder, **changes):
    """The tiny checkpoint once more, with other values in its config.json."""
    shutil.copytree(cfg.model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return dataclasses.replace(cfg, model=str(folder))


def stopped(cfg, tokenizer, pairs, words):
    """A training that must stop at its first step, with these words and nothing saved."""
    run = run_folder.Run(dataclasses.replace(cfg, save_steps=1))
    with pytest.raises(TrainingError, match=words):
        train.train(run.config, run, models.load_base(cfg), tokenizer, pairs, pairs)
    assert not run.adapter.exists() and not list(run.dir.glob("trainer/checkpoint-*"))
    lines = (run.dir / "progress.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] in ([1], [])


def test_attention_dropout_in_a_checkpoint_is_off(cfg, tokenizer, pairs, tmp_path, monkeypatch):
    dropping = other_base(cfg, tmp_path / "dropping", attention_dropout=0.5)
    trainer = trainer_for(dropping, tokenizer, pairs, tmp_path)
    trainer.train()
    assert train.check_first_loss(trainer) == pytest.approx(math.log(2), abs=1e-4)
    monkeypatch.setattr(models, "keep_steady", lambda model: None)
    stopped(dropping, tokenizer, pairs, "policy and reference differ")


def test_weights_that_are_no_numbers_stop_the_training_at_once(cfg, tokenizer, pairs, tmp_path):
    broken = other_base(cfg, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = math.nan
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    stopped(broken, tokenizer, pairs, "loss at step 1 is nan")


@pytest.mark.parametrize(("rate", "warned"), [(100.0, True), (1e-2, False)])
def test_a_training_that_ends_above_its_beginning_says_so(cfg, tokenizer, pairs, tmp_path, capsys, rate, warned):
    tiny("llama", tokenizer).save_pretrained(tmp_path / "sharp")  # its matrices are large: log π can move
    run = run_folder.Run(dataclasses.replace(cfg, model=str(tmp_path / "sharp"), learning_rate=rate, max_steps=12))
    train.train(run.config, run, models.load_base(run.config), tokenizer, pairs, pairs)
    said = capsys.readouterr().out
    assert ("worse than none: lower LEARNING_RATE (100)" in said) is warned


@pytest.mark.parametrize(
    ("kind", "prefix_sharing"), [("mixtral", True), ("mixtral", False), ("qwen3_moe", True), ("olmoe", True)]
)
def test_a_mixture_of_experts_trains_without_its_routers_loss(kind, prefix_sharing, cfg, tokenizer, pairs, tmp_path):
    tiny(kind, tokenizer, output_router_logits=True).save_pretrained(tmp_path / kind)
    changed = dataclasses.replace(cfg, model=str(tmp_path / kind), prefix_sharing=prefix_sharing)
    trainer = trainer_for(changed, tokenizer, pairs, tmp_path)
    trainer.train()
    assert train.check_first_loss(trainer) == pytest.approx(math.log(2), abs=1e-4)
    assert not trainer.model.config.output_router_logits and "aux_loss" not in trainer.state.log_history[0]


@pytest.mark.parametrize(
    ("changes", "logged", "words"),
    [
        ({}, {"loss": 0.5}, "0.5000, not ln 2"),
        ({"sft_weight": 1.0}, {"loss": 4.2, "rewards/margins": 0.3}, "margin at step 0 is 0.3000, not 0"),
        ({"loss_type": "ipo"}, {"loss": 25.0, "rewards/margins": math.nan}, "margin at step 0 is nan, not 0"),
    ],
)
def test_a_wrong_reference_fails_the_first_loss_check(cfg, tokenizer, pairs, tmp_path, changes, logged, words):
    trainer = trainer_for(dataclasses.replace(cfg, **changes), tokenizer, pairs, tmp_path)
    trainer.state.log_history = [logged | {"step": 1}]
    with pytest.raises(TrainingError, match=words):
        train.check_first_loss(trainer)
    trainer.state.log_history = [{"loss": math.log(2), "rewards/margins": 0.0, "step": 1}]
    assert train.check_first_loss(trainer) == math.log(2)


@pytest.mark.parametrize(("dtype", "passes"), [("bf16", True), ("fp32", False)])
def test_a_reference_computed_before_in_16_bits_may_miss_ln_2_by_rounding(
    cfg, tokenizer, pairs, tmp_path, dtype, passes
):
    """A loss 0.0023 off ln 2 was seen."""
    changed = dataclasses.replace(cfg, dtype=dtype, precompute_reference=True)
    trainer = trainer_for(changed, tokenizer, pairs, tmp_path)
    trainer.train()
    assert train.check_first_loss(trainer) == pytest.approx(math.log(2), abs=2e-3)
    trainer.state.log_history[0]["loss"] = math.log(2) + 0.0023
    with nullcontext() if passes else pytest.raises(TrainingError, match="not ln 2"):
        train.check_first_loss(trainer)


@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_trls_precomputed_reference_gives_the_same_training(cfg, tokenizer, pairs, tmp_path, prefix_sharing):
    """A changed LD_ALPHA has a reference of its own: else the first loss would not be ln 2."""
    losses = {}
    for once, ld_alpha in ((False, 1.0), (True, 1.0), (True, 0.5)):
        changed = dataclasses.replace(
            cfg, max_steps=4, prefix_sharing=prefix_sharing, precompute_reference=once, ld_alpha=ld_alpha,
            artifacts=str(tmp_path / f"{once}{ld_alpha}"),
        )  # fmt: skip
        run = run_folder.Run(changed)
        trainer = train.train(changed, run, models.load_base(cfg), tokenizer, pairs, pairs.select(range(3)))
        assert train.check_first_loss(trainer) == pytest.approx(math.log(2), abs=1e-4)
        log = trainer.state.log_history
        losses[once, ld_alpha] = [row.get("loss", row.get("eval_loss")) for row in log if "train_loss" not in row]
    assert len(losses[False, 1.0]) == 6 and max(losses[False, 1.0]) > 1.01 * min(losses[False, 1.0]), "it learns"
    assert losses[True, 1.0] == pytest.approx(losses[False, 1.0], abs=1e-4) != losses[True, 0.5]


@pytest.fixture
def t4(monkeypatch):
    """`resolve()` sees a card of compute capability 7.5, as on a T4; everything else still runs on the CPU."""
    card = hardware.hardware() | {"cuda": True, "capability": [7, 5], "gpu": "Tesla T4", "gpu_memory_gib": 15.0}
    monkeypatch.setattr(hardware, "hardware", lambda: card)


def trainable_types(trainer):
    return {p.dtype for p in trainer.model.parameters() if p.requires_grad}


def test_a_t4_trains_in_fp16_with_trainable_weights_in_fp32(t4, cfg, tokenizer, pairs, tmp_path, capsys):
    """trl#4901: TRL casts the adapter of a 4-bit model to bfloat16, which an fp16 GradScaler rejects."""
    found = config.resolve(model=cfg.model, lora_r=4, max_steps=2)
    assert (found.profile, found.dtype) == ("t4", "fp16")
    assert "fp16: compute capability 7.5 has no native bfloat16" in capsys.readouterr().out
    trainer = trainer_for(found, tokenizer, pairs, tmp_path)
    assert trainer.args.fp16 and not trainer.args.bf16
    assert trainable_types(trainer) == {torch.float32}


def test_without_our_cast_trl_would_leave_bf16(t4, cfg, tokenizer, pairs, tmp_path, monkeypatch):
    """Once this fails, TRL has fixed trl#4901 and `cast_trainable_to_fp32` can go."""
    monkeypatch.setattr(faster, "cast_trainable_to_fp32", lambda model: None)
    found = config.resolve(model=cfg.model, lora_r=4, max_steps=2)
    assert trainable_types(trainer_for(found, tokenizer, pairs, tmp_path)) == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_trainable_weights_are_fp32_in_the_other_types_too(cfg, tokenizer, pairs, tmp_path, dtype):
    trainer = trainer_for(dataclasses.replace(cfg, dtype=dtype), tokenizer, pairs, tmp_path)
    assert trainable_types(trainer) == {torch.float32} and not trainer.args.fp16


def test_the_adapter_is_saved_with_its_base_and_scores_the_same_after_reloading(cfg, tokenizer, pairs):
    run = run_folder.Run(cfg)
    trainer = train.train(cfg, run, models.load_base(cfg), tokenizer, pairs, pairs)
    saved = {p.name for p in run.adapter.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "training.json", "README.md", "tokenizer.json"} <= saved
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in saved)
    record = save.read_training_record(run.adapter)
    assert record["template"] == {"turn_end": "<|im_end|>"}
    assert record["base"]["name"] == "tiny-llama" and record["history"]["train"] and record["versions"]["trl"]
    card = (run.adapter / "README.md").read_text()
    assert "tiny-llama" in card and "beta 0.1" in card and "| Base revision | a local folder, with digest " in card
    assert str(run.dir) not in card + json.dumps(json.loads((run.adapter / "adapter_config.json").read_text()))

    before = scoring.score_pairs(cfg, trainer.model, tokenizer, pairs)
    after = scoring.score_pairs(cfg, lora.load_policy(cfg, run.adapter), tokenizer, pairs)
    assert [r["margin"] for r in after] == pytest.approx([r["margin"] for r in before], abs=1e-4)
    assert any(r["margin"] != 0 for r in after)


def test_a_policy_taught_swapped_labels_fails_on_pairs_it_has_not_seen(cfg, tokenizer):
    """The evaluation can fail: taught the wrong way, a policy prefers the rejected answers; one style, other words."""

    def rows(start, stop):
        made = []
        for i in range(start, stop):
            row = row_checks.extract(pair(f"Question {i}?", f"The answer is {i}.", f"Great question! It is {i}!"))
            ids = {side: encoding.encode(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")}
            counts = {f"{side}_tokens": len(answer) for side, (_, answer) in ids.items()}
            made.append(row | counts | {"prompt_tokens": len(ids["chosen"][0])})
        return Dataset.from_list(made)

    longer, test = dataclasses.replace(cfg, max_steps=12), rows(40, 60)
    swapped = rows(0, 24).rename_columns({"chosen": "rejected", "rejected": "chosen"})
    swapped = swapped.rename_columns({"chosen_tokens": "rejected_tokens", "rejected_tokens": "chosen_tokens"})
    trainer = train.build_trainer(longer, models.load_base(longer), tokenizer, swapped)
    trainer.train()
    found = stats.summarise(scoring.score_pairs(longer, trainer.model, tokenizer, test))
    assert found["accuracy"]["high"] < 0.3
    nothing = {when: {"rule": stats.rate(1, 2)} for when in ("before", "after")}
    said = told(found, nothing | {"change": {"rule": {"p": 1.0}}})
    assert "swapped labels" in said[0]


VARIANTS = {
    "sigmoid": ({"loss_type": "sigmoid"}, math.log(2)),
    "ipo": ({"loss_type": "ipo"}, (1 / (2 * 0.1)) ** 2),
    "hinge": ({"loss_type": "hinge"}, 1.0),
    "robust": ({"loss_type": "robust"}, math.log(2)),
    "sigmoid_norm": ({"loss_type": "sigmoid_norm"}, math.log(2)),
    "apo_zero": ({"loss_type": "apo_zero"}, 1.0),
    "ld_alpha": ({"ld_alpha": 0.5}, math.log(2)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_of_the_loss_starts_from_a_zero_margin_and_raises_it(cfg, tokenizer, pairs, tmp_path, name):
    knobs, first = VARIANTS[name]
    changed = dataclasses.replace(cfg, **knobs, max_steps=6, warmup_ratio=0.0, lr_scheduler="constant")
    trainer = trainer_for(changed, tokenizer, pairs, tmp_path)
    trainer.train()
    losses = [row["loss"] for row in save.history(trainer)["train"]]
    assert losses[0] == pytest.approx(first, abs=1e-3) and losses[-1] < losses[0]
    records = scoring.score_pairs(changed, trainer.model, tokenizer, pairs, beta=1.0)
    assert sum(r["margin"] for r in records) / len(records) > 1


def test_the_knobs_of_the_loss_reach_trl(cfg, tmp_path):
    plain = train.dpo_config(cfg, tmp_path)
    assert (plain.loss_type, plain.ld_alpha) == (["sigmoid"], None)
    robust = train.dpo_config(dataclasses.replace(cfg, loss_type="robust", label_smoothing=0.2, ld_alpha=0.5), tmp_path)
    assert (robust.loss_type, robust.label_smoothing, robust.ld_alpha) == (["robust"], 0.2, 0.5)
    term = train.dpo_config(dataclasses.replace(cfg, loss_type="ipo", sft_weight=0.2), tmp_path)
    assert (term.loss_type, term.loss_weights) == (["ipo", "sft"], [1.0, 0.2])


#: Knob → (another value than `cfg` has, the argument of `DPOConfig` that must have it).
ARGUMENTS = {
    "beta": (0.3, "beta"), "learning_rate": (3e-3, "learning_rate"), "lr_scheduler": ("cosine", "lr_scheduler_type"),
    "warmup_ratio": (0.25, "warmup_steps"), "epochs": (3.0, "num_train_epochs"), "max_steps": (7, "max_steps"),
    "batch_size": (3, "per_device_train_batch_size"), "grad_accum": (5, "gradient_accumulation_steps"),
    "max_grad_norm": (0.3, "max_grad_norm"), "precompute_reference": (True, "precompute_ref_log_probs"),
    "gradient_checkpointing": (True, "gradient_checkpointing"), "save_steps": (7, "save_steps"), "seed": (7, "seed"),
}  # fmt: skip
OF_THE_LOSS = {"loss_type", "sft_weight", "label_smoothing", "ld_alpha"}


def test_every_other_knob_of_the_training_reaches_trl(cfg, tmp_path):
    changed = dataclasses.replace(cfg, **{knob: value for knob, (value, _) in ARGUMENTS.items()})
    made = train.dpo_config(changed, tmp_path)
    for knob, (value, argument) in ARGUMENTS.items():
        assert getattr(made, argument) == value != getattr(cfg, knob), knob
    of_dpo = {field.name for field in dataclasses.fields(cfg) if field.metadata["group"] == "dpo"}
    assert of_dpo - set(ARGUMENTS) - OF_THE_LOSS == {"start_from", "prefix_sharing"}, "which are not TRL's"


def gradient(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])


def test_an_sft_term_adds_the_mean_nll_of_the_chosen_answers_tokens_and_its_gradient(cfg, tokenizer, pairs, tmp_path):
    trainer = trainer_for(dataclasses.replace(cfg, sft_weight=0.5), tokenizer, pairs, tmp_path)
    trainer.model.eval()  # no dropout
    batch = next(iter(trainer.get_train_dataloader()))
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    chosen = batch["completion_mask"][:, 1:].bool() & (torch.arange(4) < 2)[:, None]
    nll = -dpo.token_log_probs(logits, batch["input_ids"])[chosen].mean()
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(math.log(2) + 0.5 * nll.item(), abs=1e-4)
    whole, of_term = gradient(trainer, loss), gradient(trainer, nll)
    trainer.loss_weights = [1.0, 0.0]
    plain = gradient(trainer, trainer.compute_loss(trainer.model, batch))
    assert torch.allclose(whole, plain + 0.5 * of_term, atol=1e-5) and (whole - plain).norm() > 0.1 * plain.norm()


# --- going on from an adapter ----


def supervised(cfg, tokenizer, pairs, folder, **changes):
    """The run of an SFT training: the start of what follows."""
    changed = dataclasses.replace(cfg, loss_type="sft", artifacts=str(folder), max_steps=4, **changes)
    run = run_folder.Run(changed)
    trainer = train.train(changed, run, models.load_base(changed), tokenizer, pairs, pairs)
    losses = [row["loss"] for row in save.history(trainer)["train"]]
    assert losses[-1] < losses[0], "it learns"
    return run


@pytest.fixture
def sft(cfg, tokenizer, pairs, tmp_path):
    return supervised(cfg, tokenizer, pairs, tmp_path / "sft")


def onwards(cfg, sft, folder, **changes):
    return dataclasses.replace(cfg, start_from=str(sft.adapter), artifacts=str(folder), **changes)


def lora_weights(model, name):
    state = {n.replace(f".{name}.", "."): p.data for n, p in model.named_parameters() if f".{name}." in n}
    assert len(state) == 28 and all(p.dtype == torch.float32 for p in state.values())
    return state


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dpo_goes_on_from_the_saved_adapter_bit_for_bit_and_it_stays_the_reference(
    cfg, tokenizer, pairs, sft, tmp_path, dtype
):
    base = models.load_base(dataclasses.replace(cfg, dtype=dtype))
    frozen = [p.data.clone() for p in base.parameters()]
    changed = onwards(cfg, sft, tmp_path / "dpo", dtype=dtype, max_steps=3)
    trainer = train.build_trainer(changed, base, tokenizer, pairs, None, tmp_path / "trainer")
    saved = load_file(sft.adapter / "adapter_model.safetensors")
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in saved.values())
    assert same(lora_weights(trainer.model, "default"), saved) and same(lora_weights(trainer.model, "ref"), saved)
    trainer.train()
    assert train.check_first_loss(trainer) == pytest.approx(math.log(2), abs=1e-3)
    assert same(lora_weights(trainer.model, "ref"), saved) and not same(lora_weights(trainer.model, "default"), saved)
    after = [p.data for n, p in trainer.model.named_parameters() if "lora_" not in n]
    assert all(torch.equal(a, b) for a, b in zip(frozen, after, strict=True))


def test_the_policy_that_is_loaded_has_the_start_as_its_reference(cfg, tokenizer, pairs, sft, tmp_path):
    run = run_folder.Run(onwards(cfg, sft, tmp_path / "dpo"))
    trainer = train.train(run.config, run, models.load_base(cfg), tokenizer, pairs, pairs)
    assert (run.adapter / "ref" / "adapter_model.safetensors").is_file()
    assert "| Went on from | adapter |" in (run.adapter / "README.md").read_text()
    assert str(tmp_path) not in (run.adapter / "ref" / "adapter_config.json").read_text()
    policies = (lora.load_policy(cfg, sft.adapter), trainer.model, lora.load_policy(cfg, run.adapter))
    start, trained, loaded = (scoring.score_pairs(cfg, policy, tokenizer, pairs) for policy in policies)
    for before, here, now in zip(start, trained, loaded, strict=True):
        assert abs(before["policy_chosen"] - before["reference_chosen"]) > 0.1
        for side in ("chosen", "rejected"):
            assert now[f"reference_{side}"] == pytest.approx(before[f"policy_{side}"], abs=1e-3)
            assert now[f"policy_{side}"] == pytest.approx(here[f"policy_{side}"], abs=1e-3)
    assert any(abs(r["margin"]) > 1e-3 for r in loaded)


class StopAfterSaving(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def stopped_after_saving(changed, tokenizer, pairs):
    run = run_folder.Run(changed)
    where = checkpoints.folder(run)
    trainer = train.build_trainer(
        changed, models.load_base(changed), tokenizer, pairs, pairs, where, save_strategy="steps"
    )
    with pytest.raises(KeyboardInterrupt), resume.resumable(trainer, changed, run):
        trainer.add_callback(StopAfterSaving)
        trainer.train()
    return run


@pytest.mark.filterwarnings("error:Unable to fetch remote file")  # a base's name in its record is no address
@pytest.mark.filterwarnings("error:Could not find a config file")
def test_a_stopped_training_from_an_adapter_ends_as_an_undisturbed_one(cfg, tokenizer, pairs, sft, tmp_path, capsys):
    runs = []
    for name in ("undisturbed", "stopped"):
        changed = onwards(cfg, sft, tmp_path / name, max_steps=4, save_steps=2)
        run = stopped_after_saving(changed, tokenizer, pairs) if name == "stopped" else run_folder.Run(changed)
        train.train(changed, run, models.load_base(cfg), tokenizer, pairs, pairs)
        runs.append(run)
    assert "Resuming after step 2 of 4" in capsys.readouterr().out
    for part in ("adapter_model.safetensors", "ref/adapter_model.safetensors"):
        assert same(*(load_file(run.adapter / part) for run in runs)), part


def test_a_training_does_not_go_on_once_another_adapter_lies_where_it_started_from(
    cfg, tokenizer, pairs, sft, tmp_path
):
    run = stopped_after_saving(onwards(cfg, sft, tmp_path / "dpo", max_steps=4, save_steps=2), tokenizer, pairs)
    other = supervised(cfg, tokenizer, pairs, tmp_path / "other", seed=1)
    shutil.copytree(other.adapter, sft.adapter, dirs_exist_ok=True)
    with pytest.raises(ArtifactError, match="unfinished training with other settings"):
        train.train(run.config, run, models.load_base(cfg), tokenizer, pairs, pairs)


def test_there_must_be_an_adapter_to_start_from(cfg, tokenizer, pairs, tmp_path):
    with pytest.raises(ArtifactError, match="no adapter"):
        trainer_for(dataclasses.replace(cfg, start_from=str(tmp_path / "nowhere")), tokenizer, pairs, tmp_path)


def test_a_saved_adapter_given_to_an_fp32_trainer_scores_as_it_did(cfg, tokenizer, pairs, tmp_path):
    """The loss lab of notebook 05: the adapter just trained, in a fresh trainer, against TRL for several betas."""
    run = run_folder.Run(cfg)
    done = train.train(cfg, run, models.load_base(cfg), tokenizer, pairs, pairs)
    lab = trainer_for(cfg, tokenizer, pairs, tmp_path)
    lora.give_adapter(lab.model, run.adapter)
    margins = [[r["margin"] for r in scoring.score_pairs(cfg, t.model, tokenizer, pairs)] for t in (done, lab)]
    assert margins[1] == pytest.approx(margins[0], abs=1e-5) and any(margins[0])
    batch = next(iter(lab.get_train_dataloader()))
    for lab.beta in (0.03, 0.3, 1.0):
        with torch.no_grad():
            assert abs(our_loss(lab, batch, lab.beta) - lab.compute_loss(lab.model, batch).item()) < 1e-4


def test_progress_is_written_line_by_line(cfg, tokenizer, pairs):
    run = run_folder.Run(cfg)
    train.train(cfg, run, models.load_base(cfg), tokenizer, pairs, pairs)
    lines = [json.loads(line) for line in (run.dir / "progress.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if "loss" in r] == [1, 2]


def on_cuda(cfg, dtype):
    if dtype == "bf16" and torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("this card has no native bfloat16")
    return dataclasses.replace(cfg, dtype=dtype, max_steps=5, gradient_checkpointing=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_five_steps_on_cuda(cfg, tokenizer, pairs, dtype):
    on = on_cuda(cfg, dtype)
    trainer = train.train(on, run_folder.Run(on), models.load_base(on), tokenizer, pairs, pairs)
    assert train.check_first_loss(trainer) == pytest.approx(math.log(2), abs=1e-3)
    assert trainer.state.global_step == 5
    up = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]  # zero before the first update
    assert all(torch.isfinite(p).all() for p in up) and any(p.any() for p in up)


@pytest.mark.gpu
def test_without_our_cast_fp16_fails_on_cuda(cfg, tokenizer, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(faster, "cast_trainable_to_fp32", lambda model: None)
    trainer = trainer_for(on_cuda(cfg, "fp16"), tokenizer, pairs, tmp_path)
    with pytest.raises((RuntimeError, NotImplementedError), match="BFloat16"):
        trainer.train()


def test_where_two_gpus_are_in_view_as_on_kaggle_one_process_takes_the_first_alone(cfg, tmp_path, monkeypatch):
    for name, value in {"is_available": True, "device_count": 2, "set_device": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    for state in (PartialState, AcceleratorState):  # as in a new process
        monkeypatch.setattr(state, "_shared_state", {})
    made = faster.one_gpu(train.dpo_config(dataclasses.replace(cfg, dtype="fp16"), tmp_path))
    assert (made.n_gpu, str(made.device), made.parallel_mode.value) == (1, "cuda:0", "not_parallel")
    asked = []
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", lambda *_, **how: asked.append(how) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        models.load_base(dataclasses.replace(cfg, dtype="fp16"))
    assert asked[0]["device_map"] == {"": 0}


def test_what_lies_in_an_input_folder_is_read_and_never_written_as_on_kaggle(tiny_folder, cfg, tokenizer, tmp_path):
    """Model, pairs and adapter come from `/kaggle/input`, which is read-only; results go to the working folder."""
    given, working = tmp_path / "input", tmp_path / "working"
    shutil.copytree(tiny_folder, given / "model")
    rows = [pair(f"{ask} {n}", chosen, rejected) for n in range(6) for ask, chosen, rejected in TEXTS]
    (given / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first = dataclasses.replace(cfg, model=str(given / "model"), data=str(given / "pairs.jsonl"))
    splits = store.ensure_data(run_folder.Run(first), tokenizer).splits
    base = models.load_base(first)
    train.train(first, run_folder.Run(first), base, tokenizer, splits["train"], splits["val"])
    shutil.copytree(run_folder.Run(first).adapter, given / "adapter")
    for path in [*given.rglob("*"), given]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [given, *given.rglob("*")]}

    here = dataclasses.replace(first, artifacts=str(working))
    prepared = store.ensure_data(run_folder.Run(here), tokenizer)
    assert save.read_training_record(given / "adapter")["base"]["name"] == "model"
    assert lora.load_policy(here, given / "adapter").peft_config
    train.train(
        here, run_folder.Run(here), models.load_base(here), tokenizer, *map(prepared.splits.get, ("train", "val"))
    )
    after = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [given, *given.rglob("*")]}
    assert after == before, "as root nothing is read-only, so the folder itself is compared"
    assert save.read_training_record(run_folder.Run(here).adapter)
