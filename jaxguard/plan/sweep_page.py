"""What a sweep found: a table for the terminal and for docs, and a page with curves."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxguard.config.hardware import GIB
from jaxguard.plan.estimate import ASSUMPTIONS
from jaxguard.plan.sweep import Point
from jaxguard.report.html import page_template, svg

TEMPLATE = Path(__file__).with_name("sweep.html.j2")
HEAD = (
    "series", "devices", "mesh", "rows", "peak, GiB", "fits", "sent / ideal", "products, s", "memory, s", "network, s",
    "update, s", "MFU", "efficiency",
)  # fmt: skip


def rows(points: Sequence[Point]) -> list[list[str]]:
    """A line for each point, as HEAD names its columns."""
    return [_row(point, points) for point in points]


def _row(point: Point, points: Sequence[Point]) -> list[str]:
    head = [point["series"], f"{point['devices']:,}"]
    if "error" in point:
        return [*head, point["error"], *[""] * (len(HEAD) - 3)]
    guess, mesh = point["estimate"], point["mesh"]
    return [
        *head,
        "×".join(str(size) for size in mesh.values()),
        f"{point['shape']['rows']:,}",
        f"{point['peak'] / GIB:.1f}",
        "yes" if point["fits"] else "no",
        f"{point['sent'] / point['ideal_sent']:.2f}" if point["ideal_sent"] else "-",
        *(f"{guess[part]:.3g}" for part in ("compute", "memory", "network", "step")),
        f"{guess['mfu']:.0%}",
        f"{efficiency(point, points):.0%}",
    ]


def efficiency(point: Point, points: Sequence[Point]) -> float:
    """Rows that a device trains in a second, over those of the smallest cluster of the series."""
    first = next(one for one in points if one["series"] == point["series"] and "error" not in one)
    return _speed(point) / _speed(first)


def _speed(point: Point) -> float:
    return float(point["shape"]["rows"] / point["estimate"]["step"] / point["devices"])


def pays(points: Sequence[Point]) -> list[str]:
    """For each series, up to how many devices its sharding pays: where products still take longer than the network."""
    said = []
    for name in dict.fromkeys(point["series"] for point in points):
        good = [
            point["devices"]
            for point in points
            if point["series"] == name
            and "error" not in point
            and point["estimate"]["compute"] >= point["estimate"]["network"]
        ]
        said.append(f"{name}: " + (f"up to {max(good):,} devices" if good else "nowhere"))
    return said


def markdown(title: str, points: Sequence[Point]) -> str:
    """The table and the verdicts, as docs take them."""
    lines = [list(HEAD), ["---"] * len(HEAD), *rows(points)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    verdicts = "\n".join(f"* {said}" for said in pays(points))
    return f"# {title}\n\n{table}\n\nProducts take longer than the network:\n\n{verdicts}\n\nEstimate: {ASSUMPTIONS}.\n"


def page(title: str, points: Sequence[Point]) -> str:
    """One HTML file with curves; it asks nothing of a network."""
    return page_template(TEMPLATE).render(
        title=title,
        head=HEAD,
        rows=rows(points),
        pays=pays(points),
        figure=figure(points),
        assumptions=ASSUMPTIONS,
    )


def figure(points: Sequence[Point]) -> str:
    """Memory, the network's share of an update, its time and efficiency over the number of devices, as SVG.

    Points that the compiler refused are left out.
    """
    points = [point for point in points if "error" not in point]
    drawing = Figure(figsize=(11, 7.5), layout="constrained")
    memory, share, step, efficient = drawing.subplots(2, 2).flat
    _curves(memory, points, lambda point: point["peak"] / GIB, "peak, GiB of a device")
    _curves(
        share,
        points,
        lambda point: point["estimate"]["network"] / point["estimate"]["step"],
        "network's share of an update",
    )
    _curves(step, points, lambda point: point["estimate"]["step"], "update, seconds")
    _curves(efficient, points, lambda point: efficiency(point, points), "efficiency")
    step.set_yscale("log")
    for axes in (memory, share, efficient):
        axes.set_ylim(bottom=0)
    memory.legend(fontsize=8)
    return svg(drawing)


def _curves(axes: Axes, points: Sequence[Point], value: Callable[[Point], float], label: str) -> None:
    for name in dict.fromkeys(point["series"] for point in points):
        mine = [point for point in points if point["series"] == name]
        axes.plot([p["devices"] for p in mine], [value(p) for p in mine], marker="o", label=name.replace("$", r"\$"))
    axes.set_xscale("log", base=2)
    sizes = sorted({point["devices"] for point in points})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xlabel("devices")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
