"""Hugging Face folder -> sharded arrays, and trained arrays -> a Hugging Face folder.

Reading touches only the bytes that this host's devices need. Exporting copies the source's files and overwrites only
the trained tensors' bytes, so headers, key order, element types and whatever is not trained (a vision tower) stay as
they are; exporting unchanged weights gives the same files, bit for bit.
"""

import contextlib
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tokenizers import Tokenizer

from jaxguard.errors import JaxguardError
from jaxguard.models.folders import whole_folder
from jaxguard.models.safetensors_io import Stored, open_folder
from jaxguard.models.spec import Spec, read_spec
from jaxguard.models.weights import EMBED, HEAD, Weight, table

PREFIXES = ("model.", "language_model.model.", "model.language_model.")
"""What stands before a text weight's name: text-only models; multimodal Gemma 3 on disk; the same saved from memory."""

HEAD_PREFIXES = ("", "language_model.")

CARRIED = (
    "vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.",
)  # fmt: skip
"""Parts of a multimodal checkpoint that are not trained: kept as bytes."""

WEIGHT_FILES = {".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt"}

# The text-only Gemma 3 1B shares its tokenizer with the multimodal sizes: this token's id lies just past its
# vocabulary, and no text chat produces it.
_IMAGE_TOKEN = "<image_soft_token>"  # noqa: S105

Places = dict[Weight, tuple[Stored, ...]]
"""For each row of the table, its tensors on disk: one per layer, or a single one."""


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        tensors: trained tensors.
        carried: tensors kept as bytes.
        values: numbers in the trained tensors.
        changed: how many of them differ from the base, as stored.
        dtypes: element types that the trained tensors are stored in.
    """

    tensors: int
    carried: int
    values: int
    changed: int
    dtypes: tuple[str, ...]

    @property
    def changed_fraction(self) -> float:
        """Share of stored numbers that differ from the base."""
        return self.changed / self.values


def read_weights(
    folder: Path,
    spec: Spec,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    dtype: Any = jnp.float32,
) -> dict[str, jax.Array]:
    """Read a checkpoint into the table's flat dict.

    Args:
        folder: a Hugging Face folder with safetensors.
        spec: its spec.
        shardings: path -> sharding; None puts everything on the default device.
        dtype: element type in memory.

    Raises:
        JaxguardError: missing, unknown, misshapen or quantised tensor, or unreadable files.
    """
    places = locate(folder, spec)
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        weight.path: _read(weight, stored, spec, alone if shardings is None else shardings[weight.path], dtype)
        for weight, stored in places.items()
    }


def _read(
    weight: Weight, stored: Sequence[Stored], spec: Spec, sharding: jax.sharding.Sharding, dtype: Any
) -> jax.Array:
    shape = weight.shape(spec)
    copies: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def piece(index: tuple[slice, ...] | None) -> np.ndarray:
        """The asked part; devices that hold the same part share it."""
        assert index is not None
        key = tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
        if key not in copies:
            copies[key] = read_piece(weight, stored, spec, index, dtype)
        return copies[key]

    return jax.make_array_from_callback(shape, sharding, piece, dtype=dtype)


def read_piece(
    weight: Weight, stored: Sequence[Stored], spec: Spec, index: tuple[slice, ...], dtype: Any
) -> np.ndarray:
    """One rectangular part of a weight, in our layout, reading only the pages it lies on."""
    views = [_ours(weight, tensor.view(), spec) for tensor in (stored[index[0]] if weight.stacked else stored)]
    parts = [view[index[1:] if weight.stacked else index] for view in views]
    out = np.empty((len(parts), *parts[0].shape), dtype)
    for row, part in zip(out, parts, strict=True):
        row[...] = part
    return out if weight.stacked else out[0]


def _ours(weight: Weight, array: np.ndarray, spec: Spec) -> np.ndarray:
    return einops.rearrange(array, weight.rule, **_sizes(weight, spec))


def _theirs(weight: Weight, array: np.ndarray, spec: Spec) -> np.ndarray:
    return einops.rearrange(array, " -> ".join(reversed(weight.rule.split(" -> "))), **_sizes(weight, spec))


def _sizes(weight: Weight, spec: Spec) -> dict[str, int]:
    return {letter: size for letter, size in spec.sizes.items() if letter in weight.rule}


def locate(folder: Path, spec: Spec) -> Places:
    """Where each weight of the table lies on disk, checked for names, shapes and types.

    Raises:
        JaxguardError: missing, unknown, misshapen or quantised tensor, or unreadable files.
    """
    return _locate(folder, spec, open_folder(folder))


def _locate(folder: Path, spec: Spec, tensors: Mapping[str, Stored]) -> Places:
    prefix = next((p for p in PREFIXES if p + EMBED.hf in tensors), None)
    if prefix is None:
        tried = ", ".join(repr(p + EMBED.hf) for p in PREFIXES)
        raise JaxguardError(f"{folder} has no embedding table (looked for {tried}): not a Llama or Gemma 3 checkpoint")
    places: Places = {}
    for weight in table(spec):
        names = _names(weight, prefix, spec, tensors)
        places[weight] = tuple(_checked(folder, name, weight.hf_shape(spec), tensors) for name in names)
    known = {tensor.name for stored in places.values() for tensor in stored}
    extra = sorted(set(tensors) - known - set(_tied_heads(spec, tensors)))
    extra = [name for name in extra if not name.startswith(CARRIED) and not name.endswith(".rotary_emb.inv_freq")]
    if extra:
        raise JaxguardError(
            f"{folder} holds {len(extra)} tensors that a {spec.family} model of {spec.layers} layers does not have, "
            f"such as {extra[0]!r}: check config.json, or use the original (not quantised, not adapted) checkpoint"
        )
    return places


def _names(weight: Weight, prefix: str, spec: Spec, tensors: Mapping[str, Stored]) -> list[str]:
    if weight == HEAD:
        return [next((p + HEAD.hf for p in HEAD_PREFIXES if p + HEAD.hf in tensors), HEAD.hf)]
    return [prefix + weight.hf.format(i=i) for i in range(spec.layers if weight.stacked else 1)]


def _checked(folder: Path, name: str, shape: tuple[int, ...], tensors: Mapping[str, Stored]) -> Stored:
    if name not in tensors:
        raise JaxguardError(f"{folder} lacks the tensor {name!r}, which its config.json asks for")
    tensor = tensors[name]
    if tensor.shape != shape:
        raise JaxguardError(f"{tensor.file}: tensor {name!r} has shape {tensor.shape}; config.json asks for {shape}")
    _ = tensor.dtype  # raises for a type that cannot be trained
    return tensor


def _tied_heads(spec: Spec, tensors: Mapping[str, Stored]) -> list[str]:
    """A tied head that the checkpoint stores all the same: ignored when read, written as the embedding."""
    return [p + HEAD.hf for p in HEAD_PREFIXES if spec.tied and p + HEAD.hf in tensors]


def check_vocabulary(folder: Path, spec: Spec) -> None:
    """Refuse a tokenizer that makes ids for which there is no embedding.

    Raises:
        JaxguardError: no tokenizer.json, or ids beyond the vocabulary.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise JaxguardError(f"{folder} has no tokenizer.json: download the checkpoint with its tokenizer")
    try:
        ids = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception
        raise JaxguardError(f"{path} cannot be read: {error}") from None
    beyond = {token: i for token, i in ids.items() if i >= spec.vocab and token != _IMAGE_TOKEN}
    if beyond:
        token = min(beyond, key=beyond.__getitem__)
        raise JaxguardError(
            f"{path}: {len(beyond)} tokens have ids beyond the model's vocabulary of {spec.vocab}, first {token!r} = "
            f"{beyond[token]}: resize the model's embeddings, or use the tokenizer that belongs to it"
        )


def export_hf(weights: Mapping[str, jax.Array], source: Path, output: Path) -> ExportReport:
    """Write trained weights as a Hugging Face folder shaped exactly like the source.

    Every process of a multi-host run calls this; process 0 writes. The folder appears at the end, whole.

    Args:
        weights: path -> array, as read_weights gives them; each is asked for once, in turn.
        source: the checkpoint that training started from.
        output: folder to create.

    Raises:
        JaxguardError: weights of another model, values that are not finite, an output folder that is not empty, a full
            disk, or an unreadable source.
    """
    spec = read_spec(source)
    tensors = open_folder(source)
    places = _locate(source, spec, tensors)
    _check_weights(weights, spec, source)
    writer = jax.process_index() == 0
    changed, rewritten = 0, 0
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(whole_folder(output, _stored_bytes(tensors))) if writer else None
        files = {} if folder is None else stack.enter_context(_copies(source, folder, tensors))
        for weight, stored in places.items():
            targets = [[tensor] for tensor in stored]
            if weight == EMBED:
                targets[0] += [tensors[name] for name in _tied_heads(spec, tensors)]
            for copies, values in zip(targets, _layers(weight, weights[weight.path], spec), strict=True):
                changed += _overwrite(copies[0], values, files)
                for tensor in copies[1:]:
                    _overwrite(tensor, values, files)
                rewritten += len(copies)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("export_hf")
    trained = [tensor for stored in places.values() for tensor in stored]
    return ExportReport(
        tensors=rewritten,
        carried=len(tensors) - rewritten,
        values=sum(math.prod(tensor.shape) for tensor in trained),
        changed=changed,
        dtypes=tuple(sorted({tensor.kind for tensor in trained})),
    )


def _stored_bytes(tensors: Mapping[str, Stored]) -> int:
    """Size of a checkpoint's tensors on disk."""
    return sum(tensor.stop - tensor.start for tensor in tensors.values())


def _check_weights(weights: Mapping[str, jax.Array], spec: Spec, source: Path) -> None:
    wanted = {weight.path for weight in table(spec)}
    if set(weights) != wanted:
        odd = sorted(set(weights) ^ wanted)
        raise JaxguardError(f"these weights are of another model than {source}: {', '.join(odd)} on one side only")


def _layers(weight: Weight, array: jax.Array, spec: Spec) -> Iterator[np.ndarray]:
    """A weight's tensors in Hugging Face's layout, one at a time on this host."""
    if array.shape != weight.shape(spec):
        raise JaxguardError(
            f"weight {weight.path!r} has shape {array.shape}, but the source has {weight.shape(spec)}: another model"
        )
    if not weight.stacked:
        yield _theirs(weight, _on_host(array), spec)
        return
    for i in range(spec.layers):
        yield _theirs(weight, _on_host(jax.lax.dynamic_index_in_dim(array, i, keepdims=False)), spec)


def _on_host(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


@contextlib.contextmanager
def _copies(source: Path, folder: Path, tensors: Mapping[str, Stored]) -> Iterator[dict[str, BinaryIO]]:
    """The source's files copied; its weight files stay open for overwriting, by name."""
    copy_companions(source, folder)
    names = sorted({tensor.file.name for tensor in tensors.values()})
    for name in names:
        shutil.copyfile(source / name, folder / name)
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context((folder / name).open("r+b")) for name in names}


def copy_companions(source: Path, folder: Path) -> None:
    """Copy all that a checkpoint holds besides weights and README.md: config, tokenizer, chat templates, licence."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in WEIGHT_FILES and path.name not in {"README.md", ".gitattributes"}:
            shutil.copyfile(path, folder / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)


def _overwrite(tensor: Stored, values: np.ndarray, files: Mapping[str, BinaryIO]) -> int:
    """Write `values` where `tensor` lies, rounded to nearest even; count the stored numbers that change."""
    with np.errstate(over="ignore"):  # reported just below
        rounded = np.ascontiguousarray(values, dtype=tensor.dtype)
    if not np.isfinite(rounded).all():
        raise JaxguardError(f"tensor {tensor.name!r} has values that are not finite in {tensor.kind}: not exported")
    bits = np.dtype(f"u{tensor.dtype.itemsize}")
    changed = int(np.count_nonzero(rounded.view(bits) != tensor.view().view(bits)))
    if changed and files:
        file = files[tensor.file.name]
        file.seek(tensor.start)
        file.write(rounded.view(np.uint8).data)
    return changed
