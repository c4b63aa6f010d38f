"""From predictions to results: every guard in every mode on every benchmark, and the averages."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.data.benchmarks.loading import Benchmark
from jaxguard.data.benchmarks.schema import Group
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import CHOICES, LABEL, Mode
from jaxguard.data.policies import Policy, Question
from jaxguard.data.sources import digest
from jaxguard.evaluate.scores import metrics
from jaxguard.evaluate.scores.cascade import certify
from jaxguard.evaluate.scores.metrics import FALSE_POSITIVE_RATES, Result, Votes
from jaxguard.evaluate.scores.results import UNPARSABLE_WORD, WAITS, Average, Cell, Cost, Thresholded, Versus, Wrong
from jaxguard.guards.operating_points import F1, Asked, OperatingPoint, OperatingPoints, Platt, Share
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, Prediction
from jaxguard.utils.statistics import Estimate

MAX_ERRORS = 200
"""Of a guard on a benchmark in results.json; the others are in its predictions."""
AVERAGED: Mapping[str, tuple[Group, ...]] = {
    "prompt": ("safety_prompt",),
    "response": ("safety_response",),
    "safety": ("safety_prompt", "safety_response"),
    "custom": ("custom_policy",),
}
"""Average -> the groups of benchmarks that it is over."""

GuardMode = tuple[str, Mode]


@dataclass(frozen=True)
class PredictedExamples:
    """The predictions of a guard in a mode for examples, in the same order: of a benchmark, or validation examples (None).

    `label` is the config's name of the benchmark, `precision` the type that JAX computed the predictions in, or what else did.
    """

    guard: str
    mode: Mode
    label: str
    question: Question
    examples: Sequence[Example]
    benchmark: Benchmark | None
    predictions: Sequence[Prediction]
    precision: str = ""

    @property
    def labels(self) -> Bool[np.ndarray, "N"]:
        """Whether the label is the positive class."""
        positive = CHOICES[self.question][0]
        return np.array([getattr(example, LABEL[self.question]) == positive for example in self.examples], bool)

    @property
    def rows(self) -> dict[str, dict[str, np.ndarray]]:
        """Slice -> value -> the rows of its examples, as int[n]."""
        row = {example.id: i for i, example in enumerate(self.examples)}
        # Sorted: the order of a set differs between processes, and with it the draws of the bootstrap.
        return {
            name: {value: np.array(sorted(row[x] for x in ids if x in row), int) for value, ids in values.items()}
            for name, values in (self.benchmark.slices if self.benchmark else {}).items()
        }

    def parts(self, votes: Votes, mean: str = "main") -> list[Votes]:
        """The votes whose F1 the benchmark's is the mean of: those of the values of its slice with that `mean`, or all."""
        of = [each.name for each in self.benchmark.definition.slices if each.mean == mean] if self.benchmark else []
        return [votes[rows] for name in of for rows in self.rows[name].values()] or [votes]

    def votes(self, settings: EvaluateConfig) -> Votes:
        """What the verdicts count as."""
        verdicts = np.array([prediction.verdicts[self.question] for prediction in self.predictions], np.int8)
        return metrics.count_votes(self.labels, verdicts, self.question, settings.unparsable)

    @property
    def probabilities(self) -> Float[np.ndarray, "N"]:
        """Probabilities of the positive verdict, NaN where there is none."""
        return np.array([prediction.probabilities[self.question] for prediction in self.predictions], float)

    def filled(self, settings: EvaluateConfig, platt: Platt | None = None) -> Float[np.ndarray, "N"]:
        """Probabilities after Platt's scaling; a missing one counts as an unparsable verdict does."""
        values = self.probabilities if platt is None else platt(self.probabilities)
        unscored = [x.unscored.get(self.question, 0) / len(x.verdicts[self.question]) for x in self.predictions]
        return metrics.fill_missing(self.labels, values, self.question, settings.unparsable, np.array(unscored, float))

    def votes_at(self, filled: Float[np.ndarray, "N"], threshold: float, settings: EvaluateConfig) -> Votes:
        """What the verdicts at a threshold count as; where there is no probability, they are unparsable."""
        verdicts = metrics.verdicts_at(np.where(np.isnan(self.probabilities), np.nan, filled), threshold)
        return metrics.count_votes(self.labels, verdicts, self.question, settings.unparsable)


def choose_points(
    validation: PredictedExamples, policy: Policy, settings: EvaluateConfig, auto: bool = False
) -> OperatingPoints | None:
    """Calibrate on validation examples, and choose the thresholds of the best F1 and of false-positive rates there.

    None without probabilities. A missing one counts as an unparsable verdict does, whatever the threshold. With `auto`, those
    of mode `auto` are chosen too, by the direct answers.

    The threshold for a rate is the score of the negative that has k = floor(rate × n) of all n negatives above it. The true rate
    there is distributed as Beta(k + 1, n - k), whose quantile is the upper end of Clopper and Pearson's interval for k of n, so
    the interval has its coverage although the threshold was chosen on the same negatives (David and Nagaraja, Order Statistics,
    2003, section 2.2; Clopper and Pearson, Biometrika 26, 1934). With ties fewer than k are above: the upper end stays that of k,
    the lower one is of those that are. The positives have no part in the choice, so that recall's interval is exact as well. The
    best F1 depends on both classes: rate and recall at it have no interval.
    """
    labels, given = validation.labels, validation.probabilities
    if np.isnan(given).all():
        return None
    platt = metrics.fit_platt(labels, given)
    filled = validation.filled(settings, platt)

    positives, negatives = int(labels.sum()), int((~labels).sum())

    def share(count: int, total: int, most: int | None) -> Share | None:
        if not total:
            return None
        low, high = (None, None) if most is None else metrics.exact_interval(count, total, most)
        return Share(value=count / total, low=low, high=high)

    def point(threshold: float | None, allowed: int | None = None) -> OperatingPoint:
        if threshold is None:
            return OperatingPoint()
        votes = validation.votes_at(filled, threshold, settings).votes[:, 0]
        false, right = int(votes[~labels].sum()), int(votes[labels].sum())
        if allowed is not None and false > allowed:  # too many negatives have no probability
            return OperatingPoint()
        return OperatingPoint(
            threshold=threshold,
            false_positive_rate=share(false, negatives, allowed),
            recall=share(right, positives, None if allowed is None else right),
        )

    best_f1 = metrics.best_f1_threshold(labels, filled)
    calibrated = given if platt is None else platt(given)
    rates = {str(rate): point(*metrics.rate_threshold(labels, filled, rate)) for rate in FALSE_POSITIVE_RATES}
    return OperatingPoints(
        asked=Asked.of(policy, validation.question, validation.mode, settings),
        precision=validation.precision,
        positives=positives,
        negatives=negatives,
        examples_sha256=digest(validation.examples),
        platt=platt,
        points={F1: point(best_f1), **rates},
        auto=certify(labels, calibrated, best_f1, settings.auto) if auto and validation.mode is Mode.DIRECT else None,
    )


PointsOf = Mapping[tuple[str, Mode, Question], OperatingPoints]
"""(guard, mode, question) -> its operating points."""


def score(
    predictions: Sequence[PredictedExamples], settings: EvaluateConfig, points: PointsOf
) -> tuple[tuple[Cell, ...], tuple[Average, ...]]:
    """All cells and averages, in the order of the predictions; what a guard does not support has neither."""
    by_guard: dict[GuardMode, dict[str, PredictedExamples]] = {}
    groups = {each.label: each.benchmark.definition.group for each in predictions if each.benchmark}
    for each in predictions:
        if each.benchmark:
            by_guard.setdefault((each.guard, each.mode), {})[each.label] = each
    references = references_of(list(by_guard), settings.guards[0].name)
    cells: list[Cell] = []
    averages: list[Average] = []
    for guard, own in by_guard.items():
        reference = by_guard[references[guard]] if guard in references else {}
        for label, each in own.items():
            chosen = [points.get((*key, each.question)) for key in (guard, references.get(guard, guard))]
            cells.append(_cell(each, reference.get(label), chosen, settings))
        averages += _averages(own, reference, groups, settings)
    return tuple(cells), tuple(averages)


def references_of(guards: Sequence[GuardMode], first: str) -> dict[GuardMode, GuardMode]:
    """What each guard is compared with: the first one in the same mode, or in its first where it has no such mode."""
    modes = [mode for guard, mode in guards if guard == first]
    others = [(guard, mode) for guard, mode in guards if guard != first] if modes else []
    return {(guard, mode): (first, mode if mode in modes else modes[0]) for guard, mode in others}


def _cell(
    own: PredictedExamples,
    reference: PredictedExamples | None,
    points: Sequence[OperatingPoints | None],
    settings: EvaluateConfig,
) -> Cell:
    """`points` are those of the guard, and of its reference."""
    assert own.benchmark is not None
    seed, resamples, predictions = settings.seed, settings.resamples, own.predictions
    votes, scored = own.votes(settings), not np.isnan(own.probabilities).all()
    slices = {f"{name}: {v}": ids for name, values in own.benchmark.slices.items() for v, ids in values.items()}
    rows = {f"{name}: {v}": members for name, values in own.rows.items() for v, members in values.items()}
    result, other_f1 = _measured(own, votes, settings)
    mean = ("seconds", "scoring", "prompt_tokens", "completion_tokens")
    costs: dict[str, Any] = {name: float(np.mean([getattr(each, name) for each in predictions])) for name in mean}
    costs |= {name: sum(getattr(each, name) for each in predictions) for name in ("wall", "forced", "cut")}
    busy = (costs["seconds"] + costs["scoring"]) * len(predictions)
    if 0 < costs["wall"] < busy:  # requests overlapped: each took its share of the time by the clock, as in a batch
        costs |= {name: costs[name] * costs["wall"] / busy for name in ("seconds", "scoring")}
    if waits := [each.wait for each in predictions if each.wait]:
        costs |= {name: float(np.percentile(waits, percentile)) for name, percentile in WAITS.items()}
    unscored = sum(sum(each.unscored.values()) for each in predictions)
    definition, versus = own.benchmark.definition, None
    at, other_at = (
        _at_threshold(test, chosen, settings) for test, chosen in zip((own, reference), points, strict=True)
    )
    if reference is not None:
        versus = _versus([own], [reference], (1.0,), settings)
        versus = replace(versus, mcnemar=metrics.mcnemar(votes, reference.votes(settings)))
        if scored and not np.isnan(reference.probabilities).all():
            first, second = own.filled(settings), reference.filled(settings)
            versus = replace(versus, auprc=metrics.auprc_difference(own.labels, first, second, seed, resamples))
        if at and other_at:
            parts, others = (own.parts(each.votes) for each in (at, other_at))
            difference = metrics.f1_difference(parts, others, [1 / len(parts)] * len(parts), seed, resamples)
            versus = replace(versus, f1_at_threshold=difference)
    return Cell(
        guard=own.guard,
        mode=str(own.mode),
        benchmark=own.label,
        source=definition.name,
        title=definition.title,
        group=definition.group,
        question=own.question,
        examples=len(own.examples),
        complete=len(own.examples) == len(own.benchmark.examples),
        result=result,
        cost=Cost(**costs, unscored=unscored),
        slices={name: metrics.measure(votes[members], seed, resamples) for name, members in rows.items()},
        other_f1=other_f1,
        calibration=metrics.calibration(own.labels, own.filled(settings), seed, resamples) if scored else None,
        thresholded=_thresholded(own, at, settings) if at else None,
        versus=versus,
        wrong=tuple(_wrong(own, votes, slices)),
        right=tuple(votes.right.sum(axis=1).tolist()),
        examples_sha256=digest(own.examples),
    )


def _measured(own: PredictedExamples, votes: Votes, settings: EvaluateConfig) -> tuple[Result, dict[str, Estimate]]:
    """The scores of the votes, and what else their F1 is; see Cell."""
    assert own.benchmark is not None
    result = metrics.measure(votes, settings.seed, settings.resamples)
    for part_of in own.benchmark.definition.slices:
        if part_of.mean is not None:
            parts, over_all = own.parts(votes, part_of.mean), result.scores.f1
            mean = metrics.average_f1(parts, [1 / len(parts)] * len(parts), settings.seed, settings.resamples)
            if part_of.mean == "beside":
                return result, {f"mean of {part_of.name}": mean}
            return replace(result, scores=replace(result.scores, f1=mean)), {"over all": over_all}
    return result, {}


@dataclass(frozen=True)
class _AtThreshold:
    """Calibrated probabilities of a benchmark's examples, and the votes at the threshold with the best F1."""

    threshold: float
    points: OperatingPoints
    filled: Float[np.ndarray, "N"]
    votes: Votes


def _at_threshold(
    test: PredictedExamples | None, points: OperatingPoints | None, settings: EvaluateConfig
) -> _AtThreshold | None:
    """Calibrate, and hold against the threshold; None without it, or without probabilities."""
    threshold = None if points is None else points.threshold(F1)
    if test is None or points is None or threshold is None or np.isnan(test.probabilities).all():
        return None
    filled = test.filled(settings, points.platt)
    return _AtThreshold(threshold, points, filled, test.votes_at(filled, threshold, settings))


def _thresholded(test: PredictedExamples, at: _AtThreshold, settings: EvaluateConfig) -> Thresholded:
    """Score the benchmark at the threshold, and at those of the other operating points."""
    result, _ = _measured(test, at.votes, settings)
    thresholds = {name: at.points.threshold(name) for name in at.points.points}
    votes = {name: test.votes_at(at.filled, x, settings) for name, x in thresholds.items() if x is not None}
    points = {name: metrics.measure(each, settings.seed, settings.resamples).scores for name, each in votes.items()}
    calibration = metrics.calibration(test.labels, at.filled, settings.seed, settings.resamples)
    return Thresholded(at.threshold, at.points.platt, result, calibration, at.points.precision, points)


def _wrong(own: PredictedExamples, votes: Votes, slices: Mapping[str, frozenset[str]]) -> list[Wrong]:
    """Examples of which no more than half of the generations are right, the most certain first."""
    positive, negative = CHOICES[own.question]
    words = {POSITIVE: positive, NEGATIVE: negative}
    rows = zip(own.examples, own.predictions, votes.labels, votes.right, strict=True)
    errors = [
        Wrong(
            example=example,
            label=positive if label else negative,
            said=tuple(words.get(verdict, UNPARSABLE_WORD) for verdict in prediction.verdicts[own.question]),
            probability=prediction.probabilities[own.question],
            text=prediction.texts[int(right.argmin())] if prediction.texts else "",
            slices=tuple(name for name, ids in slices.items() if example.id in ids),
        )
        for example, prediction, label, right in rows
        if right.mean() <= 0.5
    ]
    errors.sort(key=lambda wrong: -abs((0.5 if wrong.probability is None else wrong.probability) - 0.5))
    return errors[:MAX_ERRORS]


def _averages(
    own: Mapping[str, PredictedExamples],
    reference: Mapping[str, PredictedExamples],
    groups: Mapping[str, Group],
    settings: EvaluateConfig,
) -> Iterator[Average]:
    """The averages of a guard in a mode over the benchmarks that it has of those that any guard has, label -> group."""
    for name, averaged in AVERAGED.items():
        labels = [label for group in averaged for label in groups if groups[label] == group]
        chosen = [label for label in labels if label in own]
        common = [label for label in chosen if label in reference]
        weights, weights_of_common = (
            metrics.average_weights(*(sum(groups[label] == group for label in some) for group in averaged))
            for some in (chosen, common)
        )
        if not weights:
            continue
        votes, of_parts = _split([own[label] for label in chosen], weights, settings)
        versus = None
        if weights_of_common:
            first, second = ([guard[label] for label in common] for guard in (own, reference))
            missing = tuple(label for label in labels if label not in common)
            versus = replace(_versus(first, second, weights_of_common, settings), missing=missing)
        yield Average(
            guard=own[chosen[0]].guard,
            mode=str(own[chosen[0]].mode),
            name=name,
            f1=metrics.average_f1(votes, of_parts, settings.seed, settings.resamples),
            versus=versus,
            missing=tuple(label for label in labels if label not in own),
        )


def _versus(
    own: Sequence[PredictedExamples],
    reference: Sequence[PredictedExamples],
    weights: Sequence[float],
    settings: EvaluateConfig,
) -> Versus:
    (first, weights_of_parts), (second, _) = (_split(guard, weights, settings) for guard in (own, reference))
    f1 = metrics.f1_difference(first, second, weights_of_parts, settings.seed, settings.resamples)
    return Versus(reference[0].guard, str(reference[0].mode), f1)


def _split(
    benchmarks: Sequence[PredictedExamples], weights: Sequence[float], settings: EvaluateConfig
) -> tuple[list[Votes], list[float]]:
    """The votes whose F1 make up the benchmarks', and their weights."""
    parts = [each.parts(each.votes(settings)) for each in benchmarks]
    of_parts = [weight / len(some) for some, weight in zip(parts, weights, strict=True) for _ in some]
    return [votes for some in parts for votes in some], of_parts
