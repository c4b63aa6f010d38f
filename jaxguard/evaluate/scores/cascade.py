"""The cascade of a guard's two modes: where its direct answers are trusted, and what reasoning about the others is worth."""

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import beta, binom

from jaxguard.config.evaluate import AutoConfig
from jaxguard.evaluate.scores.metrics import Labels, Probabilities
from jaxguard.guards.operating_points import AutoThresholds
from jaxguard.utils.statistics import COVERAGE


def certify(
    labels: Labels, probabilities: Probabilities, threshold: float | None, limits: AutoConfig
) -> AutoThresholds:
    """Choose the probabilities up to which direct answers may pass, and from which they may block.

    Learn then test (Angelopoulos et al., arXiv 2110.01052) with a fixed sequence, which here is every threshold in rising order:
    each is accepted while the exact upper bound (Clopper and Pearson) of its miss rate is within the limit. The rate only
    rises, so the last one accepted lies below the (k + 1)-th lowest of the n harmful examples, where k is the highest count whose
    bound is within the limit; ties do no harm. The same from above for false alarms. A missing probability (NaN) is
    neither passed nor blocked. Both stop at `threshold`, that of direct mode, so that `auto` never differs from a direct answer
    that it trusts.
    """
    passes, miss_rate = _edge(probabilities, labels, limits.miss_rate, threshold)
    lowest = None if threshold is None else -threshold
    blocks, alarm_rate = _edge(-probabilities, ~labels, limits.alarm_rate, lowest)
    blocks = None if blocks is None else -blocks
    unclear = escalated(probabilities, passes, blocks)
    shares = [float(unclear[own].mean()) if own.any() else 1.0 for own in (labels, ~labels)]
    share = float(np.dot(shares, (limits.prevalence, 1 - limits.prevalence)))
    return AutoThresholds(
        passes=passes, blocks=blocks, miss_rate=miss_rate, alarm_rate=alarm_rate, escalated=share, limits=limits
    )


def escalated(probabilities: Probabilities, passes: float | None, blocks: float | None) -> Bool[np.ndarray, "N"]:
    """Which examples are reasoned about."""
    low, high = (-np.inf if passes is None else passes), (np.inf if blocks is None else blocks)
    return ~((probabilities <= low) | (probabilities >= high))


def _edge(
    scores: Float[np.ndarray, "N"], own: Bool[np.ndarray, "N"], limit: float, most: float | None
) -> tuple[float | None, float]:
    """The highest score, `most` at most, that few enough of the class `own` are at or below; and the bound of their share."""
    count = int(own.sum())
    allowed = int((binom.cdf(np.arange(count), count, limit) <= 1 - COVERAGE).sum()) - 1

    def bound(wrong: int) -> float:
        return float(beta.ppf(COVERAGE, wrong + 1, count - wrong)) if count else 1.0

    if allowed < 0:
        return None, bound(0)
    known = np.where(np.isnan(scores), np.inf, scores)
    below = known[known < np.sort(known[own])[allowed]]
    if not len(below):
        return None, bound(0)
    return float(below.max() if most is None else min(below.max(), most)), bound(allowed)
