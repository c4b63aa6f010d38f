"""How far sampled verdicts agree with people's labels, and with each other.

Every example has one label and k sampled verdicts. Each of the k samples is scored by itself over all examples, as if it were
the only one, and the k scores are averaged: that is the paper's (arXiv 2505.20087) F1 over independent generations. Intervals
are percentiles of a bootstrap that draws examples with replacement, each with all its samples.

A score is None where it says nothing: recall and F1 without a positive label, precision and kappa without labels of both classes,
precision without a positive verdict, consistency with one sample. One example has no interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
COVERAGE = 0.95
METRICS = ("agreement", "precision", "recall", "f1", "kappa")


@dataclass(frozen=True)
class Estimate:
    """A score and its bootstrap interval."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Scores:
    """Verdicts against labels.

    Attributes:
        examples, positives: how many, and how many of them are labelled positive.
        agreement: share of the verdicts that are the label.
        precision, recall, f1: of the positive class.
        kappa: Cohen's.
    """

    examples: int
    positives: int
    agreement: Estimate
    precision: Estimate
    recall: Estimate
    f1: Estimate
    kappa: Estimate


@dataclass(frozen=True)
class Consistency:
    """Verdicts against each other.

    Attributes:
        majority: mean share of an example's samples that agree with their majority.
        unanimous: share of the examples whose samples all agree.
        pairwise: share of all pairs of samples of one example that agree.
        fleiss: Fleiss' kappa, None also where every verdict is the same.
    """

    majority: float | None
    unanimous: float | None
    pairwise: float | None
    fleiss: float | None


@dataclass(frozen=True)
class Spread:
    """How a quantity is distributed; `counts[i]` values lie from `edges[i]` to below `edges[i + 1]`."""

    mean: float
    p5: float
    p50: float
    p95: float
    most: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]


def scores(labels: np.ndarray, votes: np.ndarray, seed: int, resamples: int = RESAMPLES) -> Scores:
    """Score k verdicts for each of N examples.

    Args:
        labels: bool[N], True for the positive class.
        votes: bool[N, k].
        seed: of the bootstrap.
        resamples: how often it draws.
    """
    count = len(labels)
    cells = _cells(labels, votes)
    found, drawn = _metrics(cells.sum(axis=0)), _metrics(_resampled(cells, seed, resamples if count > 1 else 0))
    estimates = {name: _estimate(float(found[name]), drawn[name]) for name in METRICS}
    return Scores(count, int(labels.sum()), **estimates)


def consistency(votes: np.ndarray) -> Consistency:
    """How far the k verdicts on each example agree; votes: bool[N, k]."""
    count, k = votes.shape
    if k < 2:
        return Consistency(None, None, None, None)
    yes = votes.sum(axis=1)
    most = np.maximum(yes, k - yes)
    pairwise = float(np.mean((yes * (yes - 1) + (k - yes) * (k - yes - 1)) / (k * (k - 1))))
    share = yes.sum() / (count * k)
    chance = share**2 + (1 - share) ** 2
    fleiss = None if chance == 1 else float((pairwise - chance) / (1 - chance))
    return Consistency(float(np.mean(most / k)), float(np.mean(most == k)), pairwise, fleiss)


def right_counts(labels: np.ndarray, votes: np.ndarray) -> list[int]:
    """Examples by how many of their k verdicts are the label, from 0 to k; where the ends are high, samples agree."""
    right = (votes == labels[:, None]).sum(axis=1)
    return np.bincount(right, minlength=votes.shape[1] + 1).tolist()


def confusion(labels: np.ndarray, votes: np.ndarray, readable: np.ndarray) -> list[list[int]]:
    """Verdicts of positive, then of negative examples: [said positive, said negative, unreadable]."""
    return [
        [int((votes & readable)[rows].sum()), int((~votes & readable)[rows].sum()), int((~readable)[rows].sum())]
        for rows in (labels, ~labels)
    ]


def spread(values: Sequence[float], width: float) -> Spread:
    """Mean, percentiles and a histogram in bins of `width` from 0."""
    array = np.asarray(values, dtype=float)
    bins = (array / width + 1e-9).astype(int)
    p5, p50, p95 = np.percentile(array, (5, 50, 95), method="nearest").tolist()
    edges = tuple(round(i * width, 6) for i in range(int(bins.max()) + 2))
    return Spread(float(array.mean()), p5, p50, p95, float(array.max()), edges, tuple(np.bincount(bins).tolist()))


def _cells(labels: np.ndarray, votes: np.ndarray) -> np.ndarray:
    """float[N, 4, k]: one-hot of true positive, false positive, false negative, true negative."""
    label = labels[:, None]
    return np.stack([votes & label, votes & ~label, ~votes & label, ~votes & ~label], axis=1).astype(float)


def _resampled(cells: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """float[resamples, 4, k]: counts over examples drawn with replacement. Memory does not grow with the resamples' examples."""
    random, count = np.random.default_rng(seed), len(cells)
    flat = cells.reshape(count, -1)
    sums = [
        np.bincount(random.integers(count, size=count), minlength=count).astype(float) @ flat for _ in range(resamples)
    ]
    return np.reshape(sums, (resamples, *cells.shape[1:]))


def _metrics(counts: np.ndarray) -> dict[str, np.ndarray]:
    """float[..., 4, k] -> each metric as float[...], the mean over the samples for which it is defined, else NaN."""
    tp, fp, fn, tn = np.moveaxis(counts, -2, 0)
    total = tp + fp + fn + tn
    agreement = (tp + tn) / total
    chance = ((tp + fp) * (tp + fn) + (fn + tn) * (fp + tn)) / total**2
    both = (tp + fn > 0) & (fp + tn > 0)
    metrics = {
        "agreement": agreement,
        "precision": np.where(both, _ratio(tp, tp + fp), np.nan),
        "recall": _ratio(tp, tp + fn),
        "f1": np.where(tp + fn > 0, _ratio(2 * tp, 2 * tp + fp + fn), np.nan),
        "kappa": np.where(both, _ratio(agreement - chance, 1 - chance), np.nan),
    }
    return {name: _mean_defined(values) for name, values in metrics.items()}


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=below > 0)


def _mean_defined(values: np.ndarray) -> np.ndarray:
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0).sum(axis=-1), defined.sum(axis=-1).astype(float))


def _estimate(value: float, drawn: np.ndarray) -> Estimate:
    if np.isnan(value):
        return Estimate(None)
    drawn = drawn[~np.isnan(drawn)]  # a draw may lack a class
    if not len(drawn):
        return Estimate(value)
    tail = 100 * (1 - COVERAGE) / 2
    low, high = np.percentile(drawn, (tail, 100 - tail)).tolist()
    return Estimate(value, low, high)
