"""The mesh, and the shardings of state and batches over it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxguard.config import Config
from jaxguard.config.train import MeshConfig
from jaxguard.models.sharding import RULES, partition
from jaxguard.models.spec import Spec
from jaxguard.models.weights import abstract, table
from jaxguard.utils.errors import JaxguardError

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange the devices as a data × fsdp × tensor grid; jax.distributed must be initialized before.

    Raises:
        JaxguardError: the grid needs more devices than there are, leaves some idle, or shards one copy of the weights
            over two TPU slices.
    """
    devices = jax.devices() if devices is None else devices
    fixed = config.data * config.tensor
    fsdp = config.fsdp if config.fsdp > 0 else max(1, len(devices) // fixed)
    shape = (config.data, fsdp, config.tensor)
    if math.prod(shape) != len(devices):
        grid = " × ".join(f"mesh.{name}={size}" for name, size in zip(AXES, shape, strict=True))
        raise JaxguardError(
            f"{grid} is {math.prod(shape)} devices, but there are {len(devices)} ({devices[0].device_kind}); "
            "set mesh.fsdp=-1 to take all that are left, or change the mesh"
        )
    return Mesh(_grid(shape, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def _grid(shape: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
    """Arrange devices in this shape, those with the fastest links to one another along the inner axes.

    JAX lists devices host by host, so that hosts are along `data`, as far as it is long, and a host's own devices along the
    others. The chips of a TPU slice are a torus that spans its hosts: mesh_utils cuts it into smaller ones by the chips'
    coordinates. Several slices, between which the network is slow, are along `data`.
    """
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise JaxguardError(
            f"mesh.data={shape[0]} must be a multiple of {slices}, the number of TPU slices; set mesh.data={slices}"
        )
    inner, outer = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


def weight_shardings(spec: Spec, mesh: Mesh) -> dict[str, NamedSharding]:
    """Map each path to the sharding that the rule table gives that weight."""
    return {w.path: NamedSharding(mesh, partition(w.axes, w.shape(spec), mesh.shape)) for w in table(spec)}


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Shard rows over data and fsdp, nothing else."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


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
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    multiple: int = devices * config.train.accumulation
    if multiple > config.train.batch_size:
        raise JaxguardError(
            f"train.batch_size={config.train.batch_size} cannot be divided over mesh.data × mesh.fsdp = {devices} devices × "
            f"train.accumulation={config.train.accumulation}: raise the batch size, or use mesh.tensor for more of the devices"
        )
    return multiple


def abstract_state(optimizer: optax.GradientTransformation, spec: Spec, mesh: Mesh) -> dict[str, Any]:
    """Build the training state's shapes, types and shardings, without memory; Adam's moments are sharded as their weights."""
    shardings = weight_shardings(spec, mesh)
    weights = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[path]) for path, x in abstract(spec).items()
    }

    def with_sharding(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    whole = replicated(mesh)
    moments = optax.tree.map_params(
        optimizer,
        with_sharding,
        jax.eval_shape(optimizer.init, weights),
        shardings,
        transform_non_params=lambda x: with_sharding(x, whole),
    )
    step = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
    return {"weights": weights, "optimizer": moments, "step": step}
