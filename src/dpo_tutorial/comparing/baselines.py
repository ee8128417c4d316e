"""Judges that no training on preferences has made, to compare an accuracy with."""

from collections.abc import Sequence

import numpy as np
import scipy.sparse
from datasets import Dataset

from . import stats
from .stats import right


def bag_of_words(train: Dataset, test: Dataset) -> list[float]:
    """Whether a logistic regression over words and word pairs finds the chosen answer of each test pair.

    It sees the difference of the two answers' word counts and nothing else: no prompt, no order but that of neighbours.

    Returns:
        One value per test pair, as `right`; all 0.5 where the training answers are too few to share a word.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    def texts(split, side):
        return [answer[0]["content"] for answer in split[side]]

    words = CountVectorizer(ngram_range=(1, 2), min_df=2, token_pattern=r"[\w']+|[^\w\s]")
    try:
        words.fit(texts(train, "chosen") + texts(train, "rejected"))
    except ValueError:  # nothing comes in two answers
        return [0.5] * len(test)

    def difference(split):
        return words.transform(texts(split, "chosen")).astype(float) - words.transform(texts(split, "rejected"))

    x = difference(train)
    model = LogisticRegression(fit_intercept=False, C=0.1, max_iter=1000)
    model.fit(scipy.sparse.vstack([x, -x]), [1] * x.shape[0] + [0] * x.shape[0])
    return right(model.decision_function(difference(test))).tolist()


def judges(records: Sequence[dict], words: Sequence[float] | None) -> dict[str, list[float]]:
    """What each simple judge makes of each pair, as `right`: name → one value per record.

    Length and the base's log-probability, whole and per token, can be read in two directions. Each is taken in the one
    that suits it better on these very pairs, which is more than a judge may ask for. `records` are those of
    `scoring.score_pairs`; `words` is what `bag_of_words` gives for the same pairs, None leaves it out.
    """
    found = {"word counts": list(words)} if words else {}
    longer = [r["chosen_tokens"] - r["rejected_tokens"] for r in records]
    likelier = [r["reference_chosen"] - r["reference_rejected"] for r in records]
    per_token = [
        r["reference_chosen"] / r["chosen_tokens"] - r["reference_rejected"] / r["rejected_tokens"] for r in records
    ]
    for more, less, values in (
        ("longer", "shorter", longer),
        ("likelier for the base", "less likely for the base", likelier),
        ("likelier per token", "less likely per token", per_token),
    ):
        verdicts = right(values)
        forward = verdicts.mean() >= 0.5
        found[more if forward else less] = (verdicts if forward else 1 - verdicts).tolist()
    return found


def against(records: Sequence[dict], verdicts: dict[str, list[float]]) -> dict[str, dict]:
    """Each simple judge beside the policy on the same pairs.

    Returns:
        name → `share`, its accuracy, and `difference`, the policy's accuracy minus that, paired, with an interval.
    """
    policy = right([r["margin"] for r in records])
    return {
        name: {"share": stats.share(found), "difference": stats.paired_difference(found, policy)}
        for name, found in verdicts.items()
    }


def by_kind(records: Sequence[dict], verdicts: dict[str, list[float]], kinds: Sequence[str]) -> dict[str, dict]:
    """Accuracy by kind of the rejected answer.

    Returns:
        kind → `n`, `policy` and each judge, a `share` each; the kinds in the order of their size.
    """
    columns = {"policy": right([r["margin"] for r in records]).tolist()} | verdicts
    named = np.array(kinds)
    sizes = sorted(set(kinds), key=lambda kind: (-int((named == kind).sum()), kind))
    return {
        kind: {"n": int((named == kind).sum())}
        | {name: stats.share(np.array(values)[named == kind]) for name, values in columns.items()}
        for kind in sizes
    }
