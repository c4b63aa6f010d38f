"""Scores of verdicts against values worked out by hand, and against scikit-learn."""

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score, precision_score, recall_score

from jaxguard.utils.statistics import METRICS, confusion, consistency, draws, f1_draws, right_counts, scores, spread

LABELS = np.array([1, 1, 1, 0, 0], dtype=bool)
# Sample 0: 2 of 3 found, 1 false alarm. Sample 1: everything right. Sample 2: nothing found.
VOTES = np.array([[1, 1, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=bool)


@st.composite
def verdicts(draw, both_classes=False):
    """(labels, votes) of up to 30 examples with up to 5 samples."""
    count, k = draw(st.integers(2, 30)), draw(st.integers(1, 5))
    labels = draw(arrays(bool, count))
    if both_classes:
        labels[:2] = True, False
    return labels, draw(arrays(bool, (count, k)))


def values(labels, votes, **options):
    result = scores(labels, votes, seed=0, **{"resamples": 5, **options})
    return {name: getattr(result, name).value for name in METRICS}


def test_by_hand():
    result = values(LABELS, VOTES)
    assert result["agreement"] == pytest.approx((3 / 5 + 1 + 2 / 5) / 3)
    assert result["f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert result["recall"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert result["precision"] == pytest.approx((2 / 3 + 1) / 2)  # the third sample calls nothing positive
    # Sample 0: 3/5 observed, (3 * 3 + 2 * 2) / 25 = 13/25 by chance; sample 2: 2/5 observed and by chance.
    assert result["kappa"] == pytest.approx(((3 / 5 - 13 / 25) / (1 - 13 / 25) + 1 + 0) / 3)
    assert result["false_positive_rate"] == pytest.approx((1 / 2 + 0 + 0) / 3)
    whole = scores(LABELS, VOTES, seed=0)
    assert whole.f1.each == pytest.approx((2 / 3, 1, 0))
    assert whole.f1.deviation == pytest.approx(statistics.stdev((2 / 3, 1, 0)))  # divisor n - 1
    assert whole.precision.each == (pytest.approx(2 / 3), 1, None)
    assert whole.precision.deviation == pytest.approx(statistics.stdev((2 / 3, 1)))
    assert (whole.examples, whole.positives) == (5, 3)


@given(verdicts(both_classes=True))
def test_as_scikit_learn_scores_each_sample(data):
    labels, votes = data
    mine, columns = values(labels, votes), votes.T
    theirs = {
        "agreement": [accuracy_score(labels, column) for column in columns],
        "precision": [precision_score(labels, column, zero_division=0) for column in columns if column.any()],
        "recall": [recall_score(labels, column) for column in columns],
        "f1": [f1_score(labels, column) for column in columns],
        "kappa": [cohen_kappa_score(labels, column) for column in columns],
        "false_positive_rate": [1 - recall_score(~labels, ~column) for column in columns],
    }
    for name, each in theirs.items():
        assert mine[name] == (pytest.approx(np.mean(each)) if each else None), name


@given(verdicts(), st.randoms(use_true_random=False))
def test_order_and_doubling_change_no_value(data, random):
    labels, votes = data
    rows, columns = list(range(len(labels))), list(range(votes.shape[1]))
    random.shuffle(rows)
    random.shuffle(columns)
    once = values(labels, votes)
    for other in (values(labels[rows], votes[rows][:, columns]), values(np.tile(labels, 2), np.tile(votes, (2, 1)))):
        assert {n: v is None for n, v in other.items()} == {n: v is None for n, v in once.items()}
        assert [v for v in other.values() if v is not None] == pytest.approx(
            [v for v in once.values() if v is not None]
        )
    mixed, same = consistency(votes[rows][:, columns]), consistency(votes)
    assert mixed == pytest.approx(same)


@given(verdicts())
def test_intervals_are_in_order_and_within_bounds(data):
    result = scores(*data, seed=1, resamples=20)
    for name in METRICS:
        estimate = getattr(result, name)
        if estimate.value is None:
            assert (estimate.low, estimate.high, estimate.deviation) == (None, None, None)
        elif estimate.low is not None:
            assert -1 <= estimate.low <= estimate.high <= 1
    assert result.agreement.low is not None


@pytest.mark.parametrize(
    ("labels", "votes", "missing"),
    [
        (0, 0, {"precision", "recall", "f1", "kappa"}),
        (0, 1, {"precision", "recall", "f1", "kappa"}),
        (1, 0, {"precision", "kappa", "false_positive_rate"}),
        (1, 1, {"precision", "kappa", "false_positive_rate"}),
    ],
)
def test_a_class_that_is_absent_leaves_scores_out(labels, votes, missing):
    result = values(np.full(4, labels, dtype=bool), np.full((4, 3), votes, dtype=bool))
    assert {name for name, value in result.items() if value is None} == missing
    assert result["agreement"] == float(labels == votes)


def test_one_example_has_no_interval():
    recall = scores(np.ones(1, dtype=bool), np.ones((1, 4), dtype=bool), seed=0).recall
    assert (recall.value, recall.low, recall.high, recall.deviation) == (1, None, None, 0)


def test_no_example_has_no_score():
    nothing = np.zeros(0, dtype=bool), np.zeros((0, 3), dtype=bool)
    assert set(values(*nothing).values()) == {None}
    assert set(consistency(nothing[1]).values()) == {None}
    assert right_counts(*nothing) == [0, 0, 0, 0]


def test_one_sample_has_no_deviation():
    f1 = scores(LABELS, VOTES[:, :1], seed=0).f1
    assert (f1.deviation, f1.each) == (None, (f1.value,))


def test_f1_is_zero_and_not_missing_where_nothing_is_found():
    assert values(LABELS, np.zeros((5, 2), dtype=bool))["f1"] == 0


def test_the_bootstrap_is_seeded():
    random = np.random.default_rng(0)
    labels, votes = random.random(97) < 0.4, random.random((97, 3)) < 0.5
    assert scores(labels, votes, seed=3) == scores(labels, votes, seed=3)
    assert scores(labels, votes, seed=3) != scores(labels, votes, seed=4)


def test_the_bootstrap_draws_examples_with_all_their_samples():
    """Repeating each verdict k times adds no information, so the interval stays as wide."""
    votes = VOTES[:, :1]
    one, many = (scores(LABELS, v, seed=0).f1 for v in (votes, np.repeat(votes, 8, axis=1)))
    assert (one.value, one.low, one.high) == pytest.approx((many.value, many.low, many.high))


def test_f1_draws_are_those_of_the_scores():
    (f1, drawn), result = f1_draws(LABELS, VOTES, seed=7, resamples=50), scores(LABELS, VOTES, seed=7, resamples=50)
    assert f1.tolist() == list(result.f1.each)
    defined = drawn[~np.isnan(drawn).any(axis=1)].mean(axis=1)
    assert np.percentile(defined, (2.5, 97.5)).tolist() == pytest.approx([result.f1.low, result.f1.high])
    for drawn_f1, weights in zip(drawn[:, 0], draws(5, seed=7, resamples=50), strict=True):
        assert weights.sum() == 5
        if weights @ LABELS:
            again = np.repeat(np.arange(5), weights.astype(int))
            assert drawn_f1 == pytest.approx(f1_score(LABELS[again], VOTES[again, 0], zero_division=0))
        else:
            assert np.isnan(drawn_f1)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    random, covered, truth = np.random.default_rng(0), {"agreement": 0, "f1": 0}, {"agreement": 0.8, "f1": 0.8}
    for seed in range(200):
        labels = random.random(200) < 0.5
        votes = np.where(random.random((200, 2)) < 0.8, labels[:, None], ~labels[:, None])
        result = scores(labels, votes, seed, resamples=200)
        for name in covered:
            covered[name] += getattr(result, name).low <= truth[name] <= getattr(result, name).high
    assert all(178 <= hits <= 199 for hits in covered.values()), covered


def test_consistency_by_hand():
    votes = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=bool)
    result = consistency(votes)
    assert result["majority"] == (1 + 3 / 4 + 1 / 2 + 1) / 4
    assert result["unanimous"] == 1 / 2
    assert result["pairwise"] == pytest.approx((1 + 3 / 6 + 2 / 6 + 1) / 4)
    chance = (9 / 16) ** 2 + (7 / 16) ** 2
    assert result["fleiss"] == pytest.approx((result["pairwise"] - chance) / (1 - chance))


def test_fleiss_kappa_of_two_samples():
    """10 examples: 4 twice yes, 4 twice no, 2 split. Observed 0.8, chance 0.5."""
    votes = np.array([[1, 1]] * 4 + [[0, 0]] * 4 + [[1, 0]] * 2, dtype=bool)
    assert consistency(votes)["fleiss"] == pytest.approx(0.6)


def test_consistency_says_nothing_of_one_sample_or_of_one_verdict():
    assert consistency(VOTES[:, :1])["majority"] is None
    same = consistency(np.ones((3, 4), dtype=bool))
    assert (same["majority"], same["unanimous"], same["pairwise"], same["fleiss"]) == (1, 1, 1, None)


@given(verdicts())
def test_consistency_knows_no_positive_class(data):
    _, votes = data
    result = consistency(votes)
    assert result == pytest.approx(consistency(~votes))
    if result["majority"] is not None:
        assert 0.5 <= result["majority"] <= 1
        assert result["fleiss"] is None or result["fleiss"] <= 1


def test_right_counts_and_confusion():
    assert right_counts(LABELS, VOTES) == [0, 1, 3, 1]
    parsed = np.ones((5, 3), dtype=bool)
    parsed[0, 0] = parsed[4, 2] = False
    assert confusion(LABELS, VOTES, parsed) == [[4, 4, 1], [1, 4, 1]]


@given(verdicts())
def test_every_verdict_is_counted_once(data):
    labels, votes = data
    assert sum(right_counts(labels, votes)) == len(labels)
    parsed = np.ones_like(votes)
    parsed[::2] = False
    assert sum(map(sum, confusion(labels, votes, parsed))) == votes.size


def test_spread():
    result = spread([0, 5, 9, 10, 25], 10)
    assert (result["mean"], result["p5"], result["p50"], result["p95"], result["most"]) == (9.8, 0, 9, 25, 25)
    assert (result["edges"], result["counts"]) == ((0, 10, 20, 30), (3, 1, 1))
    assert spread([0.15, 0.3], 0.05)["counts"] == (0, 0, 0, 1, 0, 0, 1)


@given(st.lists(st.integers(0, 5000), min_size=1), st.integers(1, 400))
def test_every_value_lies_in_its_bin(numbers, width):
    result = spread(numbers, width)
    assert sum(result["counts"]) == len(numbers)
    assert len(result["edges"]) == len(result["counts"]) + 1
    assert result["edges"][-2] <= max(numbers) < result["edges"][-1]
