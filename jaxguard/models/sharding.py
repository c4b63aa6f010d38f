"""Logical axes: weights and activations name what a dimension is, one rule table says how devices share it.

Mesh axes: `data` holds copies of the weights, `fsdp` cuts the batch and every matrix along the model's width, `tensor`
cuts heads, hidden units and vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

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


def num_shards(axis: str, size: int) -> int:
    """Into how many parts `constrain` cuts a dimension of this size."""
    mesh = jax.sharding.get_abstract_mesh()
    (part,) = (None,) if mesh.empty else partition((axis,), (size,), mesh.shape)
    return math.prod(mesh.shape[name] for name in mesh_axes(part))


def mesh_axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Those of a PartitionSpec's entry, which is a bare name where it is one axis."""
    return (part,) if isinstance(part, str) else part or ()


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def gather(weight: jax.Array, gradient_buffer: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """A weight as matmuls want it: cast to the gradient buffer's type, then gathered over fsdp, so that half the bytes move.

    Its gradient is that of `gradient_buffer`, whose values nobody reads, and `weight` has none: a float32 weight's would have to
    be float32, although it is computed in the compute type, and twice as large. Devices add it up and cut it in one go, by a
    reduce-scatter; the gradient of a gathered array, as JAX would have it, is a gathered one.
    """
    return constrain(weight.astype(gradient_buffer.dtype), *axes, without="fsdp")


def _gather_forward(weight: jax.Array, gradient_buffer: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, None]:
    return gather(weight, gradient_buffer, axes), None


def _gather_backward(axes: tuple[str, ...], _: None, gradient: jax.Array) -> tuple[None, jax.Array]:
    return None, constrain(gradient, *axes)


gather.defvjp(_gather_forward, _gather_backward)
