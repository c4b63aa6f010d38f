"""Plans as one HTML file, with memory and time as figures."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.text import Text

from jaxguard.config.hardware import GIB
from jaxguard.plan.estimate import ASSUMPTIONS, estimate
from jaxguard.plan.show import Planned, Refused, facts
from jaxguard.report.html import page_template, svg

TEMPLATE = Path(__file__).with_name("page.html.j2")


def page(planned: Sequence[Planned], refused: Sequence[Refused] = ()) -> str:
    """The page's text; it needs nothing else, and asks nothing of a network."""
    plans = [
        {
            "name": plan.name,
            "target": plan.cluster.name,
            "fits": plan.fits,
            "facts": {fact: Text.from_markup(said).plain for fact, said in facts(plan, work).items()},
            "collectives": plan.collectives,
            "largest": plan.largest,
        }
        for plan, work in planned
    ]
    title = " / ".join(dict.fromkeys([*(plan.name for plan, _ in planned), *(one.name for one in refused)]))
    return page_template(TEMPLATE).render(
        title=f"Plan of {title}",
        plans=plans,
        refused=refused,
        figure=_figure(planned) if planned else "",
        assumptions=ASSUMPTIONS,
    )


def _figure(planned: Sequence[Planned]) -> str:
    """Memory of a device beside what is usable, and where an update's time goes."""
    plans = [plan for plan, _ in planned]
    names = [f"{plan.name}\n{plan.cluster.name}".replace("$", r"\$") for plan in plans]
    figure = Figure(figsize=(10, 1.6 + 0.6 * len(plans)), layout="constrained")
    memory, time = figure.subplots(1, 2, sharey=True)
    state = [plan.arguments / GIB for plan in plans]
    rest = [(plan.peak - plan.arguments) / GIB for plan in plans]
    _bars(memory, names, {"state and batch": state, "temporaries": rest}, "GiB of a device")
    memory.scatter([plan.usable / GIB for plan in plans], names, marker="|", s=400, color="#D55E00", label="usable")
    found = [estimate(plan) for plan in plans]
    parts = {
        "products": [one.compute for one in found],
        "memory": [one.memory for one in found],
        "network": [one.network for one in found],
    }
    _bars(time, names, parts, "seconds of an update")
    for axes in (memory, time):
        axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.25), ncols=3)
    memory.invert_yaxis()
    return svg(figure)


def _bars(axes: Axes, names: Sequence[str], parts: dict[str, list[float]], label: str) -> None:
    left = [0.0] * len(names)
    for colour, (part, widths) in zip(("#0072B2", "#56B4E9", "#E69F00"), parts.items(), strict=False):
        axes.barh(names, widths, left=left, color=colour, label=part, height=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
