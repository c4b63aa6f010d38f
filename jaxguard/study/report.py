"""Report on a study: F1 by row, axis and mode, mean and deviation over repeats, beside the published tables and figures."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from jaxguard.evaluate.report.published import AVERAGES, Published, PublishedPoint
from jaxguard.evaluate.scores.results import WAITS, Evaluation
from jaxguard.report import Drawing, Page, Paragraph, Section, Table, write_markdown, write_page
from jaxguard.report.figures import COLOURS, FAINT, INK, inline_svg, style
from jaxguard.report.text import number, seconds, short
from jaxguard.study.grid import Study
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import Fields, read_json

REPEATS = ("seed", "data.subset_seed")
"""Axes that repeat a run: results are averaged over them."""
CUSTOM = ("dynaguardrail", "cosapien")
CURVES = ("prompt", "response", "safety")
"""The metrics of the published curves."""
LEGEND = (
    "F1 of the harmful class; mean ± standard deviation (divisor n - 1) over the runs that differ in seed or subset. The last "
    "column counts runs with results, of all; 'part' means that only a part of a benchmark was evaluated."
)
BEHIND_SLASH = " In every table, what stands behind a slash is the published value."
OVER_GENERATIONS = "Standard deviation over the generations of a run, its mean over runs."
ABOUT_WAIT = (
    "Percentiles of the seconds from sending a request to its answer, means over benchmarks and runs. At a server a request is "
    "beside up to evaluate.batch others; in JAX it waits for the whole of its batch."
)


def write_report(study: Study, read: Callable[[Path], Evaluation], published: Published) -> tuple[Path, Path]:
    """Write report.md and report.html into the study's folder and return their paths; JaxguardError if no run has results.

    `read` reads a results.json; runs without one are listed as missing. Scales have the paper's columns without its values.
    """
    scores = gather(study, read)
    if scores.empty:
        raise JaxguardError(f"{study.folder} has no results yet; run the study first")
    columns = list(dict.fromkeys(scores.metric))
    if set(AVERAGES) & set(columns):
        columns = [name for name in (*AVERAGES, *CUSTOM) if name in columns]
    else:
        columns = [name for name in columns if "/" not in name]
    lines = list(_lines(study, scores, published))
    sections = [
        Section(title, [table, *([Paragraph([note], faint=True)] if note else [])])
        for title, names, value, note in _details(published)
        if (table := _table(lines, [name for name in names if name in set(scores.metric)], value)).rows
    ]
    absent = [run.name for run in study.runs if "evaluate" in run.row.stages and run.name not in set(scores.run)]
    missing = f"Without results: {', '.join(absent)}." if absent else None
    figures = [
        _curves(study, scores, columns, published),
        _words(study, scores, published),
        _latency(lines, published),
    ]
    legend = LEGEND + (BEHIND_SLASH if study.scale is None else "")
    main = [figures[0], _table(lines, columns, "f1"), Paragraph([legend], faint=True), missing]
    if (waits := _waits(lines)).rows:
        sections.append(Section("A request's own wait", [waits, Paragraph([ABOUT_WAIT], faint=True)]))
    page = Page(study.definition.title, [study.definition.about, *main, *sections, *figures[1:]])
    paths = study.folder / "report.md", study.folder / "report.html"
    write_markdown(paths[0], page)
    write_page(paths[1], page)
    return paths


def _details(published: Published) -> Iterator[tuple[str, tuple[str, ...], str, str]]:
    """The tables besides the main one: title, columns, the value of `gather` that they show, and a note."""
    subsets = {name for row in published.rows for name in row.scores if "/" in name}
    for average in ("prompt", "response"):
        yield f"{average.capitalize()} benchmarks", (*published.averages[average], average), "f1", ""
    parts = (part for name in published.averages["custom"] for part in (*sorted(subsets & _of(name, subsets)), name))
    yield "Custom policies", (*parts, "custom"), "f1", ""
    yield (
        "Deviation over generations",
        ("safety", "prompt", "response", *CUSTOM, "custom"),
        "deviation",
        OVER_GENERATIONS,
    )


def _of(benchmark: str, names: Iterable[str]) -> set[str]:
    return {name for name in names if name.startswith(f"{benchmark}/")}


def gather(study: Study, read: Callable[[Path], Evaluation]) -> pd.DataFrame:
    """Read the results of the first guard of every run: a row for each run, mode and metric.

    A metric is an average, a benchmark, or `benchmark/value` of a slice. It has the f1 (NaN if undefined), its deviation over
    generations, whether all of it was evaluated (complete), the seconds an example, and percentiles of a request's wait. Runs that
    differ only in what repeats them share a line, whose name, series, x on the curve's axis and number of runs stand beside it.
    """
    curve = study.definition.curve
    axis, of_axis = (curve.axis, curve.label) if curve else ("", "")
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
        rows: list[dict[str, Any]] = []
        for cell in evaluation.cells:
            of, f1 = {"guard": cell.guard, "mode": cell.mode, "complete": cell.complete}, cell.result.scores.f1
            costs = {name: getattr(cell.cost, name) for name in ("seconds", *WAITS)}
            rows.append(of | {"metric": cell.benchmark, "f1": f1.value, "deviation": f1.deviation} | costs)
            for name, part in cell.slices.items():
                rows.append(of | {"metric": f"{cell.benchmark}/{name.partition(': ')[2]}", "f1": part.scores.f1.value})
        for each in evaluation.averages:
            of = {"guard": each.guard, "mode": each.mode, "complete": not each.missing}
            rows.append(of | {"metric": each.name, "f1": each.f1.value, "deviation": each.f1.deviation})
        names = ["guard", "mode", "metric", "complete", "f1", "deviation", "seconds", *WAITS]
        table = pd.DataFrame(rows, columns=names).astype(dict.fromkeys(names[4:], float))
        # The column of modes shows data.mode.
        titles = [
            f"{label} {of_axis}" if field == axis else f"{field.split('.')[-1]} {label}"
            for field, label in labels.items()
            if field != "data.mode"
        ]
        table = table[table.guard == rows[0]["guard"]].assign(
            line=line, name=", ".join([series, *titles]), series=series
        )
        table["x"] = pd.to_numeric(run.row.examples if x == "all" else x, errors="coerce")
        tables.append(table.assign(run=run.name))
    scores = pd.concat(tables).sort_values("line", kind="stable") if tables else pd.DataFrame({"line": []})
    return scores.assign(runs=scores.line.map(runs))


class Line(NamedTuple):
    """A row of the tables: its scores, and what the paper reports: f1 and deviation by metric, and seconds an example."""

    scores: pd.DataFrame
    paper: Mapping[str, Mapping[str, float]]
    seconds: float | None = None

    @property
    def title(self) -> tuple[str, str]:
        """Its name and mode."""
        return self.scores.iloc[0]["name"], self.scores.iloc[0]["mode"]


def _lines(study: Study, scores: pd.DataFrame, published: Published) -> Iterator[Line]:
    runs, curve = {run.name: run for run in study.runs}, study.definition.curve
    latencies = {point.row: point.seconds for point in published.latency.points}
    for (_, mode), line in scores.groupby(["line", "mode"], sort=False):
        first = line.iloc[0]
        run = runs[first.run]
        row = None if study.scale is not None else run.row.published.get(mode)
        if row is not None:
            known = published.row(row)
            if known is None:
                raise JaxguardError(f"configs/published has no row {row!r}, which a row of this study names")
            yield Line(line, {"f1": known.scores, "deviation": known.deviations}, latencies.get(row))
        else:
            on_curve = mode == "reasoning" and curve is not None and curve.series in (None, run.row.series or run.key)
            points = [point for point in _published_curve(study, published) if on_curve and point.x == first.x]
            yield Line(line, {"f1": points[0].scores} if points else {})


def _table(lines: Iterable[Line], columns: Sequence[str], value: str) -> Table:
    """A row for each line that has a value in one of the columns."""
    table = Table(("", "mode", *columns, "runs"), left=2)
    for line in lines:
        scores, paper = line.scores, line.paper.get(value, {})
        values = {name: scores[value][scores.metric == name].dropna() for name in columns}
        if any(map(len, values.values())):
            cells = [spread(each, paper.get(name)) for name, each in values.items()]
            part = "" if scores.complete.all() else " part"
            table.add(*line.title, *cells, f"{scores.run.nunique()} of {scores.runs.iloc[0]}{part}")
    return table


def spread(values: "pd.Series[float]", published: float | None = None) -> str:
    """Format mean ± standard deviation / published value."""
    mean = number(values.mean() if len(values) else None)
    deviation = f" ± {values.std():.3f}" if len(values) > 1 else ""
    return mean + deviation + ("" if published is None else f" / {published:.3f}")


def _published_curve(study: Study, published: Published) -> Sequence[PublishedPoint]:
    curve = study.definition.curve
    return getattr(published, curve.published) if curve and curve.published and study.scale is None else ()


@style()
def _curves(study: Study, scores: pd.DataFrame, columns: Sequence[str], published: Published) -> Drawing | None:
    """Draw the study's metric, or the table's first column if no run has that; for a published curve, all of its metrics."""
    curve, metric = study.definition.curve, study.definition.metric
    if curve is None:
        return None
    caption = ["A line is the mean over seeds and subsets, its bars one standard deviation; each dot is a run."]
    if columns and metric not in set(scores.dropna(subset="f1").metric):
        caption.append(f"The figure shows {columns[0]}: no run has a result for {metric}.")
        metric = columns[0]
    paper = _published_curve(study, published) if metric in CURVES else ()
    of_paper = curve.published is not None and metric in CURVES
    panels = [name for name in CURVES if name in set(scores.metric)] if of_paper else [metric]
    if paper:
        caption.append("Dotted and black: what the paper reports, in reasoning mode.")
    levels = (
        {title: row.scores for title, row in ((t, published.row(i)) for t, i in curve.levels.items()) if row}
        if paper
        else {}
    )
    if levels:
        caption.append(f"Dashed: {', '.join(levels)}, of the paper.")
    if study.scale:
        caption.append("The paper's values are not comparable at this scale and not shown.")
    figure = Figure(figsize=(8 if len(panels) == 1 else 12, 4.8))
    every = [axes for row in figure.subplots(1, len(panels), squeeze=False) for axes in row]
    for axes, name in zip(every, panels, strict=True):
        points = scores[scores.metric == name].dropna(subset=["x", "f1"]).sort_values(["x", "line"], kind="stable")
        for i, (label, part) in enumerate(points.groupby(["series", "mode"], sort=False)):
            color = COLOURS[i % len(COLOURS)]
            at = part.groupby(["x", "line"]).f1.agg(["mean", "std"]).fillna(0.0).reset_index()
            look: dict[str, Any] = {
                "color": color,
                "marker": "o",
                "markersize": 4,
                "capsize": 3,
                "label": short(", ".join(label), 60),
            }
            axes.errorbar(at.x, at["mean"], yerr=at["std"], **look)
            axes.scatter(part.x, part.f1, color=color, s=10, alpha=0.5)
        if paper:
            xs, f1, deviations = zip(*((p.x, p.scores[name], p.deviations.get(name, 0)) for p in paper), strict=True)
            axes.errorbar(xs, f1, yerr=deviations, color=INK, linestyle=":", capsize=3, label="paper, reasoning")
        for i, (title, known) in enumerate(levels.items()):
            axes.axhline(
                known[name], color=FAINT, linestyle="--" if i else "-.", linewidth=1, label=short(f"paper, {title}", 60)
            )
        ticks = sorted({*points.x, *(point.x for point in paper)})
        if ticks and ticks[0] > 0 and ticks[-1] >= 5 * ticks[0]:
            axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{x:,g}" if x < 1e5 else f"{x:,.0f}" for x in ticks])
        axes.minorticks_off()
        axes.set(xlabel=short(curve.label, 60), ylabel=short(f"F1, {name}", 60))
    if any(axes.get_legend_handles_labels()[0] for axes in every):
        every[0].legend()
    return Drawing(" ".join(caption), inline_svg(figure, "curve", f"F1 by {curve.label}"))


@style()
def _words(study: Study, scores: pd.DataFrame, published: Published) -> Drawing | None:
    """Draw the mean words of the traces that each point was trained on, where the paper's curve has them."""
    curve = study.definition.curve
    if curve is None or not any(p.words for p in getattr(published, curve.published or "", ())):
        return None
    folders = {run.name: run.folder for run in study.runs}
    points = scores.dropna(subset="x").drop_duplicates("run")
    own = [(x, _trace_words(folders[run])) for run, x in zip(points.run, points.x, strict=True)]
    paper = [(point.x, point.words) for point in _published_curve(study, published)]
    figure = Figure(figsize=(6, 3.6))
    axes = figure.add_subplot()
    for name, color, line, values in (("ours", COLOURS[0], "-", sorted(own)), ("the paper", INK, ":", paper)):
        if values:
            axes.plot(*zip(*values, strict=True), marker="o", markersize=4, color=color, linestyle=line, label=name)
    axes.set_xticks(sorted({x for x, _ in (*own, *paper)}))
    axes.set(xlabel=short(curve.label, 60), ylabel="mean words of a trace")
    axes.legend()
    return Drawing("Words of the traces that were trained on", inline_svg(figure, "words", f"Words by {curve.label}"))


def _trace_words(folder: Path) -> float:
    path = folder / "data.json"
    words = read_json(path, Fields)["train"].get("trace_words") if path.is_file() else None
    return float("nan") if words is None else float(words)


def _waits(lines: Iterable[Line]) -> Table:
    """A row for each line whose requests' waits are known: their percentiles."""
    table = Table(("", "mode", *(f"p{percentile}" for percentile in WAITS.values())), left=2)
    for line in lines:
        waits = [line.scores[name].mean() for name in WAITS]
        if pd.notna(waits[0]):
            table.add(*line.title, *map(seconds, waits))
    return table


@style()
def _latency(lines: Sequence[Line], published: Published) -> Drawing | None:
    """Draw seconds an example, the mean over benchmarks, as bars, and the paper's of the same rows beside them."""
    means = [(", ".join(line.title), line.scores.seconds.mean(), line.seconds) for line in lines]
    bars = [bar for bar in means if bar[1] > 0]
    if not bars:
        return None
    figure = Figure(figsize=(7, 1 + 0.35 * len(bars)))
    axes = figure.add_subplot()
    for y, (_, mean, paper) in enumerate(bars):
        axes.barh(y - 0.2, mean, 0.38, color=COLOURS[0], label="ours" if not y else None)
        if paper is not None:
            axes.barh(y + 0.2, paper, 0.38, color=FAINT)
    caption = (
        "Seconds an example, with all generations: a batch's time, or at a server the time by the clock, by its examples, not what "
        "one request waits."
    )
    if any(paper is not None for _, _, paper in bars):
        axes.barh(0, 0, color=FAINT, label=f"the paper ({published.latency.hardware})")
        caption += " The paper's are of one generation."
    axes.set_yticks(range(len(bars)), [short(name, 60) for name, _, _ in bars])
    axes.set(xlabel="seconds an example of an offline batch", ylim=(len(bars) - 0.5, -0.5))
    axes.legend()
    return Drawing(caption, inline_svg(figure, "latency", "Seconds an example by row"))
