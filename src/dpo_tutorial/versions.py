"""Python and packages against the ranges of pyproject.toml, which must hold, and the pins that were tested."""

from __future__ import annotations

import importlib.metadata
import platform
from importlib import resources

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from . import environment
from .errors import Finding

TESTED_PYTHONS = ("3.11", "3.12", "3.13")  # the first is also the oldest that works: `requires-python`
BROUGHT = ("torch", "numpy")  # the machine brings them (pyproject.toml says why), so they are never to be installed


def pins() -> dict[str, SpecifierSet]:
    """Package → the one version tested, as `==2.13.0`, which a local build such as `2.13.0+cu130` satisfies too.

    Read from a copy of requirements.txt in the package: where it is installed there is no checkout, its metadata holds
    ranges only, and a link would be lost on Windows. A test compares the copy with the original.
    """
    text = (resources.files("dpo_tutorial") / "resources" / "requirements.txt").read_text(encoding="utf-8")
    lines = (line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return {canonicalize_name(r.name): r.specifier for r in map(Requirement, lines)}


def ranges() -> dict[str, SpecifierSet]:
    """Package → range, from the installed package's metadata; {} where it is not installed but on PYTHONPATH."""
    try:
        lines = importlib.metadata.requires("dpo-tutorial") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = (r for r in map(Requirement, lines) if r.marker is None)  # a marker: only with the extra `dev`
    return {canonicalize_name(r.name): r.specifier for r in found}


def python() -> Finding:
    version, (oldest, *_, newest) = platform.python_version(), TESTED_PYTHONS
    if Version(version).release < Version(oldest).release:
        mend = f"Make an environment with Python {oldest} to {newest}."
        return Finding("python", "fail", f"{version}, older than {oldest}", mend)
    if version.rpartition(".")[0] not in TESTED_PYTHONS:
        mend = f"Usually fine. If something else fails, try Python {newest}."
        return Finding("python", "warn", f"{version}, tested with {oldest} to {newest}", mend)
    return Finding("python", "ok", f"{version}, as tested")


def packages() -> list[Finding]:
    """One line for all that are in their ranges, and one more for each that is not."""
    allowed, tested = ranges(), pins()
    if not allowed:
        mend = "Install the package: pip install --no-deps --editable . in a checkout."
        return [Finding("packages", "warn", "ranges not known: dpo-tutorial is not installed", mend)]
    findings, others, fine = [], [], 0
    installed = environment.versions(allowed)
    for name, specifier in sorted(allowed.items()):
        version, pin = installed[name], tested.get(name, SpecifierSet())
        if version == "missing" or not specifier.contains(version, prereleases=True):
            found = f"{version}, needs {specifier}"
            findings.append(Finding(f"package {name}", "fail", found, f'Run: pip install "{name}{specifier}"'))
        elif not pin.contains(version, prereleases=True):
            others.append(f"{name} {version} (tested {_number(pin)})")
        else:
            fine += 1
    if others:
        mend = "Usually fine: they are in range. If a line below fails, install the tested versions."
        found = f"{fine} as tested; in range, but not as tested: {', '.join(others)}"
        findings.append(Finding("packages", "warn", found, mend))
    else:
        findings.append(Finding("packages", "ok", f"{fine} as tested"))
    return findings


def brought() -> list[Finding]:
    """torch and numpy, which are never installed here: no mend says so."""
    findings, installed = [], environment.versions(BROUGHT)
    for name in BROUGHT:
        version, pin = installed[name], pins()[name]
        if version == "missing":
            mend = f"Take an environment that brings {name}, or type `make test`, which sets one up."
            findings.append(Finding(name, "fail", "missing", mend))
        elif not pin.contains(version, prereleases=True):
            mend = "On Colab leave it: replacing it breaks the session. Elsewhere: nothing to do unless a line fails."
            findings.append(Finding(name, "warn", f"{version}, tested with {_number(pin)}", mend))
        else:
            findings.append(Finding(name, "ok", f"{version}, as tested"))
    return findings


def _number(pin: SpecifierSet) -> str:
    return str(pin).removeprefix("==")


CHECKS = (python, packages, brought)
