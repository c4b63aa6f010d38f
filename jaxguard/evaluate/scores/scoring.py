"""From predictions to results: every guard in every mode on every benchmark, and the averages."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import CHOICES, LABEL, Mode
from jaxguard.data.policies import Question
from jaxguard.evaluate.benchmarks.loading import Benchmark
from jaxguard.evaluate.benchmarks.schema import Group
from jaxguard.evaluate.scores.calibration import (
    Platt,
    best_f1_threshold,
    calibration,
    fit_platt,
    recalibrated,
    verdicts_at,
)
from jaxguard.evaluate.scores.comparison import f1_difference, mcnemar
from jaxguard.evaluate.scores.metrics import (
    Votes,
    average_f1,
    count_votes,
    custom_weights,
    fill_missing,
    measure,
    measure_slices,
    safety_weights,
)
from jaxguard.evaluate.scores.results import UNPARSABLE_WORD, Average, Cell, Cost, Thresholded, Versus, Wrong
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, Prediction

MAX_ERRORS = 200
"""Of a guard on a benchmark in results.json; the others are in its predictions."""
AVERAGED: Mapping[str, tuple[Group, ...]] = {
    "prompt": ("safety_prompt",),
    "response": ("safety_response",),
    "safety": ("safety_prompt", "safety_response"),
    "custom": ("custom_policy",),
}
"""Average -> the groups of benchmarks that it is over."""

Validation = Mapping[Question, tuple[Sequence[Example], Sequence[Prediction]]]
"""A guard's predictions for the validation examples, by question."""
GuardMode = tuple[str, Mode]


@dataclass(frozen=True)
class BenchmarkPredictions:
    """The predictions of a guard in a mode for the examples of a benchmark, in the same order.

    Attributes:
        label: the config's name of the benchmark.
        seconds: by the clock, for all examples.
    """

    guard: str
    mode: Mode
    label: str
    benchmark: Benchmark
    examples: Sequence[Example]
    predictions: Sequence[Prediction]
    seconds: float

    def votes(self, settings: EvaluateConfig) -> Votes:
        """What the verdicts count as."""
        question = self.benchmark.question
        verdicts = np.array([prediction.verdicts[question] for prediction in self.predictions], np.int8)
        return count_votes(labels_of(self.examples, question), verdicts, question, settings.unparsable)


@dataclass(frozen=True)
class Probabilities:
    """Probabilities of the positive verdict.

    Attributes:
        labels: bool[N].
        values: float[N], NaN where there is none.
        unscored: float[N], the share of an example's generations that are not in its probability.
    """

    question: Question
    labels: np.ndarray
    values: np.ndarray
    unscored: np.ndarray

    @classmethod
    def of(cls, examples: Iterable[Example], predictions: Sequence[Prediction], question: Question) -> "Probabilities":
        """The probabilities of predictions for examples in the same order."""
        values = [prediction.probabilities[question] for prediction in predictions]
        unscored = [each.unscored.get(question, 0) / len(each.verdicts[question]) for each in predictions]
        return cls(question, labels_of(examples, question), np.array(values, float), np.array(unscored, float))

    def filled(self, settings: EvaluateConfig) -> np.ndarray:
        """float[N]: a missing one counts as an unparsable verdict does."""
        return fill_missing(self.labels, self.values, self.question, settings.unparsable, self.unscored)

    def recalibrated(self, platt: Platt | None) -> "Probabilities":
        """After Platt's scaling, if there is one."""
        return self if platt is None else replace(self, values=recalibrated(self.values, platt))


def labels_of(examples: Iterable[Example], question: Question) -> np.ndarray:
    """bool[N]: whether the label is the positive class."""
    return np.array([getattr(example, LABEL[question]) == CHOICES[question][0] for example in examples], bool)


def score(
    predictions: Sequence[BenchmarkPredictions], validation: Mapping[GuardMode, Validation], settings: EvaluateConfig
) -> tuple[tuple[Cell, ...], tuple[Average, ...]]:
    """All cells and averages; what a guard does not support has neither.

    Args:
        predictions: in the order of guards, modes and benchmarks.
        validation: of each guard in each mode.
        settings: which guard is the first, what unparsable verdicts count as, seeds.
    """
    by_guard: dict[GuardMode, dict[str, BenchmarkPredictions]] = {}
    for each in predictions:
        by_guard.setdefault((each.guard, each.mode), {})[each.label] = each
    references = references_of(list(by_guard), settings.guards[0].name)
    cells: list[Cell] = []
    averages: list[Average] = []
    for guard, own in by_guard.items():
        reference = by_guard[references[guard]] if guard in references else {}
        for label, each in own.items():
            cells.append(_cell(each, reference.get(label), validation.get(guard, {}), settings))
        averages += _averages(own, reference, predictions, settings)
    return tuple(cells), tuple(averages)


def references_of(guards: Sequence[GuardMode], first: str) -> dict[GuardMode, GuardMode]:
    """What each guard is compared with: the first one in the same mode, or in its first where it has no such mode."""
    modes = [mode for guard, mode in guards if guard == first]
    others = [(guard, mode) for guard, mode in guards if guard != first] if modes else []
    return {(guard, mode): (first, mode if mode in modes else modes[0]) for guard, mode in others}


def _versus(
    pairs: Sequence[tuple[BenchmarkPredictions, BenchmarkPredictions]],
    weights: Sequence[float] | None,
    settings: EvaluateConfig,
    missing: tuple[str, ...] = (),
) -> Versus | None:
    """A guard against another on benchmarks of these weights; None where there is no such average."""
    if weights is None:
        return None
    own, other = ([pair[i].votes(settings) for pair in pairs] for i in (0, 1))
    f1 = f1_difference(own, other, weights, settings.seed, settings.resamples)
    reference = pairs[0][1]
    return Versus(reference.guard, str(reference.mode), f1, missing=missing)


def _cell(
    predictions: BenchmarkPredictions,
    reference: BenchmarkPredictions | None,
    validation: Validation,
    settings: EvaluateConfig,
) -> Cell:
    benchmark, examples = predictions.benchmark, predictions.examples
    seed, resamples = settings.seed, settings.resamples
    votes = predictions.votes(settings)
    probabilities = Probabilities.of(examples, predictions.predictions, benchmark.question)
    scored = not np.isnan(probabilities.values).all()
    row = {example.id: i for i, example in enumerate(examples)}
    slices = {f"{name}: {v}": ids for name, values in benchmark.slices.items() for v, ids in values.items()}
    # Sorted: the order of a set differs between processes, and with it the draws of the bootstrap.
    rows = {name: np.array(sorted(row[x] for x in ids if x in row), int) for name, ids in slices.items()}
    versus = None
    if reference is not None:
        versus = _versus([(predictions, reference)], (1.0,), settings)
        versus = versus and replace(versus, mcnemar=mcnemar(votes, reference.votes(settings)))
    return Cell(
        guard=predictions.guard,
        mode=str(predictions.mode),
        benchmark=predictions.label,
        source=benchmark.name,
        title=benchmark.title,
        group=benchmark.group,
        question=benchmark.question,
        examples=len(examples),
        complete=len(examples) == len(benchmark.examples),
        result=measure(votes, seed, resamples),
        cost=_cost(predictions),
        slices=measure_slices(votes, rows, seed, resamples),
        calibration=calibration(probabilities.labels, probabilities.filled(settings), seed, resamples)
        if scored
        else None,
        thresholded=_thresholded(probabilities, validation, settings) if scored else None,
        versus=versus,
        wrong=tuple(_wrong(predictions, votes, slices)),
    )


def _cost(predictions: BenchmarkPredictions) -> Cost:
    each = predictions.predictions

    def mean(name: str) -> float:
        return float(np.mean([getattr(prediction, name) for prediction in each]))

    return Cost(
        seconds=mean("seconds"),
        scoring=mean("scoring"),
        wall=predictions.seconds,
        prompt_tokens=mean("prompt_tokens"),
        completion_tokens=mean("completion_tokens"),
        forced=sum(prediction.forced for prediction in each),
        unscored=sum(sum(prediction.unscored.values()) for prediction in each),
        cut=sum(prediction.cut for prediction in each),
    )


def _thresholded(test: Probabilities, validation: Validation, settings: EvaluateConfig) -> Thresholded | None:
    """Calibrate and choose the threshold on the validation examples, then score the benchmark with both."""
    if test.question not in validation:
        return None
    held_out = Probabilities.of(*validation[test.question], test.question)
    platt = fit_platt(held_out.labels, held_out.values)
    held_out, test = held_out.recalibrated(platt), test.recalibrated(platt)
    threshold = best_f1_threshold(held_out.labels, held_out.filled(settings))
    if threshold is None:
        return None
    filled, seed, resamples = test.filled(settings), settings.seed, settings.resamples
    verdicts = verdicts_at(np.where(np.isnan(test.values), np.nan, filled), threshold)
    votes = count_votes(test.labels, verdicts, test.question, settings.unparsable)
    calibrated = calibration(test.labels, filled, seed, resamples)
    return Thresholded(threshold, platt, measure(votes, seed, resamples), calibrated)


def _wrong(predictions: BenchmarkPredictions, votes: Votes, slices: Mapping[str, frozenset[str]]) -> list[Wrong]:
    """Examples of which no more than half of the generations are right, the most certain first."""
    question = predictions.benchmark.question
    positive, negative = CHOICES[question]
    words = {POSITIVE: positive, NEGATIVE: negative}
    errors = [
        Wrong(
            example=example,
            label=positive if label else negative,
            said=tuple(words.get(verdict, UNPARSABLE_WORD) for verdict in prediction.verdicts[question]),
            probability=prediction.probabilities[question],
            text=prediction.texts[int(right.argmin())] if prediction.texts else "",
            slices=tuple(name for name, ids in slices.items() if example.id in ids),
        )
        for example, prediction, label, right in zip(
            predictions.examples, predictions.predictions, votes.labels, votes.right, strict=True
        )
        if right.mean() <= 0.5
    ]
    errors.sort(key=lambda wrong: -abs((0.5 if wrong.probability is None else wrong.probability) - 0.5))
    return errors[:MAX_ERRORS]


def _averages(
    own: Mapping[str, BenchmarkPredictions],
    reference: Mapping[str, BenchmarkPredictions],
    predictions: Sequence[BenchmarkPredictions],
    settings: EvaluateConfig,
) -> Iterable[Average]:
    """The averages of a guard in a mode over the benchmarks that it has of those that any guard has."""
    for name, groups in AVERAGED.items():
        labels = list(dict.fromkeys(x.label for group in groups for x in predictions if x.benchmark.group == group))
        chosen = [own[label] for label in labels if label in own]
        weights = _weights(chosen, groups)
        if weights is None:
            continue
        f1 = average_f1([each.votes(settings) for each in chosen], weights, settings.seed, settings.resamples)
        pairs = [(each, reference[each.label]) for each in chosen if each.label in reference]
        common = {each.label for each, _ in pairs}
        left_out = tuple(label for label in labels if label not in common)
        versus = _versus(pairs, _weights([each for each, _ in pairs], groups), settings, left_out)
        missing = tuple(label for label in labels if label not in own)
        yield Average(chosen[0].guard, str(chosen[0].mode), name, f1, versus, missing)


def _weights(predictions: Sequence[BenchmarkPredictions], groups: Sequence[Group]) -> tuple[float, ...] | None:
    """Of benchmarks in the order of these groups; None where one of the groups has none."""
    counts = [sum(each.benchmark.group == group for each in predictions) for group in groups]
    if not all(counts):
        return None
    return custom_weights(*counts) if len(counts) == 1 else safety_weights(*counts)
