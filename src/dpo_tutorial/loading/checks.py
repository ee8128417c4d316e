"""What a checkpoint is, and why it cannot be trained here: by names, config and headers, before weights are read."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bitsandbytes as bnb
import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ConfigError, ModelCorruptError, ModelFetchError, ModelUnsuitableError, first_line
from ..knobs import Config
from . import hub

_WHOLE = "Take a whole checkpoint: fetch it again with `hf download`, or in a git clone run `git lfs pull`."
_PLAIN = "Take the 16-bit checkpoint it was made from, in .safetensors: it becomes NF4 when it is loaded."


def check_folder(model: str, folder: Path) -> None:
    """Refuse a local path that is no whole checkpoint in transformers' format.

    Raises:
        ModelUnsuitableError: an adapter, or a GGUF file.
        ModelFetchError: a folder of something else.
        ModelCorruptError: a shard is missing, or a Git LFS pointer stands in for a file.
    """
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = _json(adapter).get("base_model_name_or_path")
        raise ModelUnsuitableError(
            f"MODEL={model} is the folder of an adapter, trained on {base}.",
            "Set MODEL to that base. To go on training the adapter, set START_FROM to its folder; notebook 06 takes it "
            "as ADAPTER.",
        )
    if not (folder / "config.json").is_file():
        if folder.suffix == ".gguf" or any(folder.glob("*.gguf")):
            raise ModelUnsuitableError(f"MODEL={model} is a GGUF file, the format of llama.cpp.", _PLAIN)
        raise ModelFetchError(
            f"MODEL={model} is a {'folder without config.json' if folder.is_dir() else 'file, not a folder'}.",
            "Point MODEL at a checkpoint in transformers' format, or at a hub id.",
        )
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        with path.open("rb") as stream:
            if stream.read(24).startswith(b"version https://git-lfs"):
                raise ModelCorruptError(f"{path.name} of MODEL={model} is a Git LFS pointer, not the file.", _WHOLE)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(_json(index).get("weight_map", {}).values()))
        if missing := [name for name in shards if not (folder / name).is_file()]:
            raise ModelCorruptError(
                f"MODEL={model} lacks {len(missing)} of its {len(shards)} files of weights: {', '.join(missing[:3])}.",
                _WHOLE,
            )


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def check_config(model: str, found: PretrainedConfig, path: str) -> None:
    """Refuse weights that are quantized already, unless in NF4, and layers that cannot compute with packed ones.

    `path` is where the config was found: a folder, or a hub id.

    Raises:
        ModelUnsuitableError: quantized in another way, or not as it claims; or a Mamba.
    """
    if found.model_type in ("mamba", "falcon_mamba", "jamba"):
        raise ModelUnsuitableError(
            f"MODEL={model} is a {found.model_type}, whose scan reads weights that in 4 bits are no matrices.",
            "Take a transformer; docs/models.md has a table of families.",
        )
    claim = getattr(found, "quantization_config", None)
    if not claim:
        return
    claim = claim if isinstance(claim, dict) else claim.to_dict()
    if not claim.get("load_in_4bit") or claim.get("bnb_4bit_quant_type") != "nf4":
        bits = "4 bits (FP4)" if claim.get("load_in_4bit") else "8 bits"
        method = claim.get("quant_method", "bitsandbytes")
        how = f"{method} in {bits}" if method == "bitsandbytes" else method
        raise ModelUnsuitableError(f"MODEL={model} is quantized already, by {how}.", _PLAIN)
    if Path(path).is_dir() and not _holds(Path(path), "bitsandbytes__nf4"):
        raise ModelUnsuitableError(
            f"The config.json of MODEL={model} says NF4 by bitsandbytes, but its weights are not.",
            "Delete quantization_config from its config.json, or take another checkpoint.",
        )


def _holds(folder: Path, part: str) -> bool:
    """Whether a tensor's name contains this, by the headers of the files."""
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as header:
                if any(part in name for name in header.keys()):  # noqa: SIM118 - it is no dict
                    return True
    except SafetensorError:
        return True  # torn: loading it says so
    return False


def check_tokens(config: Config, tokenizer: PreTrainedTokenizerBase, found: PretrainedConfig) -> None:
    """Refuse pairs longer than the model has positions, and a tokenizer that gives ids beyond the embedding.

    Special tokens that no template writes do not count: Gemma 3 has one for images in a model that takes none.

    Raises:
        ConfigError: `MAX_TOKENS` is more than the model has positions.
        ModelUnsuitableError: names a token beyond.
    """
    positions = getattr(found.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and config.max_tokens > positions > 0:
        raise ConfigError(
            f"MAX_TOKENS={config.max_tokens} is more than the {positions} positions of MODEL={config.model}.",
            f"Set MAX_TOKENS to {positions} or less.",
        )
    rows = getattr(found.get_text_config(), "vocab_size", None) or len(tokenizer)
    if len(tokenizer) <= rows:
        return
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    used = {tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token}
    idle = {token for token in special - used if token not in str(tokenizer.chat_template)}
    beyond = [token for token, number in tokenizer.get_vocab().items() if number >= rows and token not in idle]
    if beyond:
        raise ModelUnsuitableError(
            f"The tokenizer of {config.model} has {len(tokenizer):,} tokens, the model {rows:,}: {beyond[0]!r} is "
            "beyond.",
            "Take the tokenizer that the model was trained with, or a model whose embedding was enlarged for it.",
        )


def check_head(model: str, loaded: PreTrainedModel) -> None:
    """Refuse a model whose LM head was packed into 4 bits: a few families call it otherwise than `lm_head`.

    Raises:
        ModelUnsuitableError: with the name for `KEEP_16BIT`.
    """
    head = loaded.get_output_embeddings()
    if isinstance(head, bnb.nn.Linear4bit):
        name = next(name for name, module in loaded.named_modules() if module is head)
        raise ModelUnsuitableError(
            f"The LM head of MODEL={model} is called {name}, so transformers would pack it into 4 bits too.",
            f"Keep it in 16 bits: KEEP_16BIT={name}, with a comma between several names.",
        )


@contextmanager
def load_errors(config: Config) -> Iterator[None]:
    """Turn the loader's many exceptions into one sentence with a fix."""
    try:
        yield
    except OSError as error:
        if re.search(r"file named model\.safetensors", str(error)):  # transformers would advise to read the pickle
            raise ModelUnsuitableError(
                f"MODEL={config.model} has no weights in safetensors format.",
                "Take a checkpoint with .safetensors files; a .bin file is a pickle, which can run code.",
            ) from error
        if Path(config.model).expanduser().exists():
            raise ModelFetchError(
                f"MODEL={config.model} could not be loaded: {first_line(error)}",
                "Take a whole checkpoint in transformers' format.",
            ) from error
        cause, fix = hub.why(error)
        raise ModelFetchError(
            f"MODEL={config.model} could not be loaded: {cause}.",
            f"{fix} Without a hub, PROFILE=cpu uses the embedded model.",
        ) from error
    except torch.OutOfMemoryError as error:
        raise ModelUnsuitableError(
            f"MODEL={config.model} does not fit into the memory of this GPU.", "Take a smaller MODEL or PROFILE."
        ) from error
    except (ValueError, KeyError, RuntimeError, AttributeError, ImportError, SafetensorError) as error:
        raise ModelUnsuitableError(
            f"MODEL={config.model} could not be loaded: {first_line(error)}",
            "Take a whole checkpoint of a causal language model, with its tokenizer, that the installed transformers "
            "knows by itself: code that comes with a checkpoint is never run.",
        ) from error
