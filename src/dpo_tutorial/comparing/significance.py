"""Is a change over the same items more than chance? Tests of paired shares and means, by statsmodels and scipy."""

from collections.abc import Sequence

import numpy as np
import scipy.special
import scipy.stats
from statsmodels.stats.contingency_tables import mcnemar

Numbers = Sequence[float] | np.ndarray


def sign_test(before: Numbers, after: Numbers) -> float:
    """Two-sided p of McNemar's exact test (statsmodels): do as many items change from 0 to 1 as from 1 to 0?

    For shares of few items, where the bootstrap's interval comes out too narrow.
    """
    old, new = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    table = [[np.sum(old & new), np.sum(old & ~new)], [np.sum(~old & new), np.sum(~old & ~new)]]
    return float(mcnemar(table, exact=True).pvalue)


def smallest_change(n: int, discordant: int) -> dict:
    """What `sign_test` can see where `discordant` of n items changed: net changes, as shares of n.

    Let d be the items that changed, X of them to 1, and k the greatest count with 2 · P(Bin(d, ½) ≤ k) < 0.05. Then
    p < 0.05 exactly where X ≤ k or X ≥ d − k (McNemar's exact test).

    Returns:
        `significant`: (d − 2k) / n, the smallest change found that has p < 0.05. `power_80`: d(2q − 1) / n with
        P(Bin(d, q) ≥ d − k) = 0.8, the true change that is found four times in five; at small d chance carries it
        over, and it may be the smaller one. Both are None where d < 6: then no outcome has p < 0.05.
    """
    k = int(scipy.stats.binom.ppf(0.025, discordant, 0.5)) - 1  # ppf is the first count whose probability is enough
    found: dict = {"n": n, "discordant": discordant, "significant": None, "power_80": None}
    if k < 0:
        return found
    q = float(scipy.special.betaincinv(discordant - k, k + 1, 0.8))  # P(Bin(d, q) ≥ m) = I_q(m, d − m + 1)
    return found | {"significant": (discordant - 2 * k) / n, "power_80": discordant * (2 * q - 1) / n}


def permutation_test(before: Numbers, after: Numbers) -> float:
    """Two-sided p of the mean change over the same items: were before and after exchanged at random, item by item?

    Sign flips (scipy); exact up to 13 items, else 9,999 flips with a seed of their own.
    """
    changes = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    if len(changes) < 2 or not changes.any():
        return 1.0
    found = scipy.stats.permutation_test(
        (changes,), np.mean, permutation_type="samples", n_resamples=9999, rng=np.random.default_rng(0)
    )
    return float(found.pvalue)
