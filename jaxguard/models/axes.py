"""Logical axes: weights and activations name what a dimension is, one rule table says how devices share it.

Mesh axes: `data` holds copies of the weights, `fsdp` cuts the weights and the batch, `tensor` cuts heads, hidden units
and vocabulary. The vocabulary is cut over fsdp too: the LM head then needs neither its full matrix nor the full
gradient of it on any device.
"""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import PartitionSpec

RULES: Mapping[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "copies": ("data",),
    "embed": ("fsdp",),
    "vocab": ("tensor", "fsdp"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "layers": (),
    "head_dim": (),
    "norm": (),
    "width": (),
    None: (),
}


def partition(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mapping[str, int], without: str | None = None
) -> PartitionSpec:
    """How an array with these logical axes is cut over a mesh of these axis sizes.

    A mesh axis that does not divide a dimension is left out, and that dimension is whole on each of its devices.
    `without` names a mesh axis to gather over.
    """

    def one(axis: str | None, size: int) -> tuple[str, ...] | None:
        names: tuple[str, ...] = ()
        for name in RULES[axis]:
            if name != without and size % math.prod(mesh[n] for n in (*names, name)) == 0:
                names = (*names, name)
        return names or None

    return PartitionSpec(*map(one, axes, shape))


def constrain(x: jax.Array, *axes: str | None, without: str | None = None) -> jax.Array:
    """Ask the compiler to cut x like this over the mesh of `jax.set_mesh`; without one, x as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes, x.shape, mesh.shape, without))
