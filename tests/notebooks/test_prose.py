"""Every figure that a notebook's prose states is shown by an output, a source line or a page of benchmarks/."""

import html
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
PATHS = sorted((ROOT / "notebooks").glob("0[1-9]_*.ipynb"))  # the quickstart: test_quickstart.py
each = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)


def cells(path, kind):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]


def prose(source: str) -> str:
    """What is read aloud: no code, formulas, addresses or tags."""
    for unread in (r"```.*?```", r"\$\$.*?\$\$", r"\$[^$]*\$", r"<[^>]+>", r"\]\([^)]*\)", r"`[^`]*`"):
        source = re.sub(unread, " ", source, flags=re.DOTALL)
    return source


#: Numbers that name something and measure nothing: years, equations, sections, papers, notebooks, exercises.
NAMES = re.compile(
    r"\b(?:19|20)\d\d\b"
    r"|\b(?:eqs?|sections?|appendix|table|figure|exercises?|notebooks?|questions?|arXiv|trl#)\W{0,2}[\d.]+"
    r"(?:(?:,| and| to) [\d.]+)*|\b0[1-6]\b|\(★+, \d+ minutes\)|^#+ .*$|^\*?\*?\d\."
    r"|SmolLM2?-\S+|Qwen\S+|\b[A-Za-z]+\d\w*",
    re.MULTILINE | re.IGNORECASE,
)
NUMBER = re.compile(r"(?<![\w.])[−-]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")


def numbers(text: str) -> set[str]:
    """Figures as bare text: no sign, no thousands separator, no closing zeros."""
    found = (n.lstrip("−-").replace(",", "") for n in NUMBER.findall(text))
    return {n.rstrip("0").rstrip(".") if "." in n and "e" not in n else n for n in found if n}


def shown(path) -> str:
    """Everything that a run prints or that a source line states, of this notebook and of the benchmarks."""
    parts = [c.source for c in cells(path, "code")]
    for cell in cells(path, "code"):
        for output in cell.outputs:
            data = output.get("data", {})
            parts.append(output.get("text", "") + data.get("text/plain", "") + data.get("text/html", ""))
    parts += [
        re.sub(r"[^`]*```python(.*?)```[^`]*", r"\1", c.source, flags=re.DOTALL)
        for c in cells(path, "markdown")
        if "```" in c.source
    ]
    parts += [p.read_text(encoding="utf-8") for p in (ROOT / "benchmarks").glob("*.md")]
    return "\n".join(parts)


@each
def test_every_figure_in_the_prose_is_shown_by_an_output_a_source_line_or_a_benchmark(path):
    supported = numbers(shown(path))
    supported |= {
        str(round(float(n) * 100, 6)).rstrip("0").rstrip(".") for n in supported if re.fullmatch(r"0?\.\d+", n)
    }
    loose = []
    for cell in cells(path, "markdown"):
        text = NAMES.sub(" ", prose(cell.source))
        loose += [
            (n, cell.source[:60]) for n in sorted(numbers(text) - supported) if not (n.isdigit() and int(n) <= 12)
        ]
    assert not loose, loose


def test_no_sentence_waits_for_its_number():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        waiting = [c.source for c in cells(path, "markdown") if re.search(r"\b(?:DIFF|TODO|FIXME|TBD|XXX)\b", c.source)]
        assert not waiting, path.name


@pytest.mark.parametrize("page", ["README.md", "notebooks/01_setup.ipynb"])
def test_the_example_that_opens_a_page_is_an_answer_of_the_stored_run(page):
    (path,) = (p for p in PATHS if p.stem == "06_compare")
    said = (ROOT / page).read_text(encoding="utf-8")
    quoted = re.findall(r"\| (before|after) \| ([^|\n]+?) (?:\[…\]|… \([^|\n]*\))? ?\|", said)
    assert {when for when, _ in quoted} == {"before", "after"}
    answers = html.unescape(shown(path))
    missing = [(when, text) for when, text in quoted if text not in answers]
    assert not missing, missing
