"""The layers that are stored in 4 bits, and how many bytes the weights take, predicted and measured."""

from collections.abc import Sequence

import bitsandbytes as bnb
import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module


def linear_layers(model: PreTrainedModel | PeftModel) -> dict[str, torch.nn.Module]:
    """Every linear layer but the LM head, by name and in order: what becomes NF4, and what "all-linear" adapts.

    GPT-2's `Conv1D` is one, with its weight transposed. A mixture of experts holds its experts in plain tensors.
    """
    head = model.get_output_embeddings()
    linear = (torch.nn.Linear, Conv1D)
    return {name: m for name, m in model.named_modules() if isinstance(m, linear) and m is not head}


def weight_bytes(model: PreTrainedModel | PeftModel) -> dict[str, int]:
    """Bytes the weights take, measured tensor by tensor: 4-bit data, its scales, and everything else.

    Tied tensors (input embedding and LM head) are counted once.
    """
    measured = {"4-bit weights": 0, "4-bit scales": 0, "other weights": 0}
    for parameter in model.parameters():  # parameters() already yields tied tensors once
        if isinstance(parameter, bnb.nn.Params4bit):
            measured["4-bit weights"] += parameter.numel() * parameter.element_size()
            state = parameter.quant_state
            parts = [state.absmax, state.state2.absmax, state.state2.code] if state.nested else [state.absmax]
            measured["4-bit scales"] += sum(t.numel() * t.element_size() for t in parts)
        else:
            measured["other weights"] += parameter.numel() * parameter.element_size()
    return measured


def becomes_nf4(name: str, keep: Sequence[str] = ()) -> bool:
    """Whether transformers quantizes the linear layer of that name: not the LM head, nor what `keep_16bit` names."""
    return should_convert_module(name, [*keep, "lm_head"])


def linear_weights(model: PreTrainedModel | PeftModel, keep: Sequence[str] = ()) -> tuple[int, int]:
    """(weights that NF4 quantizes; all other weights), of a 16- or 32-bit model; `keep` as `config.keep_16bit`."""
    inside = sum(m.weight.numel() for n, m in linear_layers(model).items() if becomes_nf4(n, keep))
    return inside, sum(p.numel() for p in model.parameters()) - inside


def nf4_bits_per_weight(block: int = 64) -> float:
    """Storage of one NF4 weight in bits: 4, plus an 8-bit scale per block, plus a 32-bit scale per 256 of those.

    QLoRA (Dettmers et al. 2023), section 3, "Double Quantization": 4 + 8/64 + 32/(64·256) = 4.127.
    """
    return 4 + 8 / block + 32 / (block * 256)
