"""Safetensors files on disk: where each tensor's bytes are, memory-mapped views, and writing rows in place.

Layout of a file: 8 bytes with the header's length (little endian), the header (JSON: name -> dtype, shape, byte range
after the header), then the bytes of all tensors.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from itertools import product
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import ml_dtypes
import numpy as np
from pydantic import Field
from safetensors import SafetensorError, safe_open

from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import Fields, PathPart, parse_json, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Element types that can be trained, by their names in a file's header."""

BLOCK = 16 * 2**20
"""Bytes that are read or copied at once."""

BAND = 1312
"""Rows that are rounded, compared and written while they are in the cache. Not a power of two: numbers at such a distance evict
each other."""


@dataclass(frozen=True)
class Stored:
    """One tensor on disk."""

    name: str
    file: Path
    kind: str  # element type as the header names it
    shape: tuple[int, ...]
    start: int  # its bytes in the file, from start to stop, excluded
    stop: int

    @property
    def dtype(self) -> np.dtype:
        """The element type; an error where it cannot be trained."""
        if self.kind not in DTYPES:
            raise JaxguardError(
                f"{self.file}: tensor {self.name!r} is stored as {self.kind}; supported: {', '.join(DTYPES)}. "
                "Quantised weights cannot be trained: use the original checkpoint"
            )
        return DTYPES[self.kind]

    def view(self) -> np.ndarray:
        """Memory-map the tensor: indexing reads only the pages that it touches."""
        raw = np.memmap(self.file, mode="r", offset=self.start, shape=(self.stop - self.start,), dtype=np.uint8)
        return raw.view(np.ndarray).view(self.dtype).reshape(self.shape)

    def read_ahead(self) -> None:
        """Let the system begin to read all of it, in larger parts than page faults would."""
        with self.file.open("rb") as file:
            _advise(file, self.start, self.stop, "WILLNEED")


def _advise(file: BinaryIO, start: int, stop: int, what: Literal["WILLNEED", "DONTNEED"]) -> None:
    """Let the system begin to read bytes of a file, or to write changed ones to the disk, without waiting for it."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(file.fileno(), start, stop - start, getattr(os, f"POSIX_FADV_{what}"))


def open_folder(folder: Path) -> dict[str, Stored]:
    """Map names to tensors of a whole checkpoint, single-file or sharded.

    Raises:
        JaxguardError: no safetensors, a corrupt index, one that disagrees with its files, or a truncated file.
    """
    tensors = {name: tensor for file in shard_files(folder) for name, tensor in open_file(file).items()}
    for name, file in _weight_map(folder).items():
        if name not in tensors or tensors[name].file.name != file:
            raise JaxguardError(f"{folder / INDEX} says that tensor {name!r} is in {file!r}, which does not hold it")
    return tensors


def shard_files(folder: Path) -> list[Path]:
    """List the files that hold a checkpoint's weights."""
    files = [folder / name for name in sorted(set(_weight_map(folder).values()))]
    for file in files:
        if not file.is_file():
            raise JaxguardError(f"{folder / INDEX} names the file {file.name!r}, which is absent: download it again")
    if files or (folder / SINGLE).is_file():
        return files or [folder / SINGLE]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        raise JaxguardError(
            f"{folder} holds PyTorch pickles but no safetensors: take a revision with *.safetensors, or convert it "
            "(transformers loads it, save_pretrained writes safetensors)"
        )
    raise JaxguardError(f"{folder} has neither {SINGLE} nor {INDEX}: no weights to read")


@dataclass(frozen=True)
class _Index:
    """An index file: tensor -> file of the same folder."""

    weight_map: Annotated[dict[str, PathPart], Field(min_length=1)]


def _weight_map(folder: Path) -> dict[str, str]:
    """Read the index of a sharded checkpoint, name -> file; empty without one."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        return read_json(path, _Index).weight_map
    except JaxguardError as error:
        raise JaxguardError(f"{error}; download it again") from None


def open_file(path: Path) -> dict[str, Stored]:
    """Map names to tensors of one safetensors file, in the order of its header."""
    try:
        with safe_open(path, framework="numpy"):  # the library checks the header against the file's length
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(length), Fields, str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise JaxguardError(
            f"{path} is truncated or not a safetensors file ({str(error)[:300]}): download or copy it again"
        ) from None
    header.pop("__metadata__", None)
    return {
        name: Stored(name, path, t["dtype"], tuple(t["shape"]), *(8 + length + x for x in t["data_offsets"]))
        for name, t in header.items()
    }


def parts_of_rows(values: np.ndarray, dtype: np.dtype) -> Iterator[slice]:
    """Yield slices of rows of about BLOCK bytes in this element type, in whole bands: the work of a thread at a time."""
    rows = BAND * max(1, BLOCK // (BAND * values.shape[1] * dtype.itemsize))
    return (slice(start, start + rows) for start in range(0, len(values), rows))


def cast_tiles(values: np.ndarray, target: np.ndarray, tile: tuple[int, int]) -> None:
    """Copy a matrix into another of its shape, rounded to nearest even, tile by tile; both may have any layout.

    The tile's size decides the speed: what is read and what is written should fit the cache, and the one that is not in it yet
    should be contiguous over many elements.
    """
    dtype, bits = target.dtype, f"u{target.dtype.itemsize}"  # NumPy copies integers faster than bfloat16
    target = target.view(bits)
    with np.errstate(over="ignore"):  # callers check for infinities
        for row, column in product(*map(range, (0, 0), values.shape, tile)):
            cut = slice(row, row + tile[0]), slice(column, column + tile[1])
            target[cut] = values[cut].astype(dtype).view(bits)


def all_finite(values: np.ndarray) -> bool:
    """Whether no value is a NaN or an infinity. Compared as integers: NumPy does so faster, and NaNs are larger."""
    size = values.dtype.itemsize
    positive, negative = np.array([np.inf, -np.inf], values.dtype).view(f"u{size}")
    return bool(np.max(values.view(f"u{size}")) < negative and np.max(values.view(f"i{size}")) < positive)


def write_rows(tensor: Stored, values: np.ndarray, start: int, file: BinaryIO | None) -> int:
    """Round rows of a tensor, [rows, columns] from row `start`, and write them in their place in a file like the tensor's.

    Several threads may use the file; None only compares. Returns how many elements differ from the tensor's.

    Raises:
        JaxguardError: values that are not finite in the element type, or a tensor whose file was truncated.
    """
    bits = np.dtype(f"u{tensor.dtype.itemsize}")
    width = values.shape[1] * bits.itemsize
    begin, changed = tensor.start + start * width, 0
    buffer = np.empty((min(BAND, len(values)), values.shape[1]), tensor.dtype)
    with tensor.file.open("rb", buffering=0) as base:
        base.seek(begin)
        for row in range(0, len(values), BAND):
            rows = values[row : row + BAND]
            cast_tiles(rows, buffer[: len(rows)], (BAND, 128))
            band = buffer[: len(rows)].view(bits).reshape(-1)
            if not all_finite(buffer[: len(rows)]):
                raise JaxguardError(
                    f"tensor {tensor.name!r} has values that are not finite in {tensor.kind}: not exported"
                )
            left, offset = band.view(np.uint8).data, begin + row * width
            while file is not None and left:  # without the file's own position, which threads share
                written = os.pwrite(file.fileno(), left, offset)
                left, offset = left[written:], offset + written
            changed += _count_differences(band, base)
    if file is not None:  # else fsync would wait for all of it at the end
        _advise(file, begin, begin + len(values) * width, "DONTNEED")
    return changed


def _count_differences(values: np.ndarray, file: FileIO) -> int:
    """Count the elements that differ from the next in the file. They are read: cheaper than mapping pages that are used once."""
    differing, buffer = 0, np.empty(min(len(values), 2**18), values.dtype)
    for start in range(0, len(values), len(buffer)):
        part = values[start : start + len(buffer)]
        stored = buffer[: len(part)]
        if file.readinto(stored.view(np.uint8).data) != stored.nbytes:
            raise JaxguardError(f"{file.name} was truncated meanwhile: copy it again")
        differing += int(np.count_nonzero(part != stored))
    return differing
