"""Agreement of sampled verdicts with labels, and with each other.

Each of an example's k sampled verdicts is scored over all examples, and the k scores are averaged, as in the paper (arXiv
2505.20087). Intervals are percentiles of a bootstrap that draws examples with replacement, each with all its samples.

A score is None if undefined: recall and F1 without a positive label, the false-positive rate without a negative one, precision
and kappa without labels of both classes, precision without a positive verdict, consistency with one sample.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 1000
COVERAGE = 0.95
METRICS = ("agreement", "precision", "recall", "f1", "kappa", "false_positive_rate")


@dataclass(frozen=True)
class Estimate:
    """Mean of the defined scores of k samples, its bootstrap interval, their standard deviation (divisor n - 1), and each."""

    value: float | None
    low: float | None = None
    high: float | None = None
    deviation: float | None = None
    each: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Scores:
    """Agreement of verdicts with labels: accuracy, scores of the positive class, Cohen's kappa."""

    examples: int
    positives: int
    agreement: Estimate
    precision: Estimate
    recall: Estimate
    f1: Estimate
    kappa: Estimate
    false_positive_rate: Estimate


Seed = int | Sequence[int]


def scores(labels: np.ndarray, votes: np.ndarray, seed: Seed, resamples: int = RESAMPLES) -> Scores:
    """Score k verdicts for each of N examples: labels bool[N], True for the positive class, and votes bool[N, k]."""
    observed, drawn = _metrics_and_draws(labels, votes, seed, resamples)
    estimates = {name: estimate(observed[name], mean_defined(drawn[name])) for name in METRICS}
    return Scores(len(labels), int(labels.sum()), **estimates)


def f1_draws(
    labels: np.ndarray, votes: np.ndarray, seed: Seed, resamples: int = RESAMPLES
) -> tuple[np.ndarray, np.ndarray]:
    """Return F1 of each sample as float[k], and in every bootstrap draw as float[resamples, k]; NaN if undefined."""
    observed, drawn = _metrics_and_draws(labels, votes, seed, resamples)
    return observed["f1"], drawn["f1"]


def draws(count: int, seed: Seed, resamples: int = RESAMPLES) -> Iterator[np.ndarray]:
    """Yield bootstrap draws: how often each of `count` examples is drawn, as float[count]; none for fewer than two."""
    random = np.random.default_rng(seed)
    for _ in range(resamples if count > 1 else 0):
        yield np.bincount(random.integers(count, size=count), minlength=count).astype(float)


def estimate(each: np.ndarray, drawn: np.ndarray) -> Estimate:
    """Estimate a score from its value in every sample and its mean in every draw; NaN if undefined."""
    scores = tuple(None if np.isnan(score) else float(score) for score in each)
    defined, drawn = each[~np.isnan(each)], drawn[~np.isnan(drawn)]  # a draw may lack a class
    if not len(defined):
        return Estimate(None, each=scores)
    tail = 100 * (1 - COVERAGE) / 2
    low, high = np.percentile(drawn, (tail, 100 - tail)).tolist() if len(drawn) else (None, None)
    deviation = float(defined.std(ddof=1)) if len(defined) > 1 else None
    return Estimate(float(mean_defined(each)), low, high, deviation, scores)


def mean_defined(values: np.ndarray) -> np.ndarray:
    """Return the mean over the last axis, ignoring NaN."""
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0).sum(axis=-1), defined.sum(axis=-1).astype(float))


def consistency(votes: np.ndarray) -> dict[str, float | None]:
    """Measure the agreement of each example's k verdicts; votes: bool[N, k].

    Returns:
        majority: mean share of an example's samples that agree with their majority.
        unanimous: share of the examples whose samples all agree.
        pairwise: share of all pairs of samples of one example that agree.
        fleiss: Fleiss' kappa, None also where every verdict is the same.
    """
    count, k = votes.shape
    if k < 2 or not count:
        return dict.fromkeys(("majority", "unanimous", "pairwise", "fleiss"))
    yes = votes.sum(axis=1)
    most = np.maximum(yes, k - yes)
    pairwise = float(np.mean((yes * (yes - 1) + (k - yes) * (k - yes - 1)) / (k * (k - 1))))
    share = yes.sum() / (count * k)
    chance = share**2 + (1 - share) ** 2
    fleiss = None if chance == 1 else float((pairwise - chance) / (1 - chance))
    majority, unanimous = float(np.mean(most / k)), float(np.mean(most == k))
    return {"majority": majority, "unanimous": unanimous, "pairwise": pairwise, "fleiss": fleiss}


def right_counts(labels: np.ndarray, votes: np.ndarray) -> list[int]:
    """Count examples by their number of right verdicts, from 0 to k."""
    right = (votes == labels[:, None]).sum(axis=1)
    return [int(count) for count in np.bincount(right, minlength=votes.shape[1] + 1)]


def confusion(labels: np.ndarray, votes: np.ndarray, parsed: np.ndarray) -> list[list[int]]:
    """Count the verdicts of positive, then of negative examples: [positive, negative, unparsable]."""
    return [
        [int((votes & parsed)[rows].sum()), int((~votes & parsed)[rows].sum()), int((~parsed)[rows].sum())]
        for rows in (labels, ~labels)
    ]


def spread(values: Sequence[float], width: float) -> dict[str, Any]:
    """Return mean, p5, p50, p95, most, and a histogram: counts[i] values are in [edges[i], edges[i + 1]), of equal `width`."""
    array = np.asarray(values, dtype=float)
    bins = (array / width + 1e-9).astype(int)
    p5, p50, p95 = np.percentile(array, (5, 50, 95), method="nearest").tolist()
    edges = tuple(round(i * width, 6) for i in range(int(bins.max()) + 2))
    summary = {"mean": float(array.mean()), "p5": p5, "p50": p50, "p95": p95, "most": float(array.max())}
    return {**summary, "edges": edges, "counts": tuple(np.bincount(bins).tolist())}


def _metrics_and_draws(
    labels: np.ndarray, votes: np.ndarray, seed: Seed, resamples: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Compute each metric of each sample, float[k], and in every bootstrap draw, float[resamples, k]."""
    label = labels[:, None]
    cells = np.stack([votes & label, votes & ~label, ~votes & label, ~votes & ~label], axis=1).astype(float)
    flat = cells.reshape(len(cells), math.prod(cells.shape[1:]))
    sums = [weights @ flat for weights in draws(len(cells), seed, resamples)]
    return _metrics(cells.sum(axis=0)), _metrics(np.reshape(sums, (len(sums), *cells.shape[1:])))


def _metrics(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Compute each metric from counts of tp, fp, fn and tn: float[..., 4, k] -> float[..., k], NaN if undefined."""
    tp, fp, fn, tn = np.moveaxis(counts, -2, 0)
    total = tp + fp + fn + tn
    agreement = _ratio(tp + tn, total)
    chance = _ratio((tp + fp) * (tp + fn) + (fn + tn) * (fp + tn), total**2)
    both = (tp + fn > 0) & (fp + tn > 0)
    return {
        "agreement": agreement,
        "precision": np.where(both, _ratio(tp, tp + fp), np.nan),
        "recall": _ratio(tp, tp + fn),
        "f1": np.where(tp + fn > 0, _ratio(2 * tp, 2 * tp + fp + fn), np.nan),
        "kappa": np.where(both, _ratio(agreement - chance, 1 - chance), np.nan),
        "false_positive_rate": _ratio(fp, fp + tn),
    }


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    ratio: np.ndarray = np.divide(above, below, out=np.full(np.shape(below), np.nan), where=below > 0)
    return ratio
