"""From answers to results: every guard in every mode on every benchmark, and the averages."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from jaxguard.data.dialogue import CHOICES, Mode
from jaxguard.data.examples import Example
from jaxguard.data.policies import Question
from jaxguard.evaluate.benchmark_fields import Group
from jaxguard.evaluate.benchmarks import LABEL, Benchmark
from jaxguard.evaluate.calibration import (
    best_f1_threshold,
    calibration,
    fit_platt,
    recalibrated,
    verdicts_at,
)
from jaxguard.evaluate.comparison import f1_difference, mcnemar
from jaxguard.evaluate.judging import Answer
from jaxguard.evaluate.metrics import (
    POSITIVE,
    UNPARSEABLE,
    Judged,
    average_f1,
    custom_weights,
    filled,
    judged,
    measure,
    measure_slices,
    safety_weights,
)
from jaxguard.evaluate.results import Average, Cell, Cost, Thresholded, Wrong
from jaxguard.evaluate_sections import EvaluateConfig

SHOWN_ERRORS = 200
"""Of one guard on one benchmark; the others are in its predictions."""

Validation = Mapping[Question, tuple[Sequence[Example], Sequence[Answer]]]
"""What a guard said of the validation examples, by question."""


@dataclass(frozen=True)
class Judgements:
    """One guard in one mode on one benchmark: the examples that were judged, and what was said, in the same order."""

    guard: str
    mode: Mode
    label: str
    benchmark: Benchmark
    examples: Sequence[Example]
    answers: Sequence[Answer]
    seconds: float

    @property
    def votes(self) -> np.ndarray:
        """int8[N, k]."""
        return np.array([answer.verdicts for answer in self.answers], np.int8)

    @property
    def labels(self) -> np.ndarray:
        return labels_of(self.examples, self.benchmark.question)


def labels_of(examples: Iterable[Example], question: Question) -> np.ndarray:
    """bool[N]: the positive class."""
    return np.array([getattr(example, LABEL[question]) == CHOICES[question][0] for example in examples], bool)


def probabilities_of(answers: Iterable[Answer]) -> np.ndarray:
    """float[N], NaN where there is none."""
    return np.array([np.nan if a.probability is None else a.probability for a in answers], float)


def score(
    found: Sequence[Judgements], validation: Mapping[tuple[str, Mode], Validation], settings: EvaluateConfig
) -> tuple[tuple[Cell, ...], tuple[Average, ...]]:
    """All cells and averages.

    Args:
        found: in the order of guards, modes and benchmarks.
        validation: (guard, mode) -> answers on the validation examples.
        settings: how unreadable verdicts count, seeds.
    """
    scored = {id(one): judged(one.labels, one.votes, one.benchmark.question, settings.unparseable) for one in found}
    cells = []
    for one in found:
        base = _opponent(one, found)
        cells.append(_cell(one, scored, base, validation.get((one.guard, one.mode), {}), settings))
    return tuple(cells), tuple(_averages(found, scored, settings))


def _opponent(one: Judgements, found: Sequence[Judgements]) -> Judgements | None:
    """The first guard on the same benchmark, in the same mode where it has that."""
    first = [other for other in found if other.guard == found[0].guard and other.label == one.label]
    same = next((other for other in first if other.mode == one.mode), first[0] if first else None)
    return None if same is one else same


def _cell(
    one: Judgements,
    scored: Mapping[int, Judged],
    base: Judgements | None,
    validation: Validation,
    settings: EvaluateConfig,
) -> Cell:
    benchmark, mine = one.benchmark, scored[id(one)]
    seed, draws = settings.seed, settings.resamples
    probabilities, labels = probabilities_of(one.answers), one.labels
    known = not np.isnan(probabilities).all()
    places = {example.id: i for i, example in enumerate(one.examples)}
    slices = {f"{name}: {v}": ids for name, values in benchmark.slices.items() for v, ids in values.items()}
    rows = {name: np.array([places[x] for x in ids if x in places], int) for name, ids in slices.items()}
    versus = None
    if base is not None:
        other = scored[id(base)]
        versus = f1_difference([mine], [other], seed=seed, resamples=draws), mcnemar(mine, other)
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
        calibration=calibration(
            labels, filled(labels, probabilities, benchmark.question, settings.unparseable), seed, draws
        )
        if known
        else None,
        thresholded=_thresholded(labels, probabilities, benchmark.question, validation, settings) if known else None,
        versus=versus,
        wrong=tuple(_wrong(one, mine, slices)),
    )


def _cost(one: Judgements) -> Cost:
    seconds = [answer.seconds for answer in one.answers]
    return Cost(
        seconds=float(np.mean(seconds)),
        throughput=len(seconds) / one.seconds if one.seconds else 0.0,
        prompt_tokens=float(np.mean([answer.prompt_tokens for answer in one.answers])),
        completion_tokens=float(np.mean([answer.completion_tokens for answer in one.answers])),
        forced=sum(answer.forced for answer in one.answers),
    )


def _thresholded(
    labels: np.ndarray,
    probabilities: np.ndarray,
    question: Question,
    validation: Validation,
    settings: EvaluateConfig,
) -> Thresholded | None:
    """Calibrate and choose the threshold on the validation examples, then score the benchmark with both."""
    if question not in validation:
        return None
    examples, answers = validation[question]
    known, at_hand = labels_of(examples, question), probabilities_of(answers)
    platt = fit_platt(known, at_hand)
    if platt is not None:
        at_hand, probabilities = recalibrated(at_hand, platt), recalibrated(probabilities, platt)
    threshold = best_f1_threshold(known, filled(known, at_hand, question, settings.unparseable))
    if threshold is None:
        return None
    found = judged(labels, verdicts_at(probabilities, threshold), question, settings.unparseable)
    whole = filled(labels, probabilities, question, settings.unparseable)
    return Thresholded(
        threshold,
        platt,
        measure(found, settings.seed, settings.resamples),
        calibration(labels, whole, settings.seed, settings.resamples),
    )


def _wrong(one: Judgements, mine: Judged, slices: Mapping[str, frozenset[str]]) -> list[Wrong]:
    """Examples that most generations judge wrongly, the surest first."""
    words = CHOICES[one.benchmark.question]
    right = (mine.votes == mine.labels[:, None]).mean(axis=1)
    found = [
        Wrong(
            example=example,
            label=words[0] if label else words[1],
            said=_said(answer, words),
            probability=answer.probability,
            text=answer.texts[0] if answer.texts else "",
            slices=tuple(name for name, ids in slices.items() if example.id in ids),
        )
        for example, answer, label, share in zip(one.examples, one.answers, mine.labels, right, strict=True)
        if share <= 0.5
    ]
    found.sort(key=lambda wrong: -abs((0.5 if wrong.probability is None else wrong.probability) - 0.5))
    return found[:SHOWN_ERRORS]


def _said(answer: Answer, words: tuple[str, str]) -> str:
    names = [{POSITIVE: words[0], UNPARSEABLE: "unreadable"}.get(verdict, words[1]) for verdict in answer.verdicts]
    return max(dict.fromkeys(names), key=names.count)


def _averages(found: Sequence[Judgements], scored: Mapping[int, Judged], settings: EvaluateConfig) -> Iterable[Average]:
    """Of each guard in each mode, the averages over the benchmarks here; of one that left some out, none over these."""
    labels = {group: {one.label for one in found if one.benchmark.group == group} for group in get_args(Group)}
    firsts: dict[str, list[Judged]] = {}
    for guard, mode in dict.fromkeys((one.guard, one.mode) for one in found):
        mine = [one for one in found if (one.guard, one.mode) == (guard, mode)]
        for name, chosen, weights in _weighted(mine):
            if {one.label for one in chosen} != set().union(*(labels[one.benchmark.group] for one in chosen)):
                continue
            judgements = [scored[id(one)] for one in chosen]
            base = firsts.setdefault(name, judgements)
            versus = None
            if base is not judgements:
                versus = f1_difference(judgements, base, weights, settings.seed, settings.resamples)
            yield Average(
                guard, str(mode), name, average_f1(judgements, weights, settings.seed, settings.resamples), versus
            )


def _weighted(mine: Sequence[Judgements]) -> list[tuple[str, list[Judgements], tuple[float, ...]]]:
    groups = {
        name: [one for one in mine if one.benchmark.group == group]
        for name, group in (("prompt", "safety_prompt"), ("response", "safety_response"), ("custom", "custom_policy"))
    }
    averages = [(name, chosen, custom_weights(len(chosen))) for name, chosen in groups.items() if chosen]
    prompts, responses = groups["prompt"], groups["response"]
    if prompts and responses:
        averages.insert(2, ("safety", prompts + responses, safety_weights(len(prompts), len(responses))))
    return averages
