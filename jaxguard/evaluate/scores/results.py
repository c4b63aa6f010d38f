"""The results of an evaluation as plain data, which runs/NAME/evaluate/results.json holds and the report is written from."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from jaxguard.data.examples import Example
from jaxguard.data.policies import Question
from jaxguard.evaluate.benchmarks.schema import Group
from jaxguard.evaluate.scores.calibration import Calibration, Platt
from jaxguard.evaluate.scores.comparison import Difference, McNemar
from jaxguard.evaluate.scores.frames import tables
from jaxguard.evaluate.scores.metrics import Result
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically
from jaxguard.utils.statistics import Estimate

if TYPE_CHECKING:
    import pandas as pd

VERSION = 2
"""Of results.json; others are refused."""
UNPARSABLE_WORD = "unparsable"
"""Stands for the word of an unparsable verdict."""


@dataclass(frozen=True)
class Cost:
    """Time and tokens.

    Attributes:
        seconds: from request to prediction, per example, mean; of a batch, its share.
        scoring: seconds for the probability, likewise; not part of `seconds`.
        wall: seconds for all examples by the clock.
        prompt_tokens, completion_tokens: per example, mean; the latter of all generations together.
        forced: generations whose reasoning reached its limit.
        unscored: generations that are not in the probability.
        cut: examples whose text lacks its middle, since it does not fit the model.
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
        missing: benchmarks of an average for which one of the two has no results; the difference is without them.
    """

    guard: str
    mode: str
    f1: Difference
    mcnemar: McNemar | None = None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wrong:
    """An error: an example of which no more than half of the generations are right.

    Attributes:
        label: a verdict word.
        said: the verdict words of all generations, UNPARSABLE_WORD where there is none.
        probability: of the positive verdict.
        text: the first wrong generation, empty where nothing was sampled.
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
        examples: how many were evaluated, and `complete` whether these are all.
        result: scores of the sampled verdicts.
        slices: "slice: value" -> the same.
        calibration: of the probabilities at face value; None where the guard gives none.
        thresholded: None without evaluate.validation, or without probabilities.
        versus: None for the first guard, and where that has no results for the benchmark.
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
        missing: benchmarks that the average is without, since only other guards have results for them.
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
        models: guard -> its description, for the head of the report.
        benchmarks: the labels of all benchmarks of the config.
        cells, averages: in the config's order; what a guard does not support is left out.
        settings: the evaluate section of the config.
        finished: when, in UTC, as in "2026-01-31T12:00:00+00:00".
        hardware: what it ran on; seconds mean nothing without.
        paper_rows: "guard/mode" -> the row of configs/published/paper.yaml that it is compared with.
        folder: where results.json, report.html and report.md are; None: they are not written.
        left_out: predictions that a guard does not support -> why.
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
    folder: Path | None = field(default=None, compare=False)
    left_out: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def tables(self) -> dict[str, "pd.DataFrame"]:
        """DataFrames: scores, averages, cost, calibration and versus; see frames.tables."""
        return tables(self)

    @property
    def report(self) -> Path | None:
        """The page for people, report.html; report.md and results.json are beside it."""
        return None if self.folder is None else self.folder / "report.html"


def write_results(evaluation: Evaluation, path: Path) -> None:
    """Write results.json, in ASCII; half a character, which JSON can spell and UTF-8 cannot, becomes a question mark.

    Raises:
        JaxguardError: it cannot be written.
    """
    results = {name: value for name, value in asdict(evaluation).items() if name not in ("folder", "left_out")}
    text = json.dumps(results, ensure_ascii=False, allow_nan=False)
    tree = {"version": VERSION, "evaluation": json.loads(text.encode("utf-8", "replace"))}
    write_atomically(path, json.dumps(tree, indent=1, ensure_ascii=True) + "\n")


def read_results(path: Path) -> Evaluation:
    """Read results.json.

    Raises:
        JaxguardError: it is absent, malformed, or of another version.
    """
    again = "evaluate again, which reuses the predictions"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JaxguardError(f"{path} is not there: evaluate first") from None
    except (OSError, ValueError) as error:
        raise JaxguardError(f"{path}: {error}; {again}") from None
    version = tree.get("version") if isinstance(tree, dict) else None
    if version != VERSION:
        raise JaxguardError(f"{path}: its version is {version}, not {VERSION}; {again}")
    try:
        return replace(TypeAdapter(Evaluation).validate_python(tree.get("evaluation")), folder=path.parent)
    except ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(map(str, first["loc"])) or "evaluation"
        raise JaxguardError(f"{path}: {field_name}: {first['msg']}; {again}") from None
    except JaxguardError as error:
        raise JaxguardError(f"{path}: {error}; {again}") from None
