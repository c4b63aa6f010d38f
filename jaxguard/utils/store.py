"""An append-only JSONL file that a kill at any moment leaves usable.

The first line holds the settings that all records have in common; every line carries a checksum. A record that was appended is
never lost to a kill. A last line that was cut off is dropped when the file is opened to append; a damaged line is skipped.
"""

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically
from jaxguard.utils.provenance import differences, refuse_others

logger = logging.getLogger(__name__)

Record = TypeVar("Record")


@dataclass
class Store:
    """A file that this process appends to; see `open_store`.

    Attributes:
        path: the file.
    """

    path: Path
    _file: FileIO

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a record of JSON values: once this returns, killing the process does not lose it.

        Raises:
            JaxguardError: it cannot be written; the file is as before.
        """
        size, rest = os.fstat(self._file.fileno()).st_size, memoryview(_sealed("record", record))
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(size)  # nothing may follow half a line
            raise JaxguardError(
                f"cannot write to {self.path}: {error.strerror or error}; free some space and run again: what was appended "
                "is kept"
            ) from None


@contextmanager
def open_store(path: Path, settings: Mapping[str, Any], remedy: str) -> Iterator[Store]:
    """Open a file to append to, or create it. The caller holds a lock: there is one writer.

    Args:
        path: the file.
        settings: what decides the records. JSON.
        remedy: what to do where the file was begun with other settings.

    Raises:
        ProvenanceError: it was begun with other settings.
        JaxguardError: its settings are damaged, or it cannot be written.
    """
    header = _sealed("settings", settings)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_cut_line(path)
        if path.is_file() and path.stat().st_size:
            changes = differences(read_settings(path), _unsealed("settings", header))
            refuse_others(changes, f"{path} holds records that were made with other settings:", remedy)
        else:
            write_atomically(path, header.decode())
        file = FileIO(str(path), "ab")
    except OSError as error:
        raise JaxguardError(f"cannot write to {path}: {error.strerror or error}") from None
    with file:
        try:
            yield Store(path, file)
        finally:
            os.fsync(file.fileno())


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that a file was begun with.

    Raises:
        JaxguardError: there is no such file, or its first line is damaged.
    """
    try:
        with path.open("rb") as file:
            settings = _unsealed("settings", file.readline())
    except OSError as error:
        raise JaxguardError(f"cannot read {path}: {error.strerror or error}") from None
    if settings is None:
        raise JaxguardError(
            f"{path} is damaged: its first line does not tell the settings of its records; move it away to begin anew"
        )
    return settings


def read_records(path: Path, parse: Callable[[dict[str, Any]], Record]) -> Iterator[Record]:
    """The records of a file, oldest first, as `parse` makes them; none where there is no file.

    Damaged lines, and records for which `parse` raises KeyError, TypeError or ValueError, are skipped with a warning that
    counts them. Safe while another process appends; memory does not grow with the file.
    """
    if not path.is_file():
        return
    damaged = 0
    with path.open("rb") as file:
        file.readline()
        for line in file:
            record = _unsealed("record", line)
            try:
                parsed = None if record is None else parse(record)
            except (KeyError, TypeError, ValueError):
                parsed = None
            if parsed is None:
                damaged += 1
            else:
                yield parsed
    if damaged:
        logger.warning("%s: %d damaged lines are skipped; what they held will be made again", path, damaged)


def _drop_cut_line(path: Path) -> None:
    """Cut a file behind its last complete line."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        end = sum(len(line) for line in file if line.endswith(b"\n"))
        if file.tell() > end:
            logger.warning("%s: a last line that was cut off is dropped; what it held will be made again", path)
            file.truncate(end)


def _sealed(name: str, record: Mapping[str, Any]) -> bytes:
    """A record as one line of JSON with a checksum."""
    body = json.dumps(record, ensure_ascii=True, sort_keys=True)
    return f'{{"crc32": {zlib.crc32(body.encode())}, "{name}": {body}}}\n'.encode()


def _unsealed(name: str, line: bytes) -> dict[str, Any] | None:
    """The record of such a line; None if the line is damaged."""
    try:
        record = json.loads(line)[name]
    except (ValueError, KeyError, TypeError):
        return None
    return record if isinstance(record, dict) and _sealed(name, record) == line else None
