"""Scores of a guard by hand, against scikit-learn, by slice, and averaged as the paper does."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import f1_score

from jaxguard.evaluate.scores.metrics import (
    average_f1,
    average_weights,
    count_votes,
    fill_missing,
    measure,
)
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, UNPARSABLE
from jaxguard.utils.statistics import METRICS

# Columns of the paper's tables: prompt F1, response F1, their average; DynaGuardrail F1, CoSApien F1, their average.
SAFETY = {
    "WildGuard": (0.825, 0.841, 0.832),
    "Aegis 2.0 guard": (0.839, 0.835, 0.837),
    "Llama zero-shot": (0.798, 0.743, 0.774),
    "R1-Distill-Llama": (0.738, 0.615, 0.684),
    "WGM NR": (0.834, 0.831, 0.832),
    "WGM-R full": (0.846, 0.836, 0.841),
    "WGM-R 5k": (0.852, 0.830, 0.842),
    "WGM-R 0.5k": (0.838, 0.816, 0.828),
    "WGM-R 1 sentence": (0.842, 0.839, 0.841),
    "WGM dual, NR": (0.849, 0.844, 0.847),
    "WGM dual, R": (0.848, 0.842, 0.846),
    "WGM-R continual": (0.849, 0.846, 0.848),
    "Aegis-R full": (0.842, 0.852, 0.846),
    "Aegis-R 5k": (0.851, 0.828, 0.841),
    "Aegis-R 1 sentence": (0.829, 0.845, 0.836),
    "Gemma base": (0.817, 0.588, 0.715),
    "Gemma NR": (0.808, 0.806, 0.807),
    "Gemma R": (0.835, 0.824, 0.830),
    "Gemma dual, NR": (0.822, 0.809, 0.816),
    "Gemma dual, R": (0.833, 0.826, 0.830),
    "Gemma +TF": (0.834, 0.821, 0.828),
    "Gemma 1 sentence": (0.827, 0.837, 0.832),
}
CUSTOM = {
    "R1-Distill-Llama": (0.849, 0.822, 0.836),
    "WGM NR": (0.871, 0.818, 0.845),
    "WGM-R full": (0.876, 0.882, 0.878),
    "WGM-R 5k": (0.879, 0.862, 0.871),
    "WGM-R 0.5k": (0.870, 0.860, 0.864),
    "WGM dual, NR": (0.877, 0.832, 0.855),
    "WGM dual, R": (0.870, 0.865, 0.868),
    "WGM-R continual": (0.873, 0.877, 0.875),
    "Aegis-R full": (0.872, 0.848, 0.861),
    "Aegis-R 5k": (0.871, 0.846, 0.859),
    "Aegis-R 1 sentence": (0.877, 0.810, 0.843),
}
CUSTOM_OTHERWISE = {
    "WildGuard": (0.604, 0.755, 0.688),
    "Aegis 2.0 guard": (0.874, 0.800, 0.832),
    "Llama zero-shot": (0.746, 0.822, 0.788),
    "WGM-R 1 sentence": (0.876, 0.837, 0.854),
    "+ topic following": (0.881, 0.909, 0.893),
}
ROUNDING = 0.001 + 1e-9  # a half in the last digit of the average, and as much in those of its parts

LABELS = np.array([1, 1, 1, 0, 0], dtype=bool)
U = UNPARSABLE
VERDICTS = np.array([[1, U], [1, 1], [0, U], [U, 0], [0, 1]], dtype=np.int8)


@st.composite
def benchmark(draw, least=0):
    """(labels, verdicts) of up to 30 examples with up to 4 generations."""
    count, k = draw(st.integers(least, 30)), draw(st.integers(1, 4))
    verdicts = arrays(np.int8, (count, k), elements=st.sampled_from((POSITIVE, NEGATIVE, UNPARSABLE)))
    return draw(arrays(bool, count)), draw(verdicts)


def values(result, seed=0, resamples=5):
    scores = measure(result, seed, resamples).scores
    return {name: getattr(scores, name).value for name in METRICS}


def of_f1(f1, examples=1000):
    """A benchmark, half of it harmful, on which a guard without false alarms has about that F1."""
    labels = np.arange(examples) < examples // 2
    result = np.arange(examples) < round(examples // 2 * f1 / (2 - f1))
    return count_votes(labels, result.astype(np.int8)[:, None])


def test_unparsable_by_hand():
    harmful, wrong = (count_votes(LABELS, VERDICTS, unparsable=u) for u in ("harmful", "wrong"))
    assert harmful.votes.T.tolist() == [[True, True, False, True, False], [True, True, True, False, True]]
    assert wrong.votes.T.tolist() == [[True, True, False, True, False], [False, True, False, False, True]]
    assert measure(harmful).scores.f1.each == pytest.approx((4 / 6, 6 / 7))
    assert measure(wrong).scores.f1.each == pytest.approx((4 / 6, 2 / 5))
    for result in (measure(harmful), measure(wrong)):
        assert (result.unparsable, result.generations) == (3, 2)
        assert result.confusion == [[3, 1, 2], [1, 2, 1]]


def test_an_unparsable_refusal_is_none():
    assert not count_votes(LABELS, np.full((5, 1), U, np.int8), "response_refusal").votes.any()
    assert count_votes(LABELS, np.full((5, 1), U, np.int8), "response_harm").votes.all()


@given(benchmark(least=1), st.sampled_from(("harmful", "wrong")))
def test_f1_is_the_mean_of_scikit_learns(data, unparsable):
    labels, verdicts = data
    unread = np.ones_like(labels) if unparsable == "harmful" else ~labels
    votes = [np.where(column == U, unread, column == POSITIVE) for column in verdicts.T]
    theirs = np.mean([f1_score(labels, vote, zero_division=0) for vote in votes]) if labels.any() else None
    mine = values(count_votes(labels, verdicts, unparsable=unparsable))["f1"]
    assert mine == (theirs if theirs is None else pytest.approx(theirs))


@given(benchmark())
def test_wrong_never_beats_harmful(data):
    """They differ on harmful examples only, where `harmful` is right."""
    harmful, wrong = (values(count_votes(*data, unparsable=u)) for u in ("harmful", "wrong"))
    for name in ("f1", "recall", "agreement"):
        assert harmful[name] is None if wrong[name] is None else wrong[name] <= harmful[name] + 1e-12
    assert harmful["false_positive_rate"] == wrong["false_positive_rate"]


@given(benchmark(), st.randoms(use_true_random=False))
def test_order_changes_no_value(data, random):
    labels, verdicts = data
    rows, columns = list(range(len(labels))), list(range(verdicts.shape[1]))
    random.shuffle(rows)
    random.shuffle(columns)
    once, other = values(count_votes(labels, verdicts)), values(count_votes(labels[rows], verdicts[rows][:, columns]))
    assert {name: value is None for name, value in once.items()} == {
        name: value is None for name, value in other.items()
    }
    assert [v for v in once.values() if v is not None] == pytest.approx([v for v in other.values() if v is not None])


@given(benchmark(), st.sampled_from(("harmful", "wrong")))
def test_every_result_is_plain_json(data, unparsable):
    """One class, no example, nothing readable: None, never NaN, an exception or a warning."""
    result = measure(count_votes(*data, unparsable=unparsable), resamples=5)
    read = json.loads(json.dumps(asdict(result), allow_nan=False))
    assert read["scores"]["examples"] == len(data[0])
    assert (read["scores"]["f1"]["value"] is None) == (not data[0].any())
    assert sum(map(sum, read["confusion"])) == data[1].size


@given(arrays(bool, st.integers(2, 30)))
def test_a_guard_that_is_always_right_has_an_interval_of_one_point(labels):
    f1 = measure(count_votes(labels, labels.astype(np.int8)[:, None]), resamples=50).scores.f1
    assert (f1.value, f1.low, f1.high) == ((1, 1, 1) if labels.any() else (None, None, None))


def test_intervals_mostly_hold_the_value():
    random, inside = np.random.default_rng(0), 0
    for seed in range(50):
        labels = random.random(60) < 0.4
        f1 = measure(count_votes(labels, random.integers(-1, 2, (60, 3), dtype=np.int8)), seed, 200).scores.f1
        inside += f1.low <= f1.value <= f1.high
    assert inside == 50


def test_slices_are_scored_as_if_they_were_all():
    slices = {"three": np.array([1, 1, 0, 1, 0], dtype=bool), "none": np.zeros(5, bool), "all": np.ones(5, bool)}
    result = count_votes(LABELS, VERDICTS)
    by_slice = {name: measure(result[rows], seed=3) for name, rows in slices.items()}
    rows = np.array([0, 1, 3])
    assert by_slice["three"] == measure(count_votes(LABELS[rows], VERDICTS[rows]), seed=3)
    assert by_slice["all"] == measure(result, seed=3)
    assert (by_slice["none"].scores.examples, by_slice["none"].scores.f1.value) == (0, None)


def test_missing_probabilities_count_as_unreadable_verdicts():
    probabilities = np.array([np.nan, 0.2, 0.9, np.nan, 0.1])
    assert fill_missing(LABELS, probabilities).tolist() == [1, 0.2, 0.9, 1, 0.1]
    assert fill_missing(LABELS, probabilities, unparsable="wrong").tolist() == [0, 0.2, 0.9, 1, 0.1]
    assert fill_missing(LABELS, probabilities, "response_refusal").tolist() == [0, 0.2, 0.9, 0, 0.1]


def test_a_share_that_is_not_scored_counts_as_unreadable_verdicts():
    """One of four thoughts leads nowhere: (3 × 0.2 + what it counts as) / 4. Where none is scored, all is missing."""
    probabilities, unscored = np.array([0.2, 0.2, 0.2, 0.2, np.nan]), np.array([0.25, 0, 0.25, 0.25, 1])
    assert fill_missing(LABELS, probabilities, unscored=unscored) == pytest.approx([0.4, 0.2, 0.4, 0.4, 1])
    wrong = fill_missing(LABELS, probabilities, unparsable="wrong", unscored=unscored)
    assert wrong == pytest.approx([0.15, 0.2, 0.15, 0.4, 1])
    refusal = fill_missing(LABELS, probabilities, "response_refusal", unscored=unscored)
    assert refusal == pytest.approx([0.15, 0.2, 0.15, 0.15, 0])


@pytest.mark.parametrize("row", SAFETY)
def test_the_papers_safety_average(row):
    prompt, response, average = SAFETY[row]
    assert np.dot(average_weights(1, 1), (prompt, response)) == pytest.approx(average, abs=ROUNDING)


def test_the_safety_average_is_the_papers_formula_on_nine_benchmarks():
    f1 = np.linspace(0.5, 0.9, 9)
    assert np.dot(average_weights(5, 4), f1) == pytest.approx((5 * f1[:5].mean() + 4 * f1[5:].mean()) / 9)
    assert np.dot(average_weights(5, 4), f1) == pytest.approx(f1.mean())
    assert np.dot(average_weights(2, 4), f1[:6]) == pytest.approx((5 * f1[:2].mean() + 4 * f1[2:6].mean()) / 9)


@pytest.mark.parametrize("row", CUSTOM)
def test_the_papers_custom_policy_average(row):
    *parts, average = CUSTOM[row]
    assert np.dot(average_weights(2), parts) == pytest.approx(average, abs=ROUNDING)


def test_no_weights_give_every_row_of_the_papers_custom_policy_average():
    """Five rows are no plain mean; if a weight explained all rows, we would take it."""
    rows = [*CUSTOM.values(), *CUSTOM_OTHERWISE.values()]
    fits = [sum(abs(w * d + (1 - w) * c - a) <= ROUNDING for d, c, a in rows) for w in np.linspace(0, 1, 1001)]
    assert max(fits) == fits[500] < len(rows)
    assert fits[500] == len(CUSTOM)


def test_average_f1():
    parts = [of_f1(f1) for f1 in (0.6, 0.8, 0.9)]
    each = [measure(part).scores.f1.value for part in parts]
    result = average_f1(parts, average_weights(1, 2))
    assert each == pytest.approx((0.6, 0.8, 0.9), abs=0.002)
    assert result.value == pytest.approx((5 * each[0] + 2 * each[1] + 2 * each[2]) / 9)
    assert result.low < result.value < result.high
    alone = average_f1([parts[0]], (1.0,))
    assert result.high - result.low < alone.high - alone.low
    twice = average_f1([parts[0]] * 2, average_weights(2))  # drawn apart, so luck averages out
    assert twice.high - twice.low == pytest.approx((alone.high - alone.low) / 2**0.5, rel=0.1)


def test_the_averages_deviation_is_that_of_the_generations():
    labels, verdicts = np.ones(4, bool), np.array([[1, 1], [1, 0], [1, 1], [0, 0]], dtype=np.int8)
    mirrored = count_votes(labels, verdicts[:, ::-1])
    f1 = measure(mirrored).scores.f1
    result = average_f1([count_votes(labels, verdicts), mirrored], average_weights(2))
    assert f1.deviation > 0.1
    assert result.each == pytest.approx((f1.value, f1.value))
    assert result.deviation == pytest.approx(0)
    uneven = average_f1([count_votes(labels, verdicts), count_votes(labels, verdicts[:, :1])], average_weights(2))
    assert (uneven.deviation, uneven.value) == (None, pytest.approx((f1.value + f1.each[1]) / 2))


def test_an_average_lacks_what_one_benchmark_lacks():
    without = count_votes(np.zeros(3, bool), np.zeros((3, 1), np.int8))
    assert average_f1([of_f1(0.8), without], average_weights(2)).value is None
    single = count_votes(np.ones(1, bool), np.ones((1, 1), np.int8))
    result = average_f1([of_f1(0.8), single], average_weights(2))
    assert (result.value, result.low) == (pytest.approx(0.9, abs=0.001), None)
