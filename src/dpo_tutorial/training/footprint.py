"""What weights, activations and logits take in memory, worked out from an architecture without its weights.

The block is Llama's (Mistral and Qwen2 have the same). What autograd keeps of it was read off with
`torch.autograd.graph.saved_tensors_hooks`, under torch 2.13, transformers 5.23, PEFT 0.21, TRL 1.16.
"""

import functools
import math
from dataclasses import dataclass

import torch

from .. import knobs
from ..errors import ModelUnsuitableError, first_line
from ..knobs import Config
from ..loading import models
from ..loading import sizes as sizes_of
from ..machine import hardware
from . import prefix

FP32 = 4
TILE = {"cuda": (4096, 32768), "cpu": (512, 4096)}  # tokens x words of logits that TRL's head makes at a time


@dataclass(frozen=True)
class Shape:
    """What the arithmetic needs of an architecture. Sizes count elements unless they say bytes."""

    linears: tuple[tuple[str, int, int], ...]  # (name, in, out) of every linear layer of the blocks
    nf4: tuple[bool, ...]  # of each, whether it is quantized
    others: int  # all other weights: embedding, norms, biases, head; tied ones once
    stored: int  # bytes of one weight in the checkpoint
    layers: int
    hidden: int
    wide: int  # inside the feed-forward part
    query: int  # heads x width of one
    heads: int
    vocabulary: int

    @property
    def weights(self) -> int:
        return self.others + sum(i * o for _, i, o in self.linears)

    def adapted(self, config: Config) -> list[tuple[str, int, int]]:
        """The layers that get an adapter, of all blocks."""
        every, ends = config.lora_targets == (knobs.ALL_LINEAR,), {t.rsplit(".", 1)[-1] for t in config.lora_targets}
        return [(name, i, o) for name, i, o in self.linears if every or name in ends]


def read_shape(config: Config) -> Shape:
    """The architecture of `config.model`, built on the meta device: shapes and no memory.

    Raises:
        ModelFetchError: config.json is not at hand and cannot be fetched.
        ModelUnsuitableError: its blocks are not of Llama's kind.
    """
    return _read_shape(config.model, config.model_revision, config.keep_16bit)


def _not_planned(model: str, why: str) -> ModelUnsuitableError:
    return ModelUnsuitableError(
        f"The memory of MODEL={model} cannot be planned: {why}.",
        "The plan knows decoders with Llama's blocks. For this model, train two steps and read the measured peak.",
    )


@functools.lru_cache(maxsize=8)  # advice plans many times over
def _read_shape(model: str, revision: str | None, keep: tuple[str, ...]) -> Shape:
    found = models.load_config(Config(model=model, model_revision=revision))
    if prefix.has_experts(found):
        raise _not_planned(model, "it is a mixture of experts")
    try:
        width = getattr(found, "head_dim", None) or found.hidden_size // found.num_attention_heads
        sizes = dict(
            layers=found.num_hidden_layers, hidden=found.hidden_size, wide=found.intermediate_size,
            query=width * found.num_attention_heads, heads=found.num_attention_heads, vocabulary=found.vocab_size,
        )  # fmt: skip
        empty = models.load_empty(Config(model=model, model_revision=revision))
    except (AttributeError, ValueError) as error:
        raise _not_planned(model, first_line(error)) from error
    layers = sizes_of.linear_layers(empty)
    linears = tuple((name.rsplit(".", 1)[-1], m.in_features, m.out_features) for name, m in layers.items())
    nf4 = tuple(sizes_of.becomes_nf4(name, keep) for name in layers)
    others = sum(p.numel() for p in empty.parameters()) - sum(i * o for _, i, o in linears)
    return Shape(linears, nf4, others, stored=(getattr(found, "dtype", None) or torch.bfloat16).itemsize, **sizes)


def weight_bytes(shape: Shape, size: int) -> int:
    """NF4 with double quantization, as `sizes.weight_bytes` measures it; all other weights in `size` bytes each."""
    total = size * shape.others
    for (_, inside, outside), quantized in zip(shape.linears, shape.nf4, strict=True):
        if not quantized:
            total += size * inside * outside
            continue
        blocks = math.ceil(inside * outside / 64)  # each has an 8-bit scale, and 256 of those share a float32
        code_book = 256 * FP32
        total += math.ceil(inside * outside / 2) + blocks + FP32 * math.ceil(blocks / 256) + code_book
    return total


def adapter_weights(shape: Shape, config: Config) -> int:
    """A is [r, in] and B is [out, r] for every adapted layer (Hu et al. 2021)."""
    return config.lora_r * sum(inside + outside for _, inside, outside in shape.adapted(config))


def activation_bytes(shape: Shape, config: Config, sequences: int, length: int) -> int:
    """What one block keeps for its backward pass.

    Per token: what enters the two norms, in float32; queries, keys and values, the last two repeated for all heads (a
    padded batch has a mask, and with a mask attention is not grouped); the attention's output; gate, its activation and
    up; what enters the adapters, and their r numbers. Attention scores are not kept, only their log-sum-exp. But each
    block turns the padding mask into numbers of the compute type, length x length, and keeps that.
    """
    size = hardware.torch_dtype(config.dtype).itemsize
    inputs = {name: inside for name, inside, _ in shape.adapted(config)}
    # q, k and v read one tensor, gate and up another; o reads the attention's output, counted already
    readers = [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}]
    entering = sum(shape.hidden for names in readers if names & set(inputs)) + inputs.get("down_proj", 0)
    compute = 4 * shape.query + 3 * shape.wide + entering + config.lora_r * len(inputs)
    norms = 2 * (shape.hidden + 1)
    return sequences * length * (size * (compute + length) + FP32 * (norms + shape.heads))


def block_bytes(shape: Shape, size: int, tokens: int) -> int:
    """One block at work: four tensors of the widest kind, and the largest weight as bitsandbytes dequantizes it."""
    return size * (4 * shape.wide * tokens + max(i * o for _, i, o in shape.linears))


def logit_bytes(shape: Shape, size: int, answers: int, cuda: bool) -> tuple[int, int]:
    """(forward, backward) of TRL's head, which makes the logits of answer tokens tile by tile, and again going back.

    With Triton all happens inside the tile. In plain torch, forward adds three float32 copies of it and a mask of one
    byte, backward seven and a mask (`trl.kernels.chunked_logprob`, `_forward_tile` and `_backward_tile`).
    """
    tokens, words = TILE["cuda" if cuda else "cpu"]
    tile = min(answers, tokens) * min(shape.vocabulary, words)
    gradient = FP32 * shape.hidden * answers
    if cuda:
        return size * tile, size * tile + gradient
    return (size + 3 * FP32 + 1) * tile, (size + 7 * FP32 + 1) * tile + gradient
