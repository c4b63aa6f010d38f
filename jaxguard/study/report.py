"""What a study found: scores by row, axis and mode, mean and spread over seeds and subsets, beside the published ones."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from jaxguard.evaluate.scores.results import Evaluation
from jaxguard.report.html import page_template
from jaxguard.study.figure import Curve, draw
from jaxguard.study.grid import REPEATS, Run, Study
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically

AVERAGES = ("prompt", "response", "safety", "custom")
PUBLISHED_METRIC = "safety"
"""What the published curves are of."""
SPARE = ("data.mode",)
"""Axes that the column of modes already tells."""

Scores = dict[str, float]
"""F1 by average or benchmark; what is not defined is not in it."""


@dataclass(frozen=True)
class Line:
    """Runs that differ in nothing but what repeats them, in one mode.

    Attributes:
        series, labels, mode: which.
        scores: of each run.
        wanted: how many runs there are to be.
        limited: some of them judged only a part of a benchmark.
        published: what the paper reports.
        x: where it stands on the curve; None is nowhere.
    """

    series: str
    labels: dict[str, str]
    mode: str
    scores: tuple[Scores, ...]
    wanted: int
    limited: bool
    published: Scores
    x: float | None

    @property
    def name(self) -> str:
        labels = [f"{field.split('.')[-1]} {label}" for field, label in self.labels.items() if field not in SPARE]
        return ", ".join([self.series, *labels])

    def values(self, metric: str) -> list[float]:
        """The metric of each run that has it."""
        return [scores[metric] for scores in self.scores if metric in scores]


def write_report(study: Study, read: Callable[[Path], Evaluation], published: Any) -> tuple[Path, Path]:
    """Write report.md, and report.html with the figure in it, into the study's folder; their paths.

    Args:
        study: whose runs are looked at; those without results are counted as missing.
        read: reads a results.json.
        published: the published results (evaluate/published.py), or None.

    Raises:
        JaxguardError: no run has results yet.
    """
    published = None if study.scale else published
    lines, missing = gather(study, read, published)
    if not lines:
        raise JaxguardError(f"{study.folder} has no results yet; run the study first")
    metrics = columns(lines)
    curve = study.fields.curve
    figure, caption = None, ""
    if curve is not None:
        metric = shown_metric(study, lines)
        beside = _published_curve(study, published) if metric == PUBLISHED_METRIC else []
        figure = draw(curves(lines, metric), beside, curve.label, metric)
        caption = _caption(study, metric, bool(beside))
    rows = [cells(line, metrics) for line in lines]
    head = ("", "mode", *metrics, "runs")
    markdown = study.folder / "report.md"
    about = " ".join(study.fields.about.split())
    text = f"# {plain(study.fields.title)}\n\n" + (f"{plain(about)}\n\n" if about else "") + _table(head, rows) + "\n"
    text += f"{LEGEND}\n" + (f"\nWithout results: {', '.join(missing)}.\n" if missing else "")
    write_atomically(markdown, text)
    page = study.folder / "report.html"
    template = page_template(Path(__file__).with_name("report.html.j2"))
    html = template.render(
        title=study.fields.title,
        about=about,
        head=head,
        rows=rows,
        legend=LEGEND,
        missing=missing,
        figure=figure,
        caption=caption,
    )
    write_atomically(page, html)
    return markdown, page


LEGEND = (
    "F1 of the harmful class; mean ± standard deviation (divisor n - 1) over the runs that differ in seed or subset, with the "
    "published value behind a slash. The last column counts runs with results, of those there are to be; `part` means that a "
    "benchmark was judged in part only."
)


def gather(study: Study, read: Callable[[Path], Evaluation], published: Any) -> tuple[list[Line], list[str]]:
    """The lines of the table, in the study's order, and the runs without results."""
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[Run]] = {}
    for run in study.runs:
        if "evaluate" in run.stages:
            labels = tuple((field, label) for field, label in run.labels.items() if field not in REPEATS)
            groups.setdefault((run.row, labels), []).append(run)
    lines, missing = [], []
    for (_, labels), runs in groups.items():
        found: dict[str, list[tuple[Scores, bool]]] = {}
        for run in runs:
            path = run.folder / "evaluate" / "results.json"
            if not path.is_file():
                missing.append(run.name)
                continue
            for mode, scores, complete in scores_of(read(path)):
                found.setdefault(mode, []).append((scores, complete))
        for mode, each in found.items():
            lines.append(_line(study, runs, dict(labels), mode, each, published))
    return lines, missing


def _line(
    study: Study,
    runs: Sequence[Run],
    labels: dict[str, str],
    mode: str,
    each: list[tuple[Scores, bool]],
    published: Any,
) -> Line:
    row, curve = runs[0].fields, study.fields.curve
    series = row.series or runs[0].row
    expected: Scores = {}
    reference = row.published.get(mode)  # type: ignore[call-overload]
    if published is not None and reference is not None:
        expected = _published_scores(published, reference)
    x = None
    if curve is not None and curve.axis in labels:
        x = _number(labels[curve.axis], row.examples)
        if mode == "reasoning" and not expected and curve.series in (None, series):
            at_x = [f1 for at, f1, _ in _published_curve(study, published) if at == x]
            expected = {PUBLISHED_METRIC: at_x[0]} if at_x else {}
    return Line(
        series=series,
        labels=labels,
        mode=mode,
        scores=tuple(scores for scores, _ in each),
        wanted=len(runs),
        limited=not all(complete for _, complete in each),
        published=expected,
        x=x,
    )


def scores_of(found: Evaluation) -> list[tuple[str, Scores, bool]]:
    """(mode, its scores, whether all benchmarks were judged whole) of the first guard."""
    guard = found.cells[0].guard if found.cells else ""
    result = []
    for mode in dict.fromkeys(cell.mode for cell in found.cells if cell.guard == guard):
        cells = [cell for cell in found.cells if (cell.guard, cell.mode) == (guard, mode)]
        named = {cell.benchmark: cell.result.scores.f1.value for cell in cells}
        averages = [a for a in found.averages if (a.guard, a.mode) == (guard, mode)]
        named |= {average.name: average.f1.value for average in averages}
        defined = {name: value for name, value in named.items() if value is not None}
        whole = all(cell.complete for cell in cells) and not any(average.missing for average in averages)
        result.append((mode, defined, whole))
    return result


def columns(lines: Sequence[Line]) -> list[str]:
    """The paper's columns as far as there are any, else the benchmarks."""
    there = dict.fromkeys(name for line in lines for scores in line.scores for name in scores)
    averages = [name for name in AVERAGES if name in there]
    custom = [name for name in ("dynaguardrail", "cosapien") if name in there]
    return [*averages, *custom] if averages else list(there)


def cells(line: Line, metrics: Sequence[str]) -> list[str]:
    """A row of the table."""
    shown = []
    for metric in metrics:
        text = spread(line.values(metric))
        if metric in line.published:
            text += f" / {line.published[metric]:.3f}"
        shown.append(text)
    runs = f"{len(line.scores)} of {line.wanted}" + (" part" if line.limited else "")
    return [line.name, line.mode, *shown, runs]


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation; n/a of nothing."""
    if not values:
        return "n/a"
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def shown_metric(study: Study, lines: Sequence[Line]) -> str:
    """What the figure shows: the study's metric, or, where no run was asked for that, the first column of the table."""
    wanted = study.fields.metric
    return wanted if any(line.values(wanted) for line in lines) else next(iter(columns(lines)), wanted)


def _caption(study: Study, metric: str, beside: bool) -> str:
    said = ["A line is the mean over seeds and subsets, its bars one standard deviation; each dot is a run."]
    if beside:
        said.append("Dotted and black: what the paper reports, in reasoning mode.")
    if study.scale:
        said.append("What the paper reports is not comparable at this scale, and not shown.")
    if metric != study.fields.metric:
        said.append(f"The figure shows {metric}: no run has a result for {study.fields.metric}.")
    return " ".join(said)


def curves(lines: Sequence[Line], metric: str) -> list[Curve]:
    """The lines that stand on the curve's axis, as one curve for each series and mode."""
    found: dict[str, list[tuple[float, tuple[float, ...]]]] = {}
    for line in lines:
        values = line.values(metric)
        if line.x is not None and values:
            found.setdefault(f"{line.series}, {line.mode}", []).append((line.x, tuple(values)))
    return [Curve(name, tuple(sorted(points))) for name, points in found.items()]


def _number(label: str, whole: int | None) -> float | None:
    """A label of the curve's axis as a number; `all` stands for the whole data set."""
    if label == "all":
        return whole
    try:
        value = float(label)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _published_curve(study: Study, published: Any) -> list[tuple[float, float, float]]:
    """(x, F1, deviation) of the published curve; empty where none is wanted."""
    curve = study.fields.curve
    if published is None or curve is None or curve.published is None:
        return []
    return [(point.x, point.f1, point.deviation or 0.0) for point in getattr(published, curve.published)]


def _published_scores(published: Any, name: str) -> Scores:
    row = published.row(name)
    if row is None:
        raise JaxguardError(f"configs/published has no row {name!r}, which a row of this study names")
    found: Mapping[str, float | None] = {
        metric: getattr(row, metric) for metric in (*AVERAGES, "dynaguardrail", "cosapien")
    }
    return {metric: value for metric, value in found.items() if value is not None}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(plain(cell) for cell in line) + " |" for line in lines) + "\n"


def plain(text: str) -> str:
    """Text that Markdown takes for nothing else."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in text)
