"""Python and packages against pins and ranges, in each state they can be in."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from conftest import script
from packaging.requirements import Requirement
from packaging.version import Version

from dpo_tutorial import environment, versions

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_package_holds_the_pins_of_requirements_txt():
    original, there = ROOT / "requirements.txt", ROOT / "src" / "dpo_tutorial" / "resources" / "requirements.txt"
    assert there.read_text() == original.read_text(), f"cp {original.name} {there.relative_to(ROOT)}"
    oldest, *_, newest = versions.TESTED_PYTHONS
    assert f"(Python {oldest} to {newest})" in original.read_text()
    assert PROJECT["requires-python"] == f">={oldest}"
    assert PROJECT["classifiers"] == [f"Programming Language :: Python :: {v}" for v in versions.TESTED_PYTHONS]


def test_the_lowest_versions_are_those_that_the_ranges_admit_first():
    lowest = script("scripts/lowest.py").lowest
    for line, pin in zip(PROJECT["dependencies"], lowest(PROJECT["dependencies"]), strict=True):
        allowed, (only,) = Requirement(line), Requirement(pin).specifier
        bound = min(Version(s.version) for s in allowed.specifier)
        assert only.operator == "==" and Version(only.version) == bound and bound in allowed.specifier
    with pytest.raises(AssertionError, match="numpy"):
        lowest(["numpy"])


def test_the_ranges_are_those_of_the_installed_package_without_its_extras(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["TRL<1.17,>=1.16", 'pytest; extra == "dev"'])
    assert versions.ranges() == {"trl": "<1.17,>=1.16"}


@pytest.mark.parametrize(
    ("version", "status"),
    [("3.10.14", "fail"), ("3.11.7", "ok"), ("3.13.15", "ok"), ("3.14.0", "warn"), ("3.110.0", "warn")],
)
def test_python(monkeypatch, version, status):
    monkeypatch.setattr(versions.platform, "python_version", lambda: version)
    finding = versions.python()
    assert finding.status == status and version in finding.found and bool(finding.mend) == (status != "ok")


@pytest.fixture
def installed(monkeypatch):
    """Pretend that what was tested is installed, in the ranges of pyproject.toml; change what the test is about."""
    these = {name: str(pin).removeprefix("==") for name, pin in versions.pins().items()}
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: PROJECT["dependencies"])
    monkeypatch.setattr(environment, "versions", lambda names: {name: these[name] for name in names})
    return these


@pytest.mark.parametrize(
    ("package", "version", "status", "words"),
    [
        ("trl", "1.16.0", "ok", f"{len(PROJECT['dependencies'])} as tested"),
        ("trl", "1.16.9", "warn", "trl 1.16.9 (tested 1.16.0)"),
        ("peft", "0.21.2.dev0", "warn", "peft 0.21.2.dev0"),
        ("transformers", "6.0.0rc1", "warn", "6.0.0rc1"),
    ],
)
def test_packages_in_their_ranges_are_one_line(installed, package, version, status, words):
    installed[package] = version
    (finding,) = versions.packages()
    assert finding.status == status and words in finding.found and bool(finding.mend) == (status != "ok")


@pytest.mark.parametrize("version", ["1.17.0", "1.15.9", "1.9", "missing"])
def test_a_package_outside_its_range_fails_by_name_with_the_command_that_mends_it(installed, version):
    installed["trl"] = version
    finding, others = versions.packages()
    assert (finding.name, finding.status, others.status) == ("package trl", "fail", "ok")
    assert version in finding.found and finding.mend == 'Run: pip install "trl<1.17,>=1.16"'


def test_a_package_that_is_only_on_the_path_has_no_ranges_and_says_so(monkeypatch):
    def requires(_):
        raise importlib.metadata.PackageNotFoundError("dpo-tutorial")

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    (finding,) = versions.packages()
    assert finding.status == "warn" and "not installed" in finding.found and "pip install" in finding.mend


@pytest.mark.parametrize(
    ("version", "status"), [("2.13.0", "ok"), ("2.13.0+cu130", "ok"), ("2.99.0+cu130", "warn"), ("missing", "fail")]
)
def test_torch_is_compared_with_its_pin_and_never_to_be_installed(installed, version, status):
    installed["torch"] = version
    torch_line, numpy_line = versions.brought()
    assert (torch_line.name, torch_line.status, numpy_line.status) == ("torch", status, "ok")
    assert version in torch_line.found and "install" not in torch_line.mend
    assert bool(torch_line.mend) == (status != "ok")
