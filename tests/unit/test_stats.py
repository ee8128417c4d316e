"""Each statistic against a value worked by hand or given by scipy, statsmodels or scikit-learn."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from conftest import TEXTS, pair
from datasets import Dataset
from sklearn.metrics import brier_score_loss, log_loss

from dpo_tutorial.comparing import answer_form, baselines, significance, stats, verdict
from dpo_tutorial.pairs import row_checks


def record(margin, gap=0, **more):
    """A row-level record with this margin, all of it earned by the chosen answer."""
    return {
        "prompt_id": f"{gap}", "margin": margin, "reward_chosen": margin, "reward_rejected": 0.0,
        "chosen_tokens": 50 + gap, "rejected_tokens": 50,
    } | more  # fmt: skip


# --- one number and its interval ----


def test_wilson_interval_is_the_textbook_one():
    # 8 of 10: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n) with z = 1.96
    found = stats.rate(8, 10)
    assert (found["rate"], found["n"]) == (0.8, 10)
    assert found["low"] == pytest.approx(0.4902, abs=1e-3) and found["high"] == pytest.approx(0.9433, abs=1e-3)


def test_a_share_without_halves_is_wilsons_and_one_with_halves_is_narrower():
    assert stats.share([1, 1, 0, 1]) == stats.rate(3, 4)
    # mean 0.6, variance (4 · 0.16 + 4 · 0.01 + 2 · 0.36) / 10 = 0.14: as many as 10 · 0.24 / 0.14 = 120/7 tosses
    found = stats.share([1.0] * 4 + [0.5] * 4 + [0.0] * 2)
    wilson = stats.rate(0.6 * 120 / 7, 120 / 7)
    assert found["rate"] == pytest.approx(0.6) and found["n"] == 10
    assert (found["low"], found["high"]) == pytest.approx((wilson["low"], wilson["high"]))
    whole = stats.rate(6, 10)
    assert whole["low"] < found["low"] < 0.6 < found["high"] < whole["high"]


def test_a_share_of_nothing_but_halves_is_a_constant():
    assert stats.share([0.5] * 6) == {"rate": 0.5, "low": 0.5, "high": 0.5, "n": 6}


@pytest.mark.parametrize("odds", [(0.1, 0.5, 0.4), (0.2, 0.1, 0.7), (0.05, 0.9, 0.05)])
def test_the_interval_of_a_share_is_about_as_wide_as_that_of_the_bootstrap(odds):
    values = np.random.default_rng(1).choice([0.0, 0.5, 1.0], size=400, p=odds)
    found = stats.share(values)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, vectorized=True, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval  # fmt: skip
    assert (found["low"], found["high"]) == pytest.approx((theirs.low, theirs.high), abs=0.005)


def test_a_mean_has_the_standard_error_and_t_interval_of_scipy():
    values = [1.0, 2.0, 4.0, 9.0]
    found = stats.mean(values)
    low, high = scipy.stats.t.interval(0.95, 3, loc=4.0, scale=scipy.stats.sem(values))
    assert found["mean"] == 4.0 and found["n"] == 4
    assert found["standard_error"] == pytest.approx(scipy.stats.sem(values))
    assert (found["low"], found["high"]) == pytest.approx((low, high))


def test_one_value_has_a_mean_and_no_error():
    found = stats.mean([3.0])
    assert found["mean"] == 3.0 and math.isnan(found["standard_error"]) and math.isnan(found["low"])
    assert math.isnan(stats.paired_difference([1.0], [2.0])["low"])


def test_a_ratio_is_of_the_sums_and_its_error_that_of_the_delta_method():
    # log-ratios 2 and 8 over 10 and 30 tokens: 10/40; residuals (2 - 2.5)/20 and (8 - 7.5)/20
    found = stats.ratio([2.0, 8.0], [10, 30])
    assert found["mean"] == 0.25 and found["standard_error"] == pytest.approx(0.025)
    assert found["high"] - found["mean"] == pytest.approx(0.025 * scipy.stats.t.ppf(0.975, 1))


def test_a_paired_difference_has_the_interval_of_scipys_paired_bootstrap():
    before, after = [0.0, 1.0, 2.0, 3.0, 2.0, 1.0], [1.0, 1.0, 4.0, 3.0, 3.0, 0.0]
    found = stats.paired_difference(before, after)
    theirs = scipy.stats.bootstrap(
        (np.array(after), np.array(before)), lambda a, b, axis: np.mean(a - b, axis=axis), paired=True,
        vectorized=True, method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert found["difference"] == pytest.approx(0.5) and found["n"] == 6
    assert (found["low"], found["high"]) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert found == stats.paired_difference(before, after), "the same records give the same interval"


def test_the_sign_test_is_the_binomial_one_over_the_items_that_changed():
    before, after = [0, 0, 0, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0, 0]
    assert significance.sign_test(before, after) == pytest.approx(scipy.stats.binomtest(1, 6).pvalue)


def test_the_permutation_test_is_the_full_enumeration_of_sign_flips():
    before, after = [1.0, 2.0, 2.0, 5.0, 3.0, 1.0, 4.0, 2.0], [2.0, 5.0, 3.0, 5.5, 2.5, 4.0, 6.0, 4.5]
    changes = np.subtract(after, before)
    sums = [abs(np.dot(signs, changes)) for signs in itertools.product((-1, 1), repeat=8)]
    assert significance.permutation_test(before, after) == pytest.approx(
        np.mean(np.array(sums) > abs(changes.sum()) - 1e-9)
    )
    assert significance.permutation_test(after, before) == significance.permutation_test(before, after) < 0.05


def test_a_permutation_test_of_nothing_that_changed_is_1_and_of_many_items_repeats():
    assert significance.permutation_test([1.0, 2.0], [1.0, 2.0]) == 1.0
    assert significance.permutation_test([1.0], [2.0]) == 1.0, "one item cannot tell"
    many = np.random.default_rng(2).normal(0.2, 1.0, size=60)
    found = significance.permutation_test(np.zeros(60), many)
    assert found == significance.permutation_test(np.zeros(60), many)
    assert found == pytest.approx(scipy.stats.ttest_1samp(many, 0).pvalue, abs=0.02)


def test_corrected_is_holms_over_all_comparisons_together():
    one = {"before": {}, "change": {"a": {"p": 0.01}, "b": {"p": 0.04}}}
    two = {"change": {"a": {"p": 0.03}, "c": {"p": 0.9}}}
    first, second = stats.corrected(one, two)
    # in order 0.01 · 4, 0.03 · 3, 0.04 · 2 (raised to the one before), 0.9 · 1
    assert [first["change"][name]["corrected"] for name in "ab"] == pytest.approx([0.04, 0.09])
    assert [second["change"][name]["corrected"] for name in "ac"] == pytest.approx([0.09, 0.9])
    assert first["before"] == {} and "corrected" not in one["change"]["a"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [({"p": 0.01}, True), ({"p": 0.05}, False), ({"p": 0.01, "corrected": 0.06}, False),
     ({"p": 0.001, "corrected": 0.04}, True)],
)  # fmt: skip
def test_moved_goes_by_the_corrected_p_and_by_the_plain_one_where_there_is_no_other(change, expected):
    assert stats.moved(change) is expected


# --- held-out pairs ----


def test_a_tie_counts_half():
    summary = stats.summarise([record(1.0), record(0.0), record(-1.0), record(0.0)])
    assert summary["accuracy"]["rate"] == 0.5 and summary["ties"] == 2
    assert summary["pick_the_longer"]["rate"] == 0.5
    assert stats.right([2.0, 0.0, -3.0]).tolist() == [1.0, 0.5, 0.0]


def test_length_rules_count_the_longer_and_the_shorter_chosen_answer():
    summary = stats.summarise([record(1.0, gap) for gap in (5, 3, -2, 0)])
    assert summary["pick_the_longer"]["rate"] == 2.5 / 4 and summary["pick_the_shorter"]["rate"] == 1.5 / 4


def test_an_untrained_policy_ties_on_every_pair():
    summary = stats.summarise(stats.untrained([record(1.0), record(-2.0), record(3.0)]))
    assert summary["accuracy"]["rate"] == 0.5 and summary["ties"] == 3 and summary["margin"]["mean"] == 0
    assert summary["calibration"]["log_loss"] == pytest.approx(math.log(2))


def test_thirds_by_length_gap_show_a_policy_that_goes_by_length():
    records = [record(float(gap), gap) for gap in (-9, -7, -5, -1, 0, 1, 5, 7, 9)]  # rewards the longer answer
    parts = stats.by_length_gap(records)
    assert [(p["shortest"], p["longest"]) for p in parts] == [(-9, -5), (-1, 1), (5, 9)]
    assert [p["accuracy"]["rate"] for p in parts] == [0.0, 0.5, 1.0]
    assert [p["accuracy"]["n"] for p in parts] == [3, 3, 3]


def test_calibration_worked_by_hand():
    # σ(0) = 0.5 twice (ties, half right); σ(ln 3) = 0.75 twice, one right and one wrong
    found = stats.calibration([0.0, 0.0, math.log(3), -math.log(3)])
    confidence = [b["confidence"] for b in found["bins"]]
    assert confidence == pytest.approx([0.5, 0.5, 0.75, 0.75])
    assert [b["accuracy"]["rate"] for b in found["bins"]] == [0.5, 0.5, 1.0, 0.0]
    assert found["expected_error"] == pytest.approx((0 + 0 + 0.25 + 0.75) / 4)


def test_brier_and_log_loss_are_those_of_scikit_learn_with_either_answer_first():
    margins = np.array([2.0, -1.0, 0.3, 4.0, -0.2])
    p = 1 / (1 + np.exp(-margins))
    labels, said = [1] * 5 + [0] * 5, [*p, *(1 - p)]
    found = stats.calibration(margins)
    assert found["brier"] == pytest.approx(brier_score_loss(labels, said))
    assert found["log_loss"] == pytest.approx(log_loss(labels, said))


def test_rewards_by_position_add_up_to_the_reward_and_lie_where_they_were_earned():
    rows = [
        {"chosen_token_rewards": [1.0] + [0.0] * 19, "rejected_token_rewards": [0.0] * 9 + [-2.0]},
        {"chosen_token_rewards": [3.0, 0.0, 0.0, 0.0], "rejected_token_rewards": [-1.0]},
    ]
    found = stats.reward_by_position(rows)
    chosen, rejected = ([part["mean"] for part in found[side]] for side in ("chosen", "rejected"))
    assert chosen[0] == 0.5 and chosen[1] == 1.5 and sum(chosen) == pytest.approx(2.0)
    assert rejected[9] == -1.0 and rejected[5] == -0.5 and sum(rejected) == pytest.approx(-1.5)


def test_bag_of_words_finds_a_surface_preference_and_nothing_where_there_is_none():
    good = [
        row_checks.extract(pair(f"Question {i}?", f"Plain answer {i}.", f"Great question! Item {i}."))
        for i in range(30)
    ]
    noise = [
        row_checks.extract(pair(*(t[:2] if i % 2 else (t[0], t[2])), t[2] if i % 2 else t[1]))
        for i in range(6)
        for t in TEXTS
    ]
    assert baselines.bag_of_words(Dataset.from_list(good[:20]), Dataset.from_list(good[20:])) == [1.0] * 10
    assert np.mean(baselines.bag_of_words(Dataset.from_list(noise), Dataset.from_list(noise))) == pytest.approx(
        0.5, abs=0.1
    )


JUDGED = [
    {"margin": m, "chosen_tokens": c, "rejected_tokens": r, "reference_chosen": lc, "reference_rejected": lr}
    for m, c, r, lc, lr in (
        (1.0, 10, 20, -10.0, -30.0),
        (2.0, 10, 30, -20.0, -30.0),
        (0.0, 10, 10, -30.0, -20.0),
        (-1.0, 20, 10, -30.0, -10.0),
    )
]  # fmt: skip


def test_each_judge_is_read_in_the_direction_that_suits_it():
    found = baselines.judges(JUDGED, [1.0, 0.0, 1.0, 0.5])
    assert found == {
        "word counts": [1.0, 0.0, 1.0, 0.5],
        "shorter": [1.0, 1.0, 0.5, 0.0],
        "likelier for the base": [1.0, 1.0, 0.0, 0.0],
        "less likely per token": [0.0, 1.0, 1.0, 1.0],  # -1 and -1.5, -2 and -1, -3 and -2, -1.5 and -1
    }


def test_a_judge_beside_the_policy_has_its_share_and_the_paired_difference():
    ((name, found),) = baselines.against(JUDGED, {"words": [1.0, 0.0, 1.0, 0.5]}).items()
    assert name == "words" and found["share"] == stats.share([1.0, 0.0, 1.0, 0.5])
    assert found["difference"] == stats.paired_difference([1.0, 0.0, 1.0, 0.5], [1.0, 1.0, 0.5, 0.0])


def test_by_kind_the_largest_comes_first_and_each_pair_counts_in_its_own():
    found = baselines.by_kind(JUDGED, {"words": [1.0, 0.0, 1.0, 0.5]}, ["b", "a", "b", "a"])
    assert list(found) == ["a", "b"] and [row["n"] for row in found.values()] == [2, 2]
    assert found["a"]["policy"] == stats.share([1.0, 0.0]) and found["b"]["policy"] == stats.share([1.0, 0.5])
    assert found["a"]["words"] == stats.share([0.0, 0.5])
    assert list(baselines.by_kind(JUDGED, {}, ["b", "a", "b", "b"])) == ["b", "a"]


# --- answers ----


def test_distinct_falls_with_repetition():
    assert answer_form.distinct("one two three four") == 1.0
    assert answer_form.distinct("ha ha ha ha ha") == 0.25


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("one two three", 0),
        ("one two one three", 1),
        ("take it and go and take it and stop", 3),
        ("ha ha ha ha", 3),
        ("", 0),
        ("word", 0),
    ],
)
def test_the_longest_repeat_is_the_longest_run_that_comes_twice(text, words):
    assert answer_form.longest_repeat(text) == words


def answer(text, tokens=5, finished=True):
    return {"text": text, "tokens": tokens, "finished": finished}


def test_form_compares_the_same_prompts_before_and_after():
    before = [answer("a b a b", 10, False), answer("c d e", 20, False), answer("f", 30, True)]
    after = [answer("a b", 8), answer("c d", 16), answer("f", 30)]
    found = stats.form(before, after)
    assert found["before"]["tokens"]["mean"] == 20 and found["after"]["tokens"]["mean"] == 18
    assert found["change"]["tokens"]["difference"] == pytest.approx(-2)
    assert found["before"]["finished"] == stats.rate(1, 3) and found["after"]["finished"] == stats.rate(3, 3)
    assert found["before"]["longest repeat (words)"]["mean"] == pytest.approx(2 / 3)
    assert found["change"]["finished"]["p"] == pytest.approx(scipy.stats.binomtest(0, 2).pvalue)
    assert (
        found["change"]["tokens"]["p"] == significance.permutation_test([10, 20, 30], [8, 16, 30])
        and "target" not in found
    )
    target = stats.form(before, after, [answer("a", 6), answer("b", 8)])["target"]
    assert target["tokens"]["mean"] == 7 and target["finished"] == stats.rate(2, 2)


def test_equal_length_cuts_both_answers_to_the_words_of_the_shorter_and_keeps_their_line_breaks():
    before, after = [answer("a\n\nb c  d"), answer("x"), answer("gone")], [answer("e f g"), answer("x y"), answer("")]
    cut = stats.equal_length(before, after)
    assert [[a["text"] for a in side] for side in cut] == [["a\n\nb c", "x", ""], ["e f g", "x", ""]]
    assert before[0]["text"] == "a\n\nb c  d" and cut[0][0]["tokens"] == before[0]["tokens"]


def test_rules_hold_the_rates_and_the_paired_change():
    checks = {"short": lambda a: a["tokens"] < 10}
    found = stats.rules([answer("x", 20)] * 8, [answer("x", 5)] * 7 + [answer("x", 20)], checks)
    assert found["before"]["short"]["rate"] == 0 and found["after"]["short"]["rate"] == 7 / 8
    change = found["change"]["short"]
    assert change["difference"] == 7 / 8 and change["p"] == pytest.approx(scipy.stats.binomtest(0, 7).pvalue)
    assert stats.moved(change)


# --- in words ----

REWARD = {"mean": -1.0, "low": -1.5, "high": -0.5}


def told(held_out, rules, **measured):
    """The verdict where all but this was measured and nothing else moved."""
    same, at_rest = [answer("a")], {"p": 1.0, "smallest": significance.smallest_change(2, 0)}
    nothing = {
        "noise": {"spread": 0.0, "floor": 0.0, "within": 0},
        "against": {"shorter": {"share": stats.rate(1, 2), "difference": {"difference": 0.1, "low": 0.0, "high": 0.2}}},
        "kl": {"inside": {"per_answer": {"mean": 0.0, "low": 0.0, "high": 0.0}, "per_token": {"mean": 0.0}}},
        "form": stats.form(same, same), "same_length": stats.rules(same, same, {}), "same_form": stats.form(same, same),
        "instructions": dict.fromkeys(("before", "after"), stats.rate(1, 2)) | dict(gained=0, lost=0) | at_rest,
    }  # fmt: skip
    return verdict.verdict({"held_out": {"after": held_out}, "rules": rules} | nothing | measured)


@pytest.mark.parametrize(
    ("hits", "words"), [(58, "tells chosen from rejected"), (30, "No effect"), (5, "swapped labels")]
)
def test_the_verdict_follows_the_numbers(hits, words):
    held_out = {
        "accuracy": stats.rate(hits, 60), "reward_chosen": REWARD | {"mean": -0.5}, "reward_rejected": REWARD,
    }  # fmt: skip
    rules = {
        "before": {"no opener": stats.rate(2, 24), "plain words": stats.rate(12, 24)},
        "after": {"no opener": stats.rate(23, 24), "plain words": stats.rate(13, 24)},
        "change": {
            "no opener": {"low": 0.7, "high": 1.0, "p": 1e-6}, "plain words": {"low": -0.1, "high": 0.2, "p": 1.0},
        },
    }  # fmt: skip
    noise = {"spread": 0.0255, "floor": 0.05, "within": 3, "dtype": "bf16"}
    said = told(held_out, rules, noise=noise)
    assert words in said[0] and "3 of 60 margins" in said[2] and "Both sides became less likely" in said[3]
    assert "no opener 8% → 96%" in said[5] and "plain words" not in said[5] and "plain words" in said[7]
    assert len(said) == 8, "nothing is said of what did not move"
    for within, dtype, advised in ((3, "bf16", False), (16, "bf16", True), (16, "fp32", False)):
        said = told(held_out, rules, noise=noise | {"within": within, "dtype": dtype})
        assert ("DTYPE=fp32" in said[2]) is advised, (within, dtype)


HELD_OUT = {
    "accuracy": stats.rate(58, 60),
    "reward_chosen": {"mean": 1.0, "low": 0.5, "high": 1.5},
    "reward_rejected": REWARD,
}


@pytest.mark.parametrize(
    ("chosen", "rejected", "words"),
    [
        ((0.5, 1.5), (-1.5, -0.5), "Chosen answers became more likely and rejected ones less"),
        ((-0.1, 0.9), (-1.5, -0.5), "For at least one of them no change is shown"),
        ((-0.9, -0.1), (-1.5, -0.5), "Both sides became less likely"),
        ((-0.9, -0.1), (-0.1, 0.9), "For at least one of them no change is shown"),
        ((math.nan, math.nan), (-1.5, -0.5), "For at least one of them no change is shown"),
        ((0.5, 1.5), (0.1, 0.9), "Both sides became more likely"),
        ((0.5, 1.5), (-0.1, 0.9), "For at least one of them no change is shown"),
        ((-0.1, 1.5), (0.1, 0.9), "For at least one of them no change is shown"),
    ],
)
def test_a_reward_moves_only_where_its_interval_leaves_zero_out(chosen, rejected, words):
    sides = zip(("reward_chosen", "reward_rejected"), (chosen, rejected), strict=True)
    found = HELD_OUT | {side: {"mean": 0.4, "low": low, "high": high} for side, (low, high) in sides}
    assert words in told(found, stats.rules([answer("a")], [answer("a")], {"a": bool}))[3]


@pytest.mark.parametrize(
    ("low", "words"),
    [
        (
            0.05,
            "As a judge the policy is better than each of them, and least so than shorter (+0.10, +0.05 to +0.20).",
        ),
        (-0.05, "As a judge the policy is not shown to be better than shorter (+0.10, -0.05 to +0.20)."),
    ],
)
def test_the_verdict_names_the_judges_the_distance_and_what_is_left_at_equal_length(low, words):
    base, trained = [answer("one\n\ntwo", 80)] * 8, [answer("one", 40)] * 7 + [answer("one", 42)]
    checks = {"one paragraph": lambda a: "\n" not in a["text"], "says one": lambda a: "one" in a["text"]}
    against = {
        "word counts": {"share": stats.rate(50, 60), "difference": {"difference": 0.25, "low": 0.1, "high": 0.4}},
        "shorter": {"share": stats.rate(52, 60), "difference": {"difference": 0.1, "low": low, "high": 0.2}},
    }
    said = told(
        HELD_OUT, stats.rules(base, trained, checks), against=against,
        kl={"inside": {"per_answer": {"mean": 9.0, "low": 6.0, "high": 12.0}, "per_token": {"mean": 0.1}}},
        form=stats.form(base, trained),
        same_length=stats.rules(*stats.equal_length(base, trained), checks),
    )  # fmt: skip
    assert said[1].startswith("Simple judges of the same pairs: word counts 0.83, shorter 0.87.") and words in said[1]
    assert "9.0 nats from the base (6.0 to 12.0), 0.10 a token" in said[4]
    assert "one paragraph 0% → 100%" in said[5] and said[6] == "Answers became shorter: 80 → 40 tokens."
    assert said[7] == "At equal length, no change is shown for: one paragraph 100% → 100%." and "says one" in said[9]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ([1] * 12, "base follows 50%, the policy 80% (12 gained, 0 lost): a gain, p 0.00049."),
        ([0] * 12, "base follows 80%, the policy 50% (0 gained, 12 lost): a loss, p 0.00049."),
        ([1], "base follows 50%, the policy 52% (1 gained, 0 lost): no change is shown; too few changed to show"),
        ([0, 1] * 6, "(6 gained, 6 lost): no change is shown; it would have found"),
    ],
)
def test_the_verdict_says_what_training_cost_in_following_instructions(changed, words):
    after = [1] * 20 + changed + [0] * (20 - len(changed))
    before = [1] * 20 + [1 - new for new in changed] + [0] * (20 - len(changed))
    p, smallest = significance.sign_test(before, after), significance.smallest_change(40, len(changed))
    found = {"before": stats.share(before), "after": stats.share(after), "gained": sum(changed), "p": p}
    found |= {"lost": len(changed) - sum(changed), "smallest": smallest}
    said = told(HELD_OUT, stats.rules([answer("a")], [answer("a")], {"a": bool}), instructions=found)
    assert said[-2].startswith("Of 40 requests that a program can check the ") and words in said[-2]


def test_more_repetition_at_equal_length_is_said():
    base = [answer("a b c d e f g h i j")] * 8
    trained = [answer("a b c a b c a b c a")] * 7 + [answer("a b a b a b a b a b")]
    checks = {"says a": lambda a: "a" in a["text"]}
    cut = stats.equal_length(base, trained)
    said = told(HELD_OUT, stats.rules(base, trained, checks), same_form=stats.form(*cut))
    assert any(s.startswith("At equal length the policy repeats itself more: its longest repeat is +") for s in said)
    again = told(HELD_OUT, stats.rules(base, base, checks), same_form=stats.form(base, base))
    assert not any("repeats itself" in s for s in again)
