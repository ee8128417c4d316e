"""Stamp every Colab badge from the one slug in pyproject.toml: `python -m dpo_tutorial.badges owner/name`."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

from . import environment
from .errors import ConfigError, exit_code
from .run import notebooks

_SLUG = r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+"


def slug(root: Path) -> str:
    """The `owner/name` that pyproject.toml names as the repository."""
    urls = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    return urls["Repository"].removeprefix("https://github.com/").removesuffix("/")


def badge(owner_and_name: str, notebook: str) -> str:
    """One badge in Markdown."""
    target = f"https://colab.research.google.com/github/{owner_and_name}/blob/main/notebooks/{notebook}"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({target})"


def badge_page(owner_and_name: str, names: list[str]) -> str:
    """The text of colab_badge.md: a badge per notebook, and its Markdown to copy."""
    lines = ["# Open in Colab", "", "Written by `make badges`; the repository's name comes from `pyproject.toml`.", ""]
    lines += ["| notebook | badge |", "|---|---|"]
    lines += [f"| [{n.removesuffix('.ipynb')}](notebooks/{n}) | {badge(owner_and_name, n)} |" for n in names]
    return "\n".join(lines) + "\n"


def stamp(root: Path, owner_and_name: str) -> None:
    """Write the slug into pyproject.toml, colab_badge.md, README.md and every notebook.

    Raises:
        ConfigError: not of the form owner/name.
    """
    if not re.fullmatch(_SLUG, owner_and_name):
        raise ConfigError(
            f"REPO={owner_and_name!r} is not of the form owner/name.", "For example: make badges REPO=me/dpo."
        )
    old = slug(root)
    paths = [*(root / "notebooks").glob("00_*.ipynb"), *notebooks(root / "notebooks")]
    for path in (root / "pyproject.toml", root / "README.md", *paths):
        text = path.read_text(encoding="utf-8")
        text = re.sub(
            rf"(?<=github\.com/){re.escape(old)}(?![\w-])|(?<=/github/){re.escape(old)}(?=/)", owner_and_name, text
        )
        path.write_text(text, encoding="utf-8")
    (root / "colab_badge.md").write_text(badge_page(owner_and_name, [p.name for p in paths]), encoding="utf-8")


def main() -> int:
    root = environment.project_root()
    return exit_code(lambda: stamp(root, sys.argv[1] if len(sys.argv) > 1 else slug(root)))


if __name__ == "__main__":
    raise SystemExit(main())
