"""Which weights these are: a digest that is the same wherever a checkpoint lies, and another one for another model."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import ModelCorruptError

#: What a config.json holds beside the model: where it came from, and defaults that tokenizer and generation bring.
_NOT_THE_MODEL = (
    "_name_or_path", "transformers_version", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def of_folder(folder: str | Path) -> str:
    """SHA-256 of a checkpoint's config.json and of a sample of each tensor in its safetensors files.

    Of the files: compute type, 4-bit storage and the versions of libraries change what is in memory.

    Raises:
        ModelCorruptError: a file is cut short, or not what its name says.
    """
    try:
        digest = hashlib.sha256(of_config(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))))
        sampled = {}
        for path in sorted(Path(folder).glob("model*.safetensors")):
            with safe_open(path, framework="pt") as weights:
                sampled |= {name: sample(weights.get_tensor(name)) for name in weights.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelCorruptError(
            f"The checkpoint in {folder} could not be read: {error}.", "Copy or fetch the whole folder again."
        ) from error
    for name in sorted(sampled):
        digest.update(name.encode() + sampled[name])
    return digest.hexdigest()


def of_config(config: dict) -> bytes:
    """The config of a model as bytes, less what does not change the model."""
    kept = {name: value for name, value in config.items() if name not in _NOT_THE_MODEL}
    return json.dumps(kept, sort_keys=True, default=str).encode()


def sample(weight: torch.Tensor) -> bytes:
    """64 values or more of a tensor, with type and shape: they tell two models apart without reading all."""
    flat = weight.detach().flatten()
    values = flat[:: max(1, flat.numel() // 64)].contiguous().cpu().view(torch.uint8)
    return f"{weight.dtype} {list(weight.shape)} ".encode() + values.numpy().tobytes()
