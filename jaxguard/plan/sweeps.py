"""Plan several runs over growing clusters: how memory, communication and time scale, and where a sharding stops paying.

A sweep is a YAML file; see docs/plan.md.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
from matplotlib.figure import Figure
from pydantic import Field

from jaxguard.config import Config, dump, load
from jaxguard.config.base import CONFIG_FOLDER, Positive, Schema, find_yaml
from jaxguard.config.hardware import GIB
from jaxguard.plan.compile import OutOfMemoryError, compile_step, find_spec
from jaxguard.plan.run import NOTE, plan_json
from jaxguard.plan.targets import Cluster, find_cluster
from jaxguard.report import Bullets, Drawing, Page, Table
from jaxguard.report.figures import inline_svg, style
from jaxguard.report.text import short
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically
from jaxguard.utils.parse import Fields, read_json, read_yaml
from jaxguard.utils.versions import code_digest

_CODE = ("models", "plan", "train/step.py", "train/objectives.py")

SWEEP_FOLDER = CONFIG_FOLDER / "sweeps"
SWEEP_OUTPUT = Path("runs/sweeps")
Result = dict[str, Any]
"""A plan as data, with `series` and `devices`; one that the compiler refused has `error` instead of figures."""


class SeriesConfig(Schema):
    """One curve."""

    config: str
    """The run, a file of configs/."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Fields of it that are changed."""
    target: str
    """A name of configs/hardware/targets.yaml."""
    devices: tuple[Positive, ...] = Field(min_length=1)
    """Sizes of the cluster."""
    scaling: Literal["weak", "strong"]
    """weak: every device keeps its rows and the batch grows; strong: the batch stays."""
    rows: Positive
    """Rows of a batch: of one device (weak), or of all of them (strong)."""
    shard: Literal["all", "linked"] = "all"
    """Devices over which the weights are sharded: all, as many as divide the model's width, or the linked ones of a host or
    slice, of which the others hold copies."""
    tensor: Positive = 1
    """Devices that share the heads and hidden units of a layer."""


class SweepConfig(Schema):
    """A sweep's file."""

    title: str
    series: dict[Annotated[str, Field(pattern=r"^[\w.-]+$")], SeriesConfig] = Field(min_length=1)
    """Name, also that of its points' files -> curve."""


@dataclass(frozen=True)
class Point:
    """One point of a curve, not compiled yet."""

    series: str
    cluster: Cluster
    config: Config
    rows: int


def read_sweep(name: str) -> SweepConfig:
    """Read a file of configs/sweeps by name, or any YAML file by path; JaxguardError if there is none or a field is wrong."""
    path = find_yaml(name, SWEEP_FOLDER, "sweep")
    return read_yaml(path, SweepConfig)


def points(sweep: SweepConfig) -> Iterator[Point]:
    """All points of a sweep; JaxguardError for a config, target or shape that does not exist."""
    for name, series in sweep.series.items():
        try:
            width = find_spec(load(series.config, series.set).model).d_model
            for devices in series.devices:
                cluster = find_cluster(f"{series.target}:{devices}")
                shards = cluster.devices // series.tensor
                copies = shards // math.gcd(shards, width)
                if series.shard == "linked":
                    copies = max(1, cluster.devices // cluster.linked)
                rows = series.rows * (shards if series.scaling == "weak" else 1)
                settings = {
                    **series.set,
                    "mesh.data": copies,
                    "mesh.fsdp": shards // copies,
                    "mesh.tensor": series.tensor,
                    "train.batch_size": rows,
                }
                yield Point(name, cluster, load(series.config, settings), rows)
        except JaxguardError as error:
            raise JaxguardError(f"series {name}: {error}") from None


COLUMNS: Mapping[str, Callable[[Result], str]] = {
    "mesh": lambda r: "×".join(str(size) for size in r["mesh"].values()),
    "rows": lambda r: f"{r['shape']['rows']:,}",
    "peak, GiB": lambda r: f"{r['peak'] / GIB:.1f}",
    "fits": lambda r: "yes" if r["fits"] else "no",
    "sent / ideal": lambda r: f"{r['sent'] / r['ideal_sent']:.2f}" if r["ideal_sent"] else "-",
    "products, s": lambda r: f"{r['estimate']['compute']:.3g}",
    "memory, s": lambda r: f"{r['estimate']['memory']:.3g}",
    "network, s": lambda r: f"{r['estimate']['network']:.3g}",
    "step, s": lambda r: f"{r['estimate']['step']:.3g}",
    "MFU": lambda r: f"{r['estimate']['mfu']:.0%}",
    "efficiency": lambda r: f"{r['efficiency']:.0%}",
}
CURVES: Mapping[str, Callable[[Result], float]] = {
    "peak, GiB of a device": lambda r: r["peak"] / GIB,
    "network's share of a step": lambda r: r["estimate"]["network"] / r["estimate"]["step"],
    "step, seconds": lambda r: r["estimate"]["step"],
    "efficiency": lambda r: r["efficiency"],
}


@dataclass(frozen=True)
class SweepReport:
    """The results of a sweep, series by series, in order of size."""

    title: str
    results: Sequence[Result]

    def series(self) -> dict[str, list[Result]]:
        """Name -> the results that have figures."""
        names = dict.fromkeys(result["series"] for result in self.results)
        return {name: [r for r in self.results if r["series"] == name and "error" not in r] for name in names}

    def limits(self) -> list[str]:
        """For each series, up to how many devices its products take longer than the network."""
        lines = []
        for name, results in self.series().items():
            good = [r["devices"] for r in results if r["estimate"]["compute"] >= r["estimate"]["network"]]
            lines.append(f"{name}: " + (f"up to {max(good):,} devices" if good else "nowhere"))
        return lines

    def page(self) -> Page:
        """One page with table and curves."""
        table = Table(("series", "devices", *COLUMNS))
        for result in self.results:
            cells = [cell(result) for cell in COLUMNS.values()] if "error" not in result else [result["error"]]
            cells += [""] * (len(COLUMNS) - len(cells))
            table.add(result["series"], f"{result['devices']:,}", *cells)
        title = "Memory, the network's share, time and efficiency over the number of devices"
        figure = Drawing(title, inline_svg(self.figure(), "sweep", title))
        where = "Products take longer than the network:"
        note = "Efficiency: rows that a device trains in a second, relative to the smallest cluster of the series."
        return Page(self.title, [figure, where, Bullets(self.limits()), table, note, NOTE])

    @style()
    def figure(self) -> Figure:
        """Curves of memory, the network's share of a step, its time and efficiency over the number of devices."""
        sizes = sorted({r["devices"] for results in self.series().values() for r in results})
        figure = Figure(figsize=(11, 7.5))
        for axes, (label, value) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
            for name, results in self.series().items():
                axes.plot(
                    [r["devices"] for r in results], [value(r) for r in results], marker="o", label=short(name, 60)
                )
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axes.set(xlabel="devices", ylabel=label)
            if label == "step, seconds":
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
        figure.axes[0].legend()
        return figure


def sweep(
    name: str, folder: Path | None = None, on_point: Callable[[Point, Result], object] = lambda *_: None
) -> SweepReport:
    """Compile a sweep's points; those whose results are in `folder` already, of the same config and code, are read from there.

    Args:
        name: a file of configs/sweeps, or the path of any YAML file.
        folder: holds a JSON file for each point; default: runs/sweeps/NAME.
        on_point: called after every point.
    """
    fields, folder = read_sweep(name), folder or SWEEP_OUTPUT / Path(name).stem
    folder.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    smallest: dict[str, float] = {}
    for point in points(fields):
        spec = find_spec(point.config.model)
        # What decides the program, and the figures that are read from it.
        facts = [jax.__version__, version("jaxlib"), code_digest(*_CODE), repr(point.cluster), repr(spec), point.rows]
        key = hashlib.sha256("\n".join(map(str, [*facts, dump(point.config)])).encode()).hexdigest()[:16]
        path = folder / f"{point.series}-{point.cluster.devices}.json"
        result = read_json(path, Fields) if path.is_file() else {}
        if result.get("key") != key:
            result = {"key": key, "series": point.series, "devices": point.cluster.devices}
            try:
                plan = compile_step(point.config, spec, point.cluster, point.rows)
                result |= plan_json(plan)
            except OutOfMemoryError as error:
                result["error"] = str(error)
            write_atomically(path, json.dumps(result, indent=1) + "\n")
        if "error" not in result:
            speed = result["shape"]["rows"] / result["estimate"]["step"] / result["devices"]
            result["efficiency"] = speed / smallest.setdefault(point.series, speed)
        results.append(result)
        on_point(point, result)
    return SweepReport(fields.title, results)
