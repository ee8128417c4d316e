"""Stamp Colab's and Kaggle's badges from the one slug in pyproject.toml: `python scripts/badges.py owner/name`."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

from dpo_tutorial.cli.run import notebooks
from dpo_tutorial.errors import ConfigError, exit_code

_SLUG = r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+"


def slug(root: Path) -> str:
    """The `owner/name` that pyproject.toml names as the repository."""
    urls = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    return urls["Repository"].removeprefix("https://github.com/").removesuffix("/")


def badge(owner_and_name: str, notebook: str) -> str:
    """Colab's badge in Markdown."""
    target = f"https://colab.research.google.com/github/{owner_and_name}/blob/main/notebooks/{notebook}"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({target})"


def kaggle_badge(owner_and_name: str, notebook: str) -> str:
    """Kaggle's badge in Markdown; Kaggle imports the notebook that the link names."""
    source = f"https://github.com/{owner_and_name}/blob/main/notebooks/{notebook}"
    image = "https://kaggle.com/static/images/open-in-kaggle.svg"
    return f"[![Open in Kaggle]({image})](https://kaggle.com/kernels/welcome?src={source})"


def badge_rows(owner_and_name: str, names: list[str]) -> str:
    """The rows of the table in colab_badge.md: a notebook and its two badges each."""
    rows = []
    for name in names:
        both = f"{badge(owner_and_name, name)} | {kaggle_badge(owner_and_name, name)}"
        rows.append(f"| [{name.removesuffix('.ipynb')}](notebooks/{name}) | {both} |\n")
    return "".join(rows)


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
    page = root / "colab_badge.md"  # its table is written anew, the text around it stays
    rows = badge_rows(owner_and_name, [p.name for p in paths])
    text = re.sub(r"(^\| \[.+\n)+", lambda _: rows, page.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    ROOT = Path(__file__).parents[1]
    raise SystemExit(exit_code(stamp, ROOT, sys.argv[1] if len(sys.argv) > 1 else slug(ROOT)))
