"""What the pictures are drawn from; how they look is for eyes."""

import numpy as np

from shared.pictures import gain_by_length, gains_by_length


def test_gains_by_query_length_have_intervals_and_lose_no_query():
    draw = np.random.default_rng(0)
    words = draw.integers(1, 12, 300)
    gains = np.where(words > 6, 0.3, 0.1) + draw.normal(0, 0.2, (2, 300))
    labels, means, intervals = zip(*gains_by_length(gains, np.arange(300) // 2, words), strict=True)
    assert sum(int(label.split("(")[1].split()[0]) for label in labels) == 300
    assert labels[0].startswith("1–")
    assert all(low < mean < high for mean, (low, high) in zip(means, intervals, strict=True))
    assert means[0] < 0.2 < means[-1]


def test_queries_of_one_length_and_one_group_are_one_class_without_an_interval():
    ((label, mean, interval),) = gains_by_length(np.full((1, 4), 0.5), np.zeros(4, dtype=int), np.full(4, 3))
    assert (label, mean, interval) == ("3\n(4 queries)", 0.5, (0.5, 0.5))


def test_queries_that_gain_the_same_are_drawn():
    """By a rounding error the mean of three seeds lies outside its interval, which has no width."""
    gains = np.full((3, 4), 1 - 1 / np.log2(3))
    assert gain_by_length(gains, np.arange(4), np.full(4, 3), "ndcg@10").startswith("<?xml")
