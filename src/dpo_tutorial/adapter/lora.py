"""LoRA adapters: their configuration, the layers they sit on, and loading a trained one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import peft.tuners.lora.torchao
import peft.utils.quantization_utils
import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from .. import knobs, run_folder
from ..errors import ArtifactError, ConfigError, ModelUnsuitableError, first_line
from ..knobs import Config
from ..loading import models, sizes
from ..machine import hardware

#: Kinds of model in which PEFT refuses an adapter on `out_proj`: Mamba's kernels read its weights alone.
_MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
#: In a mixture of experts PEFT takes these for the experts, which are one tensor here and stay frozen.
_OF_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


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


def lora_config(config: Config, model: PreTrainedModel | None = None) -> LoraConfig:
    """LoRA (Hu et al. 2021) on `config.lora_targets`; the default is every linear layer but the LM head.

    `model` is the base that the adapter is for; without one, PEFT is left to find "all-linear".
    """
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=target_modules(config, model),
        task_type="CAUSAL_LM",
    )


def target_modules(config: Config, model: PreTrainedModel | None = None) -> str | list[str]:
    """`config.lora_targets` as PEFT takes them; of "all-linear" the names that `model` has."""
    if config.lora_targets != (knobs.ALL_LINEAR,):
        return list(config.lora_targets)
    return list(dict.fromkeys(map(_last, target_layers(model, config)))) if model else knobs.ALL_LINEAR


def target_layers(model: PreTrainedModel, config: Config) -> dict[str, torch.nn.Module]:
    """The layers of a plain base that get an adapter, by full name and in order: those that PEFT chooses."""
    every, barred = config.lora_targets == (knobs.ALL_LINEAR,), _barred(model)
    return {
        name: layer
        for name, layer in sizes.linear_layers(model).items()
        if (_last(name) not in barred if every else _is_one_of(name, config.lora_targets))
    }


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _is_one_of(name: str, wanted: Sequence[str]) -> bool:
    return f".{name}".endswith(tuple(f".{ending}" for ending in wanted))


def _barred(model: PreTrainedModel | PeftModel) -> tuple[str, ...]:
    """Names of layers that cannot carry an adapter of their own in this kind of model."""
    experts = any("experts" in name and p.dim() == 3 for name, p in model.named_parameters())
    return _OF_EXPERTS if experts else ("out_proj",) if model.config.model_type in _MAMBA else ()


def check_lora_targets(model: PreTrainedModel | PeftModel, config: Config) -> None:
    """Fail early, and with names, where `lora_targets` cannot carry an adapter, or carry one already.

    The model may be without its weights (`models.load_empty`).

    Raises:
        ModelUnsuitableError: an adapter is there, as when the cell that attaches one is run twice.
        ConfigError: no such layers in this architecture, its LM head, or layers that must stay as they are.
    """
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ModelUnsuitableError(
            "This model already carries an adapter, and a second one would be stacked on it.",
            "Give it the plain base: models.load_base(cfg) again, or policy.unload().",
        )
    if config.lora_targets == (knobs.ALL_LINEAR,):
        return
    linear, barred = sizes.linear_layers(model), _barred(model)
    names = sorted({_last(name) for name in linear} - set(barred))
    head = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    for target in config.lora_targets:
        if any(_is_one_of(name, [target]) for name in head):
            wrong = f"{target}, the LM head of {config.model}, whose weights the loss reads alone"
        elif not any(_is_one_of(name, [target]) for name in linear):
            wrong = f"layers that {config.model} does not have: {target}"
        elif _last(target) in barred:
            wrong = f"{target}, which in {config.model} cannot carry an adapter ({model.config.model_type})"
        else:
            continue
        raise ConfigError(f"LORA_TARGETS names {wrong}.", f"Set it to all-linear, or to some of {','.join(names)}.")


def check_adapter(config: Config, adapter: str | Path) -> None:
    """Refuse a folder that holds no readable adapter, or one of another base: on that it gives fluent nonsense.

    A base from the hub is known by name and commit, one in a local folder by what it holds, wherever it lies.

    Raises:
        ArtifactError: no adapter there, a damaged one, or one trained on another base, or with others of its layers in
            4 bits.
    """
    folder = Path(adapter)
    if not (folder / "adapter_model.safetensors").is_file():
        raise ArtifactError(f"There is no adapter in {folder}.", "Run 05_train_dpo first, or set ADAPTER to a folder.")
    with _adapter_errors(folder):
        trained = LoraConfig.from_pretrained(str(folder))
        load_file(folder / "adapter_model.safetensors")
        base, kept = {"name": trained.base_model_name_or_path, "revision": trained.revision}, config.keep_16bit
        if (folder / "training.json").is_file():
            record = dict(run_folder.read_json(folder / "training.json"))
            base, kept = base | record["base"], tuple(record["config"].get("keep_16bit", kept))
    where = models.source(config, fetch=False)
    here = {"name": where.name, "revision": where.revision, "digest": "digest" in base and where.digest}
    if "digest" not in base and base["revision"] is None:  # of another tool, which noted no commit
        here["revision"] = None
    if len({known.get("digest") or (known["name"], known["revision"]) for known in (base, here)}) > 1:
        raise ArtifactError(
            f"The adapter in {folder} was trained on {_said(base)}, not on {_said(here)}.",
            "Set MODEL to the base it was trained on: name@revision, or the folder with the same config and weights.",
        )
    said, now = (",".join(sorted(names)) or "none" for names in (kept, config.keep_16bit))
    if said != now:
        raise ArtifactError(
            f"The adapter in {folder} was trained on a base with KEEP_16BIT={said}; here it is {now}.",
            f"Set KEEP_16BIT={said}: with other layers in 4 bits it is another model.",
        )


def _said(base: dict) -> str:
    version = f"digest {base['digest'][:12]}…" if base.get("digest") else f"revision {base['revision']}"
    return f"{base['name']} ({version})"


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
        ArtifactError, ConfigError: as `check_start`.
    """
    adapter = check_start(config, adapter)
    with _adapter_errors(adapter):
        policy = PeftModel.from_pretrained(base, str(adapter), is_trainable=True, torch_device=hardware.device())
    policy.peft_config["default"].base_model_name_or_path = base.name_or_path  # else a checkpoint asks the hub
    return policy


def check_start(config: Config, adapter: str | Path) -> Path:
    """The folder of an adapter to go on from, unless the run would replace it, or `config` describes another.

    Raises:
        ArtifactError: as `check_adapter`, or it is this run's own.
        ConfigError: its rank or its layers are not those of `config`.
    """
    folder = Path(adapter).expanduser()
    check_adapter(config, folder)
    if folder.resolve() == (config.run_dir / "adapter").resolve():
        raise ArtifactError(f"START_FROM={adapter} would be replaced by the run.", "Set ARTIFACTS to a new folder.")
    with _adapter_errors(folder):
        trained = LoraConfig.from_pretrained(str(folder))
        known = {"lora_r": trained.r, "lora_alpha": trained.lora_alpha}
        if (folder / "training.json").is_file():
            record = dict(run_folder.read_json(folder / "training.json"))["config"]
            known["lora_targets"] = record["lora_targets"]
    now = {name: getattr(config, name) for name in known}
    said, here = ({n: v if isinstance(v, int) else ",".join(v) for n, v in o.items()} for o in (known, now))
    if wrong := [f"{name.upper()}={value}" for name, value in said.items() if value != here[name]]:
        raise ConfigError(f"The adapter in {folder} was trained with other knobs.", f"Set {', '.join(wrong)}.")
    return folder


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
    except torch.OutOfMemoryError:
        raise
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
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
    return model.num_parameters(only_trainable=True), model.num_parameters()
