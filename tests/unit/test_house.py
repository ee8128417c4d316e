"""The house: one room per notebook, and imports that lead to an earlier room only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "dpo_tutorial"
ROOMS = [
    "errors", "machine", "knobs", "config", "run_folder", "exercises", "show", "loading", "adapter", "pairs",
    "training", "comparing", "using", "cli", "__init__", "__main__",
]  # fmt: skip
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.stat().st_size]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """The rooms that a module imports from, in functions too."""
    here = ["dpo_tutorial", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            names = [".".join([*base, *filter(None, [node.module]), name]) for name in names]
        yield from (name.split(".")[1] for name in names if name.startswith("dpo_tutorial."))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_says_what_it_is_for_and_imports_from_earlier_rooms_only(path):
    assert path.read_text(encoding="utf-8").startswith('"""')
    allowed = ROOMS[: ROOMS.index(room(path)) + 1]
    assert {name for name in imports(path) if not name.startswith("__")} - set(allowed) == set()


def test_no_two_modules_import_each_other():
    arrows = {}
    for path in MODULES:
        here = ["dpo_tutorial", *path.relative_to(PACKAGE).parent.parts]
        name = ".".join([*here[1:], path.stem])
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*here[1 : len(here) - node.level + 1], *filter(None, [node.module])]
                arrows.setdefault(name, set()).update(
                    {".".join(base), *(".".join([*base, a.name]) for a in node.names)}
                )
    assert [(a, b) for a in arrows for b in arrows[a] if a < b and a in arrows.get(b, ())] == []
