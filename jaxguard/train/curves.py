"""A run's curves as one picture, drawn from its metrics.jsonl."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from jaxguard.report.figures import COLOURS, save_figure, style
from jaxguard.train.logging import read_metrics

Curves = dict[str, tuple[list[int], list[float]]]
"""Name -> (steps, values), finite values only."""

PANELS = {
    "Training loss (nats per target token)": "loss",
    "Learning rate": "learning_rate",
    "Gradient norm before clipping": "gradient_norm",
    "Validation loss": "validation/*loss",
    "Validation F1": "validation/*f1",
    "Validation AUPRC": "validation/*auprc",
}
"""Title -> the curve to draw, or all validation curves with that ending."""

SMOOTH_AFTER = 60
"""Values from which a curve is drawn pale, with its running mean on top."""


@style()
def draw_curves(metrics: Path, picture: Path, title: str = "") -> bool:
    """Draw the curves of `metrics` (a metrics.jsonl) into `picture` (a PNG), replacing it. False: nothing to draw.

    Raises:
        JaxguardError: a line of metrics.jsonl is no record.
    """
    curves = collect(read_metrics(metrics))
    panels = {panel: chosen for panel, pattern in PANELS.items() if (chosen := _select(curves, pattern))}
    if not panels:
        return False
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows + 0.4), dpi=120)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    last = max(1, *(steps[-1] for chosen in panels.values() for steps, _ in chosen.values()))
    for number, (panel, chosen) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, number, title=panel, xlim=(-0.02 * last, 1.02 * last))
        _draw(axes, panel, chosen)
        if number > len(panels) - columns:
            axes.set_xlabel("steps")
    save_figure(figure, picture)
    return True


def collect(records: Sequence[dict[str, Any]]) -> Curves:
    """Collect the numbers of all records by name, without non-finite ones."""
    curves: Curves = {}
    for record in records:
        for name, value in record.items():
            if name not in ("step", "speed") and isinstance(value, int | float) and math.isfinite(value):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(float(value))
    return curves


def _select(curves: Curves, pattern: str) -> Curves:
    """The curves of a panel by label: validation/reasoning/prompt_harm_f1 -> reasoning prompt harm."""
    prefix, star, ending = pattern.partition("*")
    if not star:
        return {"": curves[pattern]} if pattern in curves else {}
    names = [name for name in curves if name.startswith(prefix) and name.endswith(ending)]
    labels = [
        name[len(prefix) :].removesuffix(ending).strip("/_").replace("/", " ").replace("_", " ") for name in names
    ]
    return {label or "all": curves[name] for label, name in sorted(zip(labels, names, strict=True))}


def _draw(axes: Axes, panel: str, curves: Curves) -> None:
    for (label, (steps, values)), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
        noisy = not label and len(values) > SMOOTH_AFTER and panel != "Learning rate"
        if noisy:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            values = _running_mean(values, max(5, len(values) // 40)).tolist()
        mark = "o" if len(values) <= 40 and label else None
        axes.plot(steps, values, color=colour, linewidth=1.5, marker=mark, markersize=3.5, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if panel.endswith(("F1", "AUPRC")):
        axes.set_ylim(-0.02, 1.02)
    if panel.startswith("Gradient") and all(value > 0 for value in next(iter(curves.values()))[1]):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # the style shows mathematical notation as text
    if any(curves):
        axes.legend(fontsize=7)


def _running_mean(values: Sequence[float], width: int) -> np.ndarray:
    """Average each value with the `width - 1` before it (fewer at the start)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    means: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return means
