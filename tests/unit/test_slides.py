"""The notebooks as slides: what begins a column, what stays together, what stays out."""

from pathlib import Path

import pytest
from conftest import script
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

slides = script("scripts/slides.py")
NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def test_a_section_is_a_column_and_a_text_stays_with_its_code():
    cells = [
        new_markdown_cell("# Title\n\nWhy.\n\n## Get the package"),
        new_code_cell("%pip install"),
        new_markdown_cell("## One\n\nLook.\n\n<details><summary>Deeper</summary>\n\nLong.\n\n</details>"),
        new_code_cell("1 + 1"),
        new_markdown_cell("Two, as expected.\n\n### Further\n\nMore."),
        new_code_cell("2 + 2"),
        new_code_cell("3 + 3"),
        new_markdown_cell("## Exercises\n\n### Exercise 1.1"),
        new_code_cell("raise NotImplementedError"),
        new_markdown_cell("## Recap"),
    ]
    made = slides.as_slides(new_notebook(cells=cells)).cells
    assert [(cell.metadata.slideshow.slide_type, cell.source) for cell in made] == [
        ("slide", "# Title\n\nWhy."),
        ("slide", "## One\n\nLook."),
        ("-", "1 + 1"),
        ("subslide", "Two, as expected."),
        ("subslide", "### Further\n\nMore."),
        ("-", "2 + 2"),
        ("-", "3 + 3"),
        ("slide", "## Recap"),
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_becomes_slides_without_exercises_and_folds(path):
    page = slides.slides(path)
    assert page.count("<section>") > 10 and "<img" in page, "with the outputs that are stored"
    assert not any(word in page for word in ("NotImplementedError", "<summary>Solution", "%pip install"))
