"""What the row-level records say: rates, means, differences, calibration, repetition, and the verdict in words.

Nothing here runs a model. Every figure comes with an interval; the formulas are those of scipy and statsmodels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import scipy.sparse
import scipy.special
import scipy.stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

Numbers = Sequence[float] | np.ndarray

# --- one number and its interval ----------------------------------------------------------------------------------


def rate(hits: float, n: int) -> dict:
    """A share with its 95% Wilson interval (statsmodels); `hits` may count a tie as one half."""
    low, high = proportion_confint(hits, n, alpha=0.05, method="wilson")
    return {"rate": hits / n, "low": float(low), "high": float(high), "n": n}


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


def paired_difference(before: Numbers, after: Numbers, resamples: int = 9999) -> dict:
    """Mean of after − before over the same items, with a 95% bootstrap interval that keeps each pair together.

    Percentile bootstrap (scipy), with its own fixed seed: the same records give the same interval.
    """
    changes = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    n = len(changes)
    low = high = math.nan
    if n > 1:
        found = scipy.stats.bootstrap(
            (changes,), np.mean, n_resamples=resamples, confidence_level=0.95, method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
        low, high = float(found.low), float(found.high)
    return {"difference": float(changes.mean()), "low": low, "high": high, "n": n}


def sign_test(before: Numbers, after: Numbers) -> float:
    """Two-sided p of McNemar's exact test (statsmodels): do as many items change from 0 to 1 as from 1 to 0?

    For shares of few items, where the bootstrap's interval comes out too narrow.
    """
    old, new = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    table = [[np.sum(old & new), np.sum(old & ~new)], [np.sum(~old & new), np.sum(~old & ~new)]]
    return float(mcnemar(table, exact=True).pvalue)


def moved(difference: dict) -> bool:
    """Whether a change is more than chance: its interval lies on one side of 0 and, where it has a p, p < 0.05."""
    return (difference["low"] > 0 or difference["high"] < 0) and difference.get("p", 0.0) < 0.05


# --- held-out pairs -----------------------------------------------------------------------------------------------


def right(margins: Numbers) -> np.ndarray:
    """1.0 where the margin is above 0, 0.5 at a tie, else 0.0."""
    return (np.sign(np.asarray(margins, dtype=float)) + 1) / 2


def accuracy(margins: Numbers) -> dict:
    """Share of pairs with the higher reward on the chosen answer, as `rate`; a tie counts half."""
    return rate(float(right(margins).sum()), len(margins))


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


def calibration(margins: Numbers, parts: int = 4) -> dict:
    """Is the policy right as often as it says? σ(|margin|) is its confidence that its own order is the right one.

    Returns:
        `bins`: equal parts of the pairs by rising confidence, each with the mean `confidence` and the `accuracy`;
        `brier`: mean (1 − σ(margin))²; `log_loss`: mean −log σ(margin) in nats, which is the DPO loss;
        `expected_error`: |accuracy − confidence| averaged over the pairs' bins.
    """
    margins = np.asarray(margins, dtype=float)
    bins: list[dict] = []
    confidence = scipy.special.expit(np.abs(margins))
    for part in np.array_split(np.argsort(confidence, kind="stable"), min(parts, len(margins))):
        bins.append({"confidence": float(confidence[part].mean()), "accuracy": accuracy(margins[part])})
    gaps = [abs(b["accuracy"]["rate"] - b["confidence"]) * b["accuracy"]["n"] for b in bins]
    return {
        "bins": bins,
        "brier": float(np.mean(scipy.special.expit(-margins) ** 2)),
        "log_loss": float(np.mean(np.logaddexp(0, -margins))),
        "expected_error": float(sum(gaps) / len(margins)),
    }


def reward_by_position(records: Sequence[dict], parts: int = 10) -> dict[str, list[dict]]:
    """Where in an answer its reward lies: the reward earned in each tenth of the tokens, averaged over answers.

    Returns:
        `chosen` and `rejected`, each one `mean` per tenth; the means of a side add up to its mean reward.
    """
    found = {}
    for side in ("chosen", "rejected"):
        shares = np.zeros((len(records), parts))
        for i, record in enumerate(records):
            rewards = np.asarray(record[f"{side}_token_rewards"], dtype=float)
            part = np.minimum((np.arange(len(rewards)) + 0.5) / len(rewards) * parts, parts - 1).astype(int)
            np.add.at(shares[i], part, rewards)
        found[side] = [mean(column) for column in shares.T]
    return found


# --- answers ------------------------------------------------------------------------------------------------------


def distinct(text: str, n: int = 2) -> float:
    """distinct-n (Li et al. 2016): different n-grams of words over all n-grams; 1.0 means no repetition."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def longest_repeat(text: str) -> int:
    """Words in the longest run of words that comes at least twice; 0 where no word does."""
    words = text.split()
    n = 0
    while len({tuple(words[i : i + n + 1]) for i in range(len(words) - n)}) < len(words) - n:
        n += 1
    return n


#: Form of an answer → its value, one number per answer.
FORM: dict[str, Callable[[dict], float]] = {
    "tokens": lambda a: a["tokens"],
    "finished": lambda a: float(a["finished"]),
    "distinct-2": lambda a: distinct(a["text"]),
    "longest repeat (words)": lambda a: longest_repeat(a["text"]),
}


def form(before: Sequence[dict], after: Sequence[dict]) -> dict[str, dict]:
    """Length, finished share and repetition of the answers that base and policy give to the same prompts.

    Returns:
        `before` and `after`: for each of `FORM` a `mean`, or a `rate` for the finished share; `change`: the paired
        differences.
    """
    return _compare(before, after, FORM, shares={"finished"})


def rules(before: Sequence[dict], after: Sequence[dict], checks: dict[str, Callable[[dict], bool]]) -> dict[str, dict]:
    """Share of answers that keep each rule: `before`, `after` as `rate`; `change` as `paired_difference`, with `p`."""
    return _compare(before, after, checks, shares=set(checks))


def equal_length(before: Sequence[dict], after: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """Both answers to a prompt cut to as many words as the shorter one has: what still differs is not their length."""
    cut: tuple[list[dict], list[dict]] = ([], [])
    for both in zip(before, after, strict=True):
        words = [list(re.finditer(r"\S+", answer["text"])) for answer in both]
        n = min(map(len, words))
        for answers, answer, found in zip(cut, both, words, strict=True):
            answers.append(answer | {"text": answer["text"][: found[n - 1].end() if n else 0]})
    return cut


def _compare(before, after, values: dict[str, Callable], shares: set[str]) -> dict[str, dict]:
    found: dict[str, dict] = {"before": {}, "after": {}, "change": {}}
    for name, value in values.items():
        old, new = ([float(value(answer)) for answer in answers] for answers in (before, after))
        for when, column in (("before", old), ("after", new)):
            found[when][name] = rate(sum(column), len(column)) if name in shares else mean(column)
        found["change"][name] = paired_difference(old, new) | ({"p": sign_test(old, new)} if name in shares else {})
    return found
