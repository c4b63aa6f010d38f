"""Two guards on the same examples: does one beat the other, or is it luck?

The bootstrap draws examples, each with all generations of both guards, and looks at the difference of their F1: it covers the
luck of the examples and of the sampling. McNemar's test looks at the examples that only one of them judges right.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from jaxguard.evaluate.scores.metrics import Judged, weighted
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.statistics import RESAMPLES, estimate, f1_draws

ROUNDED = 12
"""Digits of a difference; beyond these its sign is rounding, not a lead."""


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
    """Examples that only the first, and only the second guard judges right, and the exact two-sided p."""

    only_first: int
    only_second: int
    p: float


def f1_difference(
    first: Sequence[Judged],
    second: Sequence[Judged],
    weights: Sequence[float] = (1.0,),
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """Compare two guards by F1 on a benchmark, or by a weighted average over several, given in the same order.

    Args:
        first: the one guard on each benchmark.
        second: the other; its number of generations may differ.
        weights: of the benchmarks, as for metrics.average_f1.
        seed: of the bootstrap, which draws the same examples for both guards.
        resamples: how often it draws.

    Raises:
        JaxguardError: their labels differ.
    """
    values, drawn = [], []
    for i, (one, other) in enumerate(zip(first, second, strict=True)):
        _check_same(one, other)
        k = one.votes.shape[1]
        f1, many = f1_draws(one.labels, np.concatenate([one.votes, other.votes], axis=1), (seed, i), resamples)
        values.append(f1[None, :k].mean(axis=1) - f1[None, k:].mean(axis=1))
        drawn.append(many[:, :k].mean(axis=1) - many[:, k:].mean(axis=1))
    differences = weighted(drawn, weights).round(ROUNDED)
    found = estimate(weighted(values, weights), differences)
    return Difference(found.value, found.low, found.high, None if found.low is None else _two_sided(differences))


def mcnemar(first: Judged, second: Judged) -> McNemar:
    """McNemar's exact test: an example is judged right where more than half of the generations are.

    Raises:
        JaxguardError: their labels differ.
    """
    _check_same(first, second)
    one, other = ((guard.votes == guard.labels[:, None]).mean(axis=1) > 0.5 for guard in (first, second))
    only_first, only_second = int((one & ~other).sum()), int((other & ~one).sum())
    split = only_first + only_second
    return McNemar(only_first, only_second, float(binomtest(only_first, split).pvalue) if split else 1.0)


def _check_same(first: Judged, second: Judged) -> None:
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
