"""What an evaluation found, as plain data: what the report is written from, and runs/NAME/evaluate/results.json holds."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from jaxguard.data.examples import Example
from jaxguard.data.policies import Question
from jaxguard.evaluate.benchmarks.schema import Group
from jaxguard.evaluate.scores.calibration import Calibration, Platt
from jaxguard.evaluate.scores.comparison import Difference, McNemar
from jaxguard.evaluate.scores.metrics import Result
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically
from jaxguard.utils.statistics import Estimate

VERSION = 2
"""Of results.json; another one cannot be read."""
UNREADABLE = "nothing readable"
"""Stands for a verdict word."""


@dataclass(frozen=True)
class Cost:
    """What judging took.

    Attributes:
        seconds: from asking to the answer, per example, mean; of a batch, its share.
        scoring: seconds for the probability, likewise; not part of `seconds`.
        wall: seconds for all examples by the clock, everything included.
        prompt_tokens, completion_tokens: per example, mean; the latter of all generations together.
        forced: generations whose thought ran out, of all.
        unscored: generations that are not in the probability, of all.
        cut: examples whose text was judged without its middle, since it does not fit the model.
    """

    seconds: float
    scoring: float
    wall: float
    prompt_tokens: float
    completion_tokens: float
    forced: int
    unscored: int
    cut: int


@dataclass(frozen=True)
class Thresholded:
    """Verdicts from calibrated probabilities, at a threshold chosen on the validation examples."""

    threshold: float
    platt: Platt | None
    result: Result
    calibration: Calibration


@dataclass(frozen=True)
class Versus:
    """A guard against the first one of the config.

    Attributes:
        guard, mode: the first one, in the same mode where it has that, else in its first.
        f1: of the guard less that of the first.
        mcnemar: of a single benchmark.
        missing: benchmarks of an average that one of the two did not judge; the difference is without them.
    """

    guard: str
    mode: str
    f1: Difference
    mcnemar: McNemar | None = None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wrong:
    """An error: an example that no more than half of the generations judge right.

    Attributes:
        label: a verdict word.
        said: the verdict words of all generations, UNREADABLE where there is none.
        probability: of the positive answer.
        text: what the first of the generations that are wrong wrote, empty where nothing was sampled.
        slices: the keys of Cell.slices that it is in.
    """

    example: Example
    label: str
    said: tuple[str, ...]
    probability: float | None
    text: str
    slices: tuple[str, ...] = ()


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
        versus: None for the first guard, and where that did not judge the benchmark.
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
    versus: Versus | None = None
    wrong: tuple[Wrong, ...] = ()


@dataclass(frozen=True)
class Average:
    """A weighted average over benchmarks: "prompt", "response", "safety" (the paper's Avg), "custom".

    Attributes:
        versus: None for the first guard, and where the two have no such average in common.
        missing: benchmarks that other guards judged and this one did not; the average is without them.
    """

    guard: str
    mode: str
    name: str
    f1: Estimate
    versus: Versus | None = None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """A whole evaluation.

    Attributes:
        name: the run's.
        models: what the guards are, for the head of the report: guard -> description.
        benchmarks: the labels of all that were to be judged.
        cells, averages: in the config's order; of what a guard cannot be asked there is none.
        settings: the evaluate section of the config, plain.
        finished: when, in UTC, as in "2026-01-31T12:00:00+00:00".
        hardware: what it ran on, in words; seconds mean nothing without.
        paper_rows: "guard/mode" -> the row of configs/published/paper.yaml that it is compared with.
    """

    name: str
    models: dict[str, str]
    benchmarks: tuple[str, ...]
    cells: tuple[Cell, ...]
    averages: tuple[Average, ...]
    settings: dict[str, object]
    finished: str = ""
    hardware: str = ""
    paper_rows: dict[str, str] = field(default_factory=dict)


def write_results(evaluation: Evaluation, path: Path) -> None:
    """Write results.json, in ASCII; half a character, which JSON can spell and UTF-8 cannot, becomes a question mark.

    Raises:
        JaxguardError: it cannot be written.
    """
    text = json.dumps(asdict(evaluation), ensure_ascii=False, allow_nan=False)
    tree = {"version": VERSION, "evaluation": json.loads(text.encode("utf-8", "replace"))}
    write_atomically(path, json.dumps(tree, indent=1, ensure_ascii=True) + "\n")


def read_results(path: Path) -> Evaluation:
    """What results.json holds.

    Raises:
        JaxguardError: it is not there, broken, or of another version.
    """
    again = "evaluate again, which takes what was judged before from its predictions"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JaxguardError(f"{path} is not there: evaluate first") from None
    except (OSError, ValueError) as error:
        raise JaxguardError(f"{path}: cannot be read ({error}); {again}") from None
    version = tree.get("version") if isinstance(tree, dict) else None
    if version != VERSION:
        raise JaxguardError(f"{path}: its version is {version}, not {VERSION}; {again}")
    try:
        return TypeAdapter(Evaluation).validate_python(tree.get("evaluation"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise JaxguardError(f"{path}: {place or 'evaluation'}: {first['msg']}; {again}") from None
    except JaxguardError as error:
        raise JaxguardError(f"{path}: {error}; {again}") from None
