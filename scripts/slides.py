"""Slides of the notebooks for a course, made by `make slides`: build/slides/NN_name.slides.html, for any browser.

A section is a column of slides: its text, then each cell's code with the output of the stored run. What a room does not
need stays out: the cells that install and set, folds, exercises, the questionnaire. reveal.js and MathJax come from a
CDN, so the room needs a network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbconvert.exporters import SlidesExporter
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell
from traitlets.config import Config

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "slides"
LEFT_OUT = {"Get the package", "Choose", "Exercises", "Questionnaire"}
LOOK = {
    "reveal_width": "1280", "reveal_height": "720", "reveal_theme": "white", "reveal_transition": "none",
    "reveal_scroll": True, "exclude_input_prompt": True, "exclude_output_prompt": True,
}  # fmt: skip
FOLD = re.compile(r"<details>.*?</details>\n?", re.DOTALL)


def parts(notebook: NotebookNode) -> Iterator[NotebookNode]:
    """The cells, without folds, and text cut where a heading begins."""
    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            yield cell
            continue
        for text in re.split(r"^(?=#{1,3} )", FOLD.sub("", cell.source), flags=re.MULTILINE):
            if text.strip():
                yield new_markdown_cell(text.strip())


def as_slides(notebook: NotebookNode) -> NotebookNode:
    """The notebook with a place for each cell: a section begins a column; a text and what follows it are one slide.

    Args:
        notebook: as stored, with outputs.
    """
    cells, section, before = [], "", "code"
    for cell in parts(notebook):
        heading = re.match(r"(#{1,3}) (.+)", cell.source) if cell.cell_type == "markdown" else None
        if heading and len(heading[1]) < 3:
            section = heading[2]
        if section in LEFT_OUT:
            continue
        kind = "-" if cell.cell_type == "code" or before == "markdown" else "subslide"
        if heading:
            kind = "slide" if len(heading[1]) < 3 else "subslide"
        cell.metadata["slideshow"] = {"slide_type": kind}
        cells.append(cell)
        before = cell.cell_type
    return NotebookNode(notebook | {"cells": cells})


def slides(path: Path) -> str:
    """One notebook as a page of slides."""
    settings = Config({"SlidesExporter": LOOK})
    notebook = as_slides(nbformat.read(path, as_version=4))
    notebook.metadata["title"] = path.stem  # of the browser's tab
    return SlidesExporter(config=settings).from_notebook_node(notebook)[0]


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        target = OUT / f"{path.stem}.slides.html"
        target.write_text(slides(path), encoding="utf-8")
        print(target.relative_to(ROOT))
