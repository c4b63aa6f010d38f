"""Plans of several runs over growing clusters: how memory, communication and time scale, and where a sharding stops paying.

A sweep is a YAML file (docs/plan.md). Every point is compiled; what is compiled already, from the same config, is not compiled
again.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
from pydantic import Field

from jaxguard.config import Config, dump, load
from jaxguard.config.base import Schema, read_yaml, validate
from jaxguard.config.lookup import CONFIG_FOLDER, find_yaml
from jaxguard.plan.compile import OutOfMemoryError, compile_step, find_spec
from jaxguard.plan.show import as_json
from jaxguard.plan.targets import Cluster, find_cluster
from jaxguard.plan.work import Work
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically

SWEEP_FOLDER = CONFIG_FOLDER / "sweeps"
Count = Annotated[int, Field(gt=0)]
Cut = Literal["all", "linked"]
Point = dict[str, Any]
"""A plan as data, with `series`, `devices` and `scaling`; one that the compiler refused has `error` in place of figures."""


class SeriesConfig(Schema):
    """One curve."""

    config: str
    """The run, a file of configs/."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Fields of it that are changed."""
    target: str
    """A name of configs/hardware/targets.yaml."""
    devices: tuple[Count, ...] = Field(min_length=1)
    """Sizes of the cluster."""
    scaling: Literal["weak", "strong"]
    """weak: every device keeps its rows and the batch grows; strong: the batch stays."""
    rows: Count
    """Rows of a batch: of one device (weak), or of all of them (strong)."""
    cut: Cut = "all"
    """Over which devices the weights are cut: all, or those of a host or slice, of which the others are copies. All are
    as many as the model's width can be cut over."""
    tensor: Count = 1
    """Devices that share the heads and hidden units of a layer."""


class SweepConfig(Schema):
    """A sweep's file."""

    title: str
    series: dict[Annotated[str, Field(pattern=r"^[\w.-]+$")], SeriesConfig] = Field(min_length=1)
    """Name, also that of its points' files -> curve."""


@dataclass(frozen=True)
class Place:
    """One point before it is compiled."""

    series: str
    fields: SeriesConfig
    cluster: Cluster
    config: Config
    rows: int


def read_sweep(name: str) -> SweepConfig:
    """A file of configs/sweeps by name, or any by path.

    Raises:
        JaxguardError: no such file, or a field that is unknown, missing or ill-typed.
    """
    path = find_yaml(name, SWEEP_FOLDER, "sweep")
    return validate(SweepConfig, read_yaml(path), str(path))


def places(sweep: SweepConfig) -> Iterator[Place]:
    """All points.

    Raises:
        JaxguardError: a config, target or shape that does not exist.
    """
    for name, fields in sweep.series.items():
        width = find_spec(_load(name, fields, fields.set).model).d_model
        for devices in fields.devices:
            cluster = find_cluster(f"{fields.target}:{devices}")
            shards = cluster.devices // fields.tensor
            copies = shards // math.gcd(shards, width)
            if fields.cut == "linked":
                copies = max(1, cluster.devices // cluster.linked)
            rows = fields.rows * (shards if fields.scaling == "weak" else 1)
            settings = {
                "data.share_prefixes": False,  # rows are full, whatever the data
                **fields.set,
                "mesh.data": copies,
                "mesh.fsdp": shards // copies,
                "mesh.tensor": fields.tensor,
                "train.batch_size": rows,
            }
            yield Place(name, fields, cluster, _load(name, fields, settings), rows)


def _load(name: str, fields: SeriesConfig, settings: Mapping[str, Any]) -> Config:
    try:
        return load(fields.config, [f"{field}={json.dumps(value)}" for field, value in settings.items()])
    except JaxguardError as error:
        raise JaxguardError(f"series {name}: {error}") from None


def run_sweep(sweep: SweepConfig, folder: Path, tell: Callable[[Place, Point], None]) -> list[Point]:
    """Compile what is not compiled yet, one file for each point in `folder`; `tell` hears of every point."""
    found = []
    for place in places(sweep):
        path = folder / f"{place.series}-{place.cluster.devices}.json"
        key = _key(place)
        point = _kept(path, key) or {"key": key, **_compiled(place)}
        write_atomically(path, json.dumps(point, indent=1) + "\n")
        tell(place, point)
        found.append(point)
    return found


def _compiled(place: Place) -> Point:
    known = {"series": place.series, "devices": place.cluster.devices, "scaling": place.fields.scaling}
    try:
        plan = compile_step(place.config, find_spec(place.config.model), place.cluster, place.rows)
    except OutOfMemoryError as error:
        return {**known, "error": str(error)}
    (data,) = as_json([(plan, Work(None))])
    return {**known, **data}


def _kept(path: Path, key: str) -> Point | None:
    if not path.is_file():
        return None
    try:
        point: Point = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return point if point.get("key") == key else None


def _key(place: Place) -> str:
    """Equal for points that compile to the same program, with the same jax."""
    text = "\n".join([jax.__version__, place.cluster.name, str(place.rows), dump(place.config)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
