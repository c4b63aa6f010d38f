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
from jaxguard.data.policies import Question
from jaxguard.evaluate.scores import metrics
from jaxguard.evaluate.scores.metrics import Platt, Result, Votes
from jaxguard.evaluate.scores.results import UNPARSABLE_WORD, WAITS, Average, Cell, Cost, Thresholded, Versus, Wrong
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


def score(
    predictions: Sequence[PredictedExamples], settings: EvaluateConfig
) -> tuple[tuple[Cell, ...], tuple[Average, ...]]:
    """All cells and averages, in the order of the predictions; what a guard does not support has neither."""
    by_guard: dict[GuardMode, dict[str, PredictedExamples]] = {}
    validation = {(p.guard, p.mode, p.question): p for p in predictions if p.benchmark is None}
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
            chosen_on = [validation.get((*key, each.question)) for key in (guard, references.get(guard, guard))]
            cells.append(_cell(each, reference.get(label), chosen_on, settings))
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
    chosen_on: Sequence[PredictedExamples | None],
    settings: EvaluateConfig,
) -> Cell:
    """`chosen_on` are the validation examples of the guard, and of its reference."""
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
    at, other_at = (_at_threshold(test, on, settings) for test, on in zip((own, reference), chosen_on, strict=True))
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
    """Calibrated probabilities of a benchmark's examples, and the votes at the threshold that validation examples chose."""

    threshold: float
    platt: Platt | None
    filled: Float[np.ndarray, "N"]
    votes: Votes
    precision: str


def _at_threshold(
    test: PredictedExamples | None, validation: PredictedExamples | None, settings: EvaluateConfig
) -> _AtThreshold | None:
    """Calibrate and choose the threshold on the validation examples; None without them, or without probabilities."""
    if test is None or validation is None or np.isnan(test.probabilities).all():
        return None
    platt = metrics.fit_platt(validation.labels, validation.probabilities)
    threshold = metrics.best_f1_threshold(validation.labels, validation.filled(settings, platt))
    if threshold is None:
        return None
    filled = test.filled(settings, platt)
    verdicts = metrics.verdicts_at(np.where(np.isnan(test.probabilities), np.nan, filled), threshold)
    votes = metrics.count_votes(test.labels, verdicts, test.question, settings.unparsable)
    return _AtThreshold(threshold, platt, filled, votes, validation.precision)


def _thresholded(test: PredictedExamples, at: _AtThreshold, settings: EvaluateConfig) -> Thresholded:
    """Score the benchmark at the threshold."""
    result, _ = _measured(test, at.votes, settings)
    calibration = metrics.calibration(test.labels, at.filled, settings.seed, settings.resamples)
    return Thresholded(at.threshold, at.platt, result, calibration, at.precision)


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
