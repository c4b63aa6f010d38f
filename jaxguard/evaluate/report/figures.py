"""The evaluation's figures; guards differ in their marks as well as in their colours."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from jaxguard.evaluate.report.published import Published
from jaxguard.evaluate.scores.metrics import Bin
from jaxguard.evaluate.scores.results import Cell, Evaluation
from jaxguard.report.figures import BACK, COLOURS, FAINT, INK, LINE, draw_interval, style
from jaxguard.report.text import DASH, seconds, short

MARKS = ("o", "s", "D", "^", "v", "P", "X")  # one less than colours, so that pairs are many
POOLED = 10
"""Bins of the reliability curve of all benchmarks together."""


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
    axes.set_ylim(len(cells_of) - 0.5, -0.5)
    axes.set_xlabel("F1, and its 95 % interval")
    axes.set_xlim(right=1.01)
    axes.grid(visible=False, axis="y")
    for y in range(1, len(cells_of)):
        axes.axhline(y - 0.5, color=LINE, linewidth=0.6)
    handles = [Line2D([], [], **mark(evaluation, *guard), linestyle="none") for guard in all_guards]
    labels = [short(f"{guard} ({mode})") for guard, mode in all_guards]
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
    drawn = []
    for (guard, mode), all_cells in cells_of.items():
        cells = [cell for cell in all_cells if cell.benchmark in common]
        mean = [cell.result.scores.f1.value for cell in cells if cell.result.scores.f1.value is not None]
        total = sum(cell.cost.seconds * cell.examples for cell in cells)
        latency = total / max(1, sum(cell.examples for cell in cells))
        f1 = safety[guard, mode] if whole else float(np.mean(mean)) if mean else None
        if f1 is None or latency <= 0:
            continue
        axes.plot(latency, f1, **mark(evaluation, guard, mode), linestyle="none", label=short(f"{guard} ({mode})"))
        drawn.append(latency)
    if not drawn:
        return None
    points = [(point, published.row(point.row)) for point in published.latency.points] if whole else []
    known = [(point, row.safety) for point, row in points if row is not None and row.safety is not None]
    if known:
        xs, ys = [point.seconds for point, _ in known], [f1 for _, f1 in known]
        axes.plot(xs, ys, "x", color=FAINT, label=f"the paper ({published.latency.hardware})")
    for i, (point, paper) in enumerate(known):
        offset = (0, 6 if i % 2 else -12)  # neighbours would write over each other
        axes.annotate(point.name, (point.seconds, paper), offset, textcoords="offset points", ha="center", fontsize=7.5,
                      color=FAINT)  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.2, y=0.18)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: seconds(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("seconds an example (logarithmic)")
    axes.set_ylabel("safety average, F1" if whole else "mean F1 of the common benchmarks")
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
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect("equal")
    axes.set_xlabel("probability of the positive answer")
    axes.set_ylabel("share that is positive")
    return figure


def pooled(curves: Iterable[Sequence[Bin]]) -> list[Bin]:
    """One reliability curve of several, in bins of equal width; its bins' means are weighted by their examples."""
    groups: dict[int, list[Bin]] = {}
    for each in (each for curve in curves for each in curve):
        groups.setdefault(min(int(each.probability * POOLED), POOLED - 1), []).append(each)
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
