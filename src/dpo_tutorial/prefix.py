"""Compute the tokens that a pair's two sequences have in common once, not twice.

Chosen and rejected begin with the same prompt, and under a causal mask what becomes of a token depends only on those
before it. So the prompt may be computed once with both answers behind it, as long as neither answer sees the other
(Wang and Hegde 2024, "Accelerating Direct Preference Optimization with Prefix Sharing", arXiv 2410.20305).
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass

import torch
from torch import Tensor


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


def share_prefixes(model, max_tokens: int) -> bool:
    """Have `DPOTrainer` compute the common start of each pair once; call it after the trainer is built.

    TRL hands the decoder a batch and reads hidden states where it put the tokens. In between the batch is packed and
    the states are put back, so loss and gradient are those of the plain pass up to rounding (`test_prefix.py`).
    Generation and every other forward pass stay plain.

    Args:
        model: the trainer's `PeftModel`.
        max_tokens: of the longest sequence; a model with a shorter attention window is left alone.

    Returns:
        Whether it is on: not where attention has another implementation than torch's, or does not obey the mask.
    """
    causal = model.get_base_model()
    window = getattr(causal.config, "sliding_window", None)
    if causal.config._attn_implementation != "sdpa" or (window and window < max_tokens) or not _obeys(causal):
        return False
    plain = causal.forward

    @functools.wraps(type(causal).forward)  # `generate` reads the signature
    def scored(self, *args, fused_lm_head=False, **kwargs):
        if not fused_lm_head:
            return plain(*args, **kwargs)
        decoder = self.base_model
        decoder.forward = functools.partial(forward, decoder)
        try:
            return plain(*args, fused_lm_head=True, **kwargs)
        finally:
            del decoder.forward  # the class's own comes back

    causal.forward = types.MethodType(scored, causal)
    return True


def forward(decoder, input_ids: Tensor, attention_mask: Tensor, **kwargs):
    """The decoder's own forward pass over a collated batch, packed on the way in and unpacked on the way out."""
    return _forward_packed(decoder, pack(input_ids, attention_mask), **kwargs)


def _forward_packed(decoder, packed: Packed, **kwargs):
    inputs = dict(input_ids=packed.input_ids, attention_mask=packed.attention_mask, position_ids=packed.position_ids)
    outputs = type(decoder).forward(decoder, **inputs, **kwargs)
    rows = torch.arange(len(packed.input_ids), device=packed.columns.device).repeat(2)[:, None]
    outputs.last_hidden_state = outputs.last_hidden_state[rows, packed.columns]
    return outputs


@torch.no_grad()
def _obeys(causal) -> bool:
    """Whether two short sequences come out packed as they do one by one: some architectures ignore such a mask."""
    decoder, training = causal.base_model, causal.training
    causal.eval()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [5, 6, 7, 11, 12, 13]], device=causal.device)
    packed = pack(ids, torch.ones_like(ids))
    try:
        apart = decoder(input_ids=ids, use_cache=False).last_hidden_state.float()
        together = _forward_packed(decoder, packed, use_cache=False).last_hidden_state.float()
    except (TypeError, ValueError, RuntimeError):  # as models do that want no such mask, or no positions
        return False
    finally:
        causal.train(training)
    return bool(
        (together - apart).norm() < 0.05 * apart.norm()
    )  # rounding in 16 bits stays below, a wrong mask far above
