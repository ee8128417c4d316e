"""Compute the tokens that a pair's two sequences have in common once, not twice.

Chosen and rejected begin with the same prompt, and under a causal mask what becomes of a token depends only on those
before it. So the prompt may be computed once with both answers behind it, as long as neither answer sees the other
(Wang and Hegde 2024, "Accelerating Direct Preference Optimization with Prefix Sharing", arXiv 2410.20305).

Attention is the one place where tokens meet. There the two sequences of a pair are laid out apart, each behind its own
copy of the prompt, and both run under the plain causal mask: no mask is built, and the kernels that skip what lies
above the diagonal stay in use. Everything else (projections, feed-forward, norms) sees the prompt once.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

ATTENTION = "shared_prefix"  # the name under which transformers finds `attend`


@dataclass(frozen=True)
class Packed:
    """One row per pair: what both share, the rest of the chosen sequence, the rest of the rejected one, padding.

    Shapes: `input_ids`, `position_ids` `[pairs, packed]`; `columns` `[2 x pairs, length]`, where in its packed row each
    token of the batch now lies; `origins` `[pairs, packed]`, where in chosen and rejected sequence laid side by side,
    `[pairs, 2 x length]`, each packed token has its like.
    """

    input_ids: Tensor
    position_ids: Tensor
    columns: Tensor
    origins: Tensor


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
    columns = torch.cat([column.expand(pairs, -1), column + own[0] * (column >= shared)])
    return Packed(
        input_ids[row, position], position, columns.clamp(max=place.shape[1] - 1), position + length * rejected
    )


def attend(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, packed: Packed | None = None, **kwargs):
    """torch's attention; over packed rows, in each pair's two sequences apart.

    Args:
        query, key, value: `[pairs, heads, packed, width]`, as transformers hands them to an attention function.
        packed: how the rows are packed; None: they are plain sequences.

    Returns:
        (`[pairs, packed, heads, width]`, None): no attention weights.
    """
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    apart = (_rows(x, packed.columns) for x in (query, key, value))  # [2 x pairs, heads, length, width]
    out, _ = sdpa_attention_forward(module, *apart, None, **kwargs | {"is_causal": True})
    pairs = len(packed.input_ids)
    beside = torch.cat([out[:pairs], out[pairs:]], dim=1).transpose(1, 2)  # [pairs, heads, 2 x length, width]
    return _rows(beside, packed.origins).transpose(1, 2), None


def _rows(x: Tensor, columns: Tensor) -> Tensor:
    """`x[pair, :, column]` of `[pairs, heads, tokens, width]`, for every entry of `columns`, `[n x pairs, length]`."""
    pairs, heads, tokens, width = x.shape
    row = torch.arange(len(columns), device=x.device)[:, None] % pairs
    flat = x.transpose(1, 2).reshape(pairs * tokens, heads, width)
    taken = flat.index_select(0, (row * tokens + columns).flatten())  # its backward adds, without sorting first
    return taken.view(*columns.shape, heads, width).transpose(1, 2)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def share_prefixes(model, max_tokens: int) -> bool:
    """Have `DPOTrainer` compute the common start of each pair once; call it after the trainer is built.

    TRL hands the decoder a batch and reads hidden states where it put the tokens. In between the batch is packed and
    the states are put back, so loss and gradient are those of the plain pass up to rounding (`test_prefix.py`).
    Generation and every other forward pass stay plain.

    Args:
        model: the trainer's `PeftModel`.
        max_tokens: of the longest sequence; a model with a shorter attention window is left alone.

    Returns:
        Whether it is on: not where attention has another implementation than torch's, or hands nothing on to it.
    """
    causal = model.get_base_model()
    window = getattr(causal.config, "sliding_window", None)
    if causal.config._attn_implementation not in ("sdpa", ATTENTION) or (window and window < max_tokens):
        return False
    before = causal.config._attn_implementation
    causal.set_attn_implementation(ATTENTION)  # for good: checkpointing calls attention again in the backward pass
    if not _obeys(causal):
        causal.set_attn_implementation(before)
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
    assert decoder.config._attn_implementation == ATTENTION, "call share_prefixes first: plain attention mixes answers"
    unused = packed.input_ids.new_ones((1, 1, 1, 1), dtype=torch.bool)  # a mask in four dimensions is left as it is
    inputs = dict(input_ids=packed.input_ids, position_ids=packed.position_ids, attention_mask=unused, packed=packed)
    outputs = type(decoder).forward(decoder, **inputs, **kwargs)
    rows = torch.arange(len(packed.input_ids), device=packed.columns.device).repeat(2)[:, None]
    outputs.last_hidden_state = outputs.last_hidden_state[rows, packed.columns]
    return outputs


@torch.no_grad()
def _obeys(causal) -> bool:
    """Whether two short sequences come out packed as they do one by one: not every architecture hands `packed` on."""
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
    )  # rounding in 16 bits stays below, wrong attention far above
