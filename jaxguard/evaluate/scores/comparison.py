"""Compare two guards on the same examples.

The bootstrap draws examples, each with all generations of both guards, and takes the difference of their F1: it covers the
variance of the examples and of the sampling. McNemar's test is over the examples that only one of them gets right.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from jaxguard.evaluate.scores.metrics import Votes, weighted
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.statistics import RESAMPLES, estimate, f1_draws

ROUNDED = 12
"""Digits of a difference; beyond these its sign is an error of rounding."""


@dataclass(frozen=True)
class Difference:
    """F1 of the first guard less that of the second.

    Attributes:
        value, low, high: with the interval of the bootstrap.
        p: two-sided, from the share of draws whose difference has the other sign; no less than 2 / (draws + 1).
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None


@dataclass(frozen=True)
class McNemar:
    """How many examples only the first, and only the second guard gets right, and the exact two-sided p."""

    only_first: int
    only_second: int
    p: float


def f1_difference(
    first: Sequence[Votes],
    second: Sequence[Votes],
    weights: Sequence[float] = (1.0,),
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """Compare two guards by F1 on a benchmark, or by a weighted average over several, given in the same order.

    Args:
        first: a guard on each benchmark.
        second: another; its number of generations may differ.
        weights: of the benchmarks, as for metrics.average_f1.
        seed: of the bootstrap, which draws the same examples for both guards.
        resamples: how often it draws.

    Raises:
        JaxguardError: their labels differ.
    """
    values, drawn = [], []
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        _check_same(a, b)
        k = a.votes.shape[1]
        f1, draws = f1_draws(a.labels, np.concatenate([a.votes, b.votes], axis=1), (seed, i), resamples)
        values.append(f1[None, :k].mean(axis=1) - f1[None, k:].mean(axis=1))
        drawn.append(draws[:, :k].mean(axis=1) - draws[:, k:].mean(axis=1))
    differences = weighted(drawn, weights).round(ROUNDED)
    score = estimate(weighted(values, weights), differences)
    return Difference(score.value, score.low, score.high, None if score.low is None else _two_sided(differences))


def mcnemar(first: Votes, second: Votes) -> McNemar:
    """McNemar's exact test: a guard gets an example right where more than half of the generations are.

    Raises:
        JaxguardError: their labels differ.
    """
    _check_same(first, second)
    a, b = (guard.right.mean(axis=1) > 0.5 for guard in (first, second))
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    split = only_first + only_second
    return McNemar(only_first, only_second, float(binomtest(only_first, split).pvalue) if split else 1.0)


def _check_same(first: Votes, second: Votes) -> None:
    if not np.array_equal(first.labels, second.labels):
        raise JaxguardError(
            f"the labels of the two guards differ ({len(first.labels)} and {len(second.labels)} examples): compare them on the "
            "same examples in the same order"
        )


def _two_sided(differences: np.ndarray) -> float:
    """Share of draws that contradict the sign, doubled; the observed data count as one more draw, so that it is never 0."""
    drawn = differences[~np.isnan(differences)]
    fewer = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return min(1.0, 2 * (fewer + 1) / (len(drawn) + 1))
