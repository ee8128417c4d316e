"""LoRA adapters: their configuration, the layers they sit on, and loading a trained one."""

from __future__ import annotations

from collections.abc import Iterator
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

from ..errors import ArtifactError, ConfigError, ModelUnsuitableError, first_line
from ..knobs import Config
from ..loading import models
from ..machine import hardware


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
        policy = PeftModel.from_pretrained(base, str(adapter), torch_device=hardware.device())
    attach_reference(policy, adapter)
    return policy.eval()


def go_on_from(config: Config, base: PreTrainedModel, adapter: str | Path) -> PeftModel:
    """The base with a saved adapter that learns on: SFT first and DPO then, or a further round of DPO.

    TRL keeps a frozen copy of it under the name `ref`, which is the reference of what follows.

    Raises:
        ArtifactError: as `check_adapter`.
    """
    check_adapter(config, adapter)
    with _adapter_errors(Path(adapter)):
        policy = PeftModel.from_pretrained(base, str(adapter), is_trainable=True, torch_device=hardware.device())
    policy.peft_config["default"].base_model_name_or_path = base.name_or_path  # else a checkpoint asks the hub
    return policy


def attach_reference(policy: PeftModel, adapter: str | Path) -> None:
    """Where the adapter in a folder went on from another, give the policy that one as its reference, `ref`."""
    folder = Path(adapter) / "ref"
    if (folder / "adapter_model.safetensors").is_file():
        with _adapter_errors(folder):
            policy.load_adapter(str(folder), "ref", torch_device=hardware.device())


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
