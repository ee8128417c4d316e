"""LoRA adapters: their configuration, the layers they sit on, and loading a trained one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import bitsandbytes as bnb
import peft.tuners.lora.torchao
import peft.utils.quantization_utils
import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from .. import knobs
from ..errors import ArtifactError, ConfigError, ModelUnsuitableError, first_line
from ..knobs import Config
from ..loading import models, sizes
from ..machine import hardware

#: Kinds of model, and of their layers those, in which PEFT refuses an adapter: Mamba's kernels would pass it by.
MAMBA, MAMBA_BARRED = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"), ("out_proj",)


def pass_over_old_torchao() -> None:
    """Have PEFT go on where torchao is older than it admits, as on Colab; called when this module is imported.

    PEFT 0.21 asks for torchao at each layer without 4-bit weights, and refuses the model if an old one is installed.
    It would use it for torchao's own layers only, and there are none here.
    """
    try:
        peft.tuners.lora.torchao.is_torchao_available()
    except ImportError:
        for asks in (peft.tuners.lora.torchao, peft.utils.quantization_utils):
            asks.is_torchao_available = lambda: False


pass_over_old_torchao()


def lora_config(config: Config) -> LoraConfig:
    """LoRA (Hu et al. 2021) on `config.lora_targets`; the default is every linear layer but the LM head."""
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=target_modules(config),
        task_type="CAUSAL_LM",
    )


def target_modules(config: Config) -> str | list[str]:
    """`config.lora_targets` as PEFT takes them: names, or the one word "all-linear"."""
    names = list(config.lora_targets)
    return knobs.ALL_LINEAR if names == [knobs.ALL_LINEAR] else names


def target_layers(model: PreTrainedModel, config: Config) -> dict[str, torch.nn.Module]:
    """The layers of a plain base that get an adapter, by full name and in order: what PEFT chooses."""
    linear, wanted = sizes.linear_layers(model), target_modules(config)
    if wanted == knobs.ALL_LINEAR:
        return linear
    return {name: layer for name, layer in linear.items() if _is_one_of(name, wanted)}


def _is_one_of(name: str, wanted: Sequence[str]) -> bool:
    return f".{name}".endswith(tuple(f".{ending}" for ending in wanted))


def check_lora_targets(model: PreTrainedModel | PeftModel, config: Config) -> None:
    """Fail early, and with names, where `lora_targets` cannot carry an adapter, or carry one already.

    Args:
        model: with its weights or without (`models.load_empty`).

    Raises:
        ModelUnsuitableError: an adapter is there, as when the cell that attaches one is run twice.
        ConfigError: no such layers in this architecture, its LM head, or a layer whose weights its kernels read alone.
    """
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ModelUnsuitableError(
            "This model already carries an adapter, and a second one would be stacked on it.",
            "Give it the plain base: models.load_base(cfg) again, or policy.unload().",
        )
    linear, wanted = sizes.linear_layers(model), target_modules(config)
    barred = MAMBA_BARRED if model.config.model_type in MAMBA else ()
    names = sorted({name.rsplit(".", 1)[-1] for name in linear if not _is_one_of(name, barred)})
    fix = f"Set LORA_TARGETS to some of these: {','.join(names)}."
    head = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    if wanted != knobs.ALL_LINEAR:
        if named := [w for w in wanted if any(_is_one_of(name, [w]) for name in head)]:
            raise ConfigError(
                f"LORA_TARGETS names {named[0]}, the LM head of {config.model}: the loss reads its weights alone.", fix
            )
        if missing := sorted(w for w in wanted if not any(_is_one_of(name, [w]) for name in linear)):
            raise ConfigError(
                f"LORA_TARGETS names layers that {config.model} does not have: {', '.join(missing)}.", fix
            )
    if any(_is_one_of(name, barred) for name in target_layers(model, config)):
        raise ConfigError(
            f"LORA_TARGETS={','.join(config.lora_targets)} takes in out_proj of {config.model}, whose weights a kernel "
            "of Mamba reads alone.", fix,
        )  # fmt: skip


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
    here = models.source(config)
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
    base = models.load_base(config)
    with _adapter_errors(Path(adapter)):
        return PeftModel.from_pretrained(base, str(adapter), torch_device=hardware.device()).eval()


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


def trainable_share(model: PreTrainedModel | PeftModel) -> tuple[int, int]:
    """(trainable parameters, all parameters); a 4-bit weight is one parameter although it fills half a byte."""
    trainable = total = 0
    for parameter in model.parameters():
        n = parameter.numel() * 2 if isinstance(parameter, bnb.nn.Params4bit) else parameter.numel()
        total += n
        trainable += n if parameter.requires_grad else 0
    return trainable, total
