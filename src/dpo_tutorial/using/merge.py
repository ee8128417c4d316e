"""The adapter added into its base: one model that any library loads."""

from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapter import lora
from ..config import other_data, resolve
from ..knobs import Config
from ..loading import models
from ..machine import hardware
from ..training import save as saving


def config_of(adapter: str | Path, parameters: dict[str, str], dtype: str = "", prompts: str = "") -> Config:
    """The settings that an adapter was trained with, out of its record; knobs set now come first.

    `dtype` is the compute type where these do not set one; "" for the machine's. `prompts` is other data: hub id,
    folder or file.

    Raises:
        ConfigError: as `config.other_data`.
        ArtifactError: as `lora.check_adapter`.
    """
    recorded = saving.recorded(Path(adapter)) | ({"dtype": dtype} if dtype else {})
    if prompts:
        recorded, parameters = other_data(recorded, prompts, "--prompts", parameters)
    config = resolve(recorded, **parameters)
    lora.check_adapter(config, adapter)
    return config


def merged(config: Config, adapter: str | Path, into: str = "4bit", store: str = "fp16") -> PreTrainedModel:
    """Base plus update, W + (alpha / r)·BA, in one model without adapter.

    The sum is made in `config.dtype` and rounded once to `store`. In float32, then: weights that are bfloat16 numbers
    before the sum are mostly the same numbers after it, because an update is smaller than their spacing.

    Args:
        into: "4bit" adds to the 4-bit weights, dequantized, which are those the adapter was trained on; "16bit" to the
            weights of the checkpoint, which differ from them by the error of NF4.
        store: "fp16", "bf16" or "fp32".

    Raises:
        ArtifactError: as `lora.check_adapter`.
    """
    lora.check_adapter(config, adapter)
    base = models.load_base(config, quantize=into == "4bit")
    if into == "4bit":
        base = base.dequantize()
    model = PeftModel.from_pretrained(base, str(adapter), torch_device=hardware.device()).merge_and_unload()
    model.config.use_cache = True  # off while training
    return model.to(hardware.torch_dtype(store)).eval()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the merged model with its tokenizer; generation ends at the tokenizer's EOS."""
    how = model.generation_config
    how.eos_token_id = tokenizer.eos_token_id
    if not how.do_sample:  # greedy: transformers does not save what sampling alone reads, as some checkpoints have it
        how.temperature = how.top_p = how.top_k = how.min_p = how.typical_p = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
