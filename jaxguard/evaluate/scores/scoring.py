"""From answers to results: every guard in every mode on every benchmark, and the averages."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import CHOICES, Mode
from jaxguard.data.policies import Question
from jaxguard.evaluate.benchmarks.loading import LABEL, Benchmark
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
    Judged,
    average_f1,
    custom_weights,
    filled,
    judged,
    measure,
    measure_slices,
    safety_weights,
)
from jaxguard.evaluate.scores.results import UNREADABLE, Average, Cell, Cost, Thresholded, Versus, Wrong
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, Prediction

SHOWN_ERRORS = 200
"""Of one guard on one benchmark; the others are in its predictions."""
AVERAGED: Mapping[str, tuple[Group, ...]] = {
    "prompt": ("safety_prompt",),
    "response": ("safety_response",),
    "safety": ("safety_prompt", "safety_response"),
    "custom": ("custom_policy",),
}
"""Average -> the groups of benchmarks that it is over."""

Validation = Mapping[Question, tuple[Sequence[Example], Sequence[Prediction]]]
"""What a guard said of the validation examples, by question."""
Asked = tuple[str, Mode]
"""A guard, and how it is asked."""


@dataclass(frozen=True)
class GuardPredictions:
    """One guard in one mode on one benchmark: the examples that were judged, and what was said, in the same order."""

    guard: str
    mode: Mode
    label: str
    benchmark: Benchmark
    examples: Sequence[Example]
    answers: Sequence[Prediction]
    seconds: float

    @property
    def votes(self) -> np.ndarray:
        """int8[N, k]."""
        return np.array([answer.verdicts[self.benchmark.question] for answer in self.answers], np.int8)

    @property
    def labels(self) -> np.ndarray:
        return labels_of(self.examples, self.benchmark.question)

    @property
    def probable(self) -> "Probable":
        return probable(self.examples, self.answers, self.benchmark.question)


@dataclass(frozen=True)
class Probable:
    """Probabilities of the positive answer to a question.

    Attributes:
        labels: bool[N].
        probabilities: float[N], NaN where there is none.
        unscored: float[N], the share of an example's generations that are not in its probability.
    """

    question: Question
    labels: np.ndarray
    probabilities: np.ndarray
    unscored: np.ndarray

    def filled(self, settings: EvaluateConfig) -> np.ndarray:
        """float[N]: what is missing counts as an unreadable verdict."""
        return filled(self.labels, self.probabilities, self.question, settings.unparsable, self.unscored)

    def recalibrated(self, platt: Platt | None) -> "Probable":
        """After Platt's scaling, if there is one."""
        return self if platt is None else replace(self, probabilities=recalibrated(self.probabilities, platt))


def labels_of(examples: Iterable[Example], question: Question) -> np.ndarray:
    """bool[N]: the positive class."""
    return np.array([getattr(example, LABEL[question]) == CHOICES[question][0] for example in examples], bool)


def probable(examples: Iterable[Example], answers: Sequence[Prediction], question: Question) -> Probable:
    """The probabilities that answers give, in the order of their examples."""
    return Probable(
        question,
        labels_of(examples, question),
        np.array([a.probabilities[question] for a in answers], float),
        np.array([a.unscored.get(question, 0) / len(a.verdicts[question]) for a in answers], float),
    )


def score(
    found: Sequence[GuardPredictions], validation: Mapping[Asked, Validation], settings: EvaluateConfig
) -> tuple[tuple[Cell, ...], tuple[Average, ...]]:
    """All cells and averages of what guards judged; what one of them left out has neither.

    Args:
        found: in the order of guards, modes and benchmarks.
        validation: (guard, mode) -> answers on the validation examples.
        settings: which guard is the first, how unreadable verdicts count, seeds.
    """
    scored = {id(one): judged(one.labels, one.votes, one.benchmark.question, settings.unparsable) for one in found}
    by_guard: dict[Asked, dict[str, GuardPredictions]] = {}
    for one in found:
        by_guard.setdefault((one.guard, one.mode), {})[one.label] = one
    firsts = opponents(list(by_guard), settings.guards[0].name)
    cells: list[Cell] = []
    averages: list[Average] = []
    for asked, mine in by_guard.items():
        first = firsts.get(asked)
        theirs = by_guard[first] if first else {}
        for label, one in mine.items():
            versus = _versus(one, theirs.get(label), scored, settings)
            cells.append(_cell(one, scored[id(one)], versus, validation.get(asked, {}), settings))
        averages += _averages(mine, theirs, found, scored, settings)
    return tuple(cells), tuple(averages)


def opponents(asked: Sequence[Asked], first: str) -> dict[Asked, Asked]:
    """Whom each guard is compared with: the first one in the same mode, or in its first where it has no such mode.

    The first guard is compared with nobody.
    """
    modes = [mode for guard, mode in asked if guard == first]
    others = [one for one in asked if one[0] != first] if modes else []
    return {(guard, mode): (first, mode if mode in modes else modes[0]) for guard, mode in others}


def _versus(
    one: GuardPredictions, other: GuardPredictions | None, scored: Mapping[int, Judged], settings: EvaluateConfig
) -> Versus | None:
    if other is None:
        return None
    mine, theirs = scored[id(one)], scored[id(other)]
    f1 = f1_difference([mine], [theirs], seed=settings.seed, resamples=settings.resamples)
    return Versus(other.guard, str(other.mode), f1, mcnemar(mine, theirs))


def _cell(
    one: GuardPredictions, mine: Judged, versus: Versus | None, validation: Validation, settings: EvaluateConfig
) -> Cell:
    benchmark, given = one.benchmark, one.probable
    seed, draws = settings.seed, settings.resamples
    known = not np.isnan(given.probabilities).all()
    places = {example.id: i for i, example in enumerate(one.examples)}
    slices = {f"{name}: {v}": ids for name, values in benchmark.slices.items() for v, ids in values.items()}
    rows = {name: np.array([places[x] for x in ids if x in places], int) for name, ids in slices.items()}
    return Cell(
        guard=one.guard,
        mode=str(one.mode),
        benchmark=one.label,
        source=benchmark.name,
        title=benchmark.title,
        group=benchmark.group,
        question=benchmark.question,
        examples=len(one.examples),
        complete=len(one.examples) == len(benchmark.examples),
        result=measure(mine, seed, draws),
        cost=_cost(one),
        slices=measure_slices(mine, rows, seed, draws),
        calibration=calibration(given.labels, given.filled(settings), seed, draws) if known else None,
        thresholded=_thresholded(given, validation, settings) if known else None,
        versus=versus,
        wrong=tuple(_wrong(one, mine, slices)),
    )


def _cost(one: GuardPredictions) -> Cost:
    def mean(name: str) -> float:
        return float(np.mean([getattr(answer, name) for answer in one.answers]))

    return Cost(
        seconds=mean("seconds"),
        scoring=mean("scoring"),
        wall=one.seconds,
        prompt_tokens=mean("prompt_tokens"),
        completion_tokens=mean("completion_tokens"),
        forced=sum(answer.forced for answer in one.answers),
        unscored=sum(sum(answer.unscored.values()) for answer in one.answers),
        cut=sum(answer.cut for answer in one.answers),
    )


def _thresholded(given: Probable, validation: Validation, settings: EvaluateConfig) -> Thresholded | None:
    """Calibrate and choose the threshold on the validation examples, then score the benchmark with both."""
    if given.question not in validation:
        return None
    at_hand = probable(*validation[given.question], given.question)
    platt = fit_platt(at_hand.labels, at_hand.probabilities)
    at_hand, given = at_hand.recalibrated(platt), given.recalibrated(platt)
    threshold = best_f1_threshold(at_hand.labels, at_hand.filled(settings))
    if threshold is None:
        return None
    whole, seed, draws = given.filled(settings), settings.seed, settings.resamples
    votes = verdicts_at(np.where(np.isnan(given.probabilities), np.nan, whole), threshold)
    found = judged(given.labels, votes, given.question, settings.unparsable)
    return Thresholded(threshold, platt, measure(found, seed, draws), calibration(given.labels, whole, seed, draws))


def _wrong(one: GuardPredictions, mine: Judged, slices: Mapping[str, frozenset[str]]) -> list[Wrong]:
    """Examples that no more than half of the generations judge right, the surest first."""
    positive, negative = CHOICES[one.benchmark.question]
    words = {POSITIVE: positive, NEGATIVE: negative}
    right = mine.votes == mine.labels[:, None]
    found = [
        Wrong(
            example=one.examples[i],
            label=positive if mine.labels[i] else negative,
            said=tuple(words.get(verdict, UNREADABLE) for verdict in answer.verdicts[one.benchmark.question]),
            probability=answer.probabilities[one.benchmark.question],
            text=answer.texts[int(right[i].argmin())] if answer.texts else "",
            slices=tuple(name for name, ids in slices.items() if one.examples[i].id in ids),
        )
        for i, answer in enumerate(one.answers)
        if right[i].mean() <= 0.5
    ]
    found.sort(key=lambda wrong: -abs((0.5 if wrong.probability is None else wrong.probability) - 0.5))
    return found[:SHOWN_ERRORS]


def _averages(
    mine: Mapping[str, GuardPredictions],
    theirs: Mapping[str, GuardPredictions],
    found: Sequence[GuardPredictions],
    scored: Mapping[int, Judged],
    settings: EvaluateConfig,
) -> Iterable[Average]:
    """The averages of a guard in a mode over what it judged, of the benchmarks that any guard judged."""
    for name, groups in AVERAGED.items():
        wanted = list(dict.fromkeys(x.label for group in groups for x in found if x.benchmark.group == group))
        chosen = [mine[label] for label in wanted if label in mine]
        weights = _weights(chosen, groups)
        if weights is None:
            continue
        f1 = average_f1([scored[id(one)] for one in chosen], weights, settings.seed, settings.resamples)
        both = [(one, theirs[one.label]) for one in chosen if one.label in theirs]
        versus = _versus_average(both, groups, scored, settings)
        if versus is not None:
            here = {one.label for one, _ in both}
            versus = replace(versus, missing=tuple(label for label in wanted if label not in here))
        missing = tuple(label for label in wanted if label not in mine)
        yield Average(chosen[0].guard, str(chosen[0].mode), name, f1, versus, missing)


def _versus_average(
    both: Sequence[tuple[GuardPredictions, GuardPredictions]],
    groups: Sequence[Group],
    scored: Mapping[int, Judged],
    settings: EvaluateConfig,
) -> Versus | None:
    """Over the benchmarks that both guards judged; None where these make no such average."""
    weights = _weights([one for one, _ in both], groups)
    if weights is None:
        return None
    mine, theirs = ([scored[id(pair[i])] for pair in both] for i in (0, 1))
    other = both[0][1]
    f1 = f1_difference(mine, theirs, weights, settings.seed, settings.resamples)
    return Versus(other.guard, str(other.mode), f1)


def _weights(chosen: Sequence[GuardPredictions], groups: Sequence[Group]) -> tuple[float, ...] | None:
    """Of benchmarks in the order of these groups; None where one of the groups has none."""
    counts = [sum(one.benchmark.group == group for one in chosen) for group in groups]
    if not all(counts):
        return None
    return custom_weights(*counts) if len(counts) == 1 else safety_weights(*counts)
