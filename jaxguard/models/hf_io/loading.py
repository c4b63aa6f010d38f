"""Read tensors from disk into sharded arrays in our layout.

On CPUs, threads cast and transpose each tensor from its file straight into the array's memory. Accelerators get a layer as it is
stored, cast it and write it into the stack of all layers, so that the host holds little more than two layers.
"""

import contextlib
import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxguard.models.hf_io.safetensors import Stored, cast_tiles, parts_of_rows
from jaxguard.models.spec import Spec
from jaxguard.models.weights import Weight
from jaxguard.utils.threads import in_turn

Index = tuple[slice, ...]

_TILE = (400, 400)
"""Rows and columns that are cast and transposed at once; not powers of two, for the reason that BAND gives."""


@dataclass(frozen=True)
class Load:
    """A weight to load: where it is on disk, and how it is stored in memory.

    Attributes:
        weight: its row of the table.
        tensors: one on disk per layer, or a single one.
        sharding: of the array; a stack is never cut along its layers.
        dtype: element type of the array.
    """

    weight: Weight
    tensors: tuple[Stored, ...]
    sharding: Sharding
    dtype: np.dtype


def load(loads: Sequence[Load], spec: Spec) -> dict[str, jax.Array]:
    """Load weights by path. Reads once what this host's devices need, and nothing else."""
    load_onto = _load_onto_cpu if in_host_memory(loads[0].sharding) else _load_onto_accelerators
    return load_onto(loads, spec)


def in_host_memory(sharding: Sharding) -> bool:
    """Whether the devices' memory is the host's memory."""
    devices: set[Any] = sharding.device_set
    return all(device.platform == "cpu" for device in devices)


def read_piece(weight: Weight, tensor: Stored, spec: Spec, index: Index) -> np.ndarray:
    """View one rectangular part of a tensor in our layout, memory-mapped, and let the system begin to read it."""
    if jax.process_count() == 1:  # one of several hosts needs parts only
        tensor.read_ahead()
    return weight.from_hf(tensor.view(), spec)[index]


def _local_shards(sharding: Sharding, shape: tuple[int, ...]) -> list[tuple[Index, list[jax.Device]]]:
    """List the different shards of an array on this host, each with the devices that hold it."""
    shards: dict[tuple[tuple[int, int, int], ...], tuple[Index, list[jax.Device]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
        shards.setdefault(bounds, (index, []))[1].append(device)
    return list(shards.values())


def _load_onto_cpu(loads: Sequence[Load], spec: Spec) -> dict[str, jax.Array]:
    shards, parts = [], []
    for x in loads:
        shape, stacked = x.weight.shape(spec), x.weight.stacked
        local = [
            (*shard, allocate(x.sharding.shard_shape(shape), x.dtype)) for shard in _local_shards(x.sharding, shape)
        ]
        for index, _, memory in local:
            for layer, tensor in enumerate(x.tensors):
                out, part = (memory[layer], index[1:]) if stacked else (memory, index)
                parts.append((x.weight, tensor, part, out))
        shards.append(local)
    parts.sort(key=lambda part: (part[1].file, part[1].start))
    # More threads than cores, since they also wait for the disk.
    for _ in in_turn(lambda rows: cast_tiles(*rows, _TILE), _rows(parts, spec), threads=6, ahead=12):
        pass
    return {
        x.weight.path: jax.make_array_from_single_device_arrays(
            x.weight.shape(spec),
            x.sharding,
            [jax.device_put(memory, device) for _, devices, memory in local for device in devices],
        )
        for x, local in zip(loads, shards, strict=True)
    }


def _rows(
    parts: Sequence[tuple[Weight, Stored, Index, np.ndarray]], spec: Spec
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (rows of a file, memory for them), so that threads share even the largest tensor."""
    for weight, tensor, index, out in parts:
        part = read_piece(weight, tensor, spec, index)
        values, target = (np.atleast_2d(weight.to_hf(x)) for x in (part, out))
        assert np.may_share_memory(target, out), f"{weight.path}: {weight.rule} makes a copy"
        for rows in parts_of_rows(values, values.dtype):
            yield values[rows], target[rows]


def allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate an array in huge pages where the system has them, aligned so that JAX takes it over without a copy."""
    memory = mmap.mmap(-1, max(1, math.prod(shape) * dtype.itemsize), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or built without
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)


def _load_onto_accelerators(loads: Sequence[Load], spec: Spec) -> dict[str, jax.Array]:
    single, stacked = ([x for x in loads if x.weight.stacked is kind] for kind in (False, True))
    parts = [(x, x.tensors[0]) for x in single]
    parts += [(x, x.tensors[layer]) for layer in range(spec.num_layers) for x in stacked]
    # Three threads, since they also wait for the disk; one layer ahead of the one that is written.
    arrays = in_turn(lambda part: _to_devices(*part, spec), parts, threads=3, ahead=len(stacked))
    weights = {x.weight.path: next(arrays).astype(x.dtype) for x in single}
    make_stacks, set_layer = _stack_programs(
        tuple((x.weight.path, x.weight.shape(spec), x.dtype, x.sharding) for x in stacked)
    )
    stacks = make_stacks()
    for layer in range(spec.num_layers):
        stacks = set_layer(stacks, {x.weight.path: next(arrays) for x in stacked}, layer)
        jax.block_until_ready(stacks)  # else layers that are not written yet would pile up
    return weights | stacks


@lru_cache(maxsize=64)
def _stack_programs(
    rows: tuple[tuple[str, tuple[int, ...], Any, Sharding], ...],
) -> tuple[Callable[[], dict[str, jax.Array]], Callable[..., dict[str, jax.Array]]]:
    """Jit two functions: one makes empty stacks of all layers by path, one casts a layer and writes it into them."""
    shardings = {path: sharding for path, _, _, sharding in rows}

    def make_stacks() -> dict[str, jax.Array]:
        return {path: jnp.zeros(shape, dtype) for path, shape, dtype, _ in rows}

    def set_layer(
        stacks: dict[str, jax.Array], tensors: dict[str, jax.Array], layer: jax.Array
    ) -> dict[str, jax.Array]:
        return {
            path: jax.lax.dynamic_update_index_in_dim(stack, tensors[path].astype(stack.dtype), layer, 0)
            for path, stack in stacks.items()
        }

    return jax.jit(make_stacks, out_shardings=shardings), jax.jit(set_layer, donate_argnums=0, out_shardings=shardings)


def _of_layer(sharding: Sharding) -> Sharding:
    """The sharding of one layer of a stack."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


def _to_devices(x: Load, tensor: Stored, spec: Spec) -> jax.Array:
    """Put a tensor on the devices in our layout, in its stored type. Devices that hold the same shard copy it from each other."""
    shape, sharding = x.weight.shape(spec), x.sharding
    if x.weight.stacked:
        shape, sharding = shape[1:], _of_layer(sharding)
    arrays = []
    for index, (first, *others) in _local_shards(sharding, shape):
        # No alias: the file may be changed or removed later. device_put transposes a view with strides.
        part = jax.device_put(read_piece(x.weight, tensor, spec, index), first, may_alias=False)
        arrays += [part, *(jax.device_put(part, device, may_alias=False) for device in others)]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)
