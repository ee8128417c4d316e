"""The repository around the package: pins, CI, badges, packaged data, and names we rely on in other libraries."""

import ast
import fnmatch
import importlib.metadata
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import bitsandbytes as bnb
import pytest
import trl
import trl.trainer.utils
import yaml
from conftest import code_cells, script
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from dpo_tutorial.errors import ConfigError
from dpo_tutorial.training import train

ROOT = Path(__file__).parents[2]
badges = script("scripts/badges.py")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def pins(name):
    """Package → the versions pinned, more than one where a marker chooses."""
    text = (ROOT / name).read_text(encoding="utf-8")
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (only,) = requirement.specifier
            assert only.operator == "==", line
            found.setdefault(canonicalize_name(requirement.name), set()).add(only.version)
    return found


def ranges(*extras):
    groups = [PROJECT["project"]["dependencies"], *(PROJECT["project"]["optional-dependencies"][e] for e in extras)]
    return {canonicalize_name(r.name): r.specifier for group in groups for r in map(Requirement, group)}


def python_files():
    """(name, source) of every module, test and notebook."""
    for path in sorted([*SOURCES, *(ROOT / "tests").glob("*.py"), *NOTEBOOKS]):
        if path.suffix == ".py":
            yield path.name, path.read_text(encoding="utf-8")
        else:
            yield path.name, "\n".join(c.source for c in code_cells(path))


# --- pins ----


def test_the_guide_has_the_same_version_of_whatever_both_environments_hold():
    ours, guide = pins("requirements.txt"), pins("docs/requirements.txt")
    shared = {name: (ours[name], guide[name]) for name in ours if name in guide}
    assert shared and {name: both for name, both in shared.items() if not both[1] <= both[0]} == {}


def test_every_dependency_has_a_pin_in_its_range():
    ours = pins("requirements.txt")
    for name, specifier in ranges("dev").items():
        assert name in ours, f"{name} is not pinned: make pins"
        assert all(map(specifier.contains, ours[name])), f"{name} {ours[name]} is not {specifier}: make pins"


def test_everything_that_is_pulled_in_is_pinned():
    ours = pins("requirements.txt")
    waiting, seen = [*ranges("dev"), "torch", "numpy"], set()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in seen or name.startswith(("cuda", "nvidia", "triton")):
            continue
        seen.add(name)
        assert name in ours, f"{name} is not pinned: make pins"
        if Version(importlib.metadata.version(name)).public in ours[name]:  # another version may need other packages
            needs = map(Requirement, importlib.metadata.requires(name) or [])
            waiting += [r.name for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]


def test_the_lowest_versions_are_those_that_the_ranges_admit_first():
    lowest, dependencies = script("scripts/lowest.py").lowest, PROJECT["project"]["dependencies"]
    for line, pin in zip(dependencies, lowest(dependencies), strict=True):
        allowed, (only,) = Requirement(line), Requirement(pin).specifier
        bound = min(Version(s.version) for s in allowed.specifier)
        assert only.operator == "==" and Version(only.version) == bound and bound in allowed.specifier
    with pytest.raises(AssertionError, match="numpy"):
        lowest(["numpy"])


def test_torch_and_numpy_are_left_to_the_machine():
    assert not {"torch", "numpy"} & set(ranges("dev"))
    assert {"torch", "numpy"} <= set(pins("requirements.txt")), "but what was tested is recorded"


def test_every_library_that_the_package_or_a_notebook_imports_is_declared():
    declared = set(ranges(*PROJECT["project"]["optional-dependencies"])) | {"torch", "numpy"}
    found = {"llama_cpp": ["llama-cpp-python"]} | importlib.metadata.packages_distributions()
    for name, text in python_files():
        if name.startswith(("test_", "conftest")):
            continue
        for node in ast.walk(ast.parse(text)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            for module in (m.partition(".")[0] for m in modules):
                if module in sys.stdlib_module_names or module == "dpo_tutorial":
                    continue
                distributions = {canonicalize_name(d) for d in found.get(module, [module])}
                assert distributions & declared, f"{name} imports {module}, which pyproject.toml does not name"


# --- CI ----


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda p: p.name)
def test_a_workflow_may_only_read_the_repository_and_ends(path):
    parsed = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert parsed["permissions"] == {"contents": "read"}
    assert all(job["timeout-minutes"] for job in parsed["jobs"].values())


def planned(*arguments, where=ROOT):
    """The commands that `make` would run, whatever make or environment this test itself runs under."""
    ours = (
        "PYTHON",
        "PROFILE",
        "MODEL",
        "DATA",
        "SEED",
        "ARTIFACTS",
    )
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    command = ["make", "--dry-run", *arguments]
    return subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, check=True).stdout


def test_make_test_checks_style_then_runs_the_tests_and_the_notebooks():
    shown = planned("test")
    places = [shown.find(part) for part in ("ruff check", "ruff format --check", "pytest tests", "--nbval")]
    assert -1 not in places and places == sorted(places)


def test_python_keeps_what_it_compiles_where_the_environment_forbids_it(tmp_path):
    """Installed uncompiled: each of the six kernels would compile torch and all else anew."""
    file = tmp_path / "Makefile"
    file.write_text(f'include {ROOT / "Makefile"}\nshown:\n\t@echo "[$$PYTHONDONTWRITEBYTECODE]"\n')
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = ["make", "--silent", "-f", str(file), "shown"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("python", "anew"), [("", False), ("PYTHON=./now", False), ("PYTHON=./other", True)])
def test_an_environment_of_another_python_than_asked_for_is_made_anew(tmp_path, python, anew):
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    for name, series in (("venv/bin/python", "3.11"), ("now", "3.11"), ("other", "3.12")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {series}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "venv" / ".installed").touch()
    shown = planned("run", "VENV=venv", *python.split(), where=tmp_path)
    assert ("-m venv --clear venv" in shown and "of Python 3.11" in shown and "pip install" in shown) is anew
    assert "venv/bin/python -m dpo_tutorial run" in shown


# --- badges ----


def test_the_badge_page_has_the_rows_that_make_badges_writes_and_no_others():
    page = (ROOT / "colab_badge.md").read_text(encoding="utf-8")
    rows = badges.badge_rows(badges.slug(ROOT), [p.name for p in NOTEBOOKS])
    assert rows in page and page.count("](notebooks/") == len(NOTEBOOKS)


def test_a_row_links_its_notebook_once_and_each_badge_once():
    rows = badges.badge_rows("me/dpo", ["01_a.ipynb", "02_b.ipynb"])
    for name in ("01_a.ipynb", "02_b.ipynb"):
        (row,) = [line for line in rows.splitlines() if f"](notebooks/{name})" in line]
        assert row.count(f"https://colab.research.google.com/github/me/dpo/blob/main/notebooks/{name})") == 1
        there = f"https://github.com/me/dpo/blob/main/notebooks/{name}"
        assert row.count(f"https://kaggle.com/kernels/welcome?src={there})") == 1


def test_stamping_writes_a_row_for_a_new_notebook_and_keeps_the_text_around_the_table(copied):
    page = copied / "colab_badge.md"
    before = page.read_text(encoding="utf-8")
    shutil.copy(copied / "notebooks" / "01_setup.ipynb", copied / "notebooks" / "07_new.ipynb")
    badges.stamp(copied, badges.slug(copied))
    after = page.read_text(encoding="utf-8")
    new = badges.badge_rows(badges.slug(copied), ["07_new.ipynb"])
    assert new in after and after.replace(new, "") == before


@pytest.fixture
def copied(tmp_path):
    """Everything that stamping writes, copied to where it may."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    for name in ("pyproject.toml", "README.md", "colab_badge.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def contents(folder):
    return {str(p.relative_to(folder)): p.read_text(encoding="utf-8") for p in folder.rglob("*") if p.is_file()}


def test_stamping_changes_the_slug_in_every_place_and_nothing_else(copied):
    before, old, new = contents(copied), badges.slug(copied), "some.body/my_fork-2"
    badges.stamp(copied, new)
    after = contents(copied)
    assert set(after) == set(before) and badges.slug(copied) == new
    for name, text in before.items():
        assert old in text, f"{name} holds no slug to stamp"
        assert after[name] == text.replace(old, new), name


def test_stamping_back_restores_every_byte(copied):
    before, old = contents(copied), badges.slug(copied)
    badges.stamp(copied, "me/dpo")
    assert contents(copied) != before
    badges.stamp(copied, old)
    assert contents(copied) == before


def test_stamping_leaves_links_to_other_repositories_alone(copied):
    readme = copied / "README.md"
    other = "\nhttps://github.com/huggingface/trl and git clone https://github.com/huggingface/peft\n"
    readme.write_text(readme.read_text(encoding="utf-8") + other, encoding="utf-8")
    badges.stamp(copied, "me/dpo")
    assert readme.read_text(encoding="utf-8").endswith(other)


@pytest.mark.parametrize(
    "line",
    [
        'pip install "dpo-tutorial @ git+https://github.com/{}"',
        "pip install git+https://github.com/{}",
        "git clone https://github.com/{}",
        "[issues](https://github.com/{}/issues)",
    ],
)
def test_stamping_reaches_every_way_a_readme_names_the_repository(line, copied):
    (copied / "README.md").write_text(f"# Tutorial\n\n{line.format(badges.slug(copied))}\n", encoding="utf-8")
    badges.stamp(copied, "me/dpo")
    assert (copied / "README.md").read_text(encoding="utf-8") == f"# Tutorial\n\n{line.format('me/dpo')}\n"


@pytest.mark.parametrize("wrong", ["", "dpo", "a/b/c", "a b/c", "https://github.com/me/dpo", "me/", "/dpo", "me/dpo\n"])
def test_a_slug_that_is_not_owner_and_name_is_refused_before_anything_is_written(wrong, copied):
    before = contents(copied)
    with pytest.raises(ConfigError, match="owner/name"):
        badges.stamp(copied, wrong)
    assert contents(copied) == before


# --- what is packaged ----


def test_every_resource_is_declared_as_package_data():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["dpo_tutorial.pairs"]
    folder = ROOT / "src" / "dpo_tutorial" / "pairs"
    for path in (folder / "resources").iterdir():
        if path.suffix != ".py" and path.is_file():
            name = path.relative_to(folder).as_posix()
            assert any(fnmatch.fnmatch(name, p) for p in patterns), name


# --- drift: what we pass exists in the installed versions ----


def test_the_installed_trl_builds_our_dpo_config(cfg, tmp_path):
    arguments = train.dpo_config(cfg, tmp_path)
    assert isinstance(arguments, trl.DPOConfig)
    assert (arguments.beta, arguments.loss_type, arguments.max_length) == (cfg.beta, ["sigmoid"], None)
    assert (arguments.learning_rate, arguments.max_steps, arguments.seed) == (cfg.learning_rate, 2, cfg.seed)
    assert not arguments.bf16 and not arguments.fp16
    assert arguments.report_to == [] or arguments.report_to == ["none"]


def test_the_warm_up_below_1_is_a_share_of_all_steps(cfg, tmp_path):
    assert train.dpo_config(cfg, tmp_path).get_warmup_steps(200) == cfg.warmup_ratio * 200


def test_trl_still_decides_by_the_function_we_replace_whether_to_score_completions_only():
    assert len(inspect.signature(trl.trainer.utils._use_triton).parameters) == 1
    source = inspect.getsource(trl.trainer.utils)
    assert re.search(r"compact = _use_triton\(\w+\.device\)", source)
    assert re.search(r"^ +_CHUNKED_LOGPROB_CHUNK_SIZE,$", source, re.MULTILINE), "an argument of each call"
    assert "range(0, N, TOKEN_CHUNK_SIZE)" in inspect.getsource(trl.kernels.chunked_logprob), "read at each call"


def test_a_4bit_layer_still_has_the_switch_we_turn_off():
    assert hasattr(bnb.nn.Linear4bit(64, 64), "support_avx512bf16_for_cpu")


# --- one job a notebook, one ruff ----


def test_ci_runs_each_notebook_alone_and_the_hooks_have_the_ruff_of_the_pins():
    matrix = yaml.safe_load((ROOT / ".github/workflows/cpu.yml").read_text(encoding="utf-8"))["jobs"]["notebook"]
    matrix = matrix["strategy"]["matrix"]
    assert matrix["notebook"] + [more["notebook"] for more in matrix["include"]] == [p.stem for p in NOTEBOOKS]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert {h["rev"] for h in hooks if "ruff" in h["repo"]} == {f"v{v}" for v in pins("requirements.txt")["ruff"]}
