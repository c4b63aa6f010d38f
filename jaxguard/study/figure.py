"""The curve of a study as one SVG picture: mean and spread over seeds and subsets."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxguard.report.html import svg


@dataclass(frozen=True)
class Curve:
    """A series: its name, and at each x the scores of the runs."""

    name: str
    points: tuple[tuple[float, tuple[float, ...]], ...]


def draw(curves: Sequence[Curve], published: Sequence[tuple[float, float, float]], label: str, metric: str) -> str:
    """F1 over the axis; every run is a dot, the bars are one standard deviation. `published` is (x, F1, deviation)."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for i, curve in enumerate(curves):
        _draw(axes, curve, f"C{i}")
    if published:
        places, f1, deviations = zip(*published, strict=True)
        axes.errorbar(places, f1, yerr=deviations, color="black", linestyle=":", capsize=3, label="paper, reasoning")
    xs = sorted({x for curve in curves for x, _ in curve.points} | {x for x, _, _ in published})
    if xs and xs[0] > 0 and xs[-1] >= 5 * xs[0]:
        axes.set_xscale("log")
    axes.set_xticks(xs, [f"{x:,g}" if x < 1e5 else f"{x:,.0f}" for x in xs])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylabel(f"F1, {metric}")
    axes.grid(alpha=0.3)
    if curves or published:
        axes.legend(fontsize=8)
    return svg(figure)


def _draw(axes: Axes, curve: Curve, color: str) -> None:
    xs = [x for x, _ in curve.points]
    means = [mean(values) for _, values in curve.points]
    deviations = [stdev(values) if len(values) > 1 else 0.0 for _, values in curve.points]
    # Names are escaped: matplotlib reads $ as mathematics.
    name = curve.name.replace("$", r"\$")
    axes.errorbar(xs, means, yerr=deviations, color=color, marker="o", markersize=4, capsize=3, label=name)
    dots = [(x, value) for x, values in curve.points for value in values]
    axes.scatter([x for x, _ in dots], [y for _, y in dots], color=color, s=10, alpha=0.5)
