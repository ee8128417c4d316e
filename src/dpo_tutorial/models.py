"""Base model, tokenizer, 4-bit loading and LoRA: where weights come from and what they weigh."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from . import config as configs
from . import embedded, environment
from .config import Config
from .errors import ArtifactError, ConfigError, ModelFetchError, ModelUnsuitableError


@dataclass(frozen=True)
class Source:
    """Where weights are read from: a folder or a hub id, and the pinned commit of the latter."""

    path: str
    revision: str | None
    name: str  # what an adapter's record calls its base: never a path of this machine

    def kwargs(self) -> dict:
        return dict(revision=self.revision, trust_remote_code=False)


def source(config: Config) -> Source:
    """Resolve `config.model`: the embedded wheel, a local folder, or a hub id."""
    if config.model == configs.EMBEDDED:
        return Source(str(embedded.ensure_embedded_model()), None, f"{embedded.NAME} ({embedded.REQUIREMENT})")
    folder = Path(config.model).expanduser()
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise ModelFetchError(
                f"MODEL={config.model} is a folder without config.json.",
                "Point MODEL at a checkpoint in transformers' format, or at a hub id.",
            )
        return Source(str(folder), None, folder.name)
    return Source(config.model, config.model_revision, config.model)


@contextmanager
def _fetch_errors(config: Config) -> Iterator[None]:
    """Turn the loader's many exceptions into one sentence with a mend."""
    try:
        yield
    except (OSError, ConnectionError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelFetchError(
            f"MODEL={config.model} could not be loaded: {first}",
            "Check the name, the network and, for a gated model, `huggingface-cli login`. "
            "Without a hub, PROFILE=cpu uses the embedded model.",
        ) from error


def load_tokenizer(config: Config):
    """Load the tokenizer and check what DPO needs of it.

    Raises:
        ModelFetchError: not found or no network.
        ModelUnsuitableError: no chat template, or no end-of-sequence token.
    """
    where = source(config)
    with _fetch_errors(config):
        tokenizer = AutoTokenizer.from_pretrained(where.path, **where.kwargs())
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


def load_config(config: Config):
    """The model's config.json as transformers reads it: the architecture without its weights.

    Raises:
        ModelFetchError: not found or no network.
    """
    where = source(config)
    with _fetch_errors(config):
        return AutoConfig.from_pretrained(where.path, **where.kwargs())


def quantization_config(config: Config) -> BitsAndBytesConfig:
    """NF4 with double quantization (Dettmers et al. 2023, QLoRA); matmuls run in `config.dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=environment.torch_dtype(config.dtype),
    )


def load_base(config: Config, quantize: bool = True, dtype: str | None = None):
    """Load the base model, ready for training: KV cache off, one device.

    Args:
        quantize: store the linear layers in 4-bit NF4; `False` keeps them in `dtype`.
        dtype: "bf16", "fp16" or "fp32" for everything that is not quantized; default `config.dtype`.

    Raises:
        ModelFetchError: not found, no access, or no network.
    """
    where = source(config)
    if environment.device() == "cpu":
        environment.tune_allocator()
    with _fetch_errors(config):
        model = AutoModelForCausalLM.from_pretrained(
            where.path,
            dtype=environment.torch_dtype(dtype or config.dtype),
            quantization_config=quantization_config(config) if quantize else None,
            device_map={"": int(os.environ.get("LOCAL_RANK", 0))} if environment.device() == "cuda" else None,
            **where.kwargs(),
        )
    if environment.device() == "cpu":
        environment.release_free_memory()  # converting leaves up to half a gigabyte, in pieces too small for training
    model.config.use_cache = False  # the cache serves generation; in training it only costs memory
    if quantize:
        keep_gradients(model)
    return model


def keep_gradients(model) -> None:
    """Keep bitsandbytes from swapping 4-bit weights into its inference-only CPU layout.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit layer at its first forward in eval mode (an
    evaluation, a generation) for a kernel that has no backward pass. Every later training step then gets no
    gradient through that layer, and nothing fails. `test_models.py` shows it.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def lora_config(config: Config) -> LoraConfig:
    """LoRA (Hu et al. 2021) on every linear layer of the blocks, as in QLoRA."""
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets),
        task_type="CAUSAL_LM",
    )


def check_lora_targets(model, config: Config) -> None:
    """Fail early, and with names, where `lora_targets` do not exist in this architecture."""
    linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    missing = sorted(set(config.lora_targets) - linear)
    if missing:
        raise ConfigError(
            f"LORA_TARGETS names layers that {config.model} does not have: {', '.join(missing)}.",
            f"Its linear layers are: {', '.join(sorted(linear))}.",
        )


def load_policy(config: Config, adapter: str | Path):
    """Reload the base from scratch and attach a trained adapter to it, for inference.

    Raises:
        ArtifactError: no adapter there, or it was trained on another base (a wrong base gives fluent nonsense).
    """
    folder = Path(adapter)
    if not (folder / "adapter_model.safetensors").is_file():
        raise ArtifactError(f"There is no adapter in {folder}.", "Run 05_train_dpo first, or set ADAPTER to a folder.")
    trained, here = LoraConfig.from_pretrained(str(folder)), source(config)
    if (trained.base_model_name_or_path, trained.revision) != (here.name, here.revision):
        raise ArtifactError(
            f"The adapter in {folder} was trained on {trained.base_model_name_or_path} (revision {trained.revision}), "
            f"not on {here.name} (revision {here.revision}).",
            "Load it with the base it was trained on: set MODEL=name@revision accordingly.",
        )
    return PeftModel.from_pretrained(load_base(config), str(folder)).eval()


def give_adapter(model, adapter: str | Path) -> None:
    """Put the weights of a saved adapter into the adapter that `model` already carries, of the same shape."""
    given = set_peft_model_state_dict(model, load_file(Path(adapter) / "adapter_model.safetensors"))
    assert not given.unexpected_keys, given.unexpected_keys


def weight_bytes(model) -> dict[str, int]:
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


def linear_weights(model) -> tuple[int, int]:
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


def trainable_share(model) -> tuple[int, int]:
    """(trainable parameters, all parameters); a 4-bit weight is one parameter although it fills half a byte."""
    trainable = total = 0
    for parameter in model.parameters():
        n = parameter.numel() * 2 if isinstance(parameter, bnb.nn.Params4bit) else parameter.numel()
        total += n
        trainable += n if parameter.requires_grad else 0
    return trainable, total
