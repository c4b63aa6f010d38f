"""Plan several runs over growing clusters: how memory, communication and time scale, and where a sharding stops paying.

A sweep is a YAML file; see docs/plan.md.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
from matplotlib.figure import Figure
from pydantic import Field

from jaxguard.config import Config, dump, load
from jaxguard.config.base import Positive, Schema, read_yaml, validate
from jaxguard.config.hardware import GIB
from jaxguard.config.lookup import CONFIG_FOLDER, find_yaml
from jaxguard.plan.compile import OutOfMemoryError, compile_step, find_spec
from jaxguard.plan.cost import RunCost
from jaxguard.plan.report import estimate_note, plan_json
from jaxguard.plan.targets import Cluster, find_cluster
from jaxguard.report import Bullets, Drawing, Page, Table
from jaxguard.report.figures import inline_svg, style
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically

SWEEP_FOLDER = CONFIG_FOLDER / "sweeps"
SWEEP_OUTPUT = Path("runs/sweeps")
COLUMNS = (
    "series", "devices", "mesh", "rows", "peak, GiB", "fits", "sent / ideal", "products, s", "memory, s", "network, s",
    "step, s", "MFU", "efficiency",
)  # fmt: skip
Result = dict[str, Any]
"""A plan as data, with `series`, `devices` and `scaling`; one that the compiler refused has `error` instead of figures."""


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
    scaling: str
    cluster: Cluster
    config: Config
    rows: int

    @property
    def key(self) -> str:
        """Equal for points that compile to the same program, with the same jax."""
        text = "\n".join([jax.__version__, self.cluster.name, str(self.rows), dump(self.config)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def compile(self) -> Result:
        """Compile its step."""
        known = {"series": self.series, "devices": self.cluster.devices, "scaling": self.scaling}
        try:
            plan = compile_step(self.config, find_spec(self.config.model), self.cluster, self.rows)
        except OutOfMemoryError as error:
            return {**known, "error": str(error)}
        return {**known, **plan_json(plan, RunCost(None))}


def read_sweep(name: str) -> SweepConfig:
    """Read a file of configs/sweeps by name, or any YAML file by path.

    Raises:
        JaxguardError: no such file, or a field that is unknown, missing or ill-typed.
    """
    path = find_yaml(name, SWEEP_FOLDER, "sweep")
    return validate(SweepConfig, read_yaml(path), str(path))


def points(sweep: SweepConfig) -> Iterator[Point]:
    """All points of a sweep.

    Raises:
        JaxguardError: a config, target or shape that does not exist.
    """
    for name, series in sweep.series.items():
        width = find_spec(_load(name, series, series.set).model).d_model
        for devices in series.devices:
            cluster = find_cluster(f"{series.target}:{devices}")
            shards = cluster.devices // series.tensor
            copies = shards // math.gcd(shards, width)
            if series.shard == "linked":
                copies = max(1, cluster.devices // cluster.linked)
            rows = series.rows * (shards if series.scaling == "weak" else 1)
            settings = {
                "data.share_prefixes": False,  # rows are full, whatever the data
                **series.set,
                "mesh.data": copies,
                "mesh.fsdp": shards // copies,
                "mesh.tensor": series.tensor,
                "train.batch_size": rows,
            }
            yield Point(name, series.scaling, cluster, _load(name, series, settings), rows)


def _load(name: str, series: SeriesConfig, settings: Mapping[str, Any]) -> Config:
    try:
        return load(series.config, [f"{field}={json.dumps(value)}" for field, value in settings.items()])
    except JaxguardError as error:
        raise JaxguardError(f"series {name}: {error}") from None


def _read_result(path: Path, key: str) -> Result | None:
    try:
        result: Result = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return result if result.get("key") == key else None


@dataclass(frozen=True)
class SweepReport:
    """The results of a sweep, series by series."""

    title: str
    results: Sequence[Result]

    def series(self) -> dict[str, list[Result]]:
        """Name -> the results that have figures, in order of size."""
        names = dict.fromkeys(result["series"] for result in self.results)
        return {name: [r for r in self.results if r["series"] == name and "error" not in r] for name in names}

    def efficiency(self, result: Result) -> float:
        """Rows that a device trains in a second, relative to the smallest cluster of the series."""

        def speed(result: Result) -> float:
            return float(result["shape"]["rows"] / result["estimate"]["step"] / result["devices"])

        return speed(result) / speed(self.series()[result["series"]][0])

    def limits(self) -> list[str]:
        """For each series, up to how many devices its products take longer than the network."""
        lines = []
        for name, results in self.series().items():
            good = [r["devices"] for r in results if r["estimate"]["compute"] >= r["estimate"]["network"]]
            lines.append(f"{name}: " + (f"up to {max(good):,} devices" if good else "nowhere"))
        return lines

    def table(self) -> Table:
        """A row for each point."""
        table = Table(COLUMNS)
        for result in self.results:
            table.add(*self._row(result))
        return table

    def _row(self, result: Result) -> list[str]:
        name = [result["series"], f"{result['devices']:,}"]
        if "error" in result:
            return [*name, result["error"], *[""] * (len(COLUMNS) - 3)]
        guess = result["estimate"]
        return [
            *name,
            "×".join(str(size) for size in result["mesh"].values()),
            f"{result['shape']['rows']:,}",
            f"{result['peak'] / GIB:.1f}",
            "yes" if result["fits"] else "no",
            f"{result['sent'] / result['ideal_sent']:.2f}" if result["ideal_sent"] else "-",
            *(f"{guess[part]:.3g}" for part in ("compute", "memory", "network", "step")),
            f"{guess['mfu']:.0%}",
            f"{self.efficiency(result):.0%}",
        ]

    def page(self) -> Page:
        """One page with table and curves."""
        note = "Efficiency: rows that a device trains in a second, relative to the smallest cluster of the series."
        where = "Products take longer than the network:"
        title = "Memory, the network's share, time and efficiency over the number of devices"
        figure = Drawing(title, inline_svg(self.figure(), "sweep", title))
        return Page(self.title, [figure, where, Bullets(self.limits()), self.table(), note, estimate_note()])

    @style()
    def figure(self) -> Figure:
        """Curves of memory, the network's share of a step, its time and efficiency over the number of devices."""
        curves: dict[str, Callable[[Result], float]] = {
            "peak, GiB of a device": lambda r: float(r["peak"] / GIB),
            "network's share of a step": lambda r: float(r["estimate"]["network"] / r["estimate"]["step"]),
            "step, seconds": lambda r: float(r["estimate"]["step"]),
            "efficiency": self.efficiency,
        }
        sizes = sorted({r["devices"] for results in self.series().values() for r in results})
        figure = Figure(figsize=(11, 7.5))
        for axes, (label, value) in zip(figure.subplots(2, 2).flat, curves.items(), strict=True):
            for name, results in self.series().items():
                axes.plot([r["devices"] for r in results], [value(r) for r in results], marker="o", label=name)
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
    name: str,
    folder: Path | None = None,
    on_point: Callable[[Point, Result], object] = lambda *_: None,
) -> SweepReport:
    """Compile a sweep's points; those whose results are in `folder` already, from the same config, are read from there.

    Args:
        name: a file of configs/sweeps, or the path of any YAML file.
        folder: holds a JSON file for each point; default: runs/sweeps/NAME.
        on_point: called after every point.

    Raises:
        JaxguardError: see `read_sweep` and `points`.
    """
    fields, folder = read_sweep(name), folder or SWEEP_OUTPUT / Path(name).stem
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for point in points(fields):
        path = folder / f"{point.series}-{point.cluster.devices}.json"
        results.append(_read_result(path, point.key) or {"key": point.key, **point.compile()})
        write_atomically(path, json.dumps(results[-1], indent=1) + "\n")
        on_point(point, results[-1])
    return SweepReport(fields.title, results)
