"""Judges without a language model, to compare an accuracy with."""

from __future__ import annotations

import scipy.sparse
from datasets import Dataset

from .stats import right


def bag_of_words(train: Dataset, test: Dataset) -> list[float]:
    """Whether a logistic regression over words and word pairs finds the chosen answer of each test pair.

    It sees the difference of the two answers' word counts and nothing else: no prompt, no word order.

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
