"""Score probabilities of the positive class, calibrate them, and choose a threshold on one set for use on another.

A probability above the threshold is positive, as in the training's validation. A missing one, as where the reasoning was cut,
is NaN; scores and thresholds take probabilities after metrics.fill_missing.
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from jaxguard.guards.protocol import NEGATIVE, POSITIVE, UNPARSABLE
from jaxguard.utils.statistics import RESAMPLES, Estimate, Seed, draws, estimate

BINS = 15
SMALLEST = 1e-6
"""Platt scaling, which takes the logit, clips probabilities to this distance from 0 and 1."""


@dataclass(frozen=True)
class Bin:
    """Examples of similar probability: their mean probability, and the share of them that is positive."""

    examples: int
    probability: float
    positive: float


@dataclass(frozen=True)
class Calibration:
    """Scores of probabilities.

    Attributes:
        examples, positives: how many, and how many of them are labelled positive.
        auprc: average precision; it and `auroc` are None without labels of both classes.
        brier: mean squared error.
        ece: expected calibration error over `curve`, None without examples. It has no interval: a bootstrap is biased upwards.
        curve: the reliability curve, in at most 15 bins of about equally many examples, equal probabilities in one bin.
    """

    examples: int
    positives: int
    auprc: Estimate
    auroc: Estimate
    brier: Estimate
    ece: float | None
    curve: tuple[Bin, ...]


@dataclass(frozen=True)
class Platt:
    """Calibrated log-odds = slope × log-odds + intercept."""

    slope: float
    intercept: float


def calibration(
    labels: np.ndarray, probabilities: np.ndarray, seed: Seed = 0, resamples: int = RESAMPLES
) -> Calibration:
    """Score probabilities, float[N] without NaN, against labels, bool[N]."""
    curve = reliability(labels, probabilities)
    gaps = [each.examples * abs(each.probability - each.positive) for each in curve]
    squares = (probabilities - labels) ** 2
    order = np.argsort(-probabilities)
    ends = np.flatnonzero(np.diff(probabilities[order], append=np.nan))  # of each run of equal probabilities
    rows = []
    for weights in chain([np.ones(len(labels))], draws(len(labels), seed, resamples)):
        brier = weights @ squares / len(labels) if len(labels) else np.nan
        rows.append((*_areas(labels[order], weights[order], ends), brier))
    auprc, auroc, brier = (estimate(column[:1], column[1:]) for column in np.array(rows).T)
    ece = sum(gaps) / len(labels) if len(labels) else None
    return Calibration(len(labels), int(labels.sum()), auprc, auroc, brier, ece, curve)


def _areas(labels: np.ndarray, weights: np.ndarray, ends: np.ndarray) -> tuple[float, float]:
    """AUPRC and AUROC of weighted examples in falling order, NaN without both classes.

    scikit-learn's would sort again in each draw, which makes an interval 20 times as slow.
    """
    tp, called = np.cumsum(weights * labels)[ends], np.cumsum(weights)[ends]
    if not len(ends) or not 0 < tp[-1] < called[-1]:
        return np.nan, np.nan
    fp = called - tp
    new_tp, new_fp = np.diff(tp, prepend=0), np.diff(fp, prepend=0)
    precision = np.divide(tp, called, out=np.zeros_like(tp), where=called > 0)
    return float(new_tp @ precision / tp[-1]), float(new_fp @ (tp - new_tp / 2) / (tp[-1] * fp[-1]))


def reliability(labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> tuple[Bin, ...]:
    """The reliability curve; bins that hold nothing, because their neighbours' probabilities are all equal, are left out."""
    if not len(labels):
        return ()
    last = np.arange(1, bins) * len(labels) // bins - 1
    edges = np.sort(probabilities)[np.maximum(last, 0)]
    number = np.searchsorted(edges, probabilities)
    groups = (number == i for i in np.unique(number))
    return tuple(Bin(int(g.sum()), float(probabilities[g].mean()), float(labels[g].mean())) for g in groups)


def best_f1_threshold(labels: np.ndarray, probabilities: np.ndarray) -> float | None:
    """The threshold with the highest F1, of several the one nearest to a half; None without a positive label."""
    if not labels.any():
        return None
    order = np.argsort(probabilities)
    ascending, positive = probabilities[order], labels[order]
    values = np.unique(ascending)
    thresholds = np.concatenate([[0.0], (values[:-1] + values[1:]) / 2, [1.0]])
    first = np.searchsorted(ascending, thresholds, side="right")
    tp = positive.sum() - np.concatenate([[0], np.cumsum(positive)])[first]
    f1 = 2 * tp / (len(ascending) - first + positive.sum())
    best = thresholds[f1 >= f1.max() - 1e-12]
    return float(best[np.argmin(np.abs(best - 0.5))])


def verdicts_at(probabilities: np.ndarray, threshold: float) -> np.ndarray:
    """int8[N, 1]: the verdicts of one generation, for metrics.count_votes."""
    verdicts = np.where(probabilities > threshold, POSITIVE, NEGATIVE)
    return np.where(np.isnan(probabilities), UNPARSABLE, verdicts).astype(np.int8)[:, None]


def fit_platt(labels: np.ndarray, probabilities: np.ndarray) -> Platt | None:
    """Fit Platt's scaling with his smoothed targets; missing probabilities are left out. None without both classes.

    Source: Platt, Probabilistic outputs for support vector machines, 1999, section 2.2; here of log-odds.
    """
    known = ~np.isnan(probabilities)
    labels, odds = labels[known], _log_odds(probabilities[known])[:, None]
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        return None
    target = np.where(labels, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    # A soft target is both labels, weighted.
    model = LogisticRegression(C=np.inf, max_iter=1000)
    model.fit(np.tile(odds, (2, 1)), np.repeat([1, 0], len(labels)), np.concatenate([target, 1 - target]))
    return Platt(float(model.coef_[0, 0]), float(model.intercept_[0]))


def recalibrated(probabilities: np.ndarray, platt: Platt) -> np.ndarray:
    """Probabilities after Platt's scaling; missing ones stay so."""
    return expit(platt.slope * _log_odds(probabilities) + platt.intercept)


def _log_odds(probabilities: np.ndarray) -> np.ndarray:
    return logit(np.clip(probabilities, SMALLEST, 1 - SMALLEST))
