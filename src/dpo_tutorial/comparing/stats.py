"""What the row-level records say: rates, means, differences, calibration, repetition, and the verdict in words.

Nothing here runs a model. Every figure comes with an interval; the formulas are those of scipy and statsmodels.
"""

import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import scipy.special
import scipy.stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

from .answer_form import FORM
from .significance import Numbers, permutation_test, sign_test

# --- one number and its interval ----------------------------------------------------------------------------------


def rate(hits: int, n: int) -> dict:
    """A share with its 95% Wilson interval (statsmodels)."""
    low, high = proportion_confint(hits, n, alpha=0.05, method="wilson")
    return {"rate": hits / n, "low": float(low), "high": float(high), "n": n}


def share(values: Numbers) -> dict:
    """The mean of values of 0, ½ (a tie) and 1, as `rate`.

    A half varies less than a toss of a coin, and Wilson's formula takes each value for one. So it is given as many
    tosses as would vary as much: n · p(1 − p) / variance. Where there is no half, that is n. Values that are all one
    half are a constant: it gets no interval.
    """
    found = np.asarray(values, dtype=float)
    n, p, variance = len(found), float(found.mean()), float(found.var())
    if not np.any(found == 0.5):
        return rate(int(found.sum()), n)
    if variance == 0:
        return {"rate": p, "low": p, "high": p, "n": n}
    tosses = n * p * (1 - p) / variance
    return rate(p * tosses, tosses) | {"n": n}  # type: ignore[arg-type]  # Wilson's formula takes fractions


def mean(values: Numbers) -> dict:
    """A mean with its standard error and its 95% t interval (statsmodels); NaN where one value allows none."""
    found = DescrStatsW(np.asarray(values, dtype=float))
    n = len(values)
    error = float(found.std_mean) if n > 1 else math.nan
    low, high = found.tconfint_mean(alpha=0.05) if n > 1 else (math.nan, math.nan)
    return {"mean": float(found.mean), "standard_error": error, "low": float(low), "high": float(high), "n": n}


def ratio(numerators: Numbers, denominators: Numbers) -> dict:
    """Σ numerators / Σ denominators, for example nats per token over answers; its error by the delta method.

    Returns:
        As `mean`; `n` counts the pairs of numerator and denominator.
    """
    top, bottom = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    value = top.sum() / bottom.sum()
    spread = mean((top - value * bottom) / bottom.mean())
    return spread | {name: float(value + spread[name]) for name in ("mean", "low", "high")}


def paired_difference(before: Numbers, after: Numbers) -> dict:
    """Mean of after − before over the same items, with a 95% bootstrap interval that keeps each pair together.

    Percentile bootstrap (scipy), with its own fixed seed: the same records give the same interval.
    """
    changes = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    n = len(changes)
    low = high = math.nan
    if n > 1:
        found = scipy.stats.bootstrap(
            (changes,), np.mean, n_resamples=9999, confidence_level=0.95, method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
        low, high = float(found.low), float(found.high)
    return {"difference": float(changes.mean()), "low": low, "high": high, "n": n}


def corrected(*comparisons: dict[str, dict]) -> list[dict[str, dict]]:
    """The `rules` and `form` given, each change with `corrected`: its p after Holm's correction over all together.

    Holm (1979), by statsmodels: the chance of even one false finding among all that were tested stays below 5%.
    """
    ps = [change["p"] for comparison in comparisons for change in comparison["change"].values()]
    after = iter(multipletests(ps, method="holm")[1].tolist())
    return [
        comparison | {"change": {name: c | {"corrected": next(after)} for name, c in comparison["change"].items()}}
        for comparison in comparisons
    ]


def moved(change: dict) -> bool:
    """Whether a change is more than chance: its p, corrected where others were tested with it, is below 0.05."""
    return change.get("corrected", change["p"]) < 0.05


# --- held-out pairs -----------------------------------------------------------------------------------------------


def right(margins: Numbers) -> np.ndarray:
    """1.0 where the margin is above 0, 0.5 at a tie, else 0.0."""
    return (np.sign(np.asarray(margins, dtype=float)) + 1) / 2


def accuracy(margins: Numbers) -> dict:
    """Share of pairs with the higher reward on the chosen answer, as `share`; a tie counts half."""
    return share(right(margins))


def summarise(records: Sequence[dict]) -> dict:
    """Everything the report says of held-out pairs, derived from the row-level records.

    A pair is right when the chosen answer earns the higher implicit reward; a tie counts half. Before training every
    pair ties (policy and reference are one model), so the accuracy is 0.5 by construction.
    """
    margins = [r["margin"] for r in records]
    gaps = np.array([r["chosen_tokens"] - r["rejected_tokens"] for r in records])
    return {
        "accuracy": accuracy(margins),
        "ties": int(np.sum(np.equal(margins, 0))),
        "margin": mean(margins),
        "reward_chosen": mean([r["reward_chosen"] for r in records]),
        "reward_rejected": mean([r["reward_rejected"] for r in records]),
        "pick_the_longer": accuracy(gaps),
        "pick_the_shorter": accuracy(-gaps),
        "by_length_gap": by_length_gap(records),
        "calibration": calibration(margins),
    }


def untrained(records: Sequence[dict]) -> list[dict]:
    """The same records for a policy that is its own reference: every reward and margin is 0."""
    return [r | {"reward_chosen": 0.0, "reward_rejected": 0.0, "margin": 0.0} for r in records]


def by_length_gap(records: Sequence[dict], parts: int = 3) -> list[dict]:
    """Accuracy in equal parts of the pairs, from "chosen much shorter" to "chosen much longer" than rejected.

    A policy that goes by length is right at one end and wrong at the other.

    Returns:
        One `{"shortest", "longest", "accuracy"}` per part; the gaps are chosen minus rejected, in tokens.
    """
    ordered = sorted(records, key=lambda r: (r["chosen_tokens"] - r["rejected_tokens"], r["prompt_id"]))
    found = []
    for part in np.array_split(np.arange(len(ordered)), min(parts, len(ordered))):
        rows = [ordered[i] for i in part]
        gaps = [r["chosen_tokens"] - r["rejected_tokens"] for r in rows]
        found.append({"shortest": gaps[0], "longest": gaps[-1], "accuracy": accuracy([r["margin"] for r in rows])})
    return found


def calibration(margins: Numbers) -> dict:
    """Is the policy right as often as it says? σ(|margin|) is its confidence that its own order is the right one.

    Returns:
        `bins`: equal parts of the pairs by rising confidence, each with the mean `confidence` and the `accuracy`;
        `brier`: mean (1 − σ(margin))²; `log_loss`: mean −log σ(margin) in nats, which is the DPO loss;
        `expected_error`: |accuracy − confidence| averaged over the pairs' bins.
    """
    margins = np.asarray(margins, dtype=float)
    bins: list[dict] = []
    confidence = scipy.special.expit(np.abs(margins))
    for part in np.array_split(np.argsort(confidence, kind="stable"), min(4, len(margins))):
        bins.append({"confidence": float(confidence[part].mean()), "accuracy": accuracy(margins[part])})
    gaps = [abs(b["accuracy"]["rate"] - b["confidence"]) * b["accuracy"]["n"] for b in bins]
    return {
        "bins": bins,
        "brier": float(np.mean(scipy.special.expit(-margins) ** 2)),
        "log_loss": float(np.mean(np.logaddexp(0, -margins))),
        "expected_error": float(sum(gaps) / len(margins)),
    }


def reward_by_position(records: Sequence[dict]) -> dict[str, list[dict]]:
    """Where in an answer its reward lies: the reward earned in each tenth of the tokens, averaged over answers.

    Returns:
        `chosen` and `rejected`, each one `mean` per tenth; the means of a side add up to its mean reward.
    """
    found = {}
    for side in ("chosen", "rejected"):
        shares = np.zeros((len(records), 10))
        for i, record in enumerate(records):
            rewards = np.asarray(record[f"{side}_token_rewards"], dtype=float)
            part = np.minimum((np.arange(len(rewards)) + 0.5) / len(rewards) * 10, 9).astype(int)
            np.add.at(shares[i], part, rewards)
        found[side] = [mean(column) for column in shares.T]
    return found


# --- answers ------------------------------------------------------------------------------------------------------


def form(before: Sequence[dict], after: Sequence[dict], target: Sequence[dict] = ()) -> dict[str, dict]:
    """Length, finished share and repetition of the answers that base and policy give to the same prompts.

    Args:
        target: the chosen answers to these prompts, in the same form, to see where training pulled.

    Returns:
        `before`, `after` and, if given, `target`: for each of `FORM` a `mean`, or a `rate` for the finished share;
        `change`: the paired differences from before to after, each with its `p`.
    """
    return _compare(before, after, target, FORM, shares={"finished"})


def rules(
    before: Sequence[dict],
    after: Sequence[dict],
    checks: dict[str, Callable[[dict], bool]],
    target: Sequence[dict] = (),
) -> dict[str, dict]:
    """Share of answers that keep each rule, as `rate`; arguments and parts as of `form`."""
    return _compare(before, after, target, checks, shares=set(checks))


def equal_length(before: Sequence[dict], after: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """Both answers to a prompt cut to as many words as the shorter one has: what still differs is not their length."""
    cut: tuple[list[dict], list[dict]] = ([], [])
    for both in zip(before, after, strict=True):
        words = [list(re.finditer(r"\S+", answer["text"])) for answer in both]
        n = min(map(len, words))
        for answers, answer, found in zip(cut, both, words, strict=True):
            answers.append(answer | {"text": answer["text"][: found[n - 1].end() if n else 0]})
    return cut


def _compare(before, after, target, values: dict[str, Callable], shares: set[str]) -> dict[str, dict]:
    found: dict[str, dict] = {"before": {}, "after": {}, "change": {}} | ({"target": {}} if target else {})
    for name, value in values.items():
        measure, test = (share, sign_test) if name in shares else (mean, permutation_test)
        columns = [[float(value(answer)) for answer in answers] for answers in (before, after, target)]
        for when, column in zip(("before", "after", "target"), columns, strict=True):
            if column:
                found[when][name] = measure(column)
        old, new, _ = columns
        found["change"][name] = paired_difference(old, new) | {"p": test(old, new)}
    return found
