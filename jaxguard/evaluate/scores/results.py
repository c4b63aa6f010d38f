"""The results of an evaluation as plain data, which runs/NAME/evaluate/results.json holds and the report is written from."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scipy.special import expit, logit

from jaxguard.data.benchmarks.schema import Group
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import CHOICES, TITLES
from jaxguard.data.policies import Question
from jaxguard.evaluate.scores.metrics import Calibration, Difference, McNemar, Result
from jaxguard.guards.operating_points import Platt, Worth
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically
from jaxguard.utils.parse import read_json
from jaxguard.utils.statistics import Estimate, Scores

if TYPE_CHECKING:
    import pandas as pd

SCORES = ("f1", "precision", "recall", "false_positive_rate", "agreement", "kappa")
WAITS = {"wait_p50": 50, "wait_p95": 95, "wait_p99": 99}
"""Field of Cost -> percentile."""
UNPARSABLE_WORD = "unparsable"
"""Stands for the word of an unparsable verdict."""


@dataclass(frozen=True)
class Cost:
    """Time and tokens of a guard on a benchmark: means over the examples, counts, and seconds by the clock (`wall`).

    Attributes:
        seconds: of an offline batch, an example's share of its time, with all generations; at a server, where requests overlap,
            of the time by the clock.
        scoring: seconds for the probability, likewise; not part of `seconds`.
        wait_p50, wait_p95, wait_p99: percentiles of the seconds from a request to its verdicts; None if unknown.
        completion_tokens: of all generations of an example together.
        forced, unscored: generations whose reasoning reached its limit, and those that are not in the probability.
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
    wait_p50: float | None = None
    wait_p95: float | None = None
    wait_p99: float | None = None


@dataclass(frozen=True)
class Thresholded:
    """Verdicts from calibrated probabilities, at the threshold of the best F1 on the validation examples.

    Attributes:
        precision: the type that JAX computed the probabilities in, or what else did; at another one the threshold may not fit.
        points: each operating point of guard.json that has a threshold -> scores at that.
    """

    threshold: float
    platt: Platt | None
    result: Result
    calibration: Calibration
    precision: str = ""
    points: dict[str, Scores] = field(default_factory=dict)

    @property
    def scale(self) -> str:
        """The threshold, the scale that it is on (calibrated probabilities, and those that the guard gives), and the precision."""
        computed = f", in {self.precision}" if self.precision else ""
        if self.platt is None:
            return f"P > {self.threshold:.3f}{computed}"
        slope, intercept = self.platt.slope, self.platt.intercept
        given = f", {expit((logit(self.threshold) - intercept) / slope):.3f} as given" if slope > 0 else ""
        return f"calibrated P > {self.threshold:.3f}{given}{computed}"


@dataclass(frozen=True)
class Versus:
    """F1 of a guard less that of the first one of the config; of a single benchmark also AUPRC and F1 at the chosen thresholds.

    Attributes:
        guard, mode: the first one, in the same mode where it has that, else in its first.
        mcnemar: of a single benchmark.
        missing: benchmarks of an average for which one of the two has no results; the difference is without them.
    """

    guard: str
    mode: str
    f1: Difference
    mcnemar: McNemar | None = None
    missing: tuple[str, ...] = ()
    auprc: Difference | None = None
    f1_at_threshold: Difference | None = None

    def row(self) -> dict[str, Any]:
        """The columns of a DataFrame."""
        f1, test = self.f1, self.mcnemar
        right = (test.only_first, test.only_second, test.p) if test else (None, None, None)
        first = {"first_guard": self.guard, "first_mode": self.mode}
        numbers = {"f1_difference": f1.value, "low": f1.low, "high": f1.high, "p": f1.p}
        for name, other in (("auprc", self.auprc), ("f1_at_threshold", self.f1_at_threshold)):
            ends = (other.value, other.low, other.high, other.p) if other else (None,) * 4
            numbers |= dict(zip((f"{name}_difference", f"{name}_low", f"{name}_high", f"{name}_p"), ends, strict=True))
        return first | numbers | dict(zip(("right_alone", "first_right_alone", "mcnemar_p"), right, strict=True))


@dataclass(frozen=True)
class Wrong:
    """An error: an example of which no more than half of the generations are right.

    Attributes:
        label, said: verdict words, of people and of all generations, UNPARSABLE_WORD where there is none.
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
        benchmark, source: the label that the config gives the benchmark, and its name in configs/benchmarks.
        examples: how many were evaluated, and `complete` whether these are all.
        result, slices: scores of the sampled verdicts; of each "slice: value". F1 is the mean over a slice's values where the
            benchmark says so; precision and recall are over all examples.
        other_f1: what F1 is as well: "over all", or "mean of SLICE".
        calibration: of the probabilities at face value; None where the guard gives none.
        thresholded: None without evaluate.validation, or without probabilities.
        versus: None for the first guard, and where that has no results for the benchmark.
        wrong: some of the errors, those with the most certain probability first.
        right: of each example, in the benchmark's order, how many of its verdicts are right; with `examples_sha256` of the
            examples, so that evaluations of the same ones can be compared.
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
    other_f1: dict[str, Estimate] = field(default_factory=dict)
    calibration: Calibration | None = None
    thresholded: Thresholded | None = None
    versus: Versus | None = None
    wrong: tuple[Wrong, ...] = ()
    right: tuple[int, ...] = ()
    examples_sha256: str = ""

    @property
    def guard_mode(self) -> tuple[str, str]:
        return self.guard, self.mode

    @property
    def verdicts(self) -> int:
        """How many verdicts it has, those of all generations."""
        return self.examples * self.result.generations

    @property
    def heading(self) -> str:
        """Its benchmark in a line: title, question, and how many examples."""
        label = "" if self.benchmark == self.source else f" ({self.benchmark})"
        partly = "" if self.complete else ", not all of them"
        question = TITLES[self.question].lower()
        title = self.title if question in self.title.casefold() else f"{self.title}, {question}"
        positives = f"{self.result.scores.positives:,} {CHOICES[self.question][0]}"
        return f"{title}{label}: {self.examples:,} examples{partly}, {positives}"


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

    @property
    def guard_mode(self) -> tuple[str, str]:
        return self.guard, self.mode


@dataclass(frozen=True)
class Arm:
    """A way to choose the examples that are reasoned about; the others have direct answers.

    Attributes:
        f1: over all of the benchmark's examples.
        escalated: share of the benchmark that is reasoned about; `traffic`: at the prevalence of evaluate.auto.
        seconds, tokens: mean time and generated tokens of an example, divided by those of reasoning mode; None if unknown.
        less: F1 of the cascade less this F1; None for the cascade itself.
    """

    f1: Estimate
    escalated: float
    traffic: float
    seconds: float | None
    tokens: float | None
    less: Difference | None = None


@dataclass(frozen=True)
class Cascade:
    """The two modes of a guard combined on a benchmark, from their predictions.

    Attributes:
        heading: of its cells.
        certified: what guard.json says of mode `auto`; empty without it, where as many are reasoned about as its budget allows.
        arms: "direct", "reasoning", "cascade", "random", and "value" where it can be fitted; the last three reason about as many.
        curve: arm -> F1 by the share that is reasoned about, in equal steps from 0 to 1.
        verdict: what can be said of the cascade beyond the noise.
    """

    guard: str
    benchmark: str
    heading: str
    certified: str
    arms: dict[str, Arm]
    curve: dict[str, tuple[float | None, ...]]
    verdict: Worth


@dataclass(frozen=True)
class Evaluation:
    """A whole evaluation.

    Attributes:
        models, benchmarks: guard -> its description; the labels of all benchmarks of the config.
        cells, averages: in the config's order; what a guard does not support is left out.
        settings: the evaluate section of the config.
        finished: when, in UTC.
        cascades: of guards that have both modes on a benchmark.
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
    cascades: tuple[Cascade, ...] = ()
    paper_rows: dict[str, str] = field(default_factory=dict)
    folder: Path | None = field(default=None, compare=False)
    left_out: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def by_guard(self) -> dict[tuple[str, str], list[Cell]]:
        """(guard, mode) -> its cells."""
        return {key: [c for c in self.cells if c.guard_mode == key] for key in (cell.guard_mode for cell in self.cells)}

    @property
    def by_benchmark(self) -> dict[str, list[Cell]]:
        """Benchmark -> its cells."""
        return {key: [c for c in self.cells if c.benchmark == key] for key in (cell.benchmark for cell in self.cells)}

    @property
    def report(self) -> Path | None:
        """The page for people, report.html; report.md and results.json are beside it."""
        return None if self.folder is None else self.folder / "report.html"

    @property
    def tables(self) -> dict[str, "pd.DataFrame"]:
        """The numbers as DataFrames, a row for each guard, mode and benchmark (or average).

        Scores have the ends of their 95 % intervals as `_low` and `_high`, and `_deviation` over generations.

        Returns:
            scores: of the sampled verdicts on every benchmark.
            averages: F1 of prompt, response, safety and custom benchmarks; `missing` names those left out.
            cost: means per example in seconds and tokens; `wall` is of all examples, forced, unscored and cut are counts;
                percentiles of a request's own wait.
            calibration: scores of probabilities, the threshold chosen on validation examples, and F1 at it.
            versus: F1 less that of the first guard, on benchmarks and averages, with p-values.
        """
        import pandas as pd  # takes a second, which the command line need not wait for

        names = ("scores", "averages", "cost", "calibration", "versus")
        tables: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for cell in self.cells:
            name = {"guard": cell.guard, "mode": cell.mode, "benchmark": cell.benchmark}
            size, result = {"examples": cell.examples}, cell.result
            counts = {"generations": result.generations, "unparsable": result.unparsable, "complete": cell.complete}
            scores = _columns(**{score: getattr(result.scores, score) for score in SCORES})
            tables["scores"].append(name | size | {"positives": result.scores.positives} | scores | counts)
            tables["cost"].append(name | size | asdict(cell.cost))
            if cell.calibration:
                given, chosen = cell.calibration, cell.thresholded
                row = name | _columns(auprc=given.auprc, auroc=given.auroc, brier=given.brier) | {"ece": given.ece}
                row |= _columns(**{f"recall_at_{rate}": recall for rate, recall in given.recall_at.items()})
                at = chosen.result.scores if chosen else None
                f1, rate = (at.f1, at.false_positive_rate) if at else (Estimate(None),) * 2
                row |= {"threshold": chosen.threshold if chosen else None}
                row |= _columns(f1_at_threshold=f1, false_positive_rate_at_threshold=rate)
                row["threshold_precision"] = chosen.precision if chosen else None
                tables["calibration"].append(row)
            if cell.versus:
                tables["versus"].append(name | cell.versus.row())
        for average in self.averages:
            name = {"guard": average.guard, "mode": average.mode, "average": average.name}
            tables["averages"].append(name | _columns(f1=average.f1) | {"missing": ", ".join(average.missing)})
            if average.versus:
                tables["versus"].append(name | average.versus.row())
        return {title: pd.DataFrame(rows) for title, rows in tables.items()}


def _columns(**scores: Estimate) -> dict[str, float | None]:
    parts = {"": "value", "_low": "low", "_high": "high", "_deviation": "deviation"}
    return {name + end: getattr(score, part) for name, score in scores.items() for end, part in parts.items()}


def write_results(evaluation: Evaluation, path: Path) -> None:
    """Write results.json, in ASCII; half a character, which JSON can spell and UTF-8 cannot, becomes a question mark."""
    results = {name: value for name, value in asdict(evaluation).items() if name not in ("folder", "left_out")}
    text = json.dumps({"version": 2, "evaluation": results}, ensure_ascii=False, allow_nan=False)
    write_atomically(path, json.dumps(json.loads(text.encode("utf-8", "replace")), indent=1) + "\n")


@dataclass(frozen=True)
class _Results:
    version: Literal[2]
    evaluation: Evaluation


def read_results(path: Path) -> Evaluation:
    """Read results.json.

    Raises:
        JaxguardError: it is absent, malformed, or of another version.
    """
    again = "evaluate again, which reuses the predictions"
    if not path.is_file():
        raise JaxguardError(f"{path} is not there: evaluate first")
    try:
        results = read_json(path, _Results)
    except JaxguardError as error:
        raise JaxguardError(f"{error}; {again}") from None
    return replace(results.evaluation, folder=path.parent)
