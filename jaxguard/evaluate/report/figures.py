"""The evaluation's diagrams. Colours are told apart by colour-blind readers, and guards by their marks as well.

A figure is drawn in the colours of PALETTE, which are fit for paper. On a page, `inline_svg` puts the page's own variables in
their place, so that it can be dark.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from jaxguard.evaluate.report.published import Published
from jaxguard.evaluate.report.tables import benchmarks, cells_by, guards
from jaxguard.evaluate.report.text import DASH, seconds, short
from jaxguard.evaluate.scores.calibration import Bin
from jaxguard.evaluate.scores.results import Cell, Evaluation

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's; the page has lighter ones where it is dark."""
MARKS = ("o", "s", "D", "^", "v", "P", "X")  # one more than colours, so that pairs are many
INK, FAINT, LINE, BACK = "#1B1B1D", "#6A6A6C", "#D9D9DB", "#FEFEFE"
PALETTE = {colour: f"--c{i}" for i, colour in enumerate(COLOURS)} | {
    INK: "--ink",
    FAINT: "--faint",
    LINE: "--line",
    BACK: "--back",
}
"""Colour in the figure -> variable of the page."""
POOLED = 10
"""Bins of the reliability curve of all benchmarks together."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "text.parse_math": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": FAINT, "ytick.color": FAINT,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.facecolor": "none", "figure.facecolor": "none",
    "grid.color": LINE, "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8.5, "figure.constrained_layout.use": True,
}  # fmt: skip


Arguments = ParamSpec("Arguments")


def _styled(draw: Callable[Arguments, Figure | None]) -> Callable[Arguments, Figure | None]:
    @wraps(draw)
    def styled(*args: Arguments.args, **options: Arguments.kwargs) -> Figure | None:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **options)

    return styled


@_styled
def f1_figure(evaluation: Evaluation) -> Figure | None:
    """F1 with its interval on every benchmark, a dash where a guard has none; None where there is none at all."""
    cells_of, all_guards = benchmarks(evaluation), guards(evaluation)
    if not any(cell.result.scores.f1.value is not None for cell in evaluation.cells):
        return None
    step = 0.8 / len(all_guards)
    figure = Figure(figsize=(6.2, 0.9 + len(cells_of) * max(0.3, 0.14 * len(all_guards)) + 0.2 * len(all_guards)))
    axes = figure.add_subplot()
    for y, cells in enumerate(cells_of.values()):
        scores = {(cell.guard, cell.mode): cell.result.scores.f1 for cell in cells}
        for i, one in enumerate(all_guards):
            place, style, f1 = y + step * (i - (len(all_guards) - 1) / 2), _style(evaluation, *one), scores.get(one)
            if f1 is None or f1.value is None:
                axes.text(
                    0.01,
                    place,
                    DASH,
                    color=style["color"],
                    fontsize=14,
                    va="center",
                    transform=axes.get_yaxis_transform(),
                )
                continue
            if f1.low is not None and f1.high is not None:
                axes.plot((f1.low, f1.high), (place, place), color=style["color"], linewidth=1.5)
            axes.plot(f1.value, place, **style, linestyle="none")
    axes.set_yticks(range(len(cells_of)), [short(name) for name in cells_of])
    axes.set_ylim(len(cells_of) - 0.5, -0.5)
    axes.set_xlabel("F1, and its 95 % interval")
    axes.set_xlim(right=1.01)
    axes.grid(visible=False, axis="y")
    for y in range(1, len(cells_of)):
        axes.axhline(y - 0.5, color=LINE, linewidth=0.6)
    _guard_legend(figure, evaluation, all_guards)
    return figure


@_styled
def latency_figure(evaluation: Evaluation, published: Published) -> Figure | None:
    """F1 against the seconds that an example takes; None where nothing took time.

    F1 is the safety average. Where a guard has none, or not over all benchmarks, it is the mean over the benchmarks that all
    have judged, and the paper is left out.
    """
    safety = {
        (one.guard, one.mode): one.f1.value for one in evaluation.averages if one.name == "safety" and not one.missing
    }
    all_guards, cells_of = guards(evaluation), benchmarks(evaluation)
    whole = all(safety.get(one) is not None for one in all_guards)
    common = {name for name, cells in cells_of.items() if len(cells) == len(all_guards)}
    figure = Figure(figsize=(4.9, 3.7))
    axes = figure.add_subplot()
    drawn = []
    for guard, mode in all_guards:
        cells = [cell for cell in cells_by(evaluation, guard, mode) if cell.benchmark in common]
        mean = [cell.result.scores.f1.value for cell in cells if cell.result.scores.f1.value is not None]
        took = sum(cell.cost.seconds * cell.examples for cell in cells) / max(1, sum(cell.examples for cell in cells))
        f1 = safety[guard, mode] if whole else float(np.mean(mean)) if mean else None
        if f1 is None or took <= 0:
            continue
        axes.plot(took, f1, **_style(evaluation, guard, mode), linestyle="none", label=short(f"{guard} ({mode})"))
        drawn.append(took)
    if not drawn:
        return None
    if whole:
        _draw_paper_latency(axes, published)
    axes.set_xscale("log")
    axes.margins(x=0.2, y=0.18)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: seconds(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("seconds an example (logarithmic)")
    axes.set_ylabel("safety average, F1" if whole else "mean F1 of the benchmarks that all judged")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _draw_paper_latency(axes: Axes, published: Published) -> None:
    points = [(point, published.row(point.row)) for point in published.latency.points]
    known = [(point, row.safety) for point, row in points if row is not None and row.safety is not None]
    if not known:
        return
    xs, ys = [point.seconds for point, _ in known], [f1 for _, f1 in known]
    axes.plot(xs, ys, "x", color=FAINT, label=f"the paper ({published.latency.hardware})")
    for i, (point, f1) in enumerate(known):
        below = i % 2 == 0  # neighbours would write over each other
        axes.annotate(point.name, (point.seconds, f1), (0, -12 if below else 6), textcoords="offset points", ha="center",
                      fontsize=7.5, color=FAINT)  # fmt: skip


@_styled
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
    for one in (one for curve in curves for one in curve):
        groups.setdefault(min(int(one.probability * POOLED), POOLED - 1), []).append(one)
    found = []
    for i in sorted(groups):
        count = sum(one.examples for one in groups[i])
        probability = sum(one.examples * one.probability for one in groups[i]) / count
        positive = sum(one.examples * one.positive for one in groups[i]) / count
        found.append(Bin(count, probability, positive))
    return found


def inline_svg(figure: Figure, name: str, alt: str) -> Markup:
    """A figure as an SVG element, the same for the same figure, in the page's colours and fonts.

    Args:
        figure: drawn in the colours of PALETTE.
        name: of letters and digits, and of no other figure of the page.
        alt: what it shows, in words.
    """
    FigureCanvasSVG(figure)
    file = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # the browser has more fonts
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    text = re.sub(r"\s*<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in PALETTE.items():
        text = re.sub(re.escape(colour), f"var({variable})", text, flags=re.IGNORECASE)
    label = f'<svg role="img" aria-label="{escape(alt)}"'
    return Markup(text.replace("<svg", label, 1))  # noqa: S704 (matplotlib escapes its texts; a test shows it)


def _style(evaluation: Evaluation, guard: str, mode: str) -> dict[str, Any]:
    """Colour and mark by guard; hollow without a thought."""
    i = list(dict.fromkeys(name for name, _ in guards(evaluation))).index(guard)
    colour = COLOURS[i % len(COLOURS)]
    return {"color": colour, "marker": MARKS[i % len(MARKS)], "markersize": 6, "markeredgecolor": colour,
            "markerfacecolor": BACK if mode == "direct" else colour}  # fmt: skip


def colour_of(evaluation: Evaluation, guard: str) -> str:
    """A guard's colour in all figures."""
    return _style(evaluation, guard, "")["color"]


def _guard_legend(figure: Figure, evaluation: Evaluation, all_guards: Sequence[tuple[str, str]]) -> None:
    styles = [_style(evaluation, *one) | {"linestyle": "none"} for one in all_guards]
    handles = [matplotlib.lines.Line2D([], [], **style) for style in styles]
    labels = [short(f"{guard} ({mode})") for guard, mode in all_guards]
    figure.legend(handles, labels, loc="outside upper center", ncols=min(3, len(labels)))


def _coordinates(curve: Iterable[Bin]) -> tuple[list[float], list[float]]:
    pairs = [(one.probability, one.positive) for one in curve]
    return [x for x, _ in pairs], [y for _, y in pairs]
