"""`DPOTrainer` with less work: a pair's prompt computed once, on a CPU a smaller head, and a clock beside it."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import trl.kernels.chunked_logprob
import trl.trainer.utils
from datasets import Dataset
from datasets.fingerprint import Hasher
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import DPOConfig, DPOTrainer

from . import footprint, prefix, timing, watch


class FastDPOTrainer(timing.Timed, DPOTrainer):
    """The loss of `DPOTrainer` with less work; nothing outside its own calls is changed.

    - The prompt of a pair goes through the model once (`prefix`), where the model is of a kind that allows it.
    - On a CPU the LM head leaves prompt and padding out (`cpu_head`), and adapters read their input as it is.
    - Trainable weights are float32 (`cast_trainable_to_fp32`), and an adapter that was given keeps its values.
    - `times` says where the seconds went (`timing.TimeSplit`).
    - It stops where the loss means nothing (`watch.LossWatch`), unless `ref_model` gives it a reference of its own.

    Splits get a column `length`, for `train_sampling_strategy="group_by_length"` with `remove_unused_columns=False`.

    Args:
        share_prefixes: `False` computes the prompt once per answer, as stock TRL does. All else is `DPOTrainer`'s.
    """

    def __init__(self, *, args: DPOConfig, share_prefixes: bool = True, **kwargs) -> None:
        self.share_prefixes = share_prefixes
        model = kwargs["model"]
        given = {n: p.data.clone() for n, p in model.named_parameters() if p.requires_grad and "lora_" in n}
        super().__init__(args=one_gpu(args), **kwargs)
        cast_trainable_to_fp32(self.model)
        for name, weight in given.items():  # an adapter that goes on: the cast to bfloat16 and back has rounded it
            self.model.get_parameter(name).data.copy_(weight)
        if kwargs.get("ref_model") is None:
            self.add_callback(watch.LossWatch)
        _ = self.shares_prefixes  # asks now: its short passes are no part of a training

    @property
    def shares_prefixes(self) -> bool:
        """Whether prompts are computed once: asked for, and the model is of a kind that allows it."""
        return self.share_prefixes and not self.unshared

    @functools.cached_property
    def unshared(self) -> str:
        """`prefix.obstacle` of the model."""
        return prefix.obstacle(_causal(self.model))

    def _get_train_sampler(self, *args):
        sampler = super()._get_train_sampler(*args)
        if isinstance(sampler, LengthGroupedSampler):  # of the pairs of a step, whichever process takes them
            sampler.batch_size *= self.args.world_size
        return sampler

    def training_step(self, *args, **kwargs):
        # around the backward pass too, which makes logits and checkpointed blocks anew, in the same way
        with self._head(), self._inputs():
            return super().training_step(*args, **kwargs)

    def compute_loss(self, model: PreTrainedModel, inputs, *args, **kwargs):  # an evaluation comes here too
        with self._head(), self._inputs(), self._sharing(inputs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def compute_ref_log_probs(self, model: PreTrainedModel, inputs):
        with self._head(), self._sharing(inputs):
            return super().compute_ref_log_probs(model, inputs)

    def _head(self):
        return cpu_head() if self.accelerator.device.type == "cpu" else nullcontext()

    def _inputs(self):
        """PEFT gives each adapter a float32 copy of its input, unless CUDA's autocast is on. A CPU's rounds that back.

        Without the copies every bit is the same, and a step keeps an eighth less (`footprint.activation_bytes`).
        """
        mixed = self.accelerator.device.type == "cpu" and self.accelerator.mixed_precision != "no"
        return disable_input_dtype_casting(self.model, active=mixed)

    def _sharing(self, inputs: dict):
        length = inputs["input_ids"].shape[1]
        return prefix.sharing(_causal(self.model), length) if self.shares_prefixes else nullcontext()

    def _prepare_dataset(self, dataset, *args, **kwargs):
        prepared = super()._prepare_dataset(dataset, *args, **kwargs)
        if not isinstance(prepared, Dataset) or "length" in prepared.column_names:
            return prepared
        columns = (prepared[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        return prepared.add_column("length", [len(p) + max(len(c), len(r)) for p, c, r in zip(*columns, strict=True)])

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        of = (dataset._fingerprint, self.ld_alpha, self.args.bf16, self.args.fp16, self.share_prefixes)
        dataset._fingerprint = Hasher.hash(of)  # TRL keys its cache by pairs and model alone
        if self.args.world_size > 1:  # pairs in memory have a temporary folder for each process: here one for all
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            dataset._get_cache_file_path = lambda fingerprint: str(folder / f"reference-{fingerprint}.arrow")
        return super()._precompute_ref_logps(dataset, name, batch_size)


def one_gpu(args: DPOConfig) -> DPOConfig:
    """One process takes one GPU, as on Kaggle: else Trainer wraps the model in DataParallel, which TRL refuses."""
    args._n_gpu = min(args.n_gpu, 1)
    return args


def _causal(model: PreTrainedModel):
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def cpu_head() -> Iterator[None]:
    """Inside the block, TRL's LM head projects only the tokens of the answers on a CPU too, and in smaller tiles.

    TRL 1.16 asks for Triton before it leaves prompt and padding out, because on some accelerators a changing shape
    costs a recompilation; a CPU has none. Its tiles of 4,096 tokens x 32,768 words are for a GPU; in plain torch each
    step of the arithmetic fills another tile, and small ones stay in the cache and below the size that the allocator
    fetches from the kernel each time (`memory.tune_allocator`). The loss is the same (`test_train.py` compares);
    what it saves is in `benchmarks/training_speed.md`.
    """
    tokens, words = footprint.TILE["cpu"]
    changes = (
        (trl.trainer.utils, "_use_triton", lambda device: True),
        (trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", words),
        (trl.kernels.chunked_logprob, "TOKEN_CHUNK_SIZE", tokens),
    )
    before = [getattr(module, name) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(changes, before, strict=True):
            setattr(module, name, value)


def cast_trainable_to_fp32(model: PreTrainedModel) -> None:
    """Undo TRL's cast of a 4-bit model's adapter to bfloat16, and assert that it is undone.

    fp16 training needs it: the GradScaler of a T4 rejects bfloat16 gradients (trl#4901). bf16 training gains from it:
    an update smaller than 1/256 of a bfloat16 weight is lost.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
