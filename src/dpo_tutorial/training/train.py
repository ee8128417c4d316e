"""Build the DPO trainer and train the adapter. `dpo-tutorial train` does it without a notebook."""

from pathlib import Path

from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import DPOConfig, DPOTrainer

from .. import run_folder
from ..adapter import lora
from ..config import resolve
from ..errors import ConfigError
from ..knobs import Config
from ..loading import models, sizes
from ..machine import hardware, memory
from ..pairs import store
from . import checkpoints, faster, memory_plan, prefix, resume, save, tracking, watch


def dpo_config(config: Config, output_dir: str | Path, **changes) -> DPOConfig:
    """Translate our config into TRL's, as notebook 05 does in the open. `changes` are arguments of `DPOConfig`."""
    arguments = dict(
        output_dir=str(output_dir),
        beta=config.beta,
        loss_type=[config.loss_type, "sft"] if config.sft_weight else config.loss_type,
        loss_weights=[1.0, config.sft_weight] if config.sft_weight else None,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_ratio,  # transformers 5: a value below 1 is a share of all steps
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=2 * config.batch_size,  # no gradients, so twice as many fit
        gradient_accumulation_steps=share(config),
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


def share(config: Config) -> int:
    """How many of a step's GRAD_ACCUM batches each process takes: a step has the same pairs however many there are.

    Raises:
        ConfigError: it is no whole number.
    """
    number, pairs = hardware.processes().num_processes, config.batch_size * config.grad_accum
    if config.grad_accum % number == 0:
        return config.grad_accum // number
    more = -(-config.grad_accum // number) * number
    fix = f"Set GRAD_ACCUM={more}: {config.batch_size * more} pairs a step."
    if pairs % number == 0:
        size = next(n for n in range(config.batch_size, 0, -1) if pairs // number % n == 0)
        fix = f"Set BATCH_SIZE={size} GRAD_ACCUM={pairs // size}: still {pairs} pairs a step."
    raise ConfigError(f"{number} processes cannot share GRAD_ACCUM={config.grad_accum} batches evenly.", fix)


def other_arguments(config: Config) -> dict:
    """Arguments of `DPOConfig` that notebook 05 does not talk about: rarer knobs, and what follows from the machine."""
    return dict(
        label_smoothing=config.label_smoothing,  # read by loss_type robust only
        ld_alpha=None if config.ld_alpha == 1 else config.ld_alpha,
        precompute_ref_log_probs=config.precompute_reference,
        router_aux_loss_coef=0.0,  # a mixture of experts: the loss is the pairs' alone
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        lr_scheduler_type=config.lr_scheduler,
        max_steps=config.max_steps,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=config.dtype == "bf16",
        fp16=config.dtype == "fp16",
        use_cpu=hardware.device() == "cpu",
        dataloader_pin_memory=hardware.device() == "cuda",
        **tracking.arguments(config),
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

    With `config.start_from` it goes on with that adapter instead, and a frozen copy of it is the reference.

    Args:
        model: the base model, without adapter. TRL attaches the one that `peft_config` describes; a second model in
            memory (`ref_model`) is not needed.
        val: without it, nothing is evaluated.
        changes: arguments of `DPOConfig` that differ from `config`; where they do not say so, no checkpoint is saved.
    """
    lora.check_lora_targets(model, config)
    given = lora.go_on_from(config, model, config.start_from) if config.start_from else None
    quiet: dict = {"save_strategy": "no"} | ({} if val else {"eval_strategy": "no"})
    quiet |= {"ddp_find_unused_parameters": prefix.has_experts(model.config.get_text_config())}  # an expert may idle
    return faster.FastDPOTrainer(
        model=given or model,
        args=dpo_config(config, output_dir, **(quiet | changes)),
        train_dataset=train,
        eval_dataset=val,
        processing_class=tokenizer,
        peft_config=None if given else lora.lora_config(config, model),
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
        return run_folder.json_text({"step": state.global_step, "of": state.max_steps, **logs}, indent=None)


def train(
    config: Config,
    run: run_folder.Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    val: Dataset,
) -> DPOTrainer:
    """Train the adapter and save it: what notebook 05 does around its explanations."""
    number, free = hardware.processes().num_processes, memory.free_memory_gib() * 2**30
    if hardware.device() == "cpu":
        free /= number  # they share main memory
    free += sum(sizes.weight_bytes(model).values())  # they are loaded, and the plan counts them
    free = min(gather_object([free])) if number > 1 else free  # all decide alike
    config, why = memory_plan.choose_checkpointing(config, free)
    print(why)
    if number > 1:
        print(
            f"{number} processes train together. A step has GRAD_ACCUM={config.grad_accum} batches of BATCH_SIZE="
            f"{config.batch_size} pairs: each takes {share(config)} of them."
        )
        if again := -len(train) % (number * config.batch_size):
            print(f"Each needs as many batches: {again} of the {len(train)} pairs come twice in an epoch.")
    trainer = build_trainer(config, model, tokenizer, train, val, checkpoints.folder(run), save_strategy="steps")
    if config.prefix_sharing and trainer.unshared:
        print(f"Each prompt is computed twice, once for each answer: {trainer.unshared}.")
    trainer.add_callback(Progress(run.dir / "progress.jsonl"))
    tracking.watch(config, run, trainer)
    trainer.times.counting = False  # nobody reads the clock here, and on a GPU it waits at every phase
    seconds = resume.resume_or_start(trainer, config, run)
    if trainer.is_world_process_zero():
        if said := watch.remark(trainer):
            print(said)
        save.save_adapter(config, run, trainer, tokenizer, seconds)
    return trainer


def check_first_loss(trainer: DPOTrainer) -> float:
    """The loss before the first update, which `watch.LossWatch` has let pass.

    Raises:
        TrainingError: see `watch.check_first`.
    """
    return watch.check_first(save.history(trainer)["train"][0], trainer.args)


def train_headless(parameters: dict[str, str]) -> None:
    """Train without a notebook, as one process or as one of several (`processes.train`)."""
    processes = hardware.processes()  # each takes its GPU before anything else looks at one
    config = resolve(**parameters)
    share(config)  # before a model is loaded
    hardware.seed_everything(config.seed)
    run = run_folder.Run(config)
    with processes.main_process_first():
        tokenizer = models.load_tokenizer(config)
        splits = store.ensure_data(run, tokenizer).splits
    train(config, run, models.load_base(config), tokenizer, splits["train"], splits["val"])
    print(f"adapter saved in {run.adapter}")
