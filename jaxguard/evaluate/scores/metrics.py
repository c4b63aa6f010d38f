"""Scores of a guard on benchmarks, from labels and the verdicts of k generations on each example; two guards compared.

Each generation is scored by itself and the scores are averaged (jaxguard.utils.statistics), as the paper (arXiv 2505.20087) does.
No verdict is dropped: an unparsable one counts as harmful, or as wrong, and is also counted by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.stats import binomtest

from jaxguard.config.evaluate import Unparsable
from jaxguard.data.format.dialogue import CHOICES, FAIL_CLOSED
from jaxguard.data.policies import Question
from jaxguard.guards.protocol import POSITIVE, UNPARSABLE
from jaxguard.utils.statistics import (
    RESAMPLES,
    Estimate,
    Scores,
    Seed,
    confusion,
    consistency,
    estimate,
    f1_draws,
    right_counts,
    scores,
)

PROMPT_SHARE: Final = 5 / 9
"""Weight of the prompt benchmarks in the paper's safety average, which has five of them and four of responses."""
_DIGITS = 12
"""Of a difference; beyond these its sign is an error of rounding."""


@dataclass(frozen=True, eq=False)
class Votes:
    """The verdicts of a guard on one benchmark.

    Attributes:
        labels: bool[N], True for the positive class.
        votes: bool[N, k], what each generation's verdict counts as.
        parsed: bool[N, k], False for an unparsable verdict.
    """

    labels: np.ndarray
    votes: np.ndarray
    parsed: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> "Votes":
        return Votes(self.labels[rows], self.votes[rows], self.parsed[rows])

    @property
    def right(self) -> np.ndarray:
        """bool[N, k]: the verdict is the label."""
        return self.votes == self.labels[:, None]


@dataclass(frozen=True)
class Result:
    """The scores of a benchmark, or of a slice of it.

    Attributes:
        generations: verdicts on each example.
        unparsable: how many of all verdicts are unparsable.
        confusion: verdicts on positive, then on negative examples: [positive, negative, unparsable].
        right: examples by how many of their verdicts are right, from 0 to k.
    """

    scores: Scores
    generations: int
    unparsable: int
    confusion: list[list[int]]
    consistency: dict[str, float | None]
    right: list[int]


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


def count_votes(
    labels: np.ndarray, verdicts: np.ndarray, question: Question = "prompt_harm", unparsable: Unparsable = "harmful"
) -> Votes:
    """Decide what every verdict counts as.

    Args:
        labels: bool[N].
        verdicts: int8[N, k] of POSITIVE, NEGATIVE and UNPARSABLE.
        question: decides what failing closed means.
        unparsable: what an unparsable verdict counts as.
    """
    parsed = verdicts != UNPARSABLE
    default = _default(labels, question, unparsable)[:, None]
    return Votes(labels, np.where(parsed, verdicts == POSITIVE, default), parsed)


def fill_missing(
    labels: np.ndarray,
    probabilities: np.ndarray,
    question: Question = "prompt_harm",
    unparsable: Unparsable = "harmful",
    unscored: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Probabilities of the positive class, float[N], where missing ones count as an unparsable verdict does.

    Args:
        labels: bool[N].
        probabilities: float[N], NaN where there is none.
        question: decides what failing closed means.
        unparsable: what an unparsable verdict counts as.
        unscored: float[N], the share of an example's generations that are not in its probability, which is the mean over
            the others.
    """
    missing = np.isnan(probabilities)
    share = np.where(missing, 1.0, unscored)
    known = np.where(missing, 0.0, probabilities)
    return (1 - share) * known + share * _default(labels, question, unparsable)


def _default(labels: np.ndarray, question: Question, unparsable: Unparsable) -> np.ndarray:
    """bool[N]: what an unparsable verdict counts as."""
    return ~labels if unparsable == "wrong" else np.full(len(labels), FAIL_CLOSED[question] == CHOICES[question][0])


def measure(votes: Votes, seed: Seed = 0, resamples: int = RESAMPLES) -> Result:
    """All scores of one benchmark with their intervals."""
    return Result(
        scores=scores(votes.labels, votes.votes, seed, resamples),
        generations=votes.votes.shape[1],
        unparsable=int((~votes.parsed).sum()),
        confusion=confusion(votes.labels, votes.votes, votes.parsed),
        consistency=consistency(votes.votes),
        right=right_counts(votes.labels, votes.votes),
    )


def average_weights(*counts: int) -> tuple[float, ...]:
    """Weights of the benchmarks in an average: all equal for one group of benchmarks, the paper's for prompts and responses.

    The safety average is (5 × mean F1 of the prompt benchmarks + 4 × mean F1 of the response benchmarks) / 9. Of the paper's 16
    averages over benchmarks with their own policies, 11 are the plain mean to rounding; no other weights explain more, or all.
    """
    shares = (1.0,) if len(counts) == 1 else (PROMPT_SHARE, 1 - PROMPT_SHARE)
    return tuple(share / count for share, count in zip(shares, counts, strict=True) for _ in range(count))


def average_f1(
    benchmarks: Sequence[Votes], weights: Sequence[float], seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Weighted mean of the benchmarks' F1, undefined where one of them is.

    `each` and the deviation are of the average by generation, where all benchmarks have as many of these. Benchmarks are
    drawn independently of each other, so an interval is somewhat narrow where two of them share examples.
    """
    scored = [f1_draws(votes.labels, votes.votes, (seed, i), resamples) for i, votes in enumerate(benchmarks)]
    each, drawn = [f1 for f1, _ in scored], [draws.mean(axis=-1) for _, draws in scored]
    if len({len(f1) for f1 in each}) > 1:
        each = [f1.mean(keepdims=True) for f1 in each]
    return estimate(_weighted(each, weights), _weighted(drawn, weights))


def f1_difference(
    first: Sequence[Votes],
    second: Sequence[Votes],
    weights: Sequence[float] = (1.0,),
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """Compare two guards by F1 on a benchmark, or by a weighted average over several.

    The bootstrap draws examples, each with all generations of both guards, and takes the difference of their F1: it covers the
    variance of the examples and of the sampling.

    Args:
        first: a guard on each benchmark.
        second: another on the same examples; its number of generations may differ.
        weights: of the benchmarks, as for average_f1.
        seed: of the bootstrap, which draws the same examples for both guards.
        resamples: how often it draws.
    """
    values, drawn = [], []
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        k = a.votes.shape[1]
        f1, draws = f1_draws(a.labels, np.concatenate([a.votes, b.votes], axis=1), (seed, i), resamples)
        values.append(f1[None, :k].mean(axis=1) - f1[None, k:].mean(axis=1))
        drawn.append(draws[:, :k].mean(axis=1) - draws[:, k:].mean(axis=1))
    differences = _weighted(drawn, weights).round(_DIGITS)
    score = estimate(_weighted(values, weights), differences)
    if score.low is None:
        return Difference(score.value)
    defined = differences[~np.isnan(differences)]
    fewer = min(int((defined <= 0).sum()), int((defined >= 0).sum()))
    # The observed data count as one more draw, so that p is never 0.
    return Difference(score.value, score.low, score.high, min(1.0, 2 * (fewer + 1) / (len(defined) + 1)))


def mcnemar(first: Votes, second: Votes) -> McNemar:
    """McNemar's exact test: a guard gets an example right where more than half of the generations are."""
    a, b = (guard.right.mean(axis=1) > 0.5 for guard in (first, second))
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    split = only_first + only_second
    return McNemar(only_first, only_second, float(binomtest(only_first, split).pvalue) if split else 1.0)


def _weighted(values: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Weighted sum of arrays of equal length; of draws, empty where one of them is (it has too few examples)."""
    shortest = min(map(len, values))
    return np.add.reduce([weight * each[:shortest] for each, weight in zip(values, weights, strict=True)])
