"""Notebooks 02 to 05 on models that are not a Llama: what is taught is shown on what the model has."""

import json
from pathlib import Path

import nbformat
import pytest
from conftest import TEXTS, pair, script
from test_families import tiny
from test_templates import family

refresh = script("scripts/refresh_notebooks.py")
FOLDER = Path(__file__).parents[2] / "notebooks"
#: Whose template ends a turn with another token than the tokenizer's EOS.
TEMPLATE = {"gemma2": "gemma", "phi3": "phi"}
KINDS = {
    "gpt2": {},
    "phi3": {},
    "gemma2": {},
    "gpt_neox": {},
    "mixtral": {"output_router_logits": True},
    "llama": {"attention_dropout": 0.1},
}


def lesson(number: str) -> list[str]:
    """The code cells of a notebook up to its exercises."""
    (path,) = FOLDER.glob(f"{number}_*.ipynb")
    cells = []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.source.startswith("## Exercises"):
            return cells
        if cell.cell_type == "code" and "%pip" not in cell.source:
            cells.append(cell.source)
    raise AssertionError("no exercises")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_lessons_run(kind, tokenizer, tmp_path, monkeypatch):
    if kind in TEMPLATE:
        tokenizer = family(tokenizer, TEMPLATE[kind])
    model = tiny(kind, tokenizer, **KINDS[kind])
    model.save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    rows = [pair(f"{t[0]} {i}", *t[1:]) for i in range(12) for t in TEXTS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"PROFILE": "smoke", "MODEL": kind, "DATA": "rows.jsonl", "ARTIFACTS": str(tmp_path), "MAX_TOKENS": "128"}
    for name, value in given.items():
        monkeypatch.setenv(f"DPO_TUTORIAL_{name}", value)
    monkeypatch.chdir(tmp_path)
    for number in ("02", "03", "04", "05"):
        names = {}
        for source in lesson(number):
            exec(compile(source, f"{number}: {source[:40]}", "exec"), names)
