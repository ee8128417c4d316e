"""Peak memory of a training run, predicted before a weight is loaded; and which knob to turn where it does not fit.

A sum of counted tensors (`footprint`), but for two terms: what the process holds already is measured, and what the heap
of a CPU keeps is a bound. No run in `benchmarks/memory_plan.md` and `gpu.jsonl` took more than the sum.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from ..errors import ModelUnsuitableError
from ..knobs import Config
from ..machine import hardware
from . import footprint
from .footprint import FP32

SHORTEST = 128  # tokens: advice goes no lower, an answer needs room
LOWEST_RANK = 4
HEAP = 9  # widest tensors of a block that glibc cannot give again, since torch aligns to 64 bytes: at most
WORKSPACE = 32 * 2**20  # bytes that cuBLAS holds on a Hopper GPU, the largest
ROOM = 1.5  # times the plan must be free: batches of mixed lengths rise above it (`benchmarks/memory_plan.md`)

#: What each term is, for the table.
TERMS = {
    "process": "Python and its libraries, measured (CPU only)",
    "weights": "linear layers in NF4 with their scales; the rest in the compute type",
    "checkpoint file": "mapped while it is converted",
    "adapters": "A and B of LoRA, in float32",
    "gradients": "one float32 per adapter weight",
    "optimizer": "AdamW: two float32 per adapter weight",
    "activations": "what the backward pass needs of the forward pass",
    "block": "one block at work: its widest tensors and one dequantized weight",
    "logits": "vocabulary x answer tokens, a tile at a time",
    "heap": "freed memory that glibc keeps and cannot use (CPU only, a bound)",
    "workspace": "cuBLAS (GPU only)",
}


@dataclass(frozen=True)
class Plan:
    """Bytes by phase and term. Phases follow one another in the same memory, so the largest is the peak."""

    config: Config
    device: str
    length: int  # tokens of the longest sequence
    answer: int  # tokens of the longest answer
    evaluates: bool
    phases: dict[str, dict[str, int]]

    @property
    def peak(self) -> str:
        """Name of the largest phase."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def terms(self) -> dict[str, int]:
        """Bytes by term in the largest phase."""
        return self.phases[self.peak]

    @property
    def total(self) -> int:
        """Predicted peak in bytes: resident set of the process on a CPU, allocated memory on a GPU."""
        return sum(self.terms.values())

    @property
    def needed(self) -> int:
        """Bytes beyond what the process holds already: what free memory is to be compared with."""
        return self.total - self.terms.get("process", 0)

    def rows(self) -> list[dict]:
        """One row per term, one column per phase, in MiB; the last row is the sum."""
        used = [term for term in TERMS if any(term in phase for phase in self.phases.values())]
        rows = [
            {"term": term, **{name: _mib(phase.get(term, 0)) for name, phase in self.phases.items()}, "": TERMS[term]}
            for term in used
        ]
        sums = {name: _mib(sum(phase.values())) for name, phase in self.phases.items()}
        return [*rows, {"term": "sum", **sums, "": f"largest: {self.peak}"}]


def _mib(n: int) -> str:
    return f"{n / 2**20:,.0f}"


def plan(
    config: Config, *, length: int | None = None, answer: int | None = None, process: int | None = None,
    device: str | None = None, evaluates: bool = True,
) -> Plan:  # fmt: skip
    """Predict the peak memory of a training run.

    Args:
        length: tokens of the longest sequence; default `config.max_tokens`, the longest that is kept.
        answer: tokens of the longest answer; default `length`, an upper bound.
        process: bytes the process holds before the model is loaded; default: measured now. A GPU does not count them.
        device: "cpu" or "cuda"; default the one found.
        evaluates: the run also scores validation pairs, as notebook 05 does.

    Raises:
        ModelFetchError, ModelUnsuitableError: see `footprint.read_shape`.
    """
    device = device or hardware.device()
    shape, size, cuda = footprint.read_shape(config), hardware.torch_dtype(config.dtype).itemsize, device == "cuda"
    length = length or config.max_tokens
    answer = answer or length
    answers = 2 * config.batch_size * answer  # tokens: chosen and rejected go through together,
    rows, width = 2 * config.batch_size, length
    if config.prefix_sharing:  # with the prompt once: `prefix.Packed`
        rows, width = config.batch_size, length + answer
    tokens = rows * width
    if cuda:
        process = 0
    elif process is None:
        process = psutil.Process().memory_info().rss

    adapter = footprint.adapter_weights(shape, config)
    loaded = {"process": process, "weights": footprint.weight_bytes(shape, size), "workspace": WORKSPACE * cuda}
    resting = loaded | {"adapters": FP32 * adapter, "optimizer": 2 * FP32 * adapter}

    in_block = footprint.activation_bytes(shape, config, rows, width)
    at_work = footprint.block_bytes(shape, size, tokens)
    heap = 0 if cuda else HEAP * shape.layers * size * shape.wide * tokens
    kept = size * shape.hidden * answers  # what enters the head
    if config.gradient_checkpointing:  # what enters each block and the last norm; a block is made anew in its turn
        kept += (size * shape.layers + FP32) * shape.hidden * tokens
        anew = in_block
    else:  # the last norm's input is there for the first one's: below that nothing learns
        kept += shape.layers * in_block
        anew = 0
    if size < FP32:
        kept += size * adapter  # autocast keeps a 16-bit copy of A and B until the step ends
    step = resting | {"gradients": FP32 * adapter, "activations": kept, "heap": heap}

    forward, backward = footprint.logit_bytes(shape, size, answers, cuda)
    phases = {
        "load": loaded | {"checkpoint file": shape.stored * shape.weights},
        "reference pass": step | {"block": at_work, "logits": forward},
        "backward, head": step | {"logits": backward},
        "backward, blocks": step | {"activations": kept + anew, "block": at_work},
    }
    if evaluates:  # twice the pairs at a time (`train.dpo_config`), and no gradients
        forward, _ = footprint.logit_bytes(shape, size, 2 * answers, cuda)
        at_work = footprint.block_bytes(shape, size, 2 * tokens)
        # on a CPU the heap stays as large as training made it, with room for a block
        phases["evaluation"] = resting | {"logits": forward} | ({"block": at_work} if cuda else {"heap": kept + heap})
    if cuda:
        del phases["load"]  # the file is mapped by the machine, not by the GPU
    phases = {name: {term: n for term, n in phase.items() if n} for name, phase in phases.items()}
    return Plan(config, device, length, answer, evaluates, phases)


def again(planned: Plan, config: Config | None = None, length: int | None = None, answer: int | None = None) -> Plan:
    """The same plan with another config, or for sequences of another length."""
    config = config or planned.config
    length = min(length or planned.length, config.max_tokens)
    return plan(
        config, length=length, answer=min(answer or planned.answer, length), process=planned.terms.get("process", 0),
        device=planned.device, evaluates=planned.evaluates,
    )  # fmt: skip


def fitting(planned: Plan, available: float) -> Config | None:
    """The first config, in the order of `_changes`, whose plan fits into `available` bytes; None if none does."""
    configs = (planned.config, *_changes(planned.config))
    return next((config for config in configs if again(planned, config).needed <= available), None)


def choose_checkpointing(config: Config, available: float) -> tuple[Config, str]:
    """Leave activations stored where memory has room for them, since making them again costs time.

    Args:
        config: with `gradient_checkpointing` off it stays off.
        available: bytes of free memory.

    Returns:
        The config to train with, and a sentence that says why.
    """
    if not config.gradient_checkpointing:
        return config, "Gradient checkpointing is off: asked for."
    stored = dataclasses.replace(config, gradient_checkpointing=False)
    try:
        needed = plan(stored).needed
    except ModelUnsuitableError as error:
        return config, f"Gradient checkpointing is on: {error.cause}"
    fits = ROOM * needed <= available
    return stored if fits else config, (
        f"Gradient checkpointing is {'off' if fits else 'on'}: without it {needed / 2**30:.1f} GiB are needed, "
        f"and {available / 2**30:.1f} GiB are free."
    )


def advice(planned: Plan, available: float) -> str:
    """One sentence: whether it fits into so many bytes of free memory, or which knobs to turn, and to what."""
    needs = f"{planned.needed / 2**30:.1f} GiB needed, {available / 2**30:.1f} GiB free"
    found = fitting(planned, available)
    if found is None:
        return f"It does not fit ({needs}), and with this model no setting does: choose a smaller MODEL."
    if found == planned.config:
        return f"It fits: {needs}."
    knobs = ("batch_size", "grad_accum", "gradient_checkpointing", "max_tokens", "lora_r", "lora_alpha")
    turned = [f"{k.upper()}={getattr(found, k)}" for k in knobs if getattr(found, k) != getattr(planned.config, k)]
    then = again(planned, found).needed / 2**30
    return f"It does not fit ({needs}). Set {', '.join(turned)}: then {then:.1f} GiB are needed."


def _changes(config: Config) -> Iterator[Config]:
    """Smaller and smaller configs, the cheapest change first.

    Fewer pairs at a time and more times: the same result. Checkpointing: the same result, up to half as slow again.
    Both. Then shorter pairs, which loses data. Last a lower rank, alpha with it, which learns less.
    """
    pairs = config.batch_size * config.grad_accum
    sizes = [n for n in range(config.batch_size, 0, -1) if pairs % n == 0]
    for checkpointing in (False, True):
        if checkpointing or not config.gradient_checkpointing:
            of_kind = dataclasses.replace(config, gradient_checkpointing=checkpointing)
            for n in sizes:
                smallest = dataclasses.replace(of_kind, batch_size=n, grad_accum=pairs // n)
                yield smallest
    for tokens in range((config.max_tokens - 1) // 32 * 32, SHORTEST - 1, -32):
        smallest = dataclasses.replace(smallest, max_tokens=tokens)
        yield smallest
    while smallest.lora_r > LOWEST_RANK:
        half = max(LOWEST_RANK, smallest.lora_r // 2)
        alpha = max(1, round(smallest.lora_alpha * half / smallest.lora_r))
        smallest = dataclasses.replace(smallest, lora_r=half, lora_alpha=alpha)
        yield smallest
