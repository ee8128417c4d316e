"""Every exercise: its check fails on the stub, fails on an empty answer, and passes on the folded solution."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from conftest import code_cells

from dpo_tutorial.exercises import exercise

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("0[1-9]_*.ipynb"))
HEADING = re.compile(r"^### Exercise (\d\.\d): .+ \((★{1,3}), (\d+) minutes\)$", re.MULTILINE)
SOLUTION = re.compile(r"<details>\s*<summary>Solution</summary>\s*```python\n(.*?)```", re.DOTALL)


def found_in(path: Path) -> dict[str, dict]:
    """Exercises of a notebook by number: rating, minutes, solution, and the source of the cell below."""
    cells = nbformat.read(path, as_version=4).cells
    found = {}
    for cell, below in zip(cells, cells[1:], strict=False):
        if cell.cell_type == "markdown" and (heading := HEADING.search(cell.source)):
            number, stars, minutes = heading.groups()
            solution = SOLUTION.search(cell.source)
            assert solution, f"{number} has no folded solution"
            assert number not in found and number[0] == path.name[1], number
            found[number] = dict(stars=len(stars), minutes=int(minutes), solution=solution[1], stub=below.source)
    return found


def imports_of(path: Path) -> dict:
    """The names that the notebook's own import lines bind: what an exercise may use beside its own."""
    names: dict = {}
    for cell in code_cells(path):
        lines = [n for n in ast.parse(cell.source).body if isinstance(n, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(lines, type_ignores=[]), path.name, "exec"), names)
    return names


CASES = [(path, number, found) for path in NOTEBOOKS for number, found in found_in(path).items()]
IDS = [number for _, number, _ in CASES]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_each_notebook_has_three_exercises_from_easy_to_hard(path):
    found, notebook = found_in(path), int(path.name[1])
    stars = [e["stars"] for e in found.values()]
    assert list(found) == [f"{notebook}.{n}" for n in (1, 2, 3)] and stars == sorted(stars) and stars[0] == 1
    assert all(1 <= e["minutes"] <= 30 for e in found.values())


@pytest.mark.parametrize(("path", "number", "found"), CASES, ids=IDS)
def test_the_stub_is_still_to_do(path, number, found, capsys):
    assert "raise NotImplementedError" in found["stub"] and f'with exercise("{number}"):' in found["stub"]
    exec(found["stub"], imports_of(path))
    assert f"Exercise {number}: still to do." in capsys.readouterr().out


def checks(stub: str) -> str:
    """The cell without the functions to be written: its imports, inputs and checks."""
    tree = ast.parse(stub)
    tree.body = [n for n in tree.body if not (isinstance(n, ast.FunctionDef) and "NotImplementedError" in ast.dump(n))]
    return ast.unparse(tree)


@pytest.mark.parametrize(("path", "number", "found"), CASES, ids=IDS)
def test_the_solution_passes(path, number, found, capsys):
    names = imports_of(path)
    exec(found["stub"], names)  # a solution may use the stub's imports and helpers
    exec(found["solution"], names)
    exec(checks(found["stub"]), names)
    assert capsys.readouterr().out.rstrip().endswith(f"Exercise {number}: solved.")


@pytest.mark.parametrize(("path", "number", "found"), CASES, ids=IDS)
def test_an_answer_of_nothing_fails(path, number, found):
    empty = re.sub(r"raise NotImplementedError.*", "return None", found["stub"])
    with pytest.raises((AssertionError, TypeError, AttributeError)):
        exec(empty, imports_of(path))


def test_a_wrong_answer_is_not_swallowed(capsys):
    with pytest.raises(AssertionError), exercise("0.0"):
        raise AssertionError
    assert capsys.readouterr().out == ""
