"""An evaluation as results.json, report.md and report.html.

Prompts, responses and what guards wrote are only in report.html, where they are hidden until the reader opens them.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from jaxguard import report as blocks
from jaxguard.data.format.dialogue import CHOICES
from jaxguard.data.policies import Question
from jaxguard.evaluate.report import cascade, tables
from jaxguard.evaluate.report.published import Published, read_published
from jaxguard.evaluate.scores.metrics import Bin
from jaxguard.evaluate.scores.results import Cell, Evaluation, Wrong, write_results
from jaxguard.report.figures import BACK, COLOURS, FAINT, INK, LINE, draw_interval, inline_svg, style
from jaxguard.report.text import DASH, count, number, seconds, share, short

MARKS = ("o", "s", "D", "^", "v", "P", "X")  # one less than colours, so that pairs are many
MOST_WRONG, MOST_CHARACTERS = 50, 2000
"""Errors of a guard in a mode on a benchmark, and characters of a text, that the page shows."""
ABOUT_AVERAGES = (
    "F1 of the positive class: each generation is scored by itself and the scores are averaged. In brackets the 95 % bootstrap "
    "interval over examples, after ± the deviation over generations. The safety average is (5 × prompt + 4 × response) / 9. "
    "Differences are paired, over the examples of both guards. A dash: no results."
)
ABOUT_SCORES = (
    "n/a: the examples lack the class that the score is about, or the guard gives no probability. A dash: no results. "
    "Probabilities are taken at face value for AUPRC and ECE. The chosen threshold has the best F1 on the examples of "
    "evaluate.validation, or on those of the export's guard.json; P is the probability of the positive answer, calibrated on these "
    "or as the guard gives it. Forced: the reasoning reached its limit, and the guard was made to give its verdict."
)
ABOUT_POINTS = (
    "Recall / false-positive rate here, at the thresholds that were chosen on the validation examples for their best F1 and for "
    "their false-positive rates. Where a rate here is far from the one in the heading, these examples are of another kind."
)
ABOUT_VERSUS = (
    "Each mode with the same mode of the first guard, or with its first where it has no such mode; on the same examples, by a "
    "paired bootstrap. Right alone: examples that only this guard, and only the first, gets right in more than half of its "
    "generations, with McNemar's exact test."
)
ABOUT_COST = (
    "Means of all examples of the guard. Seconds are an example's share of the time of offline batches, with all generations: in "
    "JAX of its batch's; at a server, where requests overlap, of the time by the clock. Passes for the probability alone are "
    "counted by themselves, but with evaluate.generations=0 they are the answer. Examples and tokens a second are by the clock, "
    "with these passes; tokens are those of prompts and of all generations."
)
ABOUT_WAIT = (
    "Seconds from sending a request to its answer, with all generations and without passes for the probability alone: no share of "
    "a batch. At a server a request is beside up to evaluate.batch others; in JAX it waits for the whole of its batch."
)
ABOUT_ERRORS = (
    "An example is an error unless more than half of its generations are right: a tie is one. The most certain probabilities come "
    "first; the text is the first wrong answer."
)
ABOUT_PROBABILITIES = (
    "On the dotted line, as many examples are positive as the guard says. Thin lines are single benchmarks, the thick one is all "
    "of them, the dashed one after calibration, if there are validation examples."
)

LIMITS: dict[str, tuple[float, Callable[[Cell], float]]] = {
    "gives many unparsable answers": (0.01, lambda cell: cell.result.unparsable / cell.verdicts),
    "often reasons longer than it may, and is forced to a verdict": (
        0.1,
        lambda cell: cell.cost.forced / cell.verdicts,
    ),
    "has many answers without a probability, which count as unparsable ones do": (
        0.01,
        lambda cell: cell.cost.unscored / cell.verdicts if cell.calibration else 0.0,
    ),
    "cannot hold some examples, whose text lacks its middle": (0.0, lambda cell: cell.cost.cut / cell.examples),
}
"""A warning -> the share above which it is given, and of what."""


def write_report(evaluation: Evaluation, folder: Path) -> None:
    """Write results.json, report.md and report.html into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    write_results(evaluation, folder / "results.json")
    page = report(evaluation, read_published())
    blocks.write_markdown(folder / "report.md", page)
    blocks.write_page(folder / "report.html", page)


def report(evaluation: Evaluation, published: Published) -> blocks.Page:
    """The report: tables in both formats; figures, and errors with their texts, for HTML only."""
    link = blocks.Cell(published.source, url=published.url)
    paper = blocks.Paragraph([f"The paper: {published.title}, ", link, "."], faint=True)
    groups = evaluation.by_benchmark.values()
    figures, reliability = list(_figures(evaluation, published)), list(_reliability(evaluation))
    scores, averaged = tables.score_table(evaluation), bool(evaluation.averages)
    leading: list[blocks.Content] = [
        blocks.Section("Averages", [
            blocks.note(ABOUT_AVERAGES), tables.main_table(evaluation, published), paper, blocks.Beside(figures),
        ], "averages")
        if averaged else None,
        blocks.Section(scores.title, [
            blocks.note(ABOUT_SCORES), scores, None if averaged else blocks.Beside(figures),
        ], "benchmarks")
        if scores.rows else None,
    ]  # fmt: skip
    if any(cell.group == tables.OWN for cell in evaluation.cells):
        leading.reverse()
    tabled = (
        ("points", ABOUT_POINTS, tables.points_table(evaluation)),
        ("cost", ABOUT_COST, tables.cost_table(evaluation)),
        ("wait", ABOUT_WAIT, tables.wait_table(evaluation)),
        ("versus", ABOUT_VERSUS, tables.versus_table(evaluation)),
    )
    settings = [(name, _text(value)) for name, value in evaluation.settings.items()]
    slices = [blocks.Details(cells[0].heading, [tables.slice_table(cells)]) for cells in groups]
    mistakes = [blocks.Section(cells[0].heading, [_mistakes(cell) for cell in cells]) for cells in groups]
    hidden = "Much of their text is offensive; it is hidden until you open it. A label may be wrong as well as a guard."
    any_errors = any(cell.wrong for cell in evaluation.cells)
    return blocks.Page(f"Evaluation of {evaluation.name}", [
        blocks.Facts(facts(evaluation)),
        blocks.Bullets(cautions(evaluation, published), warning=True),
        blocks.Only("html", [blocks.Details("All settings", [blocks.Facts(settings)])]),
        *leading,
        *(blocks.Section(table.title, [blocks.note(about), table], anchor) for anchor, about, table in tabled if table.rows),
        cascade.section(evaluation),
        blocks.Section("Probabilities", [
            blocks.Only("html", [blocks.note(ABOUT_PROBABILITIES), blocks.Beside(reliability)]),
        ], "probabilities")
        if reliability else None,
        blocks.Section("Slices", slices, "slices"),
        blocks.Section("Errors", [
            blocks.note(ABOUT_ERRORS),
            blocks.Only("html", [blocks.note(hidden), *mistakes] if any_errors else ["None."]),
            blocks.Only("markdown", ["Texts are in report.html, hidden until they are opened.", tables.error_table(evaluation)]),
        ], "errors"),
    ])  # fmt: skip


def facts(evaluation: Evaluation) -> list[tuple[str, str]]:
    """The head of the report."""
    settings = evaluation.settings
    examples = {cell.benchmark: cell.examples for cell in evaluation.cells}
    sampling = [f"{name} {settings[name]}" for name in ("generations", "temperature", "top_p") if name in settings]
    pairs = [
        ("Finished", evaluation.finished[:16].replace("T", " ") + " UTC" if evaluation.finished else ""),
        ("Hardware", evaluation.hardware),
        *((f"Guard {name}", description) for name, description in evaluation.models.items()),
        ("Examples", f"{sum(examples.values()):,} of {count(len(examples), 'benchmark')}"),
        ("Sampling", ", ".join(sampling)),
        ("Unparsable answers count as", _text(settings.get("unparsable", ""))),
    ]
    return [(name, value) for name, value in pairs if value]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def cautions(evaluation: Evaluation, published: Published) -> list[str]:
    """What a reader must know before the numbers, a sentence each."""
    return [*_unfinished_or_odd(evaluation), *_other_protocol(evaluation, published)]


def _unfinished_or_odd(evaluation: Evaluation) -> Iterator[str]:
    if not evaluation.cells:
        yield "Nothing was evaluated."
        return
    partial = list(dict.fromkeys(cell.benchmark for cell in evaluation.cells if not cell.complete))
    if partial:
        limit = evaluation.settings.get("limit")
        why = f"evaluate.limit is {limit}" if limit else "The evaluation is not complete"
        yield f"{why}: only some of the examples were evaluated of {', '.join(partial)}."
    idle = [name for name in evaluation.models if name not in {cell.guard for cell in evaluation.cells}]
    if idle:
        yield f"{', '.join(idle)} has no results: requests that a guard does not support are left out."
    for benchmark in evaluation.benchmarks:
        present = {cell.guard_mode for cell in evaluation.by_benchmark.get(benchmark, ())}
        absent = [_name(*guard) for guard in evaluation.by_guard if guard not in present]
        if absent:
            yield f"{benchmark} has no results of {', '.join(absent) if present else 'any guard'}."
    partly = dict.fromkeys(_name(*each.guard_mode) for each in evaluation.averages if each.missing)
    if partly:
        yield (
            f"Averages of {', '.join(partly)} are over fewer benchmarks than those of others: compare it by the differences, "
            "which are over what both have results for."
        )
    for guard_mode, cells in evaluation.by_guard.items():
        for warning, (limit, measure) in LIMITS.items():
            above = [f"{cell.benchmark} ({share(measure(cell))})" for cell in cells if measure(cell) > limit]
            if above:
                yield f"{_name(*guard_mode)} {warning}: {', '.join(above)}."


def _other_protocol(evaluation: Evaluation, published: Published) -> Iterator[str]:
    settings = evaluation.settings
    protocol = {name: paper for name, paper in published.protocol.items() if settings.get(name, paper) != paper}
    different = [f"{name} {settings[name]} (there {paper})" for name, paper in protocol.items()]
    if different and evaluation.averages:
        yield f"Answers are not sampled as in the paper: {', '.join(different)}."
    titles_by_guards: dict[tuple[str, ...], list[str]] = {}
    for name, title in tables.AVERAGE_TITLES.items():
        averages = [each for each in evaluation.averages if each.name == name]
        others = [each for each in averages if not tables.comparable(evaluation, published, each)]
        if others:
            names = () if len(others) == len(averages) else tuple(_name(*each.guard_mode) for each in others)
            titles_by_guards.setdefault(names, []).append(title)
    for names, titles in titles_by_guards.items():
        of, verb = f" of {', '.join(names)}" if names else "", "is" if len(titles) == 1 else "are"
        yield (
            f"{', '.join(titles)}{of} {verb} over other benchmarks than the paper's, or not over all of their examples: "
            "no difference to the paper is claimed."
        )


def _name(guard: str, mode: str) -> str:
    return f"{guard} ({mode})"


def _mistakes(cell: Cell) -> blocks.Details | None:
    """The errors of a guard in a mode on a benchmark, by category."""
    if not cell.wrong:
        return None
    groups, left = [], MOST_WRONG
    for category, wrong in tables.by_category(cell).items():
        listed = [_mistake(each, cell.question) for each in wrong[:left]]
        left -= len(listed)
        if listed:
            groups.append(blocks.Details(f"{category} ({len(listed)})", listed))
    total, shown = max(errors(cell), len(cell.wrong)), MOST_WRONG - left
    of = f"{shown:,} of {total:,} errors" if shown < total else count(total, "error")
    return blocks.Details(f"{_name(*cell.guard_mode)}: {of}", groups)


def errors(cell: Cell) -> int:
    """Examples of which no more than half of the generations are right."""
    right = cell.result.right
    return sum(examples for i, examples in enumerate(right) if 2 * i <= len(right) - 1)


def _mistake(wrong: Wrong, question: Question) -> blocks.Details:
    """Its texts below what was said: verdict words, the most frequent first, and how often each where they differ."""
    example, said = wrong.example, Counter(wrong.said)
    words = [f"{word} ({times} of {said.total()})" if len(said) > 1 else word for word, times in said.most_common()]
    texts = {"Prompt": example.prompt, "Response": example.response, "Its first wrong answer": wrong.text or None,
             "Policy": example.policy}  # fmt: skip
    known = [(name, text) for name, text in texts.items() if text is not None]
    quotes = [blocks.Quote(name, text, MOST_CHARACTERS, "in results.json") for name, text in known]
    about = dict.fromkeys([example.id, *wrong.slices, *(f"category: {name}" for name in example.categories)])
    probability = f"P({CHOICES[question][0]}) {number(wrong.probability)}"
    title = f"labelled {wrong.label}, it says {', '.join(words)}; {probability}"
    return blocks.Details(title, [*quotes, blocks.note(" · ".join(about))])


# Figures; guards differ in their marks as well as in their colours.


def _figures(evaluation: Evaluation, published: Published) -> Iterator[blocks.Drawing]:
    f1, latency = f1_figure(evaluation), latency_figure(evaluation, published)
    if f1 is not None:
        alt = "F1 of every guard and mode on every benchmark with its interval; the table of benchmarks has the numbers"
        caption = "F1 by benchmark; hollow marks answer in direct mode, a dash: no F1"
        yield blocks.Drawing(caption, inline_svg(f1, "f1", alt), wide=True)
    if latency is not None:
        alt = "F1 against seconds an example; the tables of averages and of benchmarks have the numbers"
        where = f", here on {evaluation.hardware}" if evaluation.hardware else ""
        paper = "; the paper's are of one generation" if evaluation.averages else ""
        yield blocks.Drawing(
            f"Seconds an example of an offline batch{where}{paper}", inline_svg(latency, "latency", alt)
        )


def _reliability(evaluation: Evaluation) -> Iterator[blocks.Drawing]:
    for i, ((guard, mode), cells) in enumerate(evaluation.by_guard.items()):
        figure = reliability_figure(cells, mark(evaluation, guard, mode)["color"])
        if figure is not None:
            ece = ", ".join(f"{c.benchmark} {number(c.calibration.ece)}" for c in cells if c.calibration)
            alt = f"Reliability of {_name(guard, mode)}. Expected calibration error: {ece}"
            yield blocks.Drawing(_name(guard, mode), inline_svg(figure, f"reliability{i}", alt))


@style()
def f1_figure(evaluation: Evaluation) -> Figure | None:
    """F1 with its interval on every benchmark, a dash where a guard has none; None where there is none at all."""
    cells_of, all_guards = evaluation.by_benchmark, list(evaluation.by_guard)
    if not any(cell.result.scores.f1.value is not None for cell in evaluation.cells):
        return None
    step = 0.8 / len(all_guards)
    figure = Figure(figsize=(6.2, 0.9 + len(cells_of) * max(0.3, 0.14 * len(all_guards)) + 0.2 * len(all_guards)))
    axes = figure.add_subplot()
    for y, cells in enumerate(cells_of.values()):
        scores = {cell.guard_mode: cell.result.scores.f1 for cell in cells}
        for i, guard in enumerate(all_guards):
            line, own = y + step * (i - (len(all_guards) - 1) / 2), mark(evaluation, *guard)
            if not draw_interval(axes, line, scores.get(guard), **own):
                transform = axes.get_yaxis_transform()
                axes.text(0.01, line, DASH, color=own["color"], fontsize=14, va="center", transform=transform)
    axes.set_yticks(range(len(cells_of)), [short(name) for name in cells_of])
    axes.set(ylim=(len(cells_of) - 0.5, -0.5), xlim=(None, 1.01), xlabel="F1, and its 95 % interval")
    axes.grid(visible=False, axis="y")
    for y in range(1, len(cells_of)):
        axes.axhline(y - 0.5, color=LINE, linewidth=0.6)
    handles = [Line2D([], [], **mark(evaluation, *guard), linestyle="none") for guard in all_guards]
    labels = [short(_name(*guard)) for guard in all_guards]
    figure.legend(handles, labels, loc="outside upper center", ncols=min(3, len(labels)))
    return figure


@style()
def latency_figure(evaluation: Evaluation, published: Published) -> Figure | None:
    """F1 against the seconds that an example takes; None where nothing took time.

    F1 is the safety average. Where a guard has none, or not over all benchmarks, it is the mean over the benchmarks for which
    all have results, and the paper is left out.
    """
    averages = [each for each in evaluation.averages if each.name == "safety" and not each.missing]
    safety = {each.guard_mode: each.f1.value for each in averages}
    cells_of = evaluation.by_guard
    whole = all(safety.get(guard) is not None for guard in cells_of)
    common = {name for name, cells in evaluation.by_benchmark.items() if len(cells) == len(cells_of)}
    figure = Figure(figsize=(4.9, 3.7))
    axes = figure.add_subplot()
    for (guard, mode), all_cells in cells_of.items():
        cells = [cell for cell in all_cells if cell.benchmark in common]
        mean = [cell.result.scores.f1.value for cell in cells if cell.result.scores.f1.value is not None]
        total = sum(cell.cost.seconds * cell.examples for cell in cells)
        latency = total / max(1, sum(cell.examples for cell in cells))
        f1 = safety[guard, mode] if whole else float(np.mean(mean)) if mean else None
        if f1 is None or latency <= 0:
            continue
        axes.plot(latency, f1, **mark(evaluation, guard, mode), linestyle="none", label=short(_name(guard, mode)))
    if not axes.lines:
        return None
    compared = {row.data for row in map(published.row, evaluation.paper_rows.values()) if row}
    points = [(point, published.row(point.row)) for point in published.latency.points] if whole else []
    points = [(point, row) for point, row in points if row and (not compared or row.data in compared)]
    known = [(point, row.scores["safety"]) for point, row in points if row and "safety" in row.scores]
    if known:
        xs, ys = [point.seconds for point, _ in known], [f1 for _, f1 in known]
        axes.plot(xs, ys, "x", color=FAINT, label=f"the paper ({published.latency.hardware})")
    for i, (point, paper) in enumerate(known):
        offset = (0, 6 if i % 2 else -12)  # neighbours would write over each other
        axes.annotate(point.name, (point.seconds, paper), offset, textcoords="offset points", ha="center", fontsize=7.5,
                      color=FAINT)  # fmt: skip
    ylabel = "safety average, F1" if whole else "mean F1 of the common benchmarks"
    axes.set(xscale="log", xlabel="seconds an example (logarithmic)", ylabel=ylabel)
    axes.margins(x=0.2, y=0.18)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: seconds(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@style()
def reliability_figure(cells: Sequence[Cell], colour: str = COLOURS[0]) -> Figure | None:
    """How often examples are positive that a guard gives some probability; None where it gives none.

    Thin: each benchmark. Thick: all of them. Dashed: all of them after calibration on the validation examples.
    """
    face = [cell.calibration.curve for cell in cells if cell.calibration and cell.calibration.curve]
    if not face:
        return None
    figure = Figure(figsize=(2.7, 3.1))
    axes = figure.add_subplot()
    axes.plot((0, 1), (0, 1), color=FAINT, linewidth=0.8, linestyle=":")
    if len(face) > 1:
        for curve in face:
            axes.plot(*_coordinates(curve), color=LINE, linewidth=1.2)
    axes.plot(*_coordinates(pooled(face)), "o-", color=colour, markersize=4, linewidth=1.8, label="at face value")
    after = [cell.thresholded.calibration.curve for cell in cells if cell.thresholded and cell.thresholded.platt]
    if any(after):
        axes.plot(*_coordinates(pooled(after)), "--", color=INK, linewidth=1.2, label="calibrated")
        figure.legend(loc="outside lower center", ncols=2)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.set(xlabel="probability of the positive answer", ylabel="share that is positive")
    return figure


def pooled(curves: Iterable[Sequence[Bin]]) -> list[Bin]:
    """One reliability curve of several, in ten bins of equal width; its bins' means are weighted by their examples."""
    groups: dict[int, list[Bin]] = {}
    for each in (each for curve in curves for each in curve):
        groups.setdefault(min(int(each.probability * 10), 9), []).append(each)
    merged = []
    for _, bins in sorted(groups.items()):
        examples = sum(each.examples for each in bins)
        probability = sum(each.examples * each.probability for each in bins) / examples
        merged.append(Bin(examples, probability, sum(each.examples * each.positive for each in bins) / examples))
    return merged


def mark(evaluation: Evaluation, guard: str, mode: str) -> dict[str, Any]:
    """Colour and mark by guard; hollow in direct mode."""
    i = list(dict.fromkeys(name for name, _ in evaluation.by_guard)).index(guard)
    colour = COLOURS[i % len(COLOURS)]
    return {"color": colour, "marker": MARKS[i % len(MARKS)], "markersize": 6, "markeredgecolor": colour,
            "markerfacecolor": BACK if mode == "direct" else colour}  # fmt: skip


def _coordinates(curve: Iterable[Bin]) -> tuple[list[float], list[float]]:
    bins = list(curve)
    return [each.probability for each in bins], [each.positive for each in bins]
