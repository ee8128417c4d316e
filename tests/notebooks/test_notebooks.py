"""The six notebooks as files: what must hold of each of them, executed or not."""

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest
from conftest import code_cells as code
from conftest import script

from dpo_tutorial import config
from dpo_tutorial.cli import run

ROOT = Path(__file__).parents[2]
badges = script("scripts/badges.py")
refresh = script("scripts/refresh_notebooks.py")
PATHS = sorted((ROOT / "notebooks").glob("0[1-9]_*.ipynb"))  # the quickstart: test_quickstart.py
IN_ALL = ["PROFILE", "MODEL", "DATA", "SEED", "ARTIFACTS"]

each = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def outputs(path):
    return [output for cell in code(path) for output in cell.outputs]


def tagged(path):
    return [c for c in read(path).cells if "parameters" in c.metadata.get("tags", [])]


def parameters(path):
    """Name → default, in order, of the tagged cell: one name a line, or several names and as many values."""
    (cell,) = tagged(path)
    found = {}
    for statement in ast.parse(cell.source).body:
        assert isinstance(statement, ast.Assign) and len(statement.targets) == 1, ast.unparse(statement)
        names, values = statement.targets[0], ast.literal_eval(statement.value)
        several = isinstance(names, ast.Tuple)
        pairs = zip(names.elts, values, strict=True) if several else [(names, values)]
        found |= {name.id: value for name, value in pairs}
    return found


def bootstrap(path):
    (cell,) = [c for c in code(path) if "pip" in c.source and "install" in c.source]
    return cell


def text_without_images(path):
    """The file's text less its base64 images, in which any short string turns up by chance."""
    notebook = read(path)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            for kind in [k for k in output.get("data", {}) if k.startswith("image/")]:
                del output.data[kind]
    return json.dumps(notebook, ensure_ascii=False)


# --- the set ----


def test_notebooks_are_numbered_from_01_to_06_without_a_gap():
    assert [p.name[:3] for p in PATHS] == [f"{n:02}_" for n in range(1, 7)]


def test_the_runner_finds_exactly_these_notebooks():
    assert run.notebooks(ROOT / "notebooks") == PATHS


@each
def test_a_notebook_is_valid_and_its_title_has_its_number(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.cells[0].source.startswith(f"# {int(path.name[:2])}. ")


# --- parameters ----


@each
def test_exactly_one_code_cell_is_tagged_parameters(path):
    assert [c.cell_type for c in tagged(path)] == ["code"]


@each
def test_the_parameters_cell_holds_literal_assignments_only(path):
    assert parameters(path)


@each
def test_every_parameter_is_a_knob_of_the_config_and_left_open(path):
    assert set(parameters(path)) <= set(config.known_parameters())
    assert all(value in (None, "") for value in parameters(path).values()), "else it would beat the environment"


@each
def test_the_parameters_begin_with_those_of_all_notebooks(path):
    assert list(parameters(path))[: len(IN_ALL)] == IN_ALL


@each
def test_the_cell_below_the_parameters_makes_the_config(path):
    cells = [c.source.strip() for c in code(path)]
    below = cells[cells.index(tagged(path)[0].source.strip()) + 1]
    assert below.endswith("cfg = config.from_notebook(globals())") and len(below.splitlines()) <= 3


# --- Colab ----


@each
def test_the_badges_open_this_notebook_of_this_repository(path):
    found = [
        m
        for c in read(path).cells
        for m in re.findall(r"https://colab\.research\.google\.com/github/[^)\s\"]+", c.source)
    ]
    slug = badges.slug(ROOT)
    assert found == [f"https://colab.research.google.com/github/{slug}/blob/main/notebooks/{path.name}"]
    for badge in (badges.badge, badges.kaggle_badge):
        assert badge(slug, path.name) in read(path).cells[0].source


@each
def test_the_bootstrap_cell_fetches_this_repository(path):
    assert re.findall(r"git\+https://github\.com/([^\"\s]+)\"", bootstrap(path).source) == [badges.slug(ROOT)]


@each
def test_the_bootstrap_cell_is_the_same_text_as_in_notebook_01(path):
    assert bootstrap(path).source == bootstrap(PATHS[0]).source


@each
def test_the_bootstrap_cell_comes_before_any_other_code(path):
    assert code(path)[0].source == bootstrap(path).source


@each
def test_the_bootstrap_cell_does_nothing_where_the_package_is_installed(path):
    """Elsewhere, and what its magic does: `make colab`."""
    names = {}
    exec(compile(bootstrap(path).source, path.name, "exec"), names)  # without IPython, a magic would be an error
    assert set(names) - {"__builtins__"} == {"dpo_tutorial"}


# --- code ----


@each
def test_every_code_cell_but_the_bootstrap_is_plain_python_of_at_most_40_lines(path):
    for cell in [c for c in read(path).cells if c.cell_type == "code"][1:]:
        ast.parse(cell.source)
        assert cell.source.strip() and len(cell.source.splitlines()) <= 40, cell.source[:80]


def test_notebook_02_says_that_a_hub_model_without_a_commit_is_not_pinned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (cell,) = [c.source for c in code(PATHS[1]) if "models.source(cfg)" in c.source]
    exec(compile(cell, PATHS[1].name, "exec"), {"cfg": config.resolve(profile="cpu", model="someone/model")})
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("base:")]
    assert said.endswith("not pinned") and "SHA-256" not in said


# --- links ----


@each
def test_every_relative_link_leads_to_a_file(path):
    checked = 0
    for cell in read(path).cells:
        if cell.cell_type != "markdown":
            continue
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", cell.source, flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)[^)]*\)", prose) + re.findall(r"(?:src|href)=[\"']([^\"']+)", prose):
            if re.match(r"[a-z]+:|#", link):
                continue
            checked += 1
            assert (path.parent / link.partition("#")[0]).is_file(), link
    assert checked, "no relative link found: each notebook leads to its neighbours"


@each
def test_a_notebook_links_to_the_other_five(path):
    text = "\n".join(c.source for c in read(path).cells if c.cell_type == "markdown")
    for other in PATHS:
        assert (f"]({other.name})" in text) == (other != path), other.name


# --- what must not be in a file ----


@each
def test_a_notebook_carries_only_the_metadata_it_needs(path):
    notebook = read(path)
    assert {"kernelspec", "language_info"} <= set(notebook.metadata) <= {"kernelspec", "language_info", "dpo_tutorial"}
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}, cell.metadata
        assert set(cell.metadata.get("tags", [])) <= {"parameters"}, cell.metadata


@each
def test_a_notebook_is_smaller_than_500_kilobytes(path):
    assert path.stat().st_size < 500_000


@each
def test_a_notebook_names_no_folder_of_a_machine(path):
    text = re.sub(r"https?://[^\s)\"\\]+", "", text_without_images(path))
    assert not re.findall(r"/(?:work|root|home|tmp|Users)/[^\s\"\\]*", text)


@each
def test_a_notebook_holds_no_hub_token(path):
    assert not re.findall(r"\bhf_[A-Za-z0-9]{10,}", text_without_images(path))


@each
def test_outputs_hold_no_widget_no_error_and_no_stderr(path):
    for output in outputs(path):
        assert not [kind for kind in output.get("data", {}) if "widget" in kind]
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.get("text", "")[:200]


# --- outputs ----


def test_the_curve_that_01_shows_is_of_the_run_that_05_shows():
    kept = json.loads((ROOT / "src" / "dpo_tutorial" / "show" / "stored_run.json").read_text(encoding="utf-8"))
    shown = json.dumps([c.get("outputs") for c in read(ROOT / "notebooks" / "05_train_dpo.ipynb").cells])
    end = kept["eval"][-1]
    assert all(f"<td>{end[f'eval_rewards/{side}']:.4g}</td>" in shown for side in ("chosen", "rejected"))


@each
def test_outputs_are_those_of_the_source_beside_them(path):
    if outputs(path):
        notebook = read(path)
        assert notebook.metadata["dpo_tutorial"]["source_sha256"] == refresh.source_digest(notebook)


def test_the_source_digest_follows_the_code_and_nothing_else():
    notebook = nbformat.from_dict(read(PATHS[0]))
    digest = refresh.source_digest(notebook)
    assert re.fullmatch("[0-9a-f]{64}", digest)
    notebook.cells[0].source += " more prose"
    first, second = [c for c in notebook.cells if c.cell_type == "code"][:2]
    first.outputs = [nbformat.v4.new_output("stream", text="said\n")]
    first.execution_count = 7
    notebook.metadata["dpo_tutorial"] = {"source_sha256": digest}
    assert refresh.source_digest(notebook) == digest
    first.source, second.source = second.source, first.source
    assert refresh.source_digest(notebook) != digest, "the order of the cells counts"
    first.source, second.source = second.source, first.source
    assert refresh.source_digest(notebook) == digest
    first.source += "\npass"
    assert refresh.source_digest(notebook) != digest


@each
def test_every_image_in_the_outputs_has_a_text_that_stands_for_it(path):
    for output in outputs(path):
        for kind in output.get("data", {}):
            if kind.startswith("image/"):
                assert output.metadata.get(kind, {}).get("alt"), f"{kind} without alt text"
