"""What an evaluation found, as plain data: what the report is written from, and runs/NAME/evaluate/results.json holds."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from jaxguard.data.examples import Example
from jaxguard.data.policies import Question
from jaxguard.disk import write_atomically
from jaxguard.errors import JaxguardError
from jaxguard.evaluate.benchmark_fields import Group
from jaxguard.evaluate.calibration import Calibration, Platt
from jaxguard.evaluate.comparison import Difference, McNemar
from jaxguard.evaluate.metrics import Result
from jaxguard.statistics import Estimate

VERSION = 1
"""Of results.json; another one cannot be read."""


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
    """An example that most generations judge wrongly.

    Attributes:
        label, said: verdict words; `said` is of most generations.
        probability: of the positive answer.
        text: what one of these generations wrote, empty where nothing was sampled.
        slices: the keys of Cell.slices that it is in.
    """

    example: Example
    label: str
    said: str
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
        models: what the guards are, for the head of the report: guard -> description.
        cells, averages: in the config's order.
        settings: the evaluate section of the config, plain.
        finished: when, in UTC, as in "2026-01-31T12:00:00+00:00".
        hardware: what it ran on, in words; seconds mean nothing without.
        paper_rows: "guard/mode" -> the row of configs/published/paper.yaml that it is compared with.
    """

    name: str
    models: dict[str, str]
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
