"""A run's curves as one picture, drawn from its metrics.jsonl."""

import fnmatch
import math
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from jaxguard.report.figures import COLOURS, save_figure, style
from jaxguard.train.logging import read_metrics

PANELS = {
    "Training loss (nats per target token)": "loss",
    "Reward of sampled answers": "rollouts/reward",
    "Right answers, a share of those sampled": "rollouts/right",
    "Answers without a verdict, a share": "rollouts/no_verdict",
    "Rates of wrong verdicts": "rollouts/false_*_rate",
    "Groups whose rewards differ": "rollouts/groups_with_signal",
    "Entropy of a sampled token (nats)": "rollouts/entropy",
    "Tokens of a sampled answer": "rollouts/answer_tokens",
    "Distance of probability ratios from 1": "policy/ratio_error",
    "Learning rate": "learning_rate",
    "Gradient norm before clipping": "gradient_norm",
    "Validation loss": "validation/*loss",
    "Validation F1": "validation/*f1",
    "Validation AUPRC": "validation/*auprc",
}
"""Title -> the curve to draw, or all validation curves with that ending."""

SMOOTH_AFTER = 60
"""Values from which a curve is drawn pale, with its running mean on top."""


def draw_curves(metrics: Path, picture: Path, title: str = "") -> bool:
    """Draw the curves of `metrics` into `picture` (a PNG), replacing it. False: nothing to draw. Errors: see curves_figure."""
    figure = curves_figure(metrics, title)
    if figure is not None:
        save_figure(figure, picture)
    return figure is not None


@style()
def curves_figure(metrics: Path, title: str = "") -> Figure | None:
    """Draw the curves of `metrics`, a metrics.jsonl; None: there is nothing to draw.

    Raises:
        JaxguardError: a line of metrics.jsonl is no record.
    """
    records = read_metrics(metrics)
    frame = pd.DataFrame(records, index=[record["step"] for record in records])
    panels = {panel: curves for panel, pattern in PANELS.items() if (curves := _select(frame, pattern))}
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows + 0.4), dpi=120)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    last = max(1, *(curve.index[-1] for curves in panels.values() for curve in curves.values()))
    for number, (panel, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, number, title=panel, xlim=(-0.02 * last, 1.02 * last))
        _draw(axes, panel, curves)
        if number > len(panels) - columns:
            axes.set_xlabel("steps")
    return figure


def _select(frame: pd.DataFrame, pattern: str) -> dict[str, pd.Series]:
    """The finite values of a panel's curves by label: validation/reasoning/prompt_harm_f1 -> reasoning prompt harm."""
    prefix, star, ending = pattern.partition("*")
    curves = {}
    for name in fnmatch.filter(frame.columns, pattern):
        label = name.removeprefix(prefix).removesuffix(ending).strip("/_").replace("/", " ").replace("_", " ")
        curves[label] = frame[name].replace([np.inf, -np.inf], np.nan).dropna()
    return {label or (star and "all"): curves[label] for label in sorted(curves) if len(curves[label])}


def _draw(axes: Axes, panel: str, curves: dict[str, pd.Series]) -> None:
    for (label, curve), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
        if not label and len(curve) > SMOOTH_AFTER and panel != "Learning rate":
            axes.plot(curve, color=colour, alpha=0.25, linewidth=0.8)
            curve = curve.rolling(max(5, len(curve) // 40), min_periods=1).mean()
        mark = "o" if len(curve) <= 40 and label else None
        axes.plot(curve, color=colour, linewidth=1.5, marker=mark, markersize=3.5, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if panel.endswith(("F1", "AUPRC")):
        axes.set_ylim(-0.02, 1.02)
    if panel.startswith("Gradient") and all((curve > 0).all() for curve in curves.values()):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # the style shows mathematical notation as text
    if any(curves):
        axes.legend(fontsize=7)
