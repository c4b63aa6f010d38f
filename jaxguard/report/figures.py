"""The style of all figures: colours that colour-blind readers tell apart, and SVG that takes the colours of its page.

Draw in `with style():`, or decorate the function that draws with `@style()`, in the colours below.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

from jaxguard.report.text import plain
from jaxguard.utils.statistics import Estimate

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#444444")
"""Okabe and Ito's, and two more."""
INK, FAINT, LINE, BACK = "#1B1B1D", "#6A6A6C", "#D9D9DB", "#FEFEFE"
PALETTE = {INK: "--ink", FAINT: "--faint", LINE: "--line", BACK: "--back"}
PALETTE |= {colour: f"--c{i}" for i, colour in enumerate(COLOURS)}
"""Colour in the figure -> variable of base.html.j2."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left",
    "text.parse_math": False, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": FAINT,
    "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.facecolor": "none",
    "figure.facecolor": "none", "grid.color": LINE, "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8.5,
    "axes.prop_cycle": cycler(color=COLOURS), "figure.constrained_layout.use": True, "svg.hashsalt": "jaxguard",
}  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """Draw in the common style; texts are text, also those that hold a $."""
    with matplotlib.rc_context(_STYLE):
        yield


def draw_interval(axes: Axes, y: float, score: Estimate | None, **mark: Any) -> bool:
    """Draw a score as a mark on its 95 % interval, in the mark's colour; return whether it is defined."""
    if score is None or score.value is None:
        return False
    if score.low is not None and score.high is not None:
        axes.plot((score.low, score.high), (y, y), color=mark["color"], linewidth=1.5)
    axes.plot(score.value, y, **mark, linestyle="none")
    return True


def inline_svg(figure: Figure, name: str, alt: str) -> Markup:
    """A figure as an SVG element in the page's colours and fonts, the same for the same figure.

    Draw it in the colours of PALETTE; `name` is unlike those of the page's other figures, `alt` says what it shows.
    """
    FigureCanvasSVG(figure)
    file = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # the browser has more fonts
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()[file.getvalue().index("<svg") :]
    text = re.sub(r"\s*<!--.*?-->|\s*<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in PALETTE.items():
        text = re.sub(re.escape(colour), f"var({variable})", text, flags=re.IGNORECASE)
    label = Markup('<svg role="img" aria-label="{}"').format(plain(alt))
    return Markup(text.replace("<svg", label, 1))  # noqa: S704 (matplotlib escapes its texts; a test shows it)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure drawn in `style` as a PNG or SVG with a white background, replacing the file at once.

    The same figure gives the same SVG.
    """
    draft = path.with_name(f".{path.name}.tmp")
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with matplotlib.rc_context(_STYLE):
        figure.savefig(draft, format=path.suffix[1:], facecolor="white", metadata=metadata)
    draft.replace(path)
