"""The cascade of two modes: certified thresholds of `auto`, and what reasoning is worth on benchmarks."""

import numpy as np
import pytest
from scipy.stats import binomtest

from jaxguard.config.evaluate import AutoConfig
from jaxguard.evaluate.scores.cascade import certify, escalated

BOTH = AutoConfig(miss_rate=0.1, alarm_rate=0.1)


@pytest.mark.parametrize("steps", [None, 50])
def test_rates_are_within_their_limits_in_95_percent_of_draws(steps):
    """Scores of both classes are uniform, or have ties: the true miss rate up to a threshold is the threshold."""
    random, labels, repetitions, wrong = np.random.default_rng(0), np.arange(300) < 120, 500, np.zeros(2, int)
    for _ in range(repetitions):
        drawn = random.random(300)
        drawn = drawn if steps is None else np.ceil(drawn * steps) / steps
        auto = certify(labels, drawn, None, BOTH)
        below = 1 - auto.blocks if steps is None else 1 - auto.blocks + 1 / steps
        wrong += (auto.passes or 0) > BOTH.miss_rate + 1e-9, below > BOTH.alarm_rate + 1e-9
    for count in wrong:
        assert binomtest(int(count), repetitions, 0.05, "greater").pvalue > 0.01


@pytest.mark.parametrize(("harmful", "certified"), [(299, True), (298, False), (12, False), (0, False)])
def test_zero_misses_in_n_certify_no_better_than_their_arithmetic(harmful, certified):
    """All harmful examples have a higher probability than the others."""
    labels = np.arange(harmful + 400) < harmful
    scores = np.where(labels, 0.9, 0.1)
    auto = certify(labels, scores, 0.5, AutoConfig(miss_rate=0.01, alarm_rate=0.01))
    assert auto.miss_rate == pytest.approx(1 - 0.05 ** (1 / harmful) if harmful else 1)
    assert auto.passes == (0.1 if certified else None)
    assert auto.blocks == (0.9 if harmful else None)
    assert escalated(scores, auto.passes, auto.blocks).sum() == (0 if certified else 400)


def test_by_hand():
    """With one miss of 60 harmful examples the bound is 7.7 %, with two 10.1 %; direct mode's threshold ends both."""
    labels = np.arange(120) < 60
    scores = np.concatenate([np.linspace(0.205, 0.795, 60), np.linspace(0.0, 0.59, 60)])
    auto = certify(labels, scores, None, AutoConfig(miss_rate=0.1, alarm_rate=0.05))
    assert (scores[labels] <= auto.passes).sum() == 1
    assert (auto.passes, auto.blocks) == (pytest.approx(0.21), pytest.approx(0.595))
    assert auto.miss_rate == pytest.approx(binomtest(1, 60).proportion_ci(0.9, "exact").high)
    assert auto.alarm_rate == pytest.approx(1 - 0.05 ** (1 / 60))
    early = certify(labels, scores, 0.1, BOTH)
    assert (early.passes, early.blocks > 0.5) == (0.1, True)
    assert certify(labels, scores, 0.7, BOTH).blocks == 0.7


def test_what_has_no_probability_is_neither_passed_nor_blocked():
    labels = np.arange(600) < 300
    scores = np.where(labels, 0.9, 0.1)
    scores[[0, 599]] = np.nan
    auto = certify(labels, scores, 0.5, BOTH)
    assert (auto.passes, auto.blocks) == (0.1, 0.9)
    assert np.flatnonzero(escalated(scores, auto.passes, auto.blocks)).tolist() == [0, 599]
    assert [auto.trusts(p, p == 0.9) for p in (0.1, 0.9)] == [True, True]
    assert [auto.trusts(p, positive) for p, positive in ((0.1, True), (0.9, False), (0.5, True), (None, True))] == [
        False
    ] * 4


def test_the_share_of_traffic_is_reweighted_to_its_prevalence():
    """A tenth of the harmful and nine tenths of the unharmful examples are in between."""
    labels = np.arange(2000) < 1000
    scores = np.where(labels, 0.9, 0.5)
    scores[:100], scores[1000:1100] = 0.5, 0.1
    shares = {p: certify(labels, scores, None, AutoConfig(prevalence=p, budget=0.5)) for p in (0.0, 0.05, 0.5, 1.0)}
    assert {p: auto.escalated for p, auto in shares.items()} == pytest.approx({0: 0.9, 0.05: 0.86, 0.5: 0.5, 1: 0.1})
    assert ["budget" in str(auto) for auto in shares.values()] == [True, True, False, False]
