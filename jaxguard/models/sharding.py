"""Logical axes: weights and activations name their dimensions, one rule table says which mesh axes cut them.

Mesh axes: `data` holds copies of the weights, `fsdp` cuts the batch and every matrix along D, `tensor` cuts attention heads, the
MLP's F and the vocabulary.
"""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import PartitionSpec

RULES: Mapping[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "copies": ("data",),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "layers": (),
    "head_dim": (),
    "norm": (),
    None: (),
}


def partition(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mapping[str, int], without: str | None = None
) -> PartitionSpec:
    """Compute how an array with these logical axes is cut over a mesh of these axis sizes.

    A mesh axis that does not divide a dimension is left out: each of its devices has that dimension whole.
    `without` names a mesh axis to gather over.
    """

    def mesh_axes_of(axis: str | None, size: int) -> tuple[str, ...] | None:
        names: tuple[str, ...] = ()
        for name in RULES[axis]:
            if name != without and size % math.prod(mesh[n] for n in (*names, name)) == 0:
                names = (*names, name)
        return names or None

    return PartitionSpec(*map(mesh_axes_of, axes, shape))


def constrain(x: jax.Array, *axes: str | None, without: str | None = None) -> jax.Array:
    """Constrain how x is cut over the mesh of `jax.set_mesh`; without a mesh, return x as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    constrained: jax.Array = jax.lax.with_sharding_constraint(x, partition(axes, x.shape, mesh.shape, without))
    return constrained


def num_shards(axis: str, size: int) -> int:
    """Number of shards that `constrain` cuts a dimension of this size into."""
    mesh = jax.sharding.get_abstract_mesh()
    (part,) = (None,) if mesh.empty else partition((axis,), (size,), mesh.shape)
    return math.prod(mesh.shape[name] for name in mesh_axes(part))


def mesh_axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec, which is a bare name where it is a single axis."""
    return (part,) if isinstance(part, str) else part or ()
