"""Build the DPO trainer and train the adapter. `dpo-tutorial train` does it without a notebook."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState
from trl import DPOConfig, DPOTrainer

from .. import run_folder
from ..adapter import lora
from ..config import resolve
from ..errors import ArtifactError, disk_error
from ..knobs import Config
from ..loading import models
from ..machine import hardware, memory, session
from ..pairs import store
from . import checkpoints, faster, memory_plan, resume, save


def dpo_config(config: Config, output_dir: str | Path, **changes) -> DPOConfig:
    """Translate our config into TRL's, as notebook 05 does in the open. `changes` are arguments of `DPOConfig`."""
    arguments = dict(
        output_dir=str(output_dir),
        beta=config.beta,
        loss_type=config.loss_type,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_ratio,  # transformers 5: a value below 1 is a share of all steps
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=2 * config.batch_size,  # no gradients, so twice as many fit
        gradient_accumulation_steps=config.grad_accum,
        max_length=None,  # notebook 04 dropped what is too long; nothing is cut silently here
        train_sampling_strategy="group_by_length",  # batches of similar length: less padding to compute
        remove_unused_columns=False,  # else TRL drops the length column before the sampler sees it
        gradient_checkpointing=config.gradient_checkpointing,
        eval_strategy="steps",
        eval_steps=0.5,  # half-way and at the end; at the start all tie
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=2,  # with a torn newest one, the other is whole
        logging_steps=1,
    )
    return DPOConfig(**(arguments | other_arguments(config) | changes))


def other_arguments(config: Config) -> dict:
    """Arguments of `DPOConfig` that notebook 05 does not talk about: rarer knobs, and what follows from the machine."""
    return dict(
        label_smoothing=config.label_smoothing,  # read by loss_type robust only
        ld_alpha=None if config.ld_alpha == 1 else config.ld_alpha,
        precompute_ref_log_probs=config.precompute_reference,
        lr_scheduler_type=config.lr_scheduler,
        max_steps=config.max_steps,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=config.dtype == "bf16",
        fp16=config.dtype == "fp16",
        use_cpu=hardware.device() == "cpu",
        dataloader_pin_memory=hardware.device() == "cuda",
    )


def build_trainer(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    val: Dataset | None = None,
    output_dir="trainer",
    **changes,
) -> faster.FastDPOTrainer:
    """A trainer over a fresh adapter, whose reference is the same model with the adapter switched off.

    Args:
        model: the base model, without adapter. TRL attaches the one that `peft_config` describes; a second model in
            memory (`ref_model`) is not needed.
        val: without it, nothing is evaluated.
        changes: arguments of `DPOConfig` that differ from `config`; where they do not say so, no checkpoint is saved.
    """
    lora.check_lora_targets(model, config)
    quiet = {"save_strategy": "no"} | ({} if val else {"eval_strategy": "no"})
    return faster.FastDPOTrainer(
        model=model,
        args=dpo_config(config, output_dir, **(quiet | changes)),
        train_dataset=train,
        eval_dataset=val,
        processing_class=tokenizer,
        peft_config=lora.lora_config(config),
        share_prefixes=config.prefix_sharing,
    )


class Progress(TrainerCallback):
    """Append every log line to a JSONL file as it comes: what a headless run can be watched by."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:  # a resumed run repeats the lines up to its checkpoint
            self.path.write_text("".join(self.line(row, state) for row in state.log_history), encoding="utf-8")

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(self.line(logs or {}, state))

    @staticmethod
    def line(logs: dict, state) -> str:
        return json.dumps({"step": state.global_step, "of": state.max_steps, **logs}) + "\n"


@dataclass
class Start:
    """Where a training begins."""

    checkpoint: str | None  # of one that was stopped; what `trainer.train(resume_from_checkpoint=…)` takes
    finished: bool  # stopped between the last step and saving: the trainer has the adapter, nothing is left to train
    seal: checkpoints.Seal

    def seconds(self) -> float:
        """Seconds of training so far, those before the stop included."""
        return self.seal.seconds()


@contextlib.contextmanager
def resumable(trainer: DPOTrainer, config: Config, run: run_folder.Run) -> Iterator[Start]:
    """Around `trainer.train`: find the newest whole checkpoint of the same training, and seal those that it writes.

    The run's folder stays locked to this process until `saving`.

    Raises:
        ArtifactError: config, pairs or base changed since the checkpoint; another process trains in this folder; or a
            checkpoint cannot be written (the ones before it stay).
    """
    if trainer.is_world_process_zero():
        run.lock()
    try:
        if trainer.is_world_process_zero():
            run.fix_adapter()
        now = checkpoints.fingerprint(config, trainer)
        with hardware.processes().main_process_first():
            if config.fresh:
                checkpoints.clear(run)
            found = checkpoints.newest(run, now)
        yield _start(trainer, config, run, now, found)
    except BaseException as error:
        refused = disk_error(error)
        if refused and trainer.is_world_process_zero():
            with contextlib.suppress(OSError):
                checkpoints.remove_torn(run)  # it may be what fills the disk
        run.unlock()
        if refused:
            raise run_folder.unwritable(checkpoints.folder(run), refused) from error
        raise


def _start(trainer: DPOTrainer, config: Config, run: run_folder.Run, now: dict, found: tuple | None) -> Start:
    checkpoint, seal = found or (None, None)
    sealing, finished = checkpoints.Seal(run, now, seal), False
    if found:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        print(f"Resuming after step {state.global_step} of {state.max_steps}, from {checkpoint.name}.", flush=True)
        finished = state.global_step >= state.max_steps  # Trainer would add a step
        if finished:
            lora.give_adapter(trainer.model, checkpoint)
            trainer.state = state
    elif trainer.state.global_step:
        raise ArtifactError(
            f"This trainer has already trained {trainer.state.global_step} steps, and there is no checkpoint of them.",
            "Restart the kernel and run the notebook from the top: a fresh adapter needs a fresh base.",
        )
    trainer.remove_callback(checkpoints.Seal)  # of a cell run before
    trainer.add_callback(sealing)
    hardware.seed_everything(config.seed)  # the order of the batches follows the seed, whatever was drawn before
    # The adapter in a checkpoint is safetensors; optimizer, scheduler and random numbers are files of torch.save, which
    # transformers reads with weights_only. They are this run's own, sealed by it, and never come from a download.
    return Start(checkpoint and str(checkpoint), finished, sealing)


def train(
    config: Config,
    run: run_folder.Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    val: Dataset,
) -> DPOTrainer:
    """Train the adapter and save it: what notebook 05 does around its explanations."""
    config, why = memory_plan.choose_checkpointing(config, memory.free_memory_gib() * 2**30)
    print(why)
    trainer = build_trainer(config, model, tokenizer, train, val, checkpoints.folder(run), save_strategy="steps")
    trainer.add_callback(Progress(run.dir / "progress.jsonl"))
    seconds = resume.resume_or_start(trainer, config, run)
    if trainer.is_world_process_zero():
        save.save_adapter(config, run, trainer, tokenizer, seconds)
    return trainer


def history(trainer: DPOTrainer) -> dict[str, list[dict]]:
    """The trainer's log in two tables: one row per optimizer step, one per evaluation."""
    log = trainer.state.log_history
    return {
        "train": [row for row in log if "loss" in row],
        "eval": [row for row in log if "eval_loss" in row],
    }


def check_first_loss(trainer: DPOTrainer) -> float:
    """The loss before the first update; with the sigmoid loss it must be ln 2: policy and reference are one model then.

    A reference computed before training saw other batches, which in 16 bits round differently: then 0.2 nats may lie
    between them, else what a loss shows in four digits.

    Raises:
        AssertionError: it is not; then the reference is wrong, and the training means nothing.
    """
    first, args = history(trainer)["train"][0]["loss"], trainer.args
    if args.loss_type != ["sigmoid"]:
        return first
    tolerance = max(1e-3, 0.2 * args.beta) if trainer.precompute_ref_logps and (args.bf16 or args.fp16) else 1e-3
    assert abs(first - math.log(2)) < tolerance, f"loss at step 0 is {first:.4f}, not ln 2 = {math.log(2):.4f}"
    return first


@contextlib.contextmanager
def saving(config: Config, run: run_folder.Run, trainer: DPOTrainer, seconds: float) -> Iterator[Path]:
    """Save into the folder it gives; training record and model card are added, and all appears whole or not at all.

    The checkpoints go once it is saved, so that the next training starts anew, and the run's folder is free for it.

    Args:
        seconds: of training, for the record.
    """
    run.lock()
    where = models.source(config)
    for peft_config in trainer.model.peft_config.values():
        peft_config.base_model_name_or_path, peft_config.revision = where.name, where.revision
    record = {
        "config": config.identity(),
        "base": {"name": where.name, "revision": where.revision, "pin": where.pin},
        "seconds": round(seconds, 1),
        "peak_memory_gib": round(memory.peak_memory_gib(), 2),
        "versions": session.versions(),
        "hardware": hardware.hardware(),
        "history": history(trainer),
    }
    with run.replacing(run.adapter) as folder:
        yield folder
        (folder / "training.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
        (folder / "README.md").write_text(save.model_card(config, record), encoding="utf-8")
    checkpoints.clear(run)
    run.unlock()


def train_headless(parameters: dict[str, str]) -> None:
    """Train without a notebook: `dpo-tutorial train`, or `accelerate launch -m dpo_tutorial train -p NAME VALUE`."""
    config = resolve(**parameters)
    hardware.seed_everything(config.seed)
    run = run_folder.Run(config)
    with hardware.processes().main_process_first():
        tokenizer = models.load_tokenizer(config)
        splits = store.ensure_data(run, tokenizer).splits
    trainer = train(config, run, models.load_base(config), tokenizer, splits["train"], splits["val"])
    check_first_loss(trainer)
    print(f"adapter saved in {run.adapter}")
