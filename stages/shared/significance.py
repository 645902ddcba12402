"""Is a difference between two models more than luck? Paired statistics over queries, and over seeds where several are.

What is drawn is not the query but its group (`shared.groups`), as in any cluster bootstrap: queries with one passage
succeed or fail together. Where each query has a passage of its own, that is the usual test over queries.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap, monte_carlo_test, norm, permutation_test, t

RESAMPLES = 9_999
SEED = 0
CONFIDENCE = 0.95
FEW_GROUPS = 30  # effective ones; below, the interval is too narrow: of 12 it held the truth 92 times in 100, not 95
BATCH = 10**6  # numbers drawn at a time; with it memory stays at some tens of MB, a few hundred with several seeds


class Comparison(NamedTuple):
    """`gain` is in the metric's own unit; `low` to `high` its 95% interval; `p_value` two-sided, of no difference."""

    gain: float
    low: float
    high: float
    p_value: float


def compare(after: np.ndarray, before: np.ndarray, groups: np.ndarray) -> Comparison:
    """Scores `after` against `before`, each of shape (seeds, queries); `groups` is each query's number, from 0 on.

    The interval is the percentile bootstrap over groups and, where there are several, over seeds at the same time
    (the pigeonhole bootstrap: Owen 2007, Annals of Applied Statistics 1:386). The p-value is that of the paired
    randomization test (Smucker, Allan, Carterette 2007, CIKM), which swaps the two models' scores group by group,
    each the mean over its seeds: the seeds are held fixed. There must be two groups or more.
    """
    after_sums, before_sums = group_sums(after, groups), group_sums(before, groups)
    low, high = interval(after_sums, before_sums, np.bincount(groups))
    gain = float(after.mean() - before.mean())
    return Comparison(gain, low, high, p_value(after_sums.mean(axis=0) - before_sums.mean(axis=0)))


def p_value(differences: np.ndarray) -> float:
    """Two-sided, of the groups' differences, shape (groups,): where models are equal, each sign is a coin's."""
    if len(differences) <= np.log2(RESAMPLES):  # all combinations of signs
        test = permutation_test((differences,), np.sum, permutation_type="samples", n_resamples=RESAMPLES)
        return float(test.pvalue)
    rng = np.random.default_rng(SEED)
    test = monte_carlo_test(  # permutation_test sorts each sign: of 15,000 groups 23 s, this 0.5
        differences,
        lambda size: differences * (1 - 2 * rng.integers(2, size=size, dtype=np.int8)),
        np.sum,
        n_resamples=RESAMPLES,
        batch=max(1, BATCH // len(differences)),
    )
    return float(test.pvalue)


def wins_and_losses(after: np.ndarray, before: np.ndarray) -> dict[str, int]:
    """How many queries score higher, the same and lower, by the mean of the seeds of `after`; `before` has one."""
    changes = (after - before).mean(axis=0)  # in this order, so that no rounding makes a tie a win
    counts = {"wins": changes > 0, "ties": changes == 0, "losses": changes < 0}
    return {name: int(chosen.sum()) for name, chosen in counts.items()}


def groups_of_some(groups: np.ndarray, chosen: np.ndarray) -> np.ndarray | None:
    """The groups of the chosen queries, numbered from 0 on; None if all are chosen, or of too few groups to compare."""
    own = several_groups(groups, chosen)
    return None if chosen.all() or own is None or effective_groups(own) < FEW_GROUPS else own


def group_counts(groups: np.ndarray) -> dict[str, int]:
    return {"groups": len(np.unique(groups)), "effective_groups": effective_groups(groups)}


def effective_groups(groups: np.ndarray) -> int:
    """As many groups of one size weigh what these do (Kish 1965, Survey Sampling).

    A few large ones rule a mean, and make its interval too narrow: of 100 queries with a passage of their own and five
    groups of 100, it held the truth 89 times in 100 (1,500 simulated test sets); one large group alone does little.
    """
    sizes = np.bincount(groups)
    return round(sizes.sum() ** 2 / (sizes**2).sum())


def several_groups(groups: np.ndarray, chosen: np.ndarray) -> np.ndarray | None:
    """The groups of the chosen queries, numbered from 0 on; None if there is but one, which has no interval."""
    _, own = np.unique(groups[chosen], return_inverse=True)
    return own if own.any() else None


def score_interval(scores: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """The 95% interval of one model's mean score; shapes as for `compare`."""
    sums = group_sums(scores, groups)
    return interval(sums, np.zeros_like(sums[:1]), np.bincount(groups))


def group_sums(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The sum of the scores of each group, shape (seeds, groups)."""
    return np.stack([np.bincount(groups, weights=seed) for seed in scores])


def interval(after: np.ndarray, before: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """The 95% interval of the mean difference per query; `sizes` is the number of queries of each group."""
    if len(after) == len(before) == 1:
        differences = after[0] - before[0]
        return draw((differences, sizes), lambda sums, sizes, axis: sums.sum(axis) / sizes.sum(axis), paired=True)
    after, before = unbiased(after), unbiased(before)

    def mean_difference(chosen: np.ndarray, after_seeds: np.ndarray, before_seeds: np.ndarray, axis: int) -> np.ndarray:
        totals = [
            sums[seeds[..., :, None], chosen[..., None, :]].sum(axis=-1).mean(axis=-1)
            for sums, seeds in ((after, after_seeds), (before, before_seeds))
        ]
        return (totals[0] - totals[1]) / sizes[chosen].sum(axis=-1)

    return draw((np.arange(len(sizes)), np.arange(len(after)), np.arange(len(before))), mean_difference, paired=False)


def draw(samples: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray], paired: bool) -> tuple[float, float]:
    """The interval of the statistic; the first sample is the groups'.

    Of n groups, percentiles alone make it as narrow as a normal interval without Bessel's correction; they are expanded
    as the t distribution asks (Hesterberg 2015, The American Statistician 69:371).
    """
    groups = len(samples[0])
    tail = norm.cdf(-np.sqrt(groups / (groups - 1)) * t.ppf((1 + CONFIDENCE) / 2, groups - 1))
    drawn = bootstrap(
        samples,
        statistic,
        paired=paired,
        method="percentile",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, BATCH // groups),
        confidence_level=1 - 2 * tail,
        rng=np.random.default_rng(SEED),
    )
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def unbiased(sums: np.ndarray) -> np.ndarray:
    """Sums of which seeds can be drawn. Of S seeds, the bootstrap sees (S - 1) / S of the variance: it is given back.

    One seed stands twice: scipy draws from two or more, and between equals the draw makes no difference.
    """
    if len(sums) == 1:
        return np.repeat(sums, 2, axis=0)
    mean = sums.mean(axis=0)
    return mean + (sums - mean) * np.sqrt(len(sums) / (len(sums) - 1))
