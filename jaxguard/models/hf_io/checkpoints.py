"""Read a Hugging Face folder into sharded arrays, and export trained arrays as a Hugging Face folder.

Reading touches only the bytes that this host's devices need. On CPUs, threads cast and transpose each tensor from its file
straight into the array's memory. Accelerators get a tensor as it is stored, cast it and write it into the stack of all layers, so
that the host holds little more than two layers. Exporting copies the source's files and replaces the trained tensors' bytes, so
headers, key order, element types and whatever is not trained (a vision tower) stay as they are.
"""

import contextlib
import math
import mmap
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxguard.models.hf_io.safetensors import (
    BLOCK,
    Stored,
    all_finite,
    cast_tiles,
    open_folder,
    parts_of_rows,
    write_rows,
)
from jaxguard.models.spec import Spec, read_spec
from jaxguard.models.weights import EMBED, HEAD, Weight, table
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import whole_folder
from jaxguard.utils.threads import in_turn

PREFIXES = ("model.", "language_model.model.", "model.language_model.")
"""Prefix of a text weight's name: text-only models; multimodal Gemma 3 on disk; the same saved from memory."""

HEADS = (HEAD.hf, f"language_model.{HEAD.hf}")
"""Names of the LM head."""

CARRIED = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
"""Parts of a multimodal checkpoint that are not trained: copied as bytes."""

COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*", "USE_POLICY*")
"""Files that belong to a checkpoint beside its weights: texts and tables, no code and no pickles."""
_TEXTS = {"", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".md", ".pdf"}

_TILE = (400, 400)
"""Rows and columns that are cast and transposed at once; not powers of two, for the reason that BAND gives."""

Tensors = dict[Weight, tuple[Stored, ...]]
"""For each row of the table, its tensors on disk: one per layer, or a single one."""

Index = tuple[slice, ...]
Shardings = Mapping[str, Sharding]
Dtypes = Mapping[str, np.dtype]


def read_weights(
    folder: Path, spec: Spec, shardings: Mapping[str, Sharding] | None = None, dtype: Any = jnp.float32
) -> dict[str, jax.Array]:
    """Read a Hugging Face folder with safetensors into a dict path -> array; `dtype` is the matrices', norms are float32.

    `shardings` is path -> sharding, which never cuts along the layers; None puts everything on the default device.

    Raises:
        JaxguardError: missing, unknown, misshapen or quantised tensor, one with a value that is not finite, or corrupt files.
    """
    located = _locate(folder, spec, open_folder(folder))
    alone = SingleDeviceSharding(jax.local_devices()[0])
    shardings = shardings or {weight.path: alone for weight in located}
    dtypes = {weight.path: np.dtype(jnp.float32 if "norm" in weight.axes else dtype) for weight in located}
    load = _load_onto_cpu if in_host_memory(shardings[EMBED.path]) else _load_onto_accelerators
    return load(located, spec, shardings, dtypes)


def _locate(folder: Path, spec: Spec, tensors: Mapping[str, Stored]) -> Tensors:
    """Find the tensors of each weight of the table; check names, shapes and types."""
    prefix = next((p for p in PREFIXES if p + EMBED.hf in tensors), None)
    if prefix is None:
        tried = ", ".join(repr(p + EMBED.hf) for p in PREFIXES)
        raise JaxguardError(
            f"{folder} has no embedding table (looked for {tried}): not a checkpoint of a supported family"
        )
    located: Tensors = {}
    for weight in table(spec):
        names = [prefix + weight.hf.format(i=i) for i in range(spec.num_layers if weight.stacked else 1)]
        if weight == HEAD:
            names = [next((name for name in HEADS if name in tensors), HEAD.hf)]
        shape = weight.hf_shape(spec)
        for name in names:
            if name not in tensors:
                raise JaxguardError(f"{folder} lacks the tensor {name!r}, which its config.json requires")
            if tensors[name].shape != shape:
                raise JaxguardError(
                    f"{tensors[name].file}: tensor {name!r} has shape {tensors[name].shape}; config.json requires {shape}"
                )
            _ = tensors[name].dtype  # raises for a type that cannot be trained
        located[weight] = tuple(tensors[name] for name in names)
    known = {tensor.name for stored in located.values() for tensor in stored}.union(HEADS if spec.tied else ())
    extra = [name for name in sorted(set(tensors) - known) if not name.startswith(CARRIED)]
    extra = [name for name in extra if not name.endswith(".rotary_emb.inv_freq")]
    if extra:
        raise JaxguardError(
            f"{folder} holds {len(extra)} tensors that a {spec.family} model of {spec.num_layers} layers does not have, "
            f"such as {extra[0]!r}: check config.json, or use the original (not quantised, not adapted) checkpoint"
        )
    return located


def in_host_memory(sharding: Sharding) -> bool:
    """Whether the devices' memory is the host's memory."""
    devices: set[Any] = sharding.device_set
    return all(device.platform == "cpu" for device in devices)


def read_piece(weight: Weight, tensor: Stored, spec: Spec, index: Index) -> np.ndarray:
    """View one rectangular part of a tensor in our layout, memory-mapped, and let the system begin to read it."""
    if jax.process_count() == 1:  # one of several hosts needs parts only
        tensor.read_ahead()
    return weight.from_hf(tensor.view(), spec)[index]


def _check_finite(tensor: Stored, values: np.ndarray) -> None:
    """Refuse a tensor some of whose values are NaN or infinite: all that the model says would be, too."""
    if not all_finite(values):
        raise JaxguardError(
            f"{tensor.file}: tensor {tensor.name!r} has values that are not finite (NaN or infinity): its training diverged, or "
            "the file is damaged; use another checkpoint, or download it again"
        )


def _local_shards(sharding: Sharding, shape: tuple[int, ...]) -> list[tuple[Index, list[jax.Device]]]:
    """List the different shards of an array on this host, each with the devices that hold it."""
    shards: dict[tuple[tuple[int, int, int], ...], tuple[Index, list[jax.Device]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
        shards.setdefault(bounds, (index, []))[1].append(device)
    return list(shards.values())


def _load_onto_cpu(located: Tensors, spec: Spec, shardings: Shardings, dtypes: Dtypes) -> dict[str, jax.Array]:
    shards: dict[Weight, list[tuple[np.ndarray, list[jax.Device]]]] = {weight: [] for weight in located}
    parts = []
    for weight, tensors in located.items():
        shape, sharding = weight.shape(spec), shardings[weight.path]
        for index, devices in _local_shards(sharding, shape):
            memory = allocate(sharding.shard_shape(shape), dtypes[weight.path])
            shards[weight].append((memory, devices))
            layers, index = (memory, index[1:]) if weight.stacked else (memory[None], index)
            parts += [(weight, tensor, index, out) for tensor, out in zip(tensors, layers, strict=True)]
    parts.sort(key=lambda part: (part[1].file, part[1].start))

    def rows_to_fill() -> Iterator[tuple[Stored, np.ndarray, np.ndarray]]:
        """Yield (tensor, rows of it, memory for them), so that threads share even the largest tensor."""
        for weight, tensor, index, out in parts:
            piece = read_piece(weight, tensor, spec, index)
            values, target = (np.atleast_2d(weight.to_hf(x)) for x in (piece, out))
            assert np.may_share_memory(target, out), f"{weight.path}: {weight.rule} makes a copy"
            for rows in parts_of_rows(values, values.dtype):
                yield tensor, values[rows], target[rows]

    def fill(tensor: Stored, values: np.ndarray, target: np.ndarray) -> None:
        cast_tiles(values, target, _TILE)
        _check_finite(tensor, values)

    # More threads than cores, since they also wait for the disk.
    for _ in in_turn(lambda rows: fill(*rows), rows_to_fill(), threads=6, ahead=12):
        pass
    weights: dict[str, jax.Array] = {}
    for weight, local in shards.items():
        arrays = [jax.device_put(memory, device) for memory, devices in local for device in devices]
        sharding = shardings[weight.path]
        weights[weight.path] = jax.make_array_from_single_device_arrays(weight.shape(spec), sharding, arrays)
    return weights


def allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate an array in huge pages where the system has them, aligned so that JAX takes it over without a copy."""
    memory = mmap.mmap(-1, max(1, math.prod(shape) * dtype.itemsize), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or built without
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)


def _load_onto_accelerators(located: Tensors, spec: Spec, shardings: Shardings, dtypes: Dtypes) -> dict[str, jax.Array]:
    parts = [(weight, layer, tensor) for weight, stored in located.items() for layer, tensor in enumerate(stored)]
    parts.sort(key=lambda part: (part[2].file, part[2].start))

    def to_devices(part: tuple[Weight, int, Stored]) -> jax.Array:
        """Put a tensor on the devices as it is stored. Devices that hold the same shard copy it from each other."""
        weight, _, tensor = part
        shape, sharding = weight.shape(spec), shardings[weight.path]
        if weight.stacked:
            shape = shape[1:]
            if isinstance(sharding, NamedSharding):
                sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        arrays = []
        for index, (first, *others) in _local_shards(sharding, shape):
            view = read_piece(weight, tensor, spec, index)
            _check_finite(tensor, view)
            # No alias: the file may be changed or removed later. device_put transposes a view with strides.
            piece = jax.device_put(view, first, may_alias=False)
            arrays += [piece, *(jax.device_put(piece, device, may_alias=False) for device in others)]
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

    stacked = [weight for weight in located if weight.stacked]
    weights = {w.path: jnp.zeros(w.shape(spec), dtypes[w.path], device=shardings[w.path]) for w in stacked}
    # Three threads, since they also wait for the disk; one layer ahead of the one that is written.
    arrays = in_turn(to_devices, parts, threads=3, ahead=len(stacked))
    for (weight, layer, _), array in zip(parts, arrays, strict=True):
        path = weight.path
        if weight.stacked:
            weights[path] = _set_layer(weights[path], array, layer, shardings[path])
            jax.block_until_ready(weights[path])  # else layers that are not written yet would pile up
        else:
            weights[path] = array.astype(dtypes[path])
    return weights


@partial(jax.jit, static_argnames="sharding", donate_argnums=0)
def _set_layer(stack: jax.Array, tensor: jax.Array, layer: jax.Array, sharding: Sharding) -> jax.Array:
    """Cast a tensor, and write it into the stack of all layers."""
    updated = jax.lax.dynamic_update_index_in_dim(stack, tensor.astype(stack.dtype), layer, 0)
    constrained: jax.Array = jax.lax.with_sharding_constraint(updated, sharding)
    return constrained


@dataclass(frozen=True)
class ExportReport:
    """Numbers of an export."""

    tensors: int  # that were trained
    carried: int  # tensors that were copied as bytes
    values: int  # elements of the trained tensors
    changed: int  # of them, those that differ from the base, as stored
    dtypes: tuple[str, ...]  # element types that the trained tensors are stored in

    @property
    def changed_fraction(self) -> float:
        """Share of the stored elements that differ from the base."""
        return self.changed / self.values


def export_hf(weights: Mapping[str, jax.Array], source: Path, output: Path) -> ExportReport:
    """Write trained weights as a Hugging Face folder with exactly the source's files.

    Every process of a multi-host run calls this; process 0 writes. The folder appears at the end, complete.

    `weights` are as read_weights returns them; `source` is the checkpoint that training started from, `output` a new folder.

    Raises:
        JaxguardError: weights of another model, values that are not finite, an output folder that is not empty, a full
            disk, or a corrupt source.
    """
    spec, tensors = read_spec(source), open_folder(source)
    located = _locate(source, spec, tensors)
    shapes = {weight.path: weight.shape(spec) for weight in located}
    for path in sorted({*shapes, *weights}):
        if path not in shapes or path not in weights:
            raise JaxguardError(f"these weights are of another model than {source}: {path} is on one side only")
        if weights[path].shape != shapes[path]:
            raise JaxguardError(
                f"weight {path!r} has shape {weights[path].shape}, but the source has {shapes[path]}: another model"
            )
    trained = [(weight, layer, tensor) for weight, stored in located.items() for layer, tensor in enumerate(stored)]
    # A tied head that is stored nevertheless is written as the embedding.
    trained += [(EMBED, 0, tensors[name]) for name in HEADS if spec.tied and name in tensors]
    own = [tensor for _, _, tensor in trained]
    with contextlib.ExitStack() as stack:
        files: Mapping[str, BinaryIO] = {}
        if jax.process_index() == 0:
            size = sum(tensor.stop - tensor.start for tensor in tensors.values())
            folder = stack.enter_context(whole_folder(output, size))
            copy_companions(source, folder)
            files = stack.enter_context(_copied_files(folder, tensors, own))

        def parts() -> Iterator[tuple[Stored, np.ndarray, int, BinaryIO | None]]:
            """Yield rows of each tensor and the number of the first, so that threads share even the largest."""
            for weight, layer, tensor in trained:
                array = _on_host(weights[weight.path], layer if weight.stacked else None, tensor.dtype)
                values = np.atleast_2d(weight.to_hf(array))
                tensor.read_ahead()
                for rows in parts_of_rows(values, tensor.dtype):
                    yield tensor, values[rows], rows.start, files.get(tensor.file.name)

        # More threads than cores, since they also wait for each other at a file.
        changed = sum(in_turn(lambda part: write_rows(*part), parts(), threads=3, ahead=6))
    multihost_utils.sync_global_devices("export_hf")
    return ExportReport(
        tensors=len(trained),
        carried=len(tensors) - len(trained),
        values=sum(math.prod(tensor.shape) for tensor in own),
        changed=changed,
        dtypes=tuple(sorted({tensor.kind for tensor in own})),
    )


@partial(jax.jit, static_argnames="dtype")
def _rounded(array: jax.Array, layer: jax.Array | None, dtype: np.dtype) -> jax.Array:
    """Round a weight, or a layer of it, to nearest even."""
    if layer is not None:
        array = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
    return array.astype(dtype)


def _on_host(array: jax.Array, layer: int | None, dtype: np.dtype) -> np.ndarray:
    """Fetch a weight, or a layer of it, rounded by its devices; unrounded where it is in this host's memory already."""
    if len(array.sharding.device_set) == 1 and array.is_fully_addressable and in_host_memory(array.sharding):
        return np.asarray(array)[... if layer is None else layer]
    rounded = _rounded(array, layer, dtype)
    return np.asarray(rounded if array.is_fully_addressable else multihost_utils.process_allgather(rounded, tiled=True))


@contextlib.contextmanager
def _copied_files(
    folder: Path, tensors: Mapping[str, Stored], trained: Sequence[Stored]
) -> Iterator[dict[str, BinaryIO]]:
    """Copy the weight files except for the trained tensors' bytes; yield the copies, open, by name."""
    with contextlib.ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for path in sorted({tensor.file for tensor in tensors.values()}):
            copy = files[path.name] = stack.enter_context((folder / path.name).open("w+b"))
            size = path.stat().st_size
            own = sorted((tensor.start, tensor.stop) for tensor in trained if tensor.file == path)
            ends = [0, *(stop for _, stop in own)], [*(start for start, _ in own), size]
            with path.open("rb") as original:
                for start, stop in zip(*ends, strict=True):
                    original.seek(start)
                    copy.seek(start)
                    for offset in range(start, stop, BLOCK):
                        copy.write(original.read(min(BLOCK, stop - offset)))
            copy.truncate(size)
        yield files


def companions(source: Path) -> list[Path]:
    """List a checkpoint's other files that an export takes over: config, tokenizer, chat templates, licence.

    JaxguardError: one of them is a link that leads out of the checkpoint, or out of the hub's cache of it.
    """
    # In the hub's cache, REPOSITORY/snapshots/COMMIT/FILE links to REPOSITORY/blobs/HASH.
    root = (source.parents[1] if source.parent.name == "snapshots" else source).resolve()
    files = {path for pattern in (*COMPANIONS, "additional_chat_templates/*.jinja") for path in source.glob(pattern)}
    chosen = sorted(path for path in files if path.is_file() and path.suffix in _TEXTS)
    for path in (*chosen, source / "README.md"):
        if not path.resolve().is_relative_to(root):
            raise JaxguardError(
                f"{path} is a link that leads to {path.resolve()}: an export would publish that file; copy it here"
            )
    return chosen


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the files of `companions`."""
    for path in companions(source):
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
