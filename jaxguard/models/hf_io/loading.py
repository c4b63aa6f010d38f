"""Tensors on disk -> arrays in our layout, on the devices that they belong to.

Where those are this host's own processors, threads cast and transpose each tensor from its file to where the array has
it. Accelerators get a layer as it is stored, cast it and lay it in, so that the host holds little more than two layers.
"""

import contextlib
import math
import mmap
from collections.abc import Iterator, Sequence
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
"""Rows and columns that are cast and transposed at once; not powers of two, as BAND is not."""


@dataclass(frozen=True)
class Wanted:
    """A weight of a checkpoint, and what is to become of it.

    Attributes:
        weight: its row of the table.
        tensors: where it lies on disk: one tensor per layer, or a single one.
        sharding: how devices share it; a stack is never cut between layers.
        dtype: element type in their memory.
    """

    weight: Weight
    tensors: tuple[Stored, ...]
    sharding: Sharding
    dtype: np.dtype


def load(wanted: Sequence[Wanted], spec: Spec) -> dict[str, jax.Array]:
    """Path -> array. What this host's devices need is read once, and nothing else."""
    onto = _onto_host if in_host_memory(wanted[0].sharding) else _onto_accelerators
    return onto(wanted, spec)


def in_host_memory(sharding: Sharding) -> bool:
    """Whether the devices' memory is their host's."""
    devices: set[Any] = sharding.device_set
    return all(device.platform == "cpu" for device in devices)


def read_piece(weight: Weight, tensor: Stored, spec: Spec, index: Index) -> np.ndarray:
    """One rectangular part of a tensor, in our layout: a view of the file, which the system is asked to read meanwhile."""
    if jax.process_count() == 1:  # one of several hosts needs parts only
        tensor.read_ahead()
    return weight.from_hf(tensor.view(), spec)[index]


def _shares(sharding: Sharding, shape: tuple[int, ...]) -> list[tuple[Index, list[jax.Device]]]:
    """The different parts of an array that this host has, and the devices that hold each of them."""
    found: dict[tuple[tuple[int, int, int], ...], tuple[Index, list[jax.Device]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
        found.setdefault(bounds, (index, []))[1].append(device)
    return list(found.values())


def _onto_host(wanted: Sequence[Wanted], spec: Spec) -> dict[str, jax.Array]:
    spaces, parts = [], []
    for one in wanted:
        shape, stacked = one.weight.shape(spec), one.weight.stacked
        shares = [
            (*share, host_space(one.sharding.shard_shape(shape), one.dtype)) for share in _shares(one.sharding, shape)
        ]
        for index, _, space in shares:
            for layer, tensor in enumerate(one.tensors):
                out, part = (space[layer], index[1:]) if stacked else (space, index)
                parts.append((one.weight, tensor, part, out))
        spaces.append(shares)
    parts.sort(key=lambda part: (part[1].file, part[1].start))
    # More threads than cores, since they also wait for the disk.
    for _ in in_turn(lambda rows: cast_tiles(*rows, _TILE), _rows(parts, spec), threads=6, ahead=12):
        pass
    return {
        one.weight.path: jax.make_array_from_single_device_arrays(
            one.weight.shape(spec),
            one.sharding,
            [jax.device_put(space, device) for _, devices, space in shares for device in devices],
        )
        for one, shares in zip(wanted, spaces, strict=True)
    }


def _rows(
    parts: Sequence[tuple[Weight, Stored, Index, np.ndarray]], spec: Spec
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Some rows of a file, and where they go: threads share even the largest tensor."""
    for weight, tensor, index, out in parts:
        part = read_piece(weight, tensor, spec, index)
        values, places = (np.atleast_2d(weight.to_hf(x)) for x in (part, out))
        assert np.may_share_memory(places, out), f"{weight.path}: {weight.rule} makes a copy"
        for rows in parts_of_rows(values, values.dtype):
            yield values[rows], places[rows]


def host_space(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory of its own, in huge pages where the system has them, and aligned so that JAX takes it over without a copy."""
    space = mmap.mmap(-1, max(1, math.prod(shape) * dtype.itemsize), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or built without
        space.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(space, dtype, math.prod(shape)).reshape(shape)


def _onto_accelerators(wanted: Sequence[Wanted], spec: Spec) -> dict[str, jax.Array]:
    single, stacked = ([one for one in wanted if one.weight.stacked is kind] for kind in (False, True))
    parts = [(one, one.tensors[0]) for one in single]
    parts += [(one, one.tensors[layer]) for layer in range(spec.num_layers) for one in stacked]
    # Three threads, since they also wait for the disk; a layer ahead of the one that is laid in.
    placed = in_turn(lambda part: _placed(*part, spec), parts, threads=3, ahead=len(stacked))
    found = {one.weight.path: next(placed).astype(one.dtype) for one in single}
    begin, lay_in = _stacks(tuple((x.weight.path, x.weight.shape(spec), x.dtype, x.sharding) for x in stacked))
    stacks = begin()
    for layer in range(spec.num_layers):
        stacks = lay_in(stacks, {one.weight.path: next(placed) for one in stacked}, layer)
        jax.block_until_ready(stacks)  # else layers that are not laid in yet would pile up
    return found | stacks


@lru_cache(maxsize=64)
def _stacks(rows: tuple[tuple[str, tuple[int, ...], Any, Sharding], ...]) -> tuple[Any, Any]:
    """Two programs of the devices: one makes the stacks of all layers, path by path; one casts a layer and lays it in."""
    shardings = {path: sharding for path, _, _, sharding in rows}

    def begin() -> dict[str, jax.Array]:
        return {path: jnp.zeros(shape, dtype) for path, shape, dtype, _ in rows}

    def lay_in(stacks: dict[str, jax.Array], tensors: dict[str, jax.Array], layer: jax.Array) -> dict[str, jax.Array]:
        return {
            path: jax.lax.dynamic_update_index_in_dim(stack, tensors[path].astype(stack.dtype), layer, 0)
            for path, stack in stacks.items()
        }

    return jax.jit(begin, out_shardings=shardings), jax.jit(lay_in, donate_argnums=0, out_shardings=shardings)


def _of_layer(sharding: Sharding) -> Sharding:
    """How one layer of a stack is cut."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


def _placed(one: Wanted, tensor: Stored, spec: Spec) -> jax.Array:
    """A tensor in our layout on the devices, as it is stored. Devices that hold the same part copy it from each other."""
    shape, sharding = one.weight.shape(spec), one.sharding
    if one.weight.stacked:
        shape, sharding = shape[1:], _of_layer(sharding)
    arrays = []
    for index, (first, *others) in _shares(sharding, shape):
        # No alias: the file may be changed or removed later. Strides are no hindrance: what puts it there transposes.
        part = jax.device_put(read_piece(one.weight, tensor, spec, index), first, may_alias=False)
        arrays += [part, *(jax.device_put(part, device, may_alias=False) for device in others)]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)
