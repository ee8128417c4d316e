"""The record of the sweep and the seeds: the page follows it, the profile follows its choice."""

import copy
import json
from pathlib import Path

import pytest
from conftest import script

from dpo_tutorial import config

FOLDER = Path(__file__).parents[1] / "benchmarks"
RECORD = json.loads((FOLDER / "effect.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def effect():
    return script("benchmarks/effect.py")


def test_the_page_is_the_one_that_the_record_gives(effect):
    assert (FOLDER / "effect.md").read_text(encoding="utf-8") == effect.page(RECORD)


def test_the_cpu_profile_has_the_settings_that_the_validation_pairs_chose(effect):
    chosen = effect.SWEEP[effect.choose(RECORD["sweep"]["results"])]
    default, profile = config.Config(), config.PROFILES["cpu"]
    for name in ("learning_rate", "beta", "epochs"):
        wanted = chosen.get(name, effect.START[name])
        assert profile.get(name, getattr(default, name)) == wanted


@pytest.mark.parametrize(
    ("path", "bad"),
    [(("accuracy", "rate"), 0.3), (("reward_chosen", "mean"), -2.0), (("distinct_2", "mean"), 0.1)],
    ids=["inaccurate", "both rewards fall", "repeats itself"],
)
def test_a_setting_that_collapses_is_not_chosen_whatever_rules_it_keeps(effect, path, bad):
    results = copy.deepcopy(RECORD["sweep"]["results"])
    first = effect.choose(results)
    for rule in results[first]["rules"].values():
        rule["rate"] = 1.0
    assert effect.choose(results) == first
    results[first][path[0]][path[1]] = bad
    assert effect.choose(results) != first


def test_of_settings_that_keep_as_many_rules_the_smallest_kl_is_chosen(effect):
    results = copy.deepcopy(RECORD["sweep"]["results"])
    first = effect.choose(results)
    results["the same, nearer"] = copy.deepcopy(results[first])
    results["the same, nearer"]["kl"]["per_answer"]["mean"] /= 2
    assert effect.choose(results) == "the same, nearer"
    for result in results.values():
        result["reward_chosen"]["mean"] = -1.0
    assert effect.choose(results) is None


def test_training_on_swapped_labels_fails_the_evaluation():
    found = RECORD["swapped"]["results"]
    assert found["accuracy"]["rate"] < 0.3 and found["accuracy"]["n"] == 98


def test_three_seeds_reach_the_promised_effect_in_the_promised_time_and_memory(effect):
    results = RECORD["seeds"]["results"]
    assert len(results) == 3
    for run in results.values():
        assert run["accuracy"]["rate"] >= 0.80 and run["accuracy"]["low"] >= 0.70
        assert run["reward_chosen"]["mean"] > 0 > run["reward_rejected"]["mean"]
        chosen = effect.SWEEP[effect.choose(RECORD["sweep"]["results"])]
        assert run["settings"] == effect.START | chosen | {"dtype": run["settings"]["dtype"]}
        assert sum(run["minutes"].values()) <= 15 and run["peak_memory_gib"] <= 6
