"""Report on a study: F1 by row, axis and mode, mean and deviation over repeats, beside the published values."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from jaxguard.evaluate.report.published import AVERAGES, Published
from jaxguard.evaluate.scores.results import Evaluation
from jaxguard.report import Drawing, Page, Paragraph, Table, write_markdown, write_page
from jaxguard.report.figures import COLOURS, INK, inline_svg, style
from jaxguard.report.text import number
from jaxguard.study.grid import REPEATS, Run, Study
from jaxguard.utils.errors import JaxguardError

CUSTOM = ("dynaguardrail", "cosapien")
PUBLISHED_METRIC = "safety"
"""The metric of the published curves."""
LEGEND = (
    "F1 of the harmful class; mean ± standard deviation (divisor n - 1) over the runs that differ in seed or subset, with the "
    "published value behind a slash. The last column counts runs with results, of all; 'part' means that only a part of a "
    "benchmark was evaluated."
)
Scores = dict[str, float]
"""Average or benchmark -> F1; undefined ones are left out."""


@dataclass(frozen=True)
class Line:
    """Runs that differ only in what repeats them, in one mode.

    Attributes:
        series, labels, mode: what they have in common.
        scores: of each run.
        runs: how many there are to be.
        partial: some evaluated only a part of a benchmark.
        published: the paper's scores.
        x: position on the curve's axis, if it is on it.
    """

    series: str
    labels: dict[str, str]
    mode: str
    scores: tuple[Scores, ...]
    runs: int
    partial: bool
    published: Scores
    x: float | None

    @property
    def name(self) -> str:
        # The column of modes shows data.mode.
        labels = [f"{axis.split('.')[-1]} {label}" for axis, label in self.labels.items() if axis != "data.mode"]
        return ", ".join([self.series, *labels])

    def values(self, metric: str) -> list[float]:
        return [scores[metric] for scores in self.scores if metric in scores]

    def cell(self, metric: str) -> str:
        published = f" / {self.published[metric]:.3f}" if metric in self.published else ""
        return spread(self.values(metric)) + published


def write_report(study: Study, read: Callable[[Path], Evaluation], published: Published | None) -> tuple[Path, Path]:
    """Write report.md and report.html into the study's folder; return their paths.

    Args:
        study: runs without results are listed as missing.
        read: reads a results.json.
        published: the published results, or None.

    Raises:
        JaxguardError: no run has results yet.
    """
    published = None if study.scale else published
    lines, absent = gather(study, read, published)
    if not lines:
        raise JaxguardError(f"{study.folder} has no results yet; run the study first")
    metrics = columns(lines)
    table = Table(("", "mode", *metrics, "runs"), left=2)
    for line in lines:
        runs = f"{len(line.scores)} of {line.runs}" + (" part" if line.partial else "")
        table.add(line.name, line.mode, *map(line.cell, metrics), runs)
    missing = f"Without results: {', '.join(absent)}." if absent else None
    blocks = [study.definition.about, _figure(study, lines, published), table, Paragraph([LEGEND], faint=True), missing]
    page = Page(study.definition.title, blocks)
    paths = study.folder / "report.md", study.folder / "report.html"
    write_markdown(paths[0], page)
    write_page(paths[1], page)
    return paths


def gather(
    study: Study, read: Callable[[Path], Evaluation], published: Published | None
) -> tuple[list[Line], list[str]]:
    """Return the table's lines, in the study's order, and the names of runs without results."""
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[Run]] = {}
    for run in study.runs:
        if "evaluate" in run.stages:
            labels = tuple((axis, label) for axis, label in run.labels.items() if axis not in REPEATS)
            groups.setdefault((run.key, labels), []).append(run)
    lines, absent = [], []
    for (_, labels), runs in groups.items():
        by_mode: dict[str, list[tuple[Scores, bool]]] = {}
        for run in runs:
            path = run.folder / "evaluate" / "results.json"
            if path.is_file():
                for mode, scores, complete in scores_of(read(path)):
                    by_mode.setdefault(mode, []).append((scores, complete))
            else:
                absent.append(run.name)
        row, axis = runs[0].row, study.definition.curve.axis if study.definition.curve else ""
        x = _number(dict(labels)[axis], row.examples) if axis in dict(labels) else None
        for mode, results in by_mode.items():
            all_scores = tuple(scores for scores, _ in results)
            expected = _published_scores(study, published, runs[0], mode, x)
            series, partial = row.series or runs[0].key, not all(complete for _, complete in results)
            lines.append(Line(series, dict(labels), mode, all_scores, len(runs), partial, expected, x))
    return lines, absent


def scores_of(evaluation: Evaluation) -> list[tuple[str, Scores, bool]]:
    """Return (mode, its scores, whether all benchmarks are complete) of the first guard."""
    guard, result = evaluation.cells[0].guard if evaluation.cells else "", []
    for mode in dict.fromkeys(cell.mode for cell in evaluation.cells if cell.guard == guard):
        cells = [cell for cell in evaluation.cells if (cell.guard, cell.mode) == (guard, mode)]
        averages = [average for average in evaluation.averages if (average.guard, average.mode) == (guard, mode)]
        scores = {cell.benchmark: cell.result.scores.f1.value for cell in cells}
        scores |= {average.name: average.f1.value for average in averages}
        complete = all(cell.complete for cell in cells) and not any(average.missing for average in averages)
        result.append((mode, {name: value for name, value in scores.items() if value is not None}, complete))
    return result


def columns(lines: Sequence[Line]) -> list[str]:
    """Return the paper's columns as far as there are any, else the benchmarks."""
    names = dict.fromkeys(name for line in lines for scores in line.scores for name in scores)
    averages = [name for name in AVERAGES if name in names]
    return [*averages, *(name for name in CUSTOM if name in names)] if averages else list(names)


def spread(values: Sequence[float]) -> str:
    """Format mean ± standard deviation."""
    return number(mean(values) if values else None) + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def shown_metric(study: Study, lines: Sequence[Line]) -> str:
    """Return the figure's metric: the study's, or the table's first column if no run has that."""
    metric = study.definition.metric
    return metric if any(line.values(metric) for line in lines) else next(iter(columns(lines)), metric)


def curves(lines: Sequence[Line], metric: str) -> dict[str, list[tuple[float, list[float]]]]:
    """Return series and mode -> (x, the scores of the runs there), in the order of x."""
    points: dict[str, list[tuple[float, list[float]]]] = {}
    for line in lines:
        if line.x is not None and (values := line.values(metric)):
            points.setdefault(f"{line.series}, {line.mode}", []).append((line.x, values))
    return {name: sorted(each) for name, each in points.items()}


def _figure(study: Study, lines: Sequence[Line], published: Published | None) -> Drawing | None:
    if study.definition.curve is None:
        return None
    metric = shown_metric(study, lines)
    paper = _published_curve(study, published) if metric == PUBLISHED_METRIC else []
    caption = ["A line is the mean over seeds and subsets, its bars one standard deviation; each dot is a run."]
    if paper:
        caption.append("Dotted and black: what the paper reports, in reasoning mode.")
    if study.scale:
        caption.append("The paper's values are not comparable at this scale and not shown.")
    if metric != study.definition.metric:
        caption.append(f"The figure shows {metric}: no run has a result for {study.definition.metric}.")
    return Drawing(" ".join(caption), draw(curves(lines, metric), paper, study.definition.curve.label, metric))


@style()
def draw(
    lines: dict[str, list[tuple[float, list[float]]]],
    published: Sequence[tuple[float, float, float]],
    label: str,
    metric: str,
) -> Markup:
    """Draw F1 over the curve's axis; `published` is (x, F1, deviation)."""
    figure = Figure(figsize=(8, 4.8))
    axes = figure.add_subplot()
    for (name, points), color in zip(lines.items(), COLOURS * len(lines), strict=False):
        xs = [x for x, _ in points]
        deviations = [stdev(values) if len(values) > 1 else 0.0 for _, values in points]
        means = [mean(values) for _, values in points]
        axes.errorbar(xs, means, yerr=deviations, color=color, marker="o", markersize=4, capsize=3, label=name)
        dots = np.array([(x, value) for x, values in points for value in values])
        axes.scatter(dots[:, 0], dots[:, 1], color=color, s=10, alpha=0.5)
    if published:
        xs, f1, paper = map(list, zip(*published, strict=True))
        axes.errorbar(xs, f1, yerr=paper, color=INK, linestyle=":", capsize=3, label="paper, reasoning")
    ticks = sorted({x for points in lines.values() for x, _ in points} | {x for x, _, _ in published})
    if ticks and ticks[0] > 0 and ticks[-1] >= 5 * ticks[0]:
        axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{x:,g}" if x < 1e5 else f"{x:,.0f}" for x in ticks])
    axes.minorticks_off()
    axes.set(xlabel=label, ylabel=f"F1, {metric}")
    if ticks:
        axes.legend()
    return inline_svg(figure, "curve", f"F1 by {label}")


def _number(label: str, whole: int | None) -> float | None:
    """Parse a label of the curve's axis; `all` is the whole data set."""
    try:
        value = float(label) if label != "all" else whole
    except ValueError:
        return None
    return value if value is not None and math.isfinite(value) else None


def _published_curve(study: Study, published: Published | None) -> list[tuple[float, float, float]]:
    """Return (x, F1, deviation) of the published curve, if there is one."""
    curve = study.definition.curve
    if published is None or curve is None or curve.published is None:
        return []
    return [(point.x, point.f1, point.deviation or 0.0) for point in getattr(published, curve.published)]


def _published_scores(study: Study, published: Published | None, run: Run, mode: str, x: float | None) -> Scores:
    """Return the published scores of a run: of the row that its row names, else of the curve at x."""
    name = {str(key): value for key, value in run.row.published.items()}.get(mode)
    if published is not None and name is not None:
        row = published.row(name)
        if row is None:
            raise JaxguardError(f"configs/published has no row {name!r}, which a row of this study names")
        scores = {metric: getattr(row, metric) for metric in (*AVERAGES, *CUSTOM)}
        return {metric: value for metric, value in scores.items() if value is not None}
    curve = study.definition.curve
    if mode != "reasoning" or curve is None or curve.series not in (None, run.row.series or run.key):
        return {}
    at_x = [f1 for at, f1, _ in _published_curve(study, published) if at == x]
    return {PUBLISHED_METRIC: at_x[0]} if at_x else {}
