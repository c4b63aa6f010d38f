"""What an evaluation found, as plain data: what the report is written from, and runs/NAME/evaluate/results.json holds."""

from dataclasses import dataclass, field

from jaxguard.data.examples import Example
from jaxguard.data.policies import Question
from jaxguard.evaluate.benchmark_fields import Group
from jaxguard.evaluate.calibration import Calibration, Platt
from jaxguard.evaluate.comparison import Difference, McNemar
from jaxguard.evaluate.metrics import Result
from jaxguard.statistics import Estimate


@dataclass(frozen=True)
class Cost:
    """What judging took.

    Attributes:
        seconds: per example, mean, as it ran here; `throughput` examples a second over the whole benchmark.
        prompt_tokens, completion_tokens: per example, mean.
        forced: generations whose thought ran out, of all.
    """

    seconds: float
    throughput: float
    prompt_tokens: float
    completion_tokens: float
    forced: int


@dataclass(frozen=True)
class Thresholded:
    """Verdicts from calibrated probabilities, at a threshold chosen on the validation examples."""

    threshold: float
    platt: Platt | None
    result: Result
    calibration: Calibration


@dataclass(frozen=True)
class Wrong:
    """An example that most generations judge wrongly."""

    example: Example
    label: str
    said: str
    probability: float | None
    text: str


@dataclass(frozen=True)
class Cell:
    """One guard in one mode on one benchmark.

    Attributes:
        guard, mode, benchmark: which; `benchmark` is the label that the config gives it, `source` its name in
            configs/benchmarks.
        title, group, question: of the benchmark.
        examples: how many were judged, and `complete` whether these are all.
        result: scores of the sampled verdicts.
        slices: "slice: value" -> the same.
        calibration: of the probabilities at face value; None where the guard gives none.
        thresholded: None without evaluate.validation, or without probabilities.
        versus: against the first guard of the config in the same mode (or its only one), None for that itself.
        wrong: some of the errors, those with the most certain probability first.
    """

    guard: str
    mode: str
    benchmark: str
    source: str
    title: str
    group: Group
    question: Question
    examples: int
    complete: bool
    result: Result
    cost: Cost
    slices: dict[str, Result] = field(default_factory=dict)
    calibration: Calibration | None = None
    thresholded: Thresholded | None = None
    versus: tuple[Difference, McNemar] | None = None
    wrong: tuple[Wrong, ...] = ()


@dataclass(frozen=True)
class Average:
    """A weighted average over benchmarks: "prompt", "response", "safety" (the paper's Avg), "custom"."""

    guard: str
    mode: str
    name: str
    f1: Estimate
    versus: Difference | None = None


@dataclass(frozen=True)
class Evaluation:
    """A whole evaluation.

    Attributes:
        name: the run's.
        model: what the guards are, for the head of the report: guard -> description.
        cells, averages: in the config's order.
        settings: the evaluate section of the config, plain.
    """

    name: str
    models: dict[str, str]
    cells: tuple[Cell, ...]
    averages: tuple[Average, ...]
    settings: dict[str, object]
