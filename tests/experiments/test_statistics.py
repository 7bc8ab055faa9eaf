"""Paired differences against SciPy, and the verdicts that follow from them."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.statistics import median_interval, paired_difference
from experiments.verdicts import Claim, judge


def test_interval_is_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=5), rng.normal(size=5)
    ours = paired_difference(dict(enumerate(a)), dict(enumerate(b)))
    theirs = stats.ttest_rel(a, b).confidence_interval(0.95)
    # Two orders of summation of five numbers: a few units in the last place.
    assert ours.low == pytest.approx(theirs.low, rel=1e-12)
    assert ours.high == pytest.approx(theirs.high, rel=1e-12)


def test_only_shared_seeds_count():
    assert paired_difference({0: 1.0, 1: 2.0}, {1: 0.5, 2: 9.0}).seeds == (1,)


CLAIM = Claim(text="less", metric="final_loss", arm="a", baseline="b")


@pytest.mark.parametrize(
    ("a", "b", "judgement"),
    [
        ([1.0, 1.0, 1.01], [2.0, 2.0, 2.0], "supported"),
        ([2.0, 2.0, 2.01], [1.0, 1.0, 1.0], "against"),
        ([1.0, 1.9], [2.0, 2.0], "leaning for"),
        ([2.1, 3.0], [2.0, 2.0], "leaning against"),
        ([1.0, 3.0], [2.0, 2.0], "undecided"),
        ([1.0, math.nan], [2.0, 2.0], "undecided"),
        ([], [], "undecided"),
        # One arm diverged with every seed: no interval, but the direction is plain.
        ([1.0, 1.0], [math.inf, math.inf], "leaning for"),
    ],
)
def test_judgements(a, b, judgement):
    values = {"a": dict(enumerate(a)), "b": dict(enumerate(b))}
    assert judge(CLAIM, values).judgement == judgement


def test_more_is_the_mirror_of_less():
    more = Claim(text="more", metric="final_loss", arm="a", baseline="b", direction="more")
    values = {"a": {0: 1.0, 1: 1.0, 2: 1.01}, "b": {0: 2.0, 1: 2.0, 2: 2.0}}
    assert judge(more, values).judgement == "against"


def test_a_claim_over_nothing() -> None:
    claim = Claim(text="positive", metric="norm_lead", arm="a", baseline=None, direction="more")
    assert judge(claim, {"a": {0: 2.0, 1: 2.5}}).judgement == "leaning for"
    assert judge(claim, {"a": {0: 2.0, 1: 2.1}}).judgement == "supported"
    assert judge(claim, {"a": {0: 2.0, 1: math.nan}}).judgement == "undecided"


def test_the_medians_interval_covers_it_as_often_as_it_says():
    """Of 200 sets of 25 Gaussian ratios; the bootstrap's 95 % of a median are 90 to 99 at this size (binomial error 1.5)."""
    rng = np.random.default_rng(0)
    covered = [
        low <= 1.0 <= high for low, high in (median_interval(rng.normal(1, 1, (1, 25))) for _ in range(200))
    ]
    assert 0.88 <= np.mean(covered) <= 0.99


def test_what_restarts_do_widens_the_medians_interval():
    rounds = np.random.default_rng(0).normal(0, 0.1, (4, 12))
    one_life = median_interval(rounds.reshape(1, -1))
    low, high = median_interval(rounds + np.array([[-1.0], [-0.5], [0.5], [1.0]]))
    assert high - low > 5 * (one_life[1] - one_life[0])
    assert median_interval(np.full((2, 3), 7.0)) == (7.0, 7.0)
