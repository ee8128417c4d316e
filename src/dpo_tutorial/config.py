"""How the knobs get their values: profile, environment, command line, papermill, a notebook's cell."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import knobs
from .errors import ConfigError
from .machine import hardware

_PREFIX = "DPO_TUTORIAL_"
#: Variables with this prefix that are no knobs; `loading.embedded`, `machine.paths` and `comparing.vote` read them.
_OTHER_VARIABLES = ("CACHE", "WHEEL", "HEADLESS")


def known_parameters() -> list[str]:
    """The names that may be set, in capitals: every field of `Config` but `reasons`."""
    return [f.name.upper() for f in dataclasses.fields(knobs.Config) if f.name != "reasons"]


def check_names(names: Iterable[str], hint: str = "", prefix: str = "") -> None:
    """Refuse names that are no knob; `hint` is added to the fix, `prefix` is what stood before each name.

    Raises:
        ConfigError: names them, and lists the known ones.
    """
    unknown = sorted(prefix + name for name in set(names) - set(known_parameters()))
    if unknown:
        fix = f"Known parameters: {', '.join(known_parameters())}.{hint}"
        raise ConfigError(f"Unknown parameter {', '.join(unknown)}.", fix)


def named(pairs: Iterable[Sequence[str]]) -> dict[str, str]:
    """The `-p NAME VALUE` pairs of a command line; of a name given twice the last value.

    Raises:
        ConfigError: a name that is no knob. Names are in capitals, as they are everywhere else.
    """
    given = {name: value for name, value in pairs}
    check_names(given)
    return given


def from_notebook(names: Mapping[str, object]) -> knobs.Config:
    """The config of a notebook: `cfg = config.from_notebook(globals())`, below the cell tagged `parameters`.

    Every knob among the names is taken, whether the tagged cell, another one or papermill set it, listed there or not.

    Raises:
        ConfigError: as `resolve`; also for a plain value under another name in capitals, or under a knob's name in
            small letters as long as no later cell can have made it.
    """
    known = known_parameters()
    first = not any(isinstance(value, knobs.Config) for value in names.values())  # else later cells may have run
    stray = [
        name
        for name, value in names.items()
        if name not in known and not name.startswith("_") and _could_set_a_knob(value)
        if name.isupper() or (first and name.upper() in known)
    ]
    check_names(stray, " In a notebook these, and only these, are written in capitals.")
    return resolve(**{name: names[name] for name in known if name in names})


def _could_set_a_knob(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(part, str) for part in value)
    return value is None or isinstance(value, (str, int, float))


def other_data(recorded: dict, source: str, option: str, parameters: dict[str, str]) -> tuple[dict, dict[str, str]]:
    """(recorded, parameters) with `source` as DATA in place of the recorded data, whose map of columns is left out.

    Raises:
        ConfigError: the parameters name DATA too.
    """
    if "DATA" in parameters:
        raise ConfigError(f"{option} and -p DATA both name pairs.", "Give one: -p DATA if those of the training moved.")
    return {name: value for name, value in recorded.items() if name != "data_columns"}, {"DATA": source} | parameters


def _from_environment() -> dict[str, str]:
    found = {}
    for name, value in os.environ.items():
        if name.startswith(_PREFIX) and name.removeprefix(_PREFIX) not in _OTHER_VARIABLES:
            found[name.removeprefix(_PREFIX)] = value
    others = ", ".join(_PREFIX + name for name in _OTHER_VARIABLES)
    check_names(found, f" In the environment each has {_PREFIX} before it; there are also {others}.", _PREFIX)
    return {name.lower(): value for name, value in found.items() if value}


def resolve(recorded: Mapping[str, Any] | None = None, /, **parameters) -> knobs.Config:
    """Turn parameters into a config, and print what was chosen and why.

    Precedence: a parameter, then the environment (`DPO_TUTORIAL_` and the name), then `recorded`, then the profile's
    default; the profile itself follows the hardware. `None` and `""` mean "not set".

    Args:
        recorded: values of an earlier run, as `Config.identity` gives them, in place of the profile's.
        **parameters: any knob of `Config`, in capitals or small letters.

    Raises:
        ConfigError: unknown profile or parameter (lists the known ones), or a value of the wrong type or range.
    """
    fields = {f.name: f for f in dataclasses.fields(knobs.Config)}
    recorded = dict(recorded or {})
    check_names(name.upper() for name in [*parameters, *recorded])
    given = {name: (value, f"set by {_PREFIX}{name.upper()}") for name, value in _from_environment().items()}
    given |= {name.lower(): (value, "asked for") for name, value in parameters.items() if value not in (None, "")}
    given = {name: (_coerce(fields[name], value), why) for name, (value, why) in given.items()}

    facts = hardware.hardware()
    choices = [given.pop("profile", None), (recorded.pop("profile", None), "recorded"), _profile_for(facts)]
    profile, why = next(choice for choice in choices if choice and choice[0])
    if profile not in knobs.PROFILES:
        raise ConfigError(f"Unknown profile {profile!r}.", f"Known profiles: {', '.join(knobs.PROFILES)}.")
    dtype, measured = hardware.pick_dtype(facts)
    reasons = [f"profile = {profile}: {why}"]
    if "dtype" not in {*given, *recorded}:
        reasons.append(f"dtype = {dtype}: {measured}")

    values = {"dtype": dtype} | knobs.PROFILES[profile]
    values |= {name: value if value is None else _coerce(fields[name], value) for name, value in recorded.items()}
    for name in ("model", "data"):  # another model or dataset does not share the pinned commit of the default
        if name in given:
            values[f"{name}_revision"] = knobs.PINNED.get(given[name][0])
    another = given.get("model", (knobs.EMBEDDED,))[0] != knobs.EMBEDDED
    if another and "keep_16bit" not in {*given, *recorded} and values.pop("keep_16bit", ()):
        reasons.append("keep_16bit = none: the profile's choice is for the embedded model")
    for name, (value, why) in given.items():
        values[name] = value
        reasons.append(f"{name} = {','.join(value) if isinstance(value, tuple) else value}: {why}")
    if values.get("loss_type") == "sft" and values.get("sft_weight"):
        values["sft_weight"] = 0.0
        reasons.append("sft_weight = 0: the loss is SFT already")
    for name in ("model", "data"):
        spec, at, revision = values.get(name, knobs.EMBEDDED).rpartition("@")
        if at and not Path(values[name]).expanduser().exists():
            values[name], values[f"{name}_revision"] = spec, revision
    if values["dtype"] == "bf16" and facts["cuda"] and dtype == "fp16":
        reasons.append(f"dtype = bf16 is emulated, and slow: {measured}")
    made = knobs.Config(profile=profile, **values, reasons=tuple(reasons))
    if made.dtype == "fp16" and not facts["cuda"]:
        raise ConfigError(
            "DTYPE=fp16 needs a CUDA GPU, and there is none.", "Set DTYPE to bf16 or fp32, or leave it out."
        )
    print(f"dpo-tutorial profile '{made.profile}', model {made.model}, data {made.data}")
    for reason in reasons:
        print(f"  {reason}")
    return made


def _coerce(f: dataclasses.Field, value: Any) -> Any:
    """The value in its field's own type: a command line, the environment and papermill hand over text."""
    kind: Any = str if f.default is None else type(f.default)
    try:
        if kind is bool:
            if str(value).lower() not in ("true", "false", "0", "1"):
                raise ValueError
            return str(value).lower() in ("true", "1")
        if kind is tuple:
            return tuple(str(part).strip() for part in (value.split(",") if isinstance(value, str) else value))
        if kind is str and not isinstance(value, (str, os.PathLike)):  # 7 may have been 007, and 1000.0 a folder 1e3
            raise ValueError
        if kind in (int, float) and isinstance(value, bool) or kind is int and float(value) != int(float(value)):
            raise ValueError
        return int(float(value)) if kind is int else kind(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(
            f"{f.name.upper()}={value!r} is not of type {kind.__name__}.",
            f"Give a {kind.__name__}, for example {f.default!r}."
            + " In a notebook text stands in quotes; papermill takes it with -r in place of -p." * (kind is str),
        ) from None


def _profile_for(facts: dict) -> tuple[str, str]:
    if not facts["cuda"]:
        return "cpu", "no CUDA device found"
    memory = facts["gpu_memory_gib"]
    name = "gpu80" if memory >= 70 else "gpu24" if memory >= 21 else "t4"
    return name, f"{facts['gpu']} with {memory:.0f} GiB"
