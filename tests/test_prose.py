"""The notebooks as reading matter: length, balance of words and code, and figures that something supports."""

import re
import statistics
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "notebooks").glob("0[1-9]_*.ipynb"))  # the quickstart: test_quickstart.py
each = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)

#: Figures that no output, source line or benchmark page shows, and where each comes from.
ALLOWED = {
    "00_quickstart": {},
    "01_setup": {},
    "02_load_4bit": {},
    "03_attach_lora": {},
    "04_prepare_ultrafeedback": {},
    "05_train_dpo": {},
    "06_compare": {},
}


def cells(path, kind):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]


def lines(cell) -> int:
    return sum(bool(line.strip()) for line in cell.source.splitlines())


def prose(source: str) -> str:
    """What is read aloud: no code, formulas, addresses or tags."""
    for unread in (r"```.*?```", r"\$\$.*?\$\$", r"\$[^$]*\$", r"<[^>]+>", r"\]\([^)]*\)", r"`[^`]*`"):
        source = re.sub(unread, " ", source, flags=re.DOTALL)
    return source


@each
def test_length_and_balance(path):
    code = cells(path, "code")
    words = sum(len(re.findall(r"[^\W\d][\w'’-]*", prose(c.source))) for c in cells(path, "markdown"))
    assert 30 <= len(nbformat.read(path, as_version=4).cells) <= 70
    assert statistics.median(lines(c) for c in code) <= 8
    ratio = words / sum(lines(c) for c in code)
    assert 4 <= ratio <= 10, f"{ratio:.1f} words of prose per line of code"


@each
def test_the_frame_is_there(path):
    source = "\n".join(c.source for c in cells(path, "markdown"))
    for part in (
        "After this notebook you can",
        "**Predict",
        "The pair we follow",
        "## Exercises",
        "## Questionnaire",
        "## Recap",
    ):
        assert part in source, part
    assert "../docs/glossary.md" in source


@each
def test_the_questionnaire_has_five_questions_with_folded_answers(path):
    (cell,) = [c.source for c in cells(path, "markdown") if c.source.startswith("## Questionnaire")]
    questions = re.findall(r"^\*\*(\d)\.\*\* .+\?", cell, re.MULTILINE)
    answers = re.findall(r"<details>\s*<summary>Answer</summary>\s*(.+?)</details>", cell, re.DOTALL)
    assert questions == list("12345") and len(answers) == 5 and all(len(a.split()) >= 5 for a in answers)


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
    supported = numbers(shown(path)) | set(ALLOWED[path.stem])
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


def test_the_allow_list_holds_nothing_that_is_shown_anyway():
    for path in PATHS:
        assert not set(ALLOWED[path.stem]) & numbers(shown(path)), path.stem


def test_a_figure_that_nothing_shows_is_found():
    assert numbers("It fell by 37.50% to −1,024 (see 3e-4).") == {"37.5", "1024", "3e-4"}
    assert NAMES.sub("", "eq. 7, section 4.2 of Hu et al. 2021 and SmolLM2-135M").strip() == ",  of Hu et al.  and"
