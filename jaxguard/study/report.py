"""Report on a study: F1 by row, axis and mode, mean and deviation over repeats, beside the published tables and figures."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from jaxguard.evaluate.report.published import AVERAGES, Published, PublishedPoint, PublishedRow
from jaxguard.evaluate.report.tables import difference
from jaxguard.evaluate.scores.metrics import Difference, accuracy_difference
from jaxguard.evaluate.scores.results import WAITS, Evaluation
from jaxguard.report import Beside, Bullets, Drawing, Only, Page, Paragraph, Section, Table, write_markdown, write_page
from jaxguard.report.figures import COLOURS, FAINT, INK, inline_svg, style
from jaxguard.report.text import ABSENT, number, seconds, short
from jaxguard.study.grid import Study
from jaxguard.study.training import ABOUT_TRAINING, training_table
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import Fields, read_json

REPEATS = ("seed", "data.subset_seed")
"""Axes that repeat a run: results are averaged over them."""
CUSTOM = ("dynaguardrail", "cosapien")
OTHER = "other mean"
"""What F1 over all examples of a benchmark is beside the mean over its subsets, and the other way round."""
CURVES = ("prompt", "response", "safety")
"""The metrics of the published curves."""
LEGEND = (
    "F1 of the harmful class; mean ± standard deviation (divisor n - 1) over the runs that differ in seed or subset. The last "
    "column counts runs with results, of all; 'part' means that only a part of a benchmark was evaluated."
)
BEHIND_SLASH = (
    " In every table, what stands behind a slash is the published value, with its deviation over subsets if it has one."
)
ABOUT_OTHER = {
    "dynaguardrail": "F1 of dynaguardrail is over all examples, its other mean that of its subsets'.",
    "cosapien": "F1 of cosapien is the mean of its scenarios', its other mean is over all examples.",
}
AGAINST = (
    "Accuracy minus that of the row, of each example the mean over seeds and subsets, with a 95 % interval over the examples. "
    "How much seeds differ, the first table says."
)
OVER_GENERATIONS = "Standard deviation over the generations of a run, its mean over runs."
ABOUT_WAIT = (
    "Percentiles of the seconds from sending a request to its answer, means over benchmarks and runs. At a server a request is "
    "beside up to evaluate.batch others; in JAX it waits for the whole of its batch."
)


def write_report(study: Study, read: Callable[[Path], Evaluation], published: Published) -> tuple[Path, Path]:
    """Write report.md and report.html into the study's folder and return their paths; JaxguardError if no run has results.

    `read` reads a results.json; runs without one are listed as missing. Scales have the paper's columns without its values.
    """
    read = cache(read)
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
        Section(title, [table, Paragraph([note] if note else [], faint=True)])
        for title, names, value, note in _details(published)
        if (table := _table(lines, [name for name in names if name in set(scores.metric)], value)).rows
    ]
    for row in study.definition.against:
        table = _against(study, scores, read, row)
        sections.append(Section(f"Against {row}, on the same examples", [table, Paragraph([AGAINST], faint=True)]))
    sections += [
        Section("Where the paper has two values", [Bullets(list(_restated(lines)))]),
        Section("Training, from its first steps to its last", _training(study, scores)),
        Section("Words of the traces", _words(study, scores, published)),
        Section("Seconds an example", _latency(lines, published)),
    ]
    absent = [run.name for run in study.runs if "evaluate" in run.row.stages and run.name not in set(scores.run)]
    missing = f"Without results: {', '.join(absent)}." if absent else None
    legend = LEGEND + (BEHIND_SLASH if study.scale is None else "")
    figure = _curves(study, scores, lines, columns, published)
    main = [figure, _table(lines, columns, "f1"), Paragraph([legend], faint=True), missing]
    if (waits := _waits(lines)).rows:
        sections.append(Section("A request's own wait", [waits, Paragraph([ABOUT_WAIT], faint=True)]))
    page = Page(study.definition.title, [study.definition.about, *main, *sections])
    paths = study.folder / "report.md", study.folder / "report.html"
    write_markdown(paths[0], page)
    write_page(paths[1], page)
    return paths


def _details(published: Published) -> Iterator[tuple[str, Sequence[str], str, str]]:
    """The tables besides the main one: title, columns in the paper's order, the value of `gather` that they show, and a note."""
    subsets = list(dict.fromkeys(name for row in published.rows for name in row.scores if "/" in name))
    for average in ("prompt", "response"):
        yield f"{average.capitalize()} benchmarks", (*published.averages[average], average), "f1", ""
    for name in published.averages["custom"]:
        parts = [each for each in subsets if each.startswith(f"{name}/")]
        yield f"Custom policies, {name}", (*parts, name, f"{name}/{OTHER}"), "f1", ABOUT_OTHER[name]
    of_all = ("safety", "prompt", "response", *CUSTOM, "custom")
    yield "Deviation over generations", of_all, "deviation", OVER_GENERATIONS


def _restated(lines: Iterable["Line"]) -> Iterator[str]:
    """What a later table of the paper has for the same rows."""
    for line in lines:
        for table, scores in line.row.restated.items() if line.row and line.paper else ():
            others = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
            yield f"For {', '.join(line.title)}, {table} of the paper has {others}."


def gather(study: Study, read: Callable[[Path], Evaluation]) -> pd.DataFrame:
    """Read the results of the first guard of every run: a row for each run, mode and metric.

    A metric is an average, a benchmark, `benchmark/value` of a slice, or `benchmark/other mean`. It has the f1 (NaN if undefined),
    its deviation over generations, whether all of it was evaluated (complete), the seconds an example, and percentiles of a
    request's wait. Runs that differ only in what repeats them share a line, whose name, series, x on the curve's axis and number of
    runs stand beside it.
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
            costs = {"examples": cell.examples} | {name: getattr(cell.cost, name) for name in ("seconds", *WAITS)}
            rows.append(of | {"metric": cell.benchmark, "f1": f1.value, "deviation": f1.deviation} | costs)
            for name, part in cell.slices.items():
                rows.append(of | {"metric": f"{cell.benchmark}/{name.partition(': ')[2]}", "f1": part.scores.f1.value})
            rows += [
                of | {"metric": f"{cell.benchmark}/{OTHER}", "f1": other.value} for other in cell.other_f1.values()
            ]
        for each in evaluation.averages:
            of = {"guard": each.guard, "mode": each.mode, "complete": not each.missing}
            rows.append(of | {"metric": each.name, "f1": each.f1.value, "deviation": each.f1.deviation})
        if not rows:
            continue
        names = ["guard", "mode", "metric", "complete", "f1", "deviation", "examples", "seconds", *WAITS]
        table = pd.DataFrame(rows, columns=names).astype(dict.fromkeys(names[4:], float))
        # The column of modes shows data.mode, but for dual guards, which have both.
        titles = [
            f"{label} {of_axis}" if field == axis else f"{field.split('.')[-1]} {label}"
            for field, label in labels.items()
            if field != "data.mode" or label == "dual"
        ]
        table = table[table.guard == rows[0]["guard"]].assign(
            line=line, name=", ".join([series, *titles]), series=series
        )
        table["x"] = pd.to_numeric(run.row.examples if x == "all" else x, errors="coerce")
        tables.append(table.assign(run=run.name))
    scores = pd.concat(tables).sort_values("line", kind="stable") if tables else pd.DataFrame({"line": []})
    return scores.assign(runs=scores.line.map(runs))


class Line(NamedTuple):
    """A row of the tables: its scores, the published row that it reproduces, and what is shown of the paper.

    Of the paper: f1, its deviation over subsets, and the deviation over generations, by metric; nothing at a scale.
    """

    scores: pd.DataFrame
    row: PublishedRow | None = None
    paper: Mapping[str, Mapping[str, float]] = {}

    @property
    def title(self) -> tuple[str, str]:
        """Its name and mode."""
        return self.scores.iloc[0]["name"], self.scores.iloc[0]["mode"]

    @property
    def quoted(self) -> bool:
        """Whether it has no run of ours."""
        return self.scores.iloc[0]["runs"] == 0


def _lines(study: Study, scores: pd.DataFrame, published: Published) -> Iterator[Line]:
    """Our lines, then the published rows that no run of the study reproduces and that it quotes."""
    runs, curve = {run.name: run for run in study.runs}, study.definition.curve

    def known(name: str) -> PublishedRow:
        if (row := published.row(name)) is None:
            raise JaxguardError(f"configs/published has no row {name!r}, which this study names")
        return row

    def paper(row: PublishedRow) -> dict[str, Mapping[str, float]]:
        return {"f1": row.scores, "deviation": row.deviations} if study.scale is None else {}

    for (_, mode), line in scores.groupby(["line", "mode"], sort=False):
        first = line.iloc[0]
        run = runs[first.run]
        if name := run.row.published.get(mode):
            yield Line(line, known(name), paper(known(name)))
        else:
            on_curve = mode == "reasoning" and curve is not None and curve.series in (None, run.row.series or run.key)
            points = [point for point in _published_curve(study, published) if on_curve and point.x == first.x]
            yield Line(line, None, {"f1": points[0].scores, "subsets": points[0].deviations} if points else {})
    for row in map(known, study.definition.quoted if study.scale is None else ()):
        empty = pd.DataFrame([{"name": row.name, "mode": row.mode, "runs": 0}])
        yield Line(empty.reindex(columns=scores.columns), row, paper(row))


def _table(lines: Iterable[Line], columns: Sequence[str], value: str) -> Table:
    """A row for each line that has a value in one of the columns, and for what is quoted there."""
    table = Table(("", "mode", *(name.rpartition("/")[2] for name in columns), "runs"), left=2)
    for line in lines:
        scores, paper = line.scores, line.paper.get(value, {})
        values = {name: scores[value][scores.metric == name].dropna() for name in columns}
        deviations = line.paper.get("subsets", {}) if value == "f1" else {}
        if any(map(len, values.values())) or (line.quoted and set(columns) & set(paper)):
            cells = [spread(each, paper.get(name), deviations.get(name)) for name, each in values.items()]
            part = "" if scores.complete.all() else " part"
            runs = "published" if line.quoted else f"{scores.run.nunique()} of {scores.runs.iloc[0]}{part}"
            table.add(*line.title, *cells, runs)
    return table


def _against(study: Study, scores: pd.DataFrame, read: Callable[[Path], Evaluation], row: str) -> Table:
    """A row for each line but those of a row of the study: accuracy minus that of this row, paired, on every benchmark of both."""
    runs = {run.name: run for run in study.runs}
    of_row = [name for name in dict.fromkeys(scores.run) if runs[name].key == row]

    def right(names: Iterable[str], mode: str) -> dict[tuple[str, str], np.ndarray]:
        """(benchmark, hash of its examples) -> the share of each example's verdicts that is right, a mean over runs."""
        found: dict[tuple[str, str], list[np.ndarray]] = {}
        for name in names:
            cells = read(runs[name].folder / "evaluate" / "results.json").cells
            for cell in cells:
                if cell.right and (cell.guard, cell.mode) == (cells[0].guard, mode):
                    shares = np.asarray(cell.right) / cell.result.generations
                    found.setdefault((cell.benchmark, cell.examples_sha256), []).append(shares)
        return {key: np.mean(shares, axis=0) for key, shares in found.items()}

    reference = {mode: right(of_row, mode) for mode in dict.fromkeys(scores["mode"])}
    lines: list[tuple[str, str, dict[str, Difference]]] = []
    for (_, mode), line in scores.groupby(["line", "mode"], sort=False):
        own, first = right(dict.fromkeys(line.run), mode), line.iloc[0]
        common = {key[0]: accuracy_difference(own[key], reference[mode][key]) for key in own if key in reference[mode]}
        if common and runs[first.run].key != row:
            lines.append((first["name"], mode, common))
    benchmarks = list(dict.fromkeys(name for _, _, common in lines for name in common))
    table = Table(("", "mode", *benchmarks), left=2)
    for name, mode, common in lines:
        table.add(name, mode, *(difference(common[each]) if each in common else ABSENT for each in benchmarks))
    return table


def spread(values: "pd.Series[float]", published: float | None = None, published_deviation: float | None = None) -> str:
    """Format mean ± standard deviation / published value ± its deviation."""
    mean = number(values.mean() if len(values) else None)
    deviation = f" ± {values.std():.3f}" if len(values) > 1 else ""
    of_paper = f" ± {published_deviation:.3f}" if published_deviation is not None else ""
    return mean + deviation + ("" if published is None else f" / {published:.3f}{of_paper}")


def _published_curve(study: Study, published: Published) -> Sequence[PublishedPoint]:
    curve = study.definition.curve
    return getattr(published, curve.published) if curve and curve.published and study.scale is None else ()


@style()
def _curves(
    study: Study, scores: pd.DataFrame, lines: Sequence[Line], columns: Sequence[str], published: Published
) -> Drawing | None:
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
    levels = [(title, row) for title, row in ((t, published.row(i)) for t, i in curve.levels.items()) if row]
    if levels:
        caption.append(f"Dashed: {', '.join(title for title, _ in levels)}{'; grey is the paper' if paper else ''}.")
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
        for i, (title, row) in enumerate(levels):
            # A run with an x is a point of the curve, and no level.
            ours = pd.concat([line.scores[line.scores.x.isna()] for line in lines if line.row == row] or [scores[:0]])
            level = {"ours": ours.f1[ours.metric == name].mean(), "paper": row.scores[name] if paper else float("nan")}
            for who, color in (("ours", COLOURS[0]), ("paper", FAINT)):
                if pd.notna(level[who]):
                    label, dash = short(f"{who}, {title}", 60), "--" if i else "-."
                    axes.axhline(level[who], label=label, color=color, linestyle=dash, linewidth=1)
        ticks = sorted({*points.x, *(point.x for point in paper)})
        if ticks and ticks[0] > 0 and ticks[-1] >= 20 * ticks[0]:
            axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{x:,g}" if x < 1e5 else f"{x:,.0f}" for x in ticks])
        axes.minorticks_off()
        axes.set(xlabel=short(curve.label, 60), ylabel=short(f"F1, {name}", 60))
    if any(axes.get_legend_handles_labels()[0] for axes in every):
        figure.legend(*every[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return Drawing(" ".join(caption), inline_svg(figure, "curve", f"F1 by {curve.label}"))


def _training(study: Study, scores: pd.DataFrame) -> list[Table | Paragraph]:
    folders = {run.name: run.folder for run in study.runs}
    runs = scores.drop_duplicates("run").groupby("name", sort=False).run
    table = training_table({name: [folders[run] for run in of_line] for name, of_line in runs})
    return [table, Paragraph([ABOUT_TRAINING], faint=True)] if table.rows else []


@style()
def _words(study: Study, scores: pd.DataFrame, published: Published) -> list[Beside]:
    """The mean words of the traces that each point was trained on, where the paper's curve has them: a table and its figure."""
    curve = study.definition.curve
    if curve is None or not any(p.words for p in getattr(published, curve.published or "", ())):
        return []
    folders = {run.name: run.folder for run in study.runs}
    points = scores.dropna(subset="x").drop_duplicates("run")
    own = {x: _trace_words(folders[run]) for run, x in zip(points.run, points.x, strict=True)}
    paper = {point.x: point.words for point in _published_curve(study, published) if point.words}
    xs = sorted({*own, *paper})
    table = Table((curve.label, "words"))
    for x in xs:
        words = own.get(x, float("nan"))
        of_paper = f" / {paper[x]:.1f}" if x in paper else ""
        table.add(f"{x:g}", (f"{words:.1f}" if words > 0 else ABSENT) + of_paper)
    figure = Figure(figsize=(6, 3.6))
    axes = figure.add_subplot()
    for name, color, line, values in (("ours", COLOURS[0], "-", own), ("the paper", INK, ":", paper)):
        if values:
            axes.plot(
                *zip(*sorted(values.items()), strict=True),
                marker="o",
                markersize=4,
                color=color,
                linestyle=line,
                label=name,
            )
    axes.set_xticks(xs)
    axes.set(xlabel=short(curve.label, 60), ylabel="mean words of a trace")
    axes.legend()
    caption = "Words of the traces that were trained on"
    return [Beside([table, Drawing(caption, inline_svg(figure, "words", f"Words by {curve.label}"))])]


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


def _mean_seconds(scores: pd.DataFrame) -> float:
    """Seconds an example over all examples of a line's benchmarks, whatever their sizes."""
    timed = scores.dropna(subset="seconds")
    return float((timed.seconds * timed.examples).sum() / timed.examples.sum()) if len(timed) else 0.0


@style()
def _latency(lines: Sequence[Line], published: Published) -> list[Table | Only | Drawing]:
    """Seconds an example, the mean over all examples, beside the paper's of the same rows: a table and its bars."""
    points, first = {point.row: point for point in published.latency.points}, published.latency.points[0]
    bars = []
    for line in lines:
        point = points.get(line.row.id) if line.row and line.paper else None
        mean = 0.0 if line.quoted else _mean_seconds(line.scores)
        if mean > 0 or (point and line.quoted):
            bars.append((line, mean, point))
    if not any(mean for _, mean, _ in bars):
        return []
    compared = any(point for _, _, point in bars)
    of_first = [mean for line, mean, _ in bars if mean and line.row and line.row.id == first.row]
    table = Table(("", "mode", "seconds", *([f"more than {first.name}"] if compared else [])), left=2)
    for line, mean, point in bars:
        cells = [seconds(mean) if mean else ABSENT, f"{mean / of_first[0] - 1:+.1%}" if mean and of_first else ABSENT]
        if point:
            cells = [f"{cells[0]} / {point.seconds:.3f}", f"{cells[1]} / {point.slower:+.1%}"]
        table.add(*line.title, *cells[: len(table.columns) - 2])
    figure = Figure(figsize=(7, 1 + 0.35 * len(bars)))
    axes = figure.add_subplot()
    for y, (_, mean, point) in enumerate(bars):
        axes.barh(y - 0.2, mean, 0.38, color=COLOURS[0], label="ours" if not y else None)
        if point:
            axes.barh(y + 0.2, point.seconds, 0.38, color=FAINT)
    caption = (
        "Seconds an example, with all generations: a batch's time, or at a server the time by the clock, by its examples, not what "
        "one request waits."
    )
    if compared:
        axes.barh(0, 0, color=FAINT, label=f"the paper ({published.latency.hardware})")
        caption += " The paper's are of one generation."
    axes.set_yticks(range(len(bars)), [short(", ".join(line.title), 60) for line, _, _ in bars])
    axes.set(xlabel="seconds an example of an offline batch", ylim=(len(bars) - 0.5, -0.5))
    figure.legend(loc="outside lower center", ncols=2)
    drawing = Drawing(caption, inline_svg(figure, "latency", "Seconds an example by row"))
    return [table, Only("markdown", [caption]), drawing]
