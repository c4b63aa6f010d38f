"""The FLOPs of a step, and the table of parameters that a run prints when it starts."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from rich.table import Table

from jaxguard.models.sharding import mesh_axes
from jaxguard.models.spec import Spec
from jaxguard.models.weights import Weight


def attended_pairs(positions: np.ndarray, window: int | None = None) -> int:
    """Count the (query, key) pairs of causal attention for tokens at these positions of their sequences, self included."""
    keys = positions + 1
    return int((keys if window is None else np.minimum(keys, window)).sum(dtype=np.int64))


def training_flops(spec: Spec, positions: np.ndarray, targets: int) -> float:
    """Count the FLOPs of the matmuls that one step needs, for MFU, without padding and recomputation.

    Forward: 2 per weight and token in the layers; 4 N H per pair of tokens that attend (scores and weighted sum);
    2 V D per target token in the head. The backward pass takes twice that (Chowdhery et al., PaLM, 2022, appendix B,
    with the pairs that the causal and local masks leave instead of T^2).

    Args:
        spec: the model's shape.
        positions: of every token that is computed, in its sequence; a prefix that examples share is computed once.
        targets: tokens whose loss is taken.
    """
    D, F, H, N, K = spec.d_model, spec.mlp_dim, spec.head_dim, spec.num_heads, spec.num_kv_heads
    layer_weights = D * H * (2 * N + 2 * K) + 3 * D * F
    pairs = [attended_pairs(positions, kind.window) for kind in spec.kinds]
    layers = 2 * layer_weights * spec.num_layers * len(positions)
    attention = 4 * N * H * sum(pairs[kind] for kind in spec.layer_kinds)
    head = 2 * spec.vocab_size * D * targets
    return 3.0 * (layers + attention + head)


def startup_table(weights: Mapping[str, jax.Array | jax.ShapeDtypeStruct], rows: Sequence[Weight]) -> Table:
    """List every parameter with its shape, logical axes, mesh axes, and bytes per device.

    Args:
        weights: path -> array, or its shape, type and sharding over a mesh.
        rows: the model's weight table.
    """
    table = Table(title="Parameters", title_justify="left", show_footer=True, pad_edge=False)
    parameters = sum(math.prod(weights[row.path].shape) for row in rows)
    per_device = {path: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for path, x in weights.items()}
    total = sum(per_device.values())
    # Adam keeps two moments of the weights' type and sharding.
    table.add_column("weight", f"{parameters:,} parameters\nwith Adam's two moments", no_wrap=True)
    for column in ("shape", "logical axes", "mesh axes", "type"):
        table.add_column(column)
    table.add_column("per device", f"{_size(total)}\n{_size(3 * total)}", justify="right", no_wrap=True)
    for row in rows:
        weight = weights[row.path]
        axes = [*weight.sharding.spec, *[None] * (len(weight.shape) - len(weight.sharding.spec))]
        table.add_row(
            row.path,
            " x ".join(map(str, weight.shape)),
            " ".join(row.axes),
            " ".join("+".join(mesh_axes(part)) or "-" for part in axes),
            str(weight.dtype),
            _size(per_device[row.path]),
        )
    return table


def _size(count: int | float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"
