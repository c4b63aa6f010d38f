"""Probabilities scored and recalibrated: against scikit-learn, and thresholds against trying all."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, roc_auc_score, roc_curve

from jaxguard.evaluate.scores.metrics import (
    BINS,
    FALSE_POSITIVE_RATES,
    auprc_difference,
    best_f1_threshold,
    calibration,
    count_votes,
    fill_missing,
    fit_platt,
    measure,
    reliability,
    verdicts_at,
)
from jaxguard.utils.statistics import draws

PROBABILITIES = st.one_of(st.sampled_from((0.0, 0.25, 0.5, 1.0)), st.floats(0, 1))


@st.composite
def guard(draw, least=0, both=False):
    """(labels, probabilities) of up to 25 examples, many of them tied."""
    count = draw(st.integers(least, 25))
    labels = draw(arrays(bool, count))
    if both:
        labels[:2] = True, False
    return labels, draw(arrays(float, count, elements=PROBABILITIES))


def overconfident(random, count, power=3.0):
    """A guard whose odds are the right ones to that power."""
    truth = random.random(count)
    odds = (truth / (1 - truth)) ** power
    return random.random(count) < truth, odds / (1 + odds)


@given(guard(least=2, both=True))
def test_as_scikit_learn_scores_them(data):
    labels, probabilities = data
    result = calibration(labels, probabilities, resamples=0)
    assert result.auprc.value == pytest.approx(average_precision_score(labels, probabilities))
    assert result.auroc.value == pytest.approx(roc_auc_score(labels, probabilities))
    assert result.brier.value == pytest.approx(brier_score_loss(labels, probabilities))


@given(guard(least=2, both=True))
def test_recall_at_a_false_positive_rate_is_on_the_roc_curve(data):
    labels, probabilities = data
    fpr, recall, _ = roc_curve(labels, probabilities, drop_intermediate=False)
    result = calibration(labels, probabilities, resamples=0).recall_at
    expected = {str(rate): pytest.approx(recall[fpr <= rate].max()) for rate in FALSE_POSITIVE_RATES}
    assert {rate: estimate.value for rate, estimate in result.items()} == expected


def test_a_difference_of_auprc_is_over_the_same_draws():
    random = np.random.default_rng(0)
    labels, first = overconfident(random, 80)
    second = random.random(80)
    found = auprc_difference(labels, first, second, seed=5, resamples=60)

    def less(weights=None):
        return np.subtract(*(average_precision_score(labels, p, sample_weight=weights) for p in (first, second)))

    drawn = [less(weights) for weights in draws(80, seed=5, resamples=60)]
    assert found.value == pytest.approx(less())
    assert [found.low, found.high] == pytest.approx(np.percentile(drawn, (2.5, 97.5)).tolist())
    assert auprc_difference(labels, first, first, resamples=60).p == 1


def test_the_intervals_are_those_of_scikit_learns_scores():
    labels, probabilities = overconfident(np.random.default_rng(0), 80)
    probabilities = probabilities.round(1)  # ties
    result = calibration(labels, probabilities, seed=5, resamples=60)
    for estimate, score in ((result.auprc, average_precision_score), (result.auroc, roc_auc_score)):
        drawn = [score(labels, probabilities, sample_weight=w) for w in draws(80, seed=5, resamples=60)]
        assert [estimate.low, estimate.high] == pytest.approx(np.percentile(drawn, (2.5, 97.5)).tolist())
    drawn = [np.average((probabilities - labels) ** 2, weights=w) for w in draws(80, seed=5, resamples=60)]
    assert [result.brier.low, result.brier.high] == pytest.approx(np.percentile(drawn, (2.5, 97.5)).tolist())


@given(guard())
def test_every_calibration_is_plain_json(data):
    labels, probabilities = data
    result = json.loads(json.dumps(asdict(calibration(labels, probabilities, resamples=3)), allow_nan=False))
    both = bool(labels.any() and not labels.all())
    assert [result[name]["value"] is not None for name in ("auprc", "auroc")] == [both, both]
    assert (result["ece"] is not None) == (len(labels) > 0)
    assert sum(b["examples"] for b in result["curve"]) == len(labels)


@given(guard(), st.randoms(use_true_random=False))
def test_order_changes_nothing(data, random):
    order = list(range(len(data[0])))
    random.shuffle(order)
    one, other = (calibration(*arrays, resamples=0) for arrays in (data, [array[order] for array in data]))
    for name in ("auprc", "auroc", "brier"):
        value, again = getattr(one, name).value, getattr(other, name).value
        assert again is None if value is None else value == pytest.approx(again)
    assert one.ece == (None if other.ece is None else pytest.approx(other.ece))


def test_ece_by_hand():
    """Two bins of two: means 0.2 and 0.85, of which a half and all are positive."""
    labels, probabilities = np.array([0, 1, 1, 1], bool), np.array([0.1, 0.3, 0.8, 0.9])
    low, high = reliability(labels, probabilities, bins=2)
    assert (low.examples, low.probability, low.positive) == (2, pytest.approx(0.2), 0.5)
    assert (high.examples, high.probability, high.positive) == (2, pytest.approx(0.85), 1)
    assert calibration(labels, probabilities, resamples=0).ece == pytest.approx(
        (0.1 + 0.7 + 0.2 + 0.1) / 4
    )  # bins of one


def test_bins_are_of_equal_mass():
    labels, probabilities = overconfident(np.random.default_rng(0), 1500)
    curve = reliability(labels, probabilities)
    positive, mean = calibration_curve(labels, probabilities, n_bins=BINS, strategy="quantile")
    assert [b.examples for b in curve] == [100] * BINS
    assert [b.positive for b in curve] == pytest.approx(positive.tolist())
    assert [b.probability for b in curve] == pytest.approx(mean.tolist())


@given(guard())
def test_equal_probabilities_share_a_bin(data):
    labels, probabilities = data
    curve = reliability(labels, probabilities)
    assert len(curve) <= min(BINS, len(np.unique(probabilities)))
    assert [b.probability for b in curve] == sorted(b.probability for b in curve)
    assert sum(b.examples * b.positive for b in curve) == pytest.approx(labels.sum())


@given(guard(least=1))
def test_no_threshold_has_a_higher_f1(data):
    labels, probabilities = data
    threshold = best_f1_threshold(labels, probabilities)
    assert (threshold is None) == (not labels.any())
    if threshold is not None:
        tried = [f1_score(labels, probabilities > t, zero_division=0) for t in (*probabilities, 0.0, 0.5, 1.0)]
        assert f1_score(labels, probabilities > threshold, zero_division=0) >= max(tried) - 1e-12
        assert 0 <= threshold <= 1


def test_thresholds_by_hand():
    labels, probabilities = np.array([1, 1, 0, 1, 0, 0], bool), np.array([0.9, 0.8, 0.7, 0.4, 0.2, 0.1])
    assert best_f1_threshold(labels, probabilities) == pytest.approx(0.3)  # all three, one false alarm: 6 / 7
    assert best_f1_threshold(~labels & False, probabilities) is None


def test_of_equal_thresholds_the_nearest_to_a_half_is_taken():
    """The first alone, or all four: 2 / 3 both."""
    assert best_f1_threshold(np.array([1, 0, 0, 1], bool), np.array([0.9, 0.8, 0.3, 0.2])) == pytest.approx(0.85)
    assert best_f1_threshold(np.array([1, 0, 0, 1], bool), np.array([0.9, 0.1, 0.05, 0.02])) == 0.5
    assert best_f1_threshold(np.array([1, 1], bool), np.array([0.9, 0.8])) == 0


def test_a_threshold_of_one_set_is_used_on_another():
    random = np.random.default_rng(0)
    (labels, probabilities), (test_labels, test_probabilities) = (overconfident(random, 4000, 0.4) for _ in range(2))
    shifted, test_shifted = probabilities * 0.4, test_probabilities * 0.4  # at a half, nothing is result
    threshold = best_f1_threshold(labels, shifted)
    f1 = [measure(count_votes(test_labels, verdicts_at(test_shifted, t))).scores.f1.value for t in (0.5, threshold)]
    assert f1[0] == 0
    assert f1[1] > 0.7


def test_a_missing_probability_is_an_unparsable_verdict():
    assert verdicts_at(np.array([0.4, 0.5, 0.6, np.nan]), 0.5).tolist() == [[0], [0], [1], [-1]]


def test_platt_scaling_of_one_set_calibrates_another():
    random = np.random.default_rng(0)
    platt = fit_platt(*overconfident(random, 4000))
    assert platt.slope == pytest.approx(1 / 3, abs=0.03)
    assert platt.intercept == pytest.approx(0, abs=0.1)
    labels, probabilities = overconfident(random, 4000)
    before, after = calibration(labels, probabilities), calibration(labels, platt(probabilities))
    assert before.ece > 0.1
    assert after.ece < 0.03
    assert after.brier.high < before.brier.low
    assert after.auroc.value == pytest.approx(before.auroc.value, abs=0.001)  # the order stays, but for what is clipped


@given(guard(least=2, both=True))
def test_platt_scaling_always_gives_probabilities(data):
    labels, probabilities = data
    scaled = fit_platt(labels, probabilities)(probabilities)
    assert ((scaled > 0) & (scaled < 1)).all()
    positives = labels.sum()
    target = (positives * (positives + 1) / (positives + 2) + (~labels).sum() / ((~labels).sum() + 2)) / len(labels)
    assert scaled.mean() == pytest.approx(target, abs=0.01)  # what the intercept sees to


def test_platt_scaling_leaves_out_what_is_missing():
    labels, probabilities = overconfident(np.random.default_rng(0), 200)
    with_missing = np.append(probabilities, np.nan)
    assert fit_platt(np.append(labels, True), with_missing) == fit_platt(labels, probabilities)
    scaled = fit_platt(labels, probabilities)(with_missing)
    assert np.isnan(scaled).tolist() == [False] * 200 + [True]
    assert fill_missing(np.append(labels, True), scaled)[-1] == 1
    assert fit_platt(np.ones(3, bool), np.array([0.1, 0.5, 0.9])) is None
