"""The mesh, and how weights, state and batches are sharded over it.

Weights and activations name their dimensions by logical axes; one rule table says which mesh axes cut them: `data` holds copies of
the weights, `fsdp` cuts the batch and every matrix along D, `tensor` cuts attention heads, the MLP's F and the vocabulary.

On many TPU chips fsdp is two axes: its last part is `line`, the chips of a line of the torus. Weights are gathered, and gradients
scattered, over one axis after the other, which sends no more bytes. Over a whole torus at once the compiler all-reduces gradients,
and weights too from 4x4x4 chips on: twice the bytes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxguard.config import Config
from jaxguard.config.train import MeshConfig
from jaxguard.models.devices import find_devices
from jaxguard.models.spec import Spec
from jaxguard.models.weights import abstract, table
from jaxguard.utils.errors import JaxguardError

AXES = ("data", "fsdp", "tensor")
FSDP = ("fsdp", "line")
"""The mesh axes that weights are gathered over; only a mesh of many TPU chips has the second."""
PERMUTED = 32
"""Up to so many chips, XLA scatters gradients by permutations that run behind the products."""

RULES: Mapping[str | None, tuple[str, ...]] = {
    "batch": ("data", *FSDP),
    "copies": ("data",),
    "embed": FSDP,
    **dict.fromkeys(("vocab", "heads", "kv_heads", "mlp"), ("tensor",)),
    **dict.fromkeys(("layers", "head_dim", "norm", None), ()),
}


def partition(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mapping[str, int], without: Sequence[str] = ()
) -> PartitionSpec:
    """Compute how an array with these logical axes is sharded over a mesh of these axis sizes.

    A mesh axis that does not divide a dimension is left out: each of its devices has that dimension whole.
    `without` names mesh axes to gather over.
    """

    def mesh_axes_of(axis: str | None, size: int) -> tuple[str, ...] | None:
        names: tuple[str, ...] = ()
        for name in RULES[axis]:
            if name in mesh and name not in without and size % math.prod(mesh[n] for n in (*names, name)) == 0:
                names = (*names, name)
        return names or None

    return PartitionSpec(*map(mesh_axes_of, axes, shape))


def constrain(x: jax.Array, *axes: str | None, without: Sequence[str] = ()) -> jax.Array:
    """Constrain how x is sharded over the mesh of `jax.set_mesh`; without a mesh, return x as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    constrained: jax.Array = jax.lax.with_sharding_constraint(x, partition(axes, x.shape, mesh.shape, without))
    return constrained


def gather_over_fsdp(x: jax.Array, *axes: str | None) -> jax.Array:
    """Gather x over fsdp, along the lines of a TPU's torus first."""
    for first in reversed(range(len(_fsdp_axes()))):
        x = constrain(x, *axes, without=FSDP[first:])
    return x


def scatter_over_fsdp(x: jax.Array, *axes: str | None) -> jax.Array:
    """Sum over fsdp what each device has of x, and cut it: `gather_over_fsdp` backwards."""
    for first in range(1, 1 + len(_fsdp_axes())):
        x = constrain(x, *axes, without=FSDP[first:])
    return x


def _fsdp_axes() -> list[str]:
    return [name for name in FSDP if name in jax.sharding.get_abstract_mesh().shape]


def num_shards(axis: str, size: int) -> int:
    """Number of shards that `constrain` cuts a dimension of this size into."""
    mesh = jax.sharding.get_abstract_mesh()
    (part,) = (None,) if mesh.empty else partition((axis,), (size,), mesh.shape)
    return math.prod(mesh.shape[name] for name in mesh_axes(part))


def mesh_axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec, which is a bare name where it is a single axis."""
    return (part,) if isinstance(part, str) else part or ()


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange devices as data × fsdp × tensor, many TPU chips as data × fsdp × line × tensor; initialize jax.distributed before.

    Those with the fastest links to one another are along the inner axes: a host's own devices (JAX lists them host by host), or
    neighbours in the torus of a TPU slice. Several slices, between which the network is slow, are along `data`.

    Raises:
        JaxguardError: the grid needs more devices than there are, leaves some idle, or shards one copy of the weights
            over two TPU slices.
    """
    devices = find_devices() if devices is None else devices
    fsdp = config.fsdp if config.fsdp > 0 else max(1, len(devices) // (config.data * config.tensor))
    shape: tuple[int, ...] = (config.data, fsdp, config.tensor)
    if math.prod(shape) != len(devices):
        requested = " × ".join(f"mesh.{name}={size}" for name, size in zip(AXES, shape, strict=True))
        raise JaxguardError(
            f"{requested} is {math.prod(shape)} devices, but there are {len(devices)} ({devices[0].device_kind}); "
            "set mesh.fsdp=-1 to take all that are left, or change the mesh"
        )
    if devices[0].platform != "tpu":
        return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    names: tuple[str, ...] = AXES
    if fsdp > PERMUTED:
        line = math.gcd(fsdp, 1 + max(max(device.coords) for device in devices))  # the torus's longest side
        shape, names = (config.data, fsdp // line, line, config.tensor), ("data", *FSDP, "tensor")
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif config.data % slices:
        raise JaxguardError(
            f"mesh.data={config.data} must be a multiple of {slices}, the number of TPU slices; set mesh.data={slices}"
        )
    else:
        inner = (config.data // slices, *shape[1:])
        outer = (slices, *(1 for _ in shape[1:]))
        grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def weight_shardings(spec: Spec, mesh: Mesh) -> dict[str, NamedSharding]:
    """Map each path to the sharding that the rule table gives that weight."""
    return {w.path: NamedSharding(mesh, partition(w.axes, w.shape(spec), mesh.shape)) for w in table(spec)}


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Shard rows over data and fsdp, nothing else."""
    return NamedSharding(mesh, PartitionSpec(tuple(name for name in RULES["batch"] if name in mesh.shape)))


def batch_shards(mesh: Mesh) -> int:
    """Number of devices, or groups of `tensor` devices, that share a batch's rows."""
    return int(mesh.size // mesh.shape["tensor"])


def shard_batch(tree: Any, sharding: NamedSharding) -> Any:
    """Shard arrays that every host has whole: each host gives its devices their part."""

    def shard(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(shard, tree)


def row_multiple(config: Config, mesh: Mesh) -> int:
    """Number that a row count must be a multiple of, so that every device and micro-batch has equally many rows.

    Raises:
        JaxguardError: the batch has fewer examples than that, so that some devices would only hold padding.
    """
    devices = batch_shards(mesh)
    multiple = devices * config.train.accumulation
    if multiple > config.train.batch_size:
        raise JaxguardError(
            f"train.batch_size={config.train.batch_size} cannot be divided over mesh.data × mesh.fsdp = {devices} devices × "
            f"train.accumulation={config.train.accumulation}: raise the batch size, or use mesh.tensor for more of the devices"
        )
    return multiple


def abstract_state(optimizer: optax.GradientTransformation, spec: Spec, mesh: Mesh) -> dict[str, Any]:
    """Build the training state's shapes, types and shardings, without memory; Adam's moments are sharded as their weights."""

    def with_sharding(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    shardings, whole = weight_shardings(spec, mesh), replicated(mesh)
    weights = {path: with_sharding(x, shardings[path]) for path, x in abstract(spec).items()}
    empty = jax.eval_shape(optimizer.init, weights)
    moments = optax.tree.map_params(
        optimizer, with_sharding, empty, shardings, transform_non_params=lambda x: with_sharding(x, whole)
    )
    step = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
    return {"weights": weights, "optimizer": moments, "step": step}
