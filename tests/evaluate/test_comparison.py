"""Two guards compared: by hand, mirrored, and on guards of which the better one is known."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binom

from jaxguard.evaluate.scores.metrics import (
    Difference,
    average_f1,
    average_weights,
    count_votes,
    f1_difference,
    mcnemar,
    measure,
)


@st.composite
def two_guards(draw, least=0):
    count = draw(st.integers(least, 20))
    labels = draw(arrays(bool, count))
    verdicts = [draw(arrays(np.int8, (count, draw(st.integers(1, 4))), elements=st.integers(-1, 1))) for _ in range(2)]
    return [count_votes(labels, v) for v in verdicts]


def sampled(random, labels, accuracies):
    """A guard right with that probability, which may differ by example, in three generations."""
    right = random.random((len(labels), 3)) < np.reshape(accuracies, (-1, 1))
    return count_votes(labels, np.where(right, labels[:, None], ~labels[:, None]).astype(np.int8))


def test_mcnemar_by_hand():
    """Only the first is right on 6 examples, only the second on 1; both or none on the rest."""
    labels = np.ones(10, bool)
    first, second = np.array([1] * 8 + [0] * 2, np.int8), np.array([0] * 6 + [1] * 3 + [0], np.int8)
    result = mcnemar(count_votes(labels, first[:, None]), count_votes(labels, second[:, None]))
    assert (result.only_first, result.only_second) == (6, 1)
    assert result.p == pytest.approx(2 * binom.cdf(1, 7, 0.5))


def test_mcnemar_takes_the_majority_and_a_tie_is_none():
    labels = np.array([True, True, False])
    first = count_votes(labels, np.array([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]], np.int8))
    second = count_votes(labels, np.array([[1], [1], [1]], np.int8))
    result = mcnemar(first, second)
    assert (result.only_first, result.only_second, result.p) == (1, 1, 1)


@given(two_guards())
def test_swapping_the_guards_turns_everything_round(guards):
    one, other = (
        f1_difference(*([g] for g in guards), resamples=30),
        f1_difference(*([g] for g in guards[::-1]), resamples=30),
    )
    assert one.p == other.p
    for mine, mirrored in ((one.value, other.value), (one.low, other.high), (one.high, other.low)):
        assert mirrored is None if mine is None else mine == pytest.approx(-mirrored)
    here, there = mcnemar(*guards), mcnemar(*guards[::-1])
    assert (here.only_first, here.only_second, here.p) == (there.only_second, there.only_first, there.p)
    json.dumps([asdict(one), asdict(here)], allow_nan=False)


@given(two_guards())
def test_the_difference_is_that_of_the_scores(guards):
    f1, other = (measure(guard, resamples=0).scores.f1.value for guard in guards)
    result = f1_difference(*([guard] for guard in guards), resamples=5)
    assert result.value == (None if f1 is None else pytest.approx(f1 - other))


@given(two_guards(least=2), st.randoms(use_true_random=False))
def test_a_guard_does_not_differ_from_itself(guards, random):
    guard = guards[0]
    order = list(range(guard.votes.shape[1]))
    random.shuffle(order)
    same = count_votes(guard.labels, guard.votes[:, order].astype(np.int8))
    result = f1_difference([guard], [same], resamples=10)
    if guard.labels.any() and result.low is not None:
        assert result == Difference(pytest.approx(0), 0, 0, 1)
    assert mcnemar(guard, same).p == 1


def test_one_example_has_no_interval():
    guards = [count_votes(np.ones(1, bool), np.array([[v]], np.int8)) for v in (1, 0)]
    assert f1_difference([guards[0]], [guards[1]]) == Difference(1)


def test_the_better_guard_is_found_and_equals_are_not():
    random = np.random.default_rng(0)
    labels = random.random(1000) < 0.5
    good, bad, also_bad = (sampled(random, labels, a) for a in (0.9, 0.84, 0.84))
    better, equal = f1_difference([good], [bad]), f1_difference([bad], [also_bad])
    assert 0 < better.low < better.value < better.high
    assert better.p == pytest.approx(2 / 1001)  # no draw of 1,000 turns it round
    assert mcnemar(good, bad).p < 0.01
    assert equal.low < 0 < equal.high
    assert equal.p > 0.05


def test_pairing_narrows_the_interval():
    """Guards that fail on the same examples differ less than their own intervals say."""
    random = np.random.default_rng(1)
    labels = random.random(600) < 0.5
    difficulty = np.where(random.random(600) < 0.2, 0.05, 0.98)
    one, other = sampled(random, labels, difficulty), sampled(random, labels, difficulty)
    paired, alone = f1_difference([one], [other]), measure(one).scores.f1
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)


def test_luck_is_called_a_lead_about_as_often_as_p_says():
    random, hits = np.random.default_rng(2), 0
    for seed in range(200):
        labels = random.random(150) < 0.5
        one, other = sampled(random, labels, 0.8), sampled(random, labels, 0.8)
        hits += f1_difference([one], [other], seed=seed, resamples=200).p < 0.05
    assert 2 <= hits <= 20, hits


def test_averages_are_compared_as_they_are_scored():
    random = np.random.default_rng(3)
    many = [random.random(300) < 0.4 for _ in range(3)]
    first, second = ([sampled(random, labels, a) for labels in many] for a in (0.88, 0.85))
    weights = average_weights(3)
    result = f1_difference(first, second, weights)
    assert result.value == pytest.approx(average_f1(first, weights).value - average_f1(second, weights).value)
    single, thrice = f1_difference(first[:1], second[:1]), f1_difference(first[:1] * 3, second[:1] * 3, weights)
    assert thrice.high - thrice.low == pytest.approx((single.high - single.low) / 3**0.5, rel=0.1)
