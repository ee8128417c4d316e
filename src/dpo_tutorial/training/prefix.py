"""Compute the tokens that a pair's two sequences have in common once, not twice.

Chosen and rejected begin with the same prompt, and under a causal mask what becomes of a token depends only on those
before it. So the prompt may be computed once with both answers behind it, as long as neither answer sees the other
(Wang and Hegde 2024, "Accelerating Direct Preference Optimization with Prefix Sharing", arXiv 2410.20305).
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import first_line


@dataclass(frozen=True)
class Packed:
    """One row per pair: what both share, the rest of the chosen sequence, the rest of the rejected one, padding.

    Shapes: `input_ids`, `position_ids` `[pairs, packed]`; `attention_mask` `[pairs, 1, packed, packed]`, true where a
    token (row) sees another (column); `columns` `[2 x pairs, length]`, where in its packed row each token now lies.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    columns: Tensor


def pack(input_ids: Tensor, attention_mask: Tensor) -> Packed:
    """Pack a batch as TRL collates it: chosen sequences, then rejected ones, `[2 x pairs, length]`, padded right."""
    pairs, length = input_ids.shape[0] // 2, input_ids.shape[1]
    column = torch.arange(length, device=input_ids.device)
    tokens = attention_mask.sum(1).view(2, pairs, 1)
    same = (input_ids[:pairs] == input_ids[pairs:]) & (column < tokens.amin(0))
    shared = same.long().cumprod(1).sum(1, keepdim=True)  # up to the first token that differs
    own = tokens - shared  # behind it
    total = shared + own.sum(0)

    place = torch.arange(int(total.max()), device=input_ids.device).expand(pairs, -1)
    rejected = place >= tokens[0]
    position = torch.where(rejected, place - own[0], place).clamp(max=length - 1)  # as in its own sequence
    row = torch.arange(pairs, device=input_ids.device)[:, None] + pairs * rejected
    part = torch.where(place < shared, 0, 1 + rejected.long())  # 0 shared, 1 chosen, 2 rejected
    sees = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
    sees &= (place[:, None, :] <= place[:, :, None]) & (place < total)[:, None, :]
    sees |= torch.eye(place.shape[1], dtype=torch.bool, device=input_ids.device)  # padding sees itself, not nothing

    columns = torch.cat([column.expand(pairs, -1), column + own[0] * (column >= shared)])
    return Packed(input_ids[row, position], position, sees[:, None], columns.clamp(max=place.shape[1] - 1))


@contextmanager
def sharing(causal: PreTrainedModel, length: int) -> Iterator[None]:
    """Inside the block, the decoder computes the common start of each pair of a collated batch once.

    Nothing changes where sequences are of more tokens (`length`) than each of its layers sees (`window`).
    TRL hands the decoder a batch and reads hidden states where it put the tokens. In between the batch is packed and
    the states are put back, so loss and gradient are those of the plain pass up to rounding (`test_prefix.py`).
    """
    if length > window(causal.config):
        yield
        return
    decoder = causal.base_model
    before = vars(decoder).get("forward")
    decoder.forward = functools.partial(forward, decoder)
    try:
        yield
    finally:
        del decoder.forward  # the class's own comes back
        if before:
            decoder.forward = before


def forward(decoder: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, position_ids: None = None, **kwargs):
    """The decoder's own forward pass over a collated batch, packed on the way in and unpacked on the way out.

    Positions are made here; a causal model hands its decoder `position_ids=None`.
    """
    return _forward_packed(decoder, pack(input_ids, attention_mask), **kwargs)


def _forward_packed(decoder: PreTrainedModel, packed: Packed, **kwargs):
    inputs = dict(input_ids=packed.input_ids, attention_mask=packed.attention_mask, position_ids=packed.position_ids)
    outputs = type(decoder).forward(decoder, **inputs, **kwargs)
    rows = torch.arange(len(packed.input_ids), device=packed.columns.device).repeat(2)[:, None]
    outputs.last_hidden_state = outputs.last_hidden_state[rows, packed.columns]
    return outputs


def obstacle(causal: PreTrainedModel) -> str:
    """Why a model computes prompts once per answer, by what it is; empty where it may share them.

    Looked at first: its config. Then four short passes ask whether its layers keep to a mask of ours and take positions
    of ours. Masked columns weigh exactly 0, so what must not be seen must not change a bit, however small the weights.
    """
    config = causal.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if config._attn_implementation != "sdpa":
        return f"attention is {config._attn_implementation}, not torch's"
    if has_experts(config):
        return "a mixture of experts: what its router counts is the batch as TRL collates it"
    if kinds:
        return f"layers of another kind: {', '.join(sorted(kinds))}"
    if getattr(config, "alibi", False) or "position_ids" not in signature(type(causal.base_model).forward).parameters:
        return "positions cannot be given"
    return _disobeys(causal)


def has_experts(config) -> bool:
    """Whether a model's config is of a mixture of experts."""
    return any("expert" in key and value for key, value in config.to_dict().items())


def window(config) -> float:
    """The longest sequence, in tokens, of which every layer sees all; infinite where no layer has a window."""
    config = config.get_text_config()
    names = ("sliding_window", "window_size", "attention_window", "attention_chunk_size")
    return min((size for name in names if isinstance(size := getattr(config, name, None), int)), default=math.inf)


@torch.no_grad()
def _disobeys(causal: PreTrainedModel) -> str:
    decoder, training = causal.base_model, causal.training
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [5, 6, 7, 11, 12, 13]], device=causal.device)
    other = ids.clone()
    other[0, 3:] += 6  # another chosen answer

    def states(ids, **changes):
        packed = dataclasses.replace(pack(ids, torch.ones_like(ids)), **changes)
        return _forward_packed(decoder, packed, use_cache=False).last_hidden_state.float()

    causal.eval()
    try:
        apart, changed = (decoder(input_ids=i, use_cache=False).last_hidden_state.float() for i in (ids, other))
        together = states(ids)
        if not torch.equal(apart[0, :3], changed[0, :3]):
            return "a token sees those behind it"
        if not torch.equal(together[1], states(other)[1]):
            return "an answer sees the other one: not all that mixes tokens is attention"
        if torch.equal(together[1], states(ids, position_ids=torch.arange(9, device=ids.device)[None])[1]):
            return "positions of ours change nothing"
        limit = 1e-3 if causal.dtype == torch.float32 else 0.05  # rounding stays below
        if not (together - apart).norm() <= limit * apart.norm():  # also where it is no number
            return "hidden states are not those of the plain pass"
        return ""
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        return f"no mask or positions of ours: {first_line(error)}"
    finally:
        causal.train(training)
