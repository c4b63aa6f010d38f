"""What a run says of itself when it starts: a summary for the terminal, and every weight for weights.txt."""

import math
from collections.abc import Mapping
from pathlib import Path

import jax
from rich.table import Table

from jaxguard.config import Config
from jaxguard.data.prepare import Prepared
from jaxguard.models.sharding import mesh_axes
from jaxguard.models.spec import Spec
from jaxguard.models.weights import count, table
from jaxguard.train.step import Program
from jaxguard.utils.terminal import Console

WIDTH = 80
"""Columns that the summary takes at most."""


def summarize(console: Console, folder: Path, config: Config, data: Prepared, program: Program, steps: int) -> None:
    """Print the run, its model, data, steps and mesh, in lines that fit the console."""
    weights, train, held_out = program.state["weights"], data.manifest["train"], data.manifest["validation"]
    axes = " × ".join(f"{name} {size}" for name, size in program.mesh.shape.items())
    state = _size(3 * sum(bytes_per_device(weights).values()))
    facts = {
        "run": f"{folder} (config.yaml, weights.txt)",
        "model": f"{config.model.checkpoint}: {count(weights):,} parameters, {state} a device with Adam's moments",
        "data": f"{train['examples']:,} examples, {held_out['examples']:,} held out; {config.data.mode} mode; "
        f"policy {data.manifest['policy']['name']}",
        "steps": f"{steps:,} of {config.train.batch_size:,} examples, learning rate {config.optimizer.learning_rate:g}",
        "mesh": f"{axes} of {jax.devices()[0].device_kind}; attention {program.compute.attention}",
    }
    grid = Table.grid(padding=(0, 2))
    for name, fact in facts.items():
        grid.add_row(name, fact)
    console.print(grid, width=min(WIDTH, console.width))


def bytes_per_device(weights: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, int]:
    """Return path -> bytes of the weight's shard."""
    return {path: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for path, x in weights.items()}


def list_weights(spec: Spec, weights: Mapping[str, jax.ShapeDtypeStruct]) -> str:
    """List every parameter of the weight table with its shape, logical axes, mesh axes, and bytes per device."""
    listing = Table(show_footer=True, pad_edge=False)
    per_device = bytes_per_device(weights)
    total = sum(per_device.values())
    # Adam keeps two moments of the weights' type and sharding.
    listing.add_column("weight", f"{count(weights):,} parameters\nwith Adam's two moments", no_wrap=True)
    for column in ("shape", "logical axes", "mesh axes", "type"):
        listing.add_column(column, no_wrap=True)
    listing.add_column("per device", f"{_size(total)}\n{_size(3 * total)}", justify="right", no_wrap=True)
    for row in table(spec):
        weight = weights[row.path]
        axes = [*weight.sharding.spec, *[None] * (len(weight.shape) - len(weight.sharding.spec))]
        listing.add_row(
            row.path,
            " x ".join(map(str, weight.shape)),
            " ".join(row.axes),
            " ".join("+".join(mesh_axes(part)) or "-" for part in axes),
            str(weight.dtype),
            _size(per_device[row.path]),
        )
    console = Console(width=200)
    with console.capture() as capture:
        console.print(listing)
    return capture.get()


def _size(count: int | float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"
