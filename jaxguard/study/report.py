"""Report on a study: F1 by row, axis and mode, mean and deviation over repeats, beside the published values."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from jaxguard.evaluate.report.published import AVERAGES, Published, PublishedPoint
from jaxguard.evaluate.scores.results import Evaluation
from jaxguard.report import Drawing, Page, Paragraph, Table, write_markdown, write_page
from jaxguard.report.figures import COLOURS, INK, inline_svg, style
from jaxguard.report.text import number, short
from jaxguard.study.grid import Run, Study
from jaxguard.utils.errors import JaxguardError

REPEATS = ("seed", "data.subset_seed")
"""Axes that repeat a run: results are averaged over them."""
CUSTOM = ("dynaguardrail", "cosapien")
PUBLISHED_METRIC = "safety"
"""The metric of the published curves."""
LEGEND = (
    "F1 of the harmful class; mean ± standard deviation (divisor n - 1) over the runs that differ in seed or subset, with the "
    "published value behind a slash. The last column counts runs with results, of all; 'part' means that only a part of a "
    "benchmark was evaluated."
)


def write_report(study: Study, read: Callable[[Path], Evaluation], published: Published | None) -> tuple[Path, Path]:
    """Write report.md and report.html into the study's folder and return their paths; JaxguardError if no run has results.

    `read` reads a results.json; runs without one are listed as missing.
    """
    published = None if study.scale else published
    scores = gather(study, read)
    if scores.empty:
        raise JaxguardError(f"{study.folder} has no results yet; run the study first")
    defined, runs = scores.dropna(subset="f1"), {run.name: run for run in study.runs}
    metrics = list(dict.fromkeys(defined.metric))
    if set(AVERAGES) & set(metrics):
        metrics = [name for name in (*AVERAGES, *CUSTOM) if name in metrics]
    table = Table(("", "mode", *metrics, "runs"), left=2)
    for (_, mode), line in scores.groupby(["line", "mode"], sort=False):
        first = line.iloc[0]
        expected = _published_scores(study, published, runs[first.run], mode, first.x)
        cells = [spread(line.f1[line.metric == name].dropna(), expected.get(name)) for name in metrics]
        count = f"{line.run.nunique()} of {first.runs}" + ("" if line.complete.all() else " part")
        table.add(first["name"], mode, *cells, count)
    absent = [run.name for run in study.runs if "evaluate" in run.row.stages and run.name not in set(scores.run)]
    missing = f"Without results: {', '.join(absent)}." if absent else None
    blocks = [_figure(study, defined, metrics, published), table, Paragraph([LEGEND], faint=True), missing]
    page = Page(study.definition.title, [study.definition.about, *blocks])
    paths = study.folder / "report.md", study.folder / "report.html"
    write_markdown(paths[0], page)
    write_page(paths[1], page)
    return paths


def gather(study: Study, read: Callable[[Path], Evaluation]) -> pd.DataFrame:
    """Read the results of the first guard of every run: a row for each run, mode and metric, an average or a benchmark.

    It has the f1 (NaN if undefined) and whether all of it was evaluated (complete). Runs that differ only in what repeats them
    share a line, whose name, series, x on the curve's axis and number of runs stand beside it.
    """
    axis = study.definition.curve.axis if study.definition.curve else ""
    lines: dict[tuple[Any, ...], int] = {}
    runs: Counter[int] = Counter()
    tables = []
    for run in (run for run in study.runs if "evaluate" in run.row.stages):
        labels = {field: label for field, label in run.labels.items() if field not in REPEATS}
        line = lines.setdefault((run.key, *labels.items()), len(lines))
        runs[line] += 1
        path, series, x = run.folder / "evaluate" / "results.json", run.row.series or run.key, labels.get(axis)
        if not path.is_file():
            continue
        evaluation = read(path)
        rows = [(c.guard, c.mode, c.benchmark, c.result.scores.f1.value, c.complete) for c in evaluation.cells]
        rows += [(a.guard, a.mode, a.name, a.f1.value, not a.missing) for a in evaluation.averages]
        table = pd.DataFrame(rows, columns=["guard", "mode", "metric", "f1", "complete"]).astype({"f1": float})
        # The column of modes shows data.mode.
        names = [f"{field.split('.')[-1]} {label}" for field, label in labels.items() if field != "data.mode"]
        table = table[table.guard == rows[0][0]].assign(line=line, name=", ".join([series, *names]), series=series)
        table["x"] = pd.to_numeric(run.row.examples if x == "all" else x, errors="coerce")
        tables.append(table.assign(run=run.name))
    scores = pd.concat(tables).sort_values("line", kind="stable") if tables else pd.DataFrame({"line": []})
    return scores.assign(runs=scores.line.map(runs))


def spread(values: "pd.Series[float]", published: float | None = None) -> str:
    """Format mean ± standard deviation / published value."""
    mean = number(values.mean() if len(values) else None)
    deviation = f" ± {values.std():.3f}" if len(values) > 1 else ""
    return mean + deviation + ("" if published is None else f" / {published:.3f}")


def _published_scores(study: Study, published: Published | None, run: Run, mode: Any, x: float) -> Mapping[str, float]:
    """Return the published scores of a run: of the row that its row names, else of the curve at x."""
    if published is not None and mode in run.row.published:
        name = run.row.published[mode]
        row = published.row(name)
        if row is None:
            raise JaxguardError(f"configs/published has no row {name!r}, which a row of this study names")
        return {metric: getattr(row, metric) for metric in (*AVERAGES, *CUSTOM)}
    curve = study.definition.curve
    on_curve = mode == "reasoning" and curve is not None and curve.series in (None, run.row.series or run.key)
    at_x = [point.f1 for point in _published_curve(study, published) if on_curve and point.x == x]
    return {PUBLISHED_METRIC: at_x[0]} if at_x else {}


def _published_curve(study: Study, published: Published | None) -> Sequence[PublishedPoint]:
    curve = study.definition.curve
    return getattr(published, curve.published) if published and curve and curve.published else ()


@style()
def _figure(study: Study, scores: pd.DataFrame, metrics: Sequence[str], published: Published | None) -> Drawing | None:
    """Draw the study's metric, or the table's first column if no run has that."""
    curve, metric = study.definition.curve, study.definition.metric
    if curve is None:
        return None
    caption = ["A line is the mean over seeds and subsets, its bars one standard deviation; each dot is a run."]
    if metrics and metric not in set(scores.metric):
        caption.append(f"The figure shows {metrics[0]}: no run has a result for {metric}.")
        metric = metrics[0]
    paper = _published_curve(study, published) if metric == PUBLISHED_METRIC else ()
    if paper:
        caption.append("Dotted and black: what the paper reports, in reasoning mode.")
    if study.scale:
        caption.append("The paper's values are not comparable at this scale and not shown.")
    points = scores[scores.metric == metric].dropna(subset="x").sort_values(["x", "line"], kind="stable")
    figure = Figure(figsize=(8, 4.8))
    axes = figure.add_subplot()
    for i, (name, part) in enumerate(points.groupby(["series", "mode"], sort=False)):
        color = COLOURS[i % len(COLOURS)]
        at = part.groupby(["x", "line"]).f1.agg(["mean", "std"]).fillna(0.0).reset_index()
        look: dict[str, Any] = {
            "color": color,
            "marker": "o",
            "markersize": 4,
            "capsize": 3,
            "label": short(", ".join(name), 60),
        }
        axes.errorbar(at.x, at["mean"], yerr=at["std"], **look)
        axes.scatter(part.x, part.f1, color=color, s=10, alpha=0.5)
    if paper:
        xs, f1, deviations = zip(*((p.x, p.f1, p.deviation or 0.0) for p in paper), strict=True)
        axes.errorbar(xs, f1, yerr=deviations, color=INK, linestyle=":", capsize=3, label="paper, reasoning")
    ticks = sorted({*points.x, *(point.x for point in paper)})
    if ticks and ticks[0] > 0 and ticks[-1] >= 5 * ticks[0]:
        axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{x:,g}" if x < 1e5 else f"{x:,.0f}" for x in ticks])
    axes.minorticks_off()
    axes.set(xlabel=short(curve.label, 60), ylabel=short(f"F1, {metric}", 60))
    if ticks:
        axes.legend()
    return Drawing(" ".join(caption), inline_svg(figure, "curve", f"F1 by {curve.label}"))
