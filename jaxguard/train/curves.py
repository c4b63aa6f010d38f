"""A run's curves as one picture, drawn from its metrics.jsonl."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

from jaxguard.train.logging import read_metrics

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#444444")
"""Okabe and Ito's palette, told apart by colour-blind readers too."""

Curves = dict[str, tuple[list[int], list[float]]]
"""Name -> (steps, values), finite values only."""


@dataclass(frozen=True)
class Panel:
    """One diagram: the curves `names` exactly, or those under validation/ that end in `ending`."""

    title: str
    names: tuple[str, ...] = ()
    ending: str | None = None
    log_scale: bool = False
    unit_interval: bool = False

    def pick(self, curves: Curves) -> Curves:
        if self.ending is None:
            return {name: curves[name] for name in self.names if name in curves}
        picked = {name: c for name, c in curves.items() if name.startswith("validation") and name.endswith(self.ending)}
        return {_short(name, self.ending): curve for name, curve in picked.items()}


PANELS = (
    Panel("Training loss (nats per target token)", names=("loss",)),
    Panel("Learning rate", names=("learning_rate",)),
    Panel("Gradient norm before clipping", names=("gradient_norm",), log_scale=True),
    Panel("Validation loss", ending="loss"),
    Panel("Validation F1", ending="f1", unit_interval=True),
    Panel("Validation AUPRC", ending="auprc", unit_interval=True),
)


def draw_curves(metrics: Path, picture: Path, title: str = "") -> bool:
    """Draw the curves of `metrics` (a metrics.jsonl) into `picture` (a PNG), replacing it. False: nothing to draw.

    Raises:
        JaxguardError: a line of metrics.jsonl is no record.
    """
    curves = collect(read_metrics(metrics))
    panels = [(panel, panel.pick(curves)) for panel in PANELS]
    panels = [(panel, picked) for panel, picked in panels if picked]
    if not panels:
        return False
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows + 0.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold")
    last = max(steps[-1] for _, picked in panels for steps, _ in picked.values())
    for number, (panel, picked) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        _draw(axes, panel, picked)
        axes.set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))
        if number > len(panels) - columns:
            axes.set_xlabel("steps", fontsize=9)
    draft = picture.with_name(f".{picture.name}.tmp")
    figure.savefig(draft, format="png")
    draft.replace(picture)
    return True


def collect(records: Sequence[dict[str, Any]]) -> Curves:
    """The numbers of all records by name; non-finite ones are left out."""
    curves: Curves = {}
    for record in records:
        for name, value in record.items():
            if name not in ("step", "speed") and isinstance(value, int | float) and math.isfinite(value):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(float(value))
    return curves


def _draw(axes: Axes, panel: Panel, picked: Curves) -> None:
    for (name, (steps, values)), colour in zip(sorted(picked.items()), COLOURS * len(picked), strict=False):
        if panel.ending is None and len(values) > 60 and not _is_smooth(values):
            # The single steps are noisy: show them pale, and their running mean on top.
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, _running_mean(values, max(5, len(values) // 40)), color=colour, linewidth=1.6, label=name)
        else:
            mark = "o" if len(values) <= 40 and panel.ending else None
            axes.plot(steps, values, color=colour, linewidth=1.5, marker=mark, markersize=3.5, label=name)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.unit_interval:
        axes.set_ylim(-0.02, 1.02)
    elif panel.log_scale and all(v > 0 for _, values in picked.values() for v in values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(LogLocator(subs="all"))
        axes.yaxis.set_minor_formatter("")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.tick_params(labelsize=8)
    if panel.ending is not None and list(picked) != [""]:
        axes.legend(fontsize=7, frameon=False, loc="best")


def _short(name: str, ending: str) -> str:
    """validation/reasoning/prompt_harm/f1 -> reasoning prompt harm."""
    middle = name.removeprefix("validation").removesuffix(ending).strip("/_")
    return middle.replace("/", " ").replace("_", " ")


def _is_smooth(values: Sequence[float]) -> bool:
    """Whether a curve goes where it goes without noise, as a schedule does."""
    changes = np.diff(values)
    return bool(np.abs(np.diff(np.sign(changes))).sum() <= 4)


def _running_mean(values: Sequence[float], width: int) -> np.ndarray:
    """The mean of each value and the `width - 1` before it (fewer at the start)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
