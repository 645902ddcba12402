"""Is a difference between two models more than luck? Paired statistics over queries, and over seeds where several are.

The unit is the passage and not the query: queries that one passage answers succeed or fail together, so that they are
drawn together (a cluster). With one query a passage that is the usual test over queries.
"""

from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap, permutation_test

RESAMPLES = 9_999
SEED = 0
CONFIDENCE = 0.95
BATCH = 10**7  # numbers held at a time, 80 MB


class Comparison(NamedTuple):
    """`gain` is in the metric's own unit; `low` to `high` its 95% interval; `p_value` two-sided, of no difference."""

    gain: float
    low: float
    high: float
    p_value: float


def compare(after: np.ndarray, before: np.ndarray, clusters: np.ndarray) -> Comparison:
    """Scores `after` against `before`, each of shape (seeds, queries); `clusters` is each query's number, from 0 on.

    The interval is the percentile bootstrap over clusters and, where there are several, over seeds at the same time
    (the pigeonhole bootstrap: Owen 2007, Annals of Applied Statistics 1:386). The p-value is that of the paired
    randomization test (Smucker, Allan, Carterette 2007, CIKM), which swaps the two models' scores cluster by cluster,
    each the mean over its seeds. There must be two clusters or more.
    """
    after_sums, before_sums = cluster_sums(after, clusters), cluster_sums(before, clusters)
    low, high = interval(after_sums, before_sums, np.bincount(clusters))
    test = permutation_test(
        (after_sums.mean(axis=0), before_sums.mean(axis=0)),
        lambda a, b, axis: (a - b).sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, BATCH // after_sums.shape[1]),
        rng=np.random.default_rng(SEED),
    )
    return Comparison(float(after.mean() - before.mean()), low, high, float(test.pvalue))


def score_interval(scores: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """The 95% interval of one model's mean score; shapes as for `compare`."""
    sums = cluster_sums(scores, clusters)
    return interval(sums, np.zeros_like(sums), np.bincount(clusters))


def cluster_sums(scores: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """The sum of the scores of each cluster, shape (seeds, clusters)."""
    return np.stack([np.bincount(clusters, weights=seed) for seed in scores])


def interval(after: np.ndarray, before: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """The 95% interval of the mean difference per query; `sizes` is the number of queries of each cluster."""
    after, before = ready_to_draw(after), ready_to_draw(before)

    def mean_difference(chosen: np.ndarray, after_seeds: np.ndarray, before_seeds: np.ndarray, axis: int) -> np.ndarray:
        totals = [
            sums[seeds[..., :, None], chosen[..., None, :]].sum(axis=-1).mean(axis=-1)
            for sums, seeds in ((after, after_seeds), (before, before_seeds))
        ]
        return (totals[0] - totals[1]) / sizes[chosen].sum(axis=-1)

    drawn = bootstrap(
        (np.arange(len(sizes)), np.arange(len(after)), np.arange(len(before))),
        mean_difference,
        method="percentile",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, BATCH // max(after.size, before.size)),
        confidence_level=CONFIDENCE,
        rng=np.random.default_rng(SEED),
    )
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def ready_to_draw(sums: np.ndarray) -> np.ndarray:
    """Sums of which seeds can be drawn. Of S seeds, the bootstrap sees (S - 1) / S of the variance: it is given back.

    One seed stands twice: scipy draws from two or more, and between equals the draw makes no difference.
    """
    if len(sums) == 1:
        return np.repeat(sums, 2, axis=0)
    mean = sums.mean(axis=0)
    return mean + (sums - mean) * np.sqrt(len(sums) / (len(sums) - 1))
