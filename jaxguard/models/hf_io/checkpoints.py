"""Read a Hugging Face folder into sharded arrays, and export trained arrays as a Hugging Face folder.

Reading touches only the bytes that this host's devices need. Exporting copies the source's files and replaces the trained
tensors' bytes, so headers, key order, element types and whatever is not trained (a vision tower) stay as they are: exporting
unchanged weights gives the same files, bit for bit.
"""

import contextlib
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tokenizers import Tokenizer

from jaxguard.models.hf_io.loading import Load, in_host_memory, load
from jaxguard.models.hf_io.safetensors import BLOCK, Stored, open_folder, parts_of_rows, write_rows
from jaxguard.models.spec import Spec, read_spec
from jaxguard.models.weights import EMBED, HEAD, Weight, table
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import whole_folder
from jaxguard.utils.threads import in_turn

PREFIXES = ("model.", "language_model.model.", "model.language_model.")
"""Prefix of a text weight's name: text-only models; multimodal Gemma 3 on disk; the same saved from memory."""

HEAD_PREFIXES = ("", "language_model.")

CARRIED = (
    "vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.",
)  # fmt: skip
"""Parts of a multimodal checkpoint that are not trained: copied as bytes."""

WEIGHT_FILES = {".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt"}

# The text-only Gemma 3 1B shares its tokenizer with the multimodal sizes: this token's id is just beyond its
# vocabulary, and no text chat produces it.
_IMAGE_TOKEN = "<image_soft_token>"  # noqa: S105

Tensors = dict[Weight, tuple[Stored, ...]]
"""For each row of the table, its tensors on disk: one per layer, or a single one."""


@dataclass(frozen=True)
class ExportReport:
    """Numbers of an export.

    Attributes:
        tensors: trained tensors.
        carried: tensors copied as bytes.
        values: elements of the trained tensors.
        changed: elements that differ from the base, as stored.
        dtypes: element types that the trained tensors are stored in.
    """

    tensors: int
    carried: int
    values: int
    changed: int
    dtypes: tuple[str, ...]

    @property
    def changed_fraction(self) -> float:
        """Share of the stored elements that differ from the base."""
        return self.changed / self.values


def read_weights(
    folder: Path,
    spec: Spec,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    dtype: Any = jnp.float32,
) -> dict[str, jax.Array]:
    """Read a checkpoint into a dict path -> array.

    Args:
        folder: a Hugging Face folder with safetensors.
        spec: its spec.
        shardings: path -> sharding; None puts everything on the default device.
        dtype: element type of the matrices in memory; norms are float32.

    Raises:
        JaxguardError: missing, unknown, misshapen or quantised tensor, or corrupt files.
    """
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    loads = [
        Load(
            weight,
            tensors,
            alone if shardings is None else shardings[weight.path],
            np.dtype(jnp.float32 if "norm" in weight.axes else dtype),
        )
        for weight, tensors in _locate(folder, spec, open_folder(folder)).items()
    ]
    return load(loads, spec)


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
        names = _names(weight, prefix, spec, tensors)
        located[weight] = tuple(_checked(folder, name, weight.hf_shape(spec), tensors) for name in names)
    known = {tensor.name for stored in located.values() for tensor in stored}
    extra = sorted(set(tensors) - known - set(_tied_heads(spec, tensors)))
    extra = [name for name in extra if not name.startswith(CARRIED) and not name.endswith(".rotary_emb.inv_freq")]
    if extra:
        raise JaxguardError(
            f"{folder} holds {len(extra)} tensors that a {spec.family} model of {spec.num_layers} layers does not have, "
            f"such as {extra[0]!r}: check config.json, or use the original (not quantised, not adapted) checkpoint"
        )
    return located


def _names(weight: Weight, prefix: str, spec: Spec, tensors: Mapping[str, Stored]) -> list[str]:
    if weight == HEAD:
        return [next((p + HEAD.hf for p in HEAD_PREFIXES if p + HEAD.hf in tensors), HEAD.hf)]
    return [prefix + weight.hf.format(i=i) for i in range(spec.num_layers if weight.stacked else 1)]


def _checked(folder: Path, name: str, shape: tuple[int, ...], tensors: Mapping[str, Stored]) -> Stored:
    if name not in tensors:
        raise JaxguardError(f"{folder} lacks the tensor {name!r}, which its config.json requires")
    tensor = tensors[name]
    if tensor.shape != shape:
        raise JaxguardError(f"{tensor.file}: tensor {name!r} has shape {tensor.shape}; config.json requires {shape}")
    _ = tensor.dtype  # raises for a type that cannot be trained
    return tensor


def _tied_heads(spec: Spec, tensors: Mapping[str, Stored]) -> list[str]:
    """Names of a tied head that the checkpoint stores nevertheless: ignored when read, written as the embedding."""
    return [p + HEAD.hf for p in HEAD_PREFIXES if spec.tied and p + HEAD.hf in tensors]


def check_vocabulary(folder: Path, spec: Spec) -> None:
    """Refuse a tokenizer with ids for which there is no embedding.

    Raises:
        JaxguardError: no tokenizer.json, or ids beyond the vocabulary.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise JaxguardError(f"{folder} has no tokenizer.json: download the checkpoint with its tokenizer")
    try:
        ids = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception
        raise JaxguardError(f"{path} is not a valid tokenizer: {error}") from None
    beyond = {token: i for token, i in ids.items() if i >= spec.vocab_size and token != _IMAGE_TOKEN}
    if beyond:
        token = min(beyond, key=beyond.__getitem__)
        raise JaxguardError(
            f"{path}: {len(beyond)} tokens have ids beyond the model's vocabulary of {spec.vocab_size}, first {token!r} = "
            f"{beyond[token]}: resize the model's embeddings, or use the tokenizer that belongs to it"
        )


def export_hf(weights: Mapping[str, jax.Array], source: Path, output: Path) -> ExportReport:
    """Write trained weights as a Hugging Face folder with exactly the source's files.

    Every process of a multi-host run calls this; process 0 writes. The folder appears at the end, complete.

    Args:
        weights: path -> array, as read_weights returns them; each is read once, in the order of the table.
        source: the checkpoint that training started from.
        output: folder to create.

    Raises:
        JaxguardError: weights of another model, values that are not finite, an output folder that is not empty, a full
            disk, or a corrupt source.
    """
    spec = read_spec(source)
    tensors = open_folder(source)
    located = _locate(source, spec, tensors)
    _check_weights(weights, spec, source)
    own = [tensor for stored in located.values() for tensor in stored]
    tied = [tensors[name] for name in _tied_heads(spec, tensors)]
    writer = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        size = sum(tensor.stop - tensor.start for tensor in tensors.values())
        folder = stack.enter_context(whole_folder(output, size)) if writer else None
        files = {} if folder is None else stack.enter_context(_copied_files(source, folder, tensors, [*own, *tied]))
        parts = _parts(_values(weights, located, tied, spec))
        # More threads than cores, since they also wait for each other at a file.
        changed = sum(in_turn(lambda part: _write(*part, files), parts, threads=3, ahead=6))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("export_hf")
    return ExportReport(
        tensors=len(own) + len(tied),
        carried=len(tensors) - len(own) - len(tied),
        values=sum(math.prod(tensor.shape) for tensor in own),
        changed=changed,
        dtypes=tuple(sorted({tensor.kind for tensor in own})),
    )


def _check_weights(weights: Mapping[str, jax.Array], spec: Spec, source: Path) -> None:
    paths = {weight.path for weight in table(spec)}
    if set(weights) != paths:
        odd = sorted(set(weights) ^ paths)
        raise JaxguardError(f"these weights are of another model than {source}: {', '.join(odd)} on one side only")


def _values(
    weights: Mapping[str, jax.Array], located: Tensors, tied: Sequence[Stored], spec: Spec
) -> Iterator[tuple[list[Stored], np.ndarray]]:
    """Yield the tensors to write, and their values: a view in Hugging Face's layout of an array in ours."""
    for weight, stored in located.items():
        array = weights[weight.path]
        if array.shape != weight.shape(spec):
            raise JaxguardError(
                f"weight {weight.path!r} has shape {array.shape}, but the source has {weight.shape(spec)}: another model"
            )
        for i, tensor in enumerate(stored):
            copies = [tensor, *(tied if weight == EMBED else ())]
            dtype = np.result_type(*(copy.dtype for copy in copies))
            values = _on_host(array, i if weight.stacked else None, dtype)
            yield copies, weight.to_hf(values)


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
    source: Path, folder: Path, tensors: Mapping[str, Stored], trained: Sequence[Stored]
) -> Iterator[dict[str, BinaryIO]]:
    """Copy the source's files except for the trained tensors' bytes; yield the weight files, open, by name."""
    copy_companions(source, folder)
    with contextlib.ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for path in sorted({tensor.file for tensor in tensors.values()}):
            files[path.name] = stack.enter_context((folder / path.name).open("w+b"))
            own = sorted((tensor.start, tensor.stop) for tensor in trained if tensor.file == path)
            ends = [0, *(stop for _, stop in own)], [*(start for start, _ in own), path.stat().st_size]
            with path.open("rb") as original:
                for start, stop in zip(*ends, strict=True):
                    _copy(original, files[path.name], start, stop)
            files[path.name].truncate(path.stat().st_size)
        yield files


def _copy(original: BinaryIO, copy: BinaryIO, start: int, stop: int) -> None:
    original.seek(start)
    copy.seek(start)
    for offset in range(start, stop, BLOCK):
        copy.write(original.read(min(BLOCK, stop - offset)))


def copy_companions(source: Path, folder: Path) -> None:
    """Copy a checkpoint's other files, except for README.md: config, tokenizer, chat templates, licence."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in WEIGHT_FILES and path.name not in {"README.md", ".gitattributes"}:
            shutil.copyfile(path, folder / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)


def _parts(tensors: Iterable[tuple[list[Stored], np.ndarray]]) -> Iterator[tuple[list[Stored], np.ndarray, int]]:
    """Split each tensor into parts of some rows, with the number of the first, so that threads share even the largest."""
    for copies, values in tensors:
        matrix = np.atleast_2d(values)
        for copy in copies:
            copy.read_ahead()
        for rows in parts_of_rows(matrix, copies[0].dtype):
            yield copies, matrix[rows], rows.start


def _write(copies: Sequence[Stored], values: np.ndarray, start: int, files: Mapping[str, BinaryIO]) -> int:
    """Write rows of a tensor and its copies; return how many elements of the first differ from the base."""
    changed, *_ = [write_rows(tensor, values, start, files[tensor.file.name] if files else None) for tensor in copies]
    return changed
