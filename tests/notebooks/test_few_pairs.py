"""Notebook 06 on a test split of a few pairs: every statistic says what it needs, and the notebook ends."""

import json
from pathlib import Path

import pytest
from conftest import TEXTS, code_cells, pair

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "06_compare.ipynb"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the first case trains, and the others find its adapter."""
    return tmp_path_factory.mktemp("few")


def rows(split, n):
    return [pair(f"{ask} {split} {i}", *answers) for i in range(n) for ask, *answers in [TEXTS[i % len(TEXTS)]]]


@pytest.mark.end_to_end
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_comparison_ends_with_a_few_test_pairs(n, tiny_folder, folder, tmp_path, monkeypatch, capsys):
    for split, count in (("train", 4), ("val", 2), ("test", n)):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows(split, count))))
    monkeypatch.setenv("DPO_TUTORIAL_HEADLESS", "1")
    given = dict(
        PROFILE="smoke", MODEL=str(tiny_folder), DATA=str(tmp_path), DTYPE="fp32", MAX_TOKENS=128, MAX_TEST=n,
        TRAIN_IF_MISSING=True, ARTIFACTS=str(folder), MAX_NEW_TOKENS=4,
    )  # fmt: skip
    names = {}
    for cell in code_cells(NOTEBOOK):
        if "pip" not in cell.source and "exercise(" not in cell.source:
            exec(compile(cell.source, NOTEBOOK.name, "exec"), names)
        if "parameters" in cell.metadata.get("tags", []):
            names |= given
    saved = json.loads((folder / "smoke" / "comparison.json").read_text())
    assert saved["held_out"]["after"]["accuracy"]["n"] == len(names["records"]) == n
    page, said = (folder / "smoke" / "report.html").read_text(), capsys.readouterr().out
    assert ("no interval: one value" in page) == (n == 1)
    assert "nan" not in said + page.split("<body>")[1].split("<img")[0]
