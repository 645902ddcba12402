"""Intervals that cover, honest p-values, words that claim no more; on simulated data, so that the truth is known."""

import itertools

import numpy as np
import pytest
from scipy import stats

from shared import report, significance

GAIN = 0.02


@pytest.fixture
def fewer_resamples(monkeypatch):
    """A thousand draws in seconds. It widens the spread of an interval's ends, and not its coverage."""
    monkeypatch.setattr(significance, "RESAMPLES", 499)


def simulate(draw: np.random.Generator, queries: int, seeds: int, passages: int) -> tuple[np.ndarray, np.ndarray]:
    """Differences in score as they are in the default experiment: most are 0, the others large; and groups."""
    groups = np.sort(draw.integers(0, passages, queries)) if passages < queries else np.arange(queries)
    _, groups = np.unique(groups, return_inverse=True)
    changed = draw.random((1, queries)) < 0.5
    by_passage = draw.normal(GAIN / 0.5, 0.25, groups.max() + 1)[groups]
    by_query = draw.normal(0, 0.3, queries)
    by_seed = draw.normal(0, 0.005, (seeds, 1)) if seeds > 1 else 0
    return changed * (by_passage + by_query) + by_seed + draw.normal(0, 0.05, (seeds, queries)), groups


@pytest.mark.usefixtures("fewer_resamples")
@pytest.mark.parametrize(
    ("queries", "seeds", "passages"),
    [(50, 1, 50), (100, 1, 100), (687, 1, 687), (687, 1, 150), (300, 3, 300)],
    ids=["50 queries", "100 queries", "687 queries", "several queries a passage", "three seeds"],
)
def test_intervals_hold_the_true_gain_in_95_of_100_draws(queries, seeds, passages):
    draw, held = np.random.default_rng(1), 0
    for _ in range(1000):
        differences, groups = simulate(draw, queries, seeds, passages)
        sums = significance.group_sums(differences, groups)
        low, high = significance.interval(sums, np.zeros_like(sums[:1]), np.bincount(groups))
        held += low <= GAIN <= high
    assert 930 <= held <= 970


@pytest.mark.usefixtures("fewer_resamples")
def test_p_is_below_5_in_5_of_100_draws_where_there_is_no_difference():
    draw, below = np.random.default_rng(2), 0
    for _ in range(400):
        before = draw.random((1, 60)).round(1)
        after = np.where(draw.random((1, 60)) < 0.5, before, draw.permutation(before[0]))
        swapped = draw.random((1, 60)) < 0.5
        one, other = np.where(swapped, after, before), np.where(swapped, before, after)
        below += significance.compare(one, other, np.arange(60)).p_value < 0.05
    assert 8 <= below <= 32  # 20 expected; these are three standard deviations


def test_p_of_few_queries_is_exact():
    """Five queries that all gain: of the 32 ways to swap, two are as far from 0."""
    comparison = significance.compare(np.full((1, 5), 0.7), np.full((1, 5), 0.4), np.arange(5))
    assert comparison.p_value == pytest.approx(2 / 32)
    assert (comparison.gain, comparison.low, comparison.high) == pytest.approx((0.3, 0.3, 0.3))


def test_p_of_many_queries_is_near_that_of_all_ways_to_swap():
    differences = np.random.default_rng(8).normal(0.5, 1, 16)
    sums = np.array(list(itertools.product((-1, 1), repeat=16))) @ differences
    exact = 2 * np.mean(sums >= differences.sum())
    assert 0.05 < exact < 0.5
    comparison = significance.compare(differences[None], np.zeros((1, 16)), np.arange(16))
    assert comparison.p_value == pytest.approx(exact, abs=0.02)  # some three standard deviations


def test_p_is_of_groups():
    comparison = significance.compare(np.full((1, 20), 0.7), np.full((1, 20), 0.4), np.repeat(np.arange(5), 4))
    assert comparison.p_value == pytest.approx(2 / 32)


@pytest.mark.usefixtures("fewer_resamples")
def test_intervals_of_few_groups_are_expanded_as_the_t_distribution_asks():
    """Without, of 12 groups, they would be as narrow as z and a variance over n make them: 0.85 times as wide."""
    draw, widths = np.random.default_rng(7), []
    for _ in range(50):
        differences = draw.normal(0, 1, (1, 12))
        low, high = significance.interval(differences, np.zeros((1, 12)), np.ones(12, dtype=int))
        widths.append((high - low) / (2 * stats.t.ppf(0.975, 11) * differences.std(ddof=1) / np.sqrt(12)))
    assert np.mean(widths) == pytest.approx(1, abs=0.06)


def test_queries_of_one_passage_are_worth_less_than_as_many_of_their_own():
    draw = np.random.default_rng(3)
    by_passage = draw.normal(0.1, 0.3, 50)
    alone = significance.compare(np.repeat(by_passage, 4)[None], np.zeros((1, 200)), np.arange(200))
    together = significance.compare(np.repeat(by_passage, 4)[None], np.zeros((1, 200)), np.repeat(np.arange(50), 4))
    assert together.high - together.low == pytest.approx(2 * (alone.high - alone.low), rel=0.1)
    assert together.gain == alone.gain


def test_seeds_that_disagree_widen_the_interval():
    scores = np.random.default_rng(4).random((1, 400))
    agree = significance.compare(scores + np.full((3, 1), 0.1), scores, np.arange(400))
    disagree = significance.compare(scores + np.array([[0.0], [0.1], [0.2]]), scores, np.arange(400))
    assert disagree.gain == pytest.approx(agree.gain)
    assert disagree.high - disagree.low > agree.high - agree.low + 0.1


def test_the_variance_of_few_seeds_is_not_taken_for_smaller_than_it_is():
    """Of two seeds 0.2 apart, the bootstrap draws means 0.1 from the middle; unbiased is sqrt(2) times that."""
    two = significance.compare(np.array([[0.4] * 50, [0.6] * 50]), np.full((1, 50), 0.4), np.arange(50))
    assert (two.low, two.gain, two.high) == pytest.approx((0.1 - 0.1 * 2**0.5, 0.1, 0.1 + 0.1 * 2**0.5))


def test_a_model_against_itself_is_no_difference_and_the_same_comparison_gives_the_same_numbers():
    scores = np.random.default_rng(5).random((1, 100))
    assert significance.compare(scores, scores, np.arange(100)) == (0, 0, 0, 1)
    other = np.random.default_rng(6).random((2, 100))
    assert significance.compare(other, scores, np.arange(100)) == significance.compare(other, scores, np.arange(100))


def test_what_is_the_same_in_each_seed_is_a_tie():
    """Of three seeds with 0.1 each, the rounded mean is not 0.1."""
    after = np.array([[0.1, 0.0, 0.5], [0.1, 0.3, 0.1], [0.1, 0.0, 0.1]])
    before = np.array([[0.1, 0.2, 0.2]])
    assert significance.wins_and_losses(after, before) == {"wins": 1, "ties": 1, "losses": 1}


def test_some_of_the_queries_are_numbered_anew_by_group():
    groups = np.array([0, 1, 1, 2, 2])
    some = significance.several_groups(groups, np.array([True, False, False, True, True]))
    assert some.tolist() == [0, 1, 1]
    assert significance.several_groups(groups, groups == 1) is None  # one group alone cannot be drawn from
    assert significance.several_groups(groups, np.full(5, False)) is None
    assert significance.several_groups(groups, np.full(5, True)).tolist() == groups.tolist()


def test_what_is_left_of_the_test_is_compared_where_it_is_something_else_and_not_too_little():
    groups = np.arange(31)
    assert significance.groups_of_some(groups, groups > 0).tolist() == list(range(30))
    assert significance.groups_of_some(groups, groups > 1) is None
    assert significance.groups_of_some(groups, groups >= 0) is None  # nothing is left out
    one_rules = np.append(groups, np.zeros(60, dtype=int))  # 31 groups, of which the first has 61 of 91 queries
    assert significance.groups_of_some(one_rules, one_rules < 30) is None


def test_groups_weigh_by_their_sizes():
    assert significance.effective_groups(np.arange(31)) == 31
    assert significance.effective_groups(np.repeat(np.arange(31), 4)) == 31
    assert significance.effective_groups(np.append(np.arange(1, 31), np.zeros(30, dtype=int))) == 4  # 60² / 930


@pytest.mark.parametrize(
    ("comparison", "words"),
    [
        ((0.041, 0.022, 0.060, 0.001), "It is better than bm25 by 0.041 NDCG@10 (95% 0.022 to 0.060)"),
        ((-0.041, -0.060, -0.022, 0.001), "It is worse than bm25 by 0.041 NDCG@10 (95% 0.022 to 0.060)"),
        (
            (0.004, -0.006, 0.014, 0.4),
            "It and bm25: no difference that 639 queries can show (+0.004 NDCG@10, 95% -0.006",
        ),
        (
            (0.0, 0.0, 0.0, 1.0),
            "It and bm25: no difference that 639 queries can show (+0.000 NDCG@10, 95% +0.000 to +0",
        ),
        # Of three queries that all gain, the bootstrap sees no other; the test knows that three are few.
        (
            (0.3, 0.2, 0.4, 0.25),
            "It and bm25: no difference that 639 queries can show (+0.300 NDCG@10, 95% +0.200 to +0",
        ),
    ],
)
def test_words(comparison, words):
    assert report.verdict(significance.Comparison(*comparison), "ndcg@10", "It", "bm25", 639).startswith(words)
