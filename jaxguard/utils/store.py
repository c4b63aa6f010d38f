"""An append-only JSONL file that a kill at any moment leaves usable, and the settings that its records must share.

The first line holds the settings that all records have in common; every line carries a checksum. A record that was appended is
never lost to a kill. A last line that was cut off is dropped when the file is opened to append; a damaged line is skipped.
"""

import json
import logging
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

from jaxguard.utils.errors import JaxguardError, ProvenanceError
from jaxguard.utils.parse import LINE_BYTES, Fields, check, shown

logger = logging.getLogger(__name__)

Record = TypeVar("Record")


@dataclass
class Store:
    """A file that this process appends to; see `open_store`."""

    path: Path
    _file: FileIO

    def append(self, record: Mapping[str, Any], name: str = "record") -> None:
        """Append a record of JSON values: once this returns, killing the process does not lose it.

        JaxguardError: it cannot be written; the file is as before.
        """
        size, rest = os.fstat(self._file.fileno()).st_size, memoryview(_sealed(name, record))
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

    Raises:
        ProvenanceError: it was begun with other `settings` (what decides the records; JSON); says the `remedy`.
        JaxguardError: its settings are damaged, or it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = FileIO(str(path), "ab")
    except OSError as error:
        raise JaxguardError(f"cannot write to {path}: {error.strerror or error}") from None
    with file:
        store = Store(path, file)
        with path.open("rb") as lines:
            end = sum(len(line) for line in lines if line.endswith(b"\n"))
            if lines.tell() > end:
                logger.warning("%s: a last line that was cut off is dropped; what it held will be made again", path)
                file.truncate(end)
        if end:
            changes = differences(read_settings(path), json.loads(json.dumps(settings)))
            refuse_others(changes, f"{path} holds records that were made with other settings:", remedy)
        else:
            store.append(settings, "settings")
        try:
            yield store
        finally:
            os.fsync(file.fileno())


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings that a file was begun with.

    JaxguardError: there is no such file, or its first line is damaged.
    """
    try:
        with path.open("rb") as file:
            return _unsealed("settings", file.readline(LINE_BYTES), Fields)
    except OSError as error:
        raise JaxguardError(f"cannot read {path}: {error.strerror or error}") from None
    except JaxguardError:
        raise JaxguardError(
            f"{path} is damaged: its first line does not tell the settings of its records; move it away to begin anew"
        ) from None


def read_records(path: Path, shape: type[Record]) -> Iterator[Record]:
    """Yield the records of a file, oldest first, as `shape`, see parse_json; none where there is no file.

    Damaged lines, and records of another shape, are skipped with a warning that counts them. Safe while another process
    appends; memory does not grow with the file.
    """
    if not path.is_file():
        return
    damaged = 0
    with path.open("rb") as file:
        file.readline()
        for line in file:
            try:
                record = _unsealed("record", line, shape)
            except JaxguardError:
                damaged += 1
            else:
                yield record
    if damaged:
        logger.warning("%s: %d damaged lines are skipped; what they held will be made again", path, damaged)


def _sealed(name: str, record: Mapping[str, Any]) -> bytes:
    """Return a record as one line of JSON with a checksum."""
    body = json.dumps(record, ensure_ascii=True, sort_keys=True)
    return f'{{"crc32": {zlib.crc32(body.encode())}, "{name}": {body}}}\n'.encode()


def _unsealed(name: str, line: bytes, shape: type[Record]) -> Record:
    """Return the record of such a line; JaxguardError: it is damaged, or of another shape."""
    sealed = re.fullmatch(rb'\{"crc32": (\d{1,10}), "%b": (.*)\}\n' % name.encode(), line, re.DOTALL)
    if sealed is None or zlib.crc32(sealed[2]) != int(sealed[1]):
        raise JaxguardError("the checksum is another")
    try:
        record = json.loads(sealed[2])  # exactly what was appended, half a surrogate pair included
    except (ValueError, RecursionError) as error:
        raise JaxguardError(str(error)) from None
    return check(record, shape, name)


def differences(old: Any, new: Any, field: str = "") -> dict[str, tuple[Any, Any]]:
    """Return dotted field -> (old, new) for every leaf that differs between two plain trees; None where it is absent."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = (dict(enumerate(values)) for values in (old, new))
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return {} if old == new else {field: (old, new)}
    changes: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*old, *new]):
        changes |= differences(old.get(key), new.get(key), f"{field}.{key}" if field else str(key))
    return changes


def refuse_others(changes: Mapping[str, tuple[Any, Any]], holds: str, remedy: str) -> None:
    """Raise a ProvenanceError that says what exists (`holds`), every change as from `differences`, and the remedy."""
    if changes:
        lines = (f"  {field[:200]}: {shown(old)} there, {shown(new)} now" for field, (old, new) in changes.items())
        raise ProvenanceError("\n".join([holds, *lines, remedy]))
