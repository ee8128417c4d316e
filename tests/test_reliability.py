"""The record of kills and faults, and the page made of it."""

import json
from pathlib import Path

import pytest
from conftest import script

FOLDER = Path(__file__).parents[1] / "benchmarks"
RECORD = json.loads((FOLDER / "reliability.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def reliability():
    return script("benchmarks/reliability.py")


def test_the_page_is_the_one_that_the_record_gives(reliability):
    assert (FOLDER / "reliability.md").read_text(encoding="utf-8") == reliability.page(RECORD)


def test_twenty_kills_left_the_adapter_of_an_undisturbed_training():
    found = RECORD["kills"]
    hits = [kill["hit"] for kill in found["kills"]]
    assert len(hits) == 20 and hits.count("write") >= 5
    assert found["same adapter"] and found["same history"] and found["left over"] == []


@pytest.mark.parametrize("fault", RECORD["faults"], ids=lambda fault: fault["fault"])
def test_every_fault_ends_in_a_sentence_with_its_mend_or_goes_on(fault):
    if fault["exit code"]:
        cause, mend = fault["says"].split("\n  Mend: ")
        assert cause and mend and "Traceback" not in fault["says"]
    else:
        assert fault["says"].startswith("Resuming after step ")
