"""Arrays in a file that says what they were computed from: a line, key and SHA-256 of the rest, and then NumPy's .npz."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from jaxguard.utils.files import write_atomically


class DamagedError(ValueError):
    """A file that is not what was written."""


def write_arrays(path: Path, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays under a key; the file appears whole or not at all. JaxguardError: it cannot be written."""
    stream = io.BytesIO()
    np.savez(stream, **dict(arrays))  # type: ignore[arg-type]
    contents = stream.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{key} {hashlib.sha256(contents).hexdigest()}\n".encode() + contents)


def read_arrays(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """Read the arrays that were written under a key; None where there is no file, or one of another key. DamagedError."""
    if not path.is_file():
        return None
    try:
        header, _, contents = path.read_bytes().partition(b"\n")
        known, checksum = header.decode("ascii").split(" ")
        if checksum != hashlib.sha256(contents).hexdigest():
            raise ValueError("its checksum is another")
        if known != key:
            return None
        with np.load(io.BytesIO(contents), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, LookupError, ValueError, BadZipFile) as error:
        raise DamagedError(f"{path} is damaged ({error})") from None
