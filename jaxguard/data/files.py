"""Rows of a data set: from the hub by `datasets`, from local files directly.

Local files are not given to `datasets`: it guesses a type for each column, so that prompts that look like dates come
back as timestamps and the prompt `NA` as null, and it does not say in which line of a file a mistake is.
"""

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.errors
import pyarrow
import pyarrow.parquet

from jaxguard.utils.errors import JaxguardError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv")
_LONGEST_CELL = 2**31 - 1


@dataclass(frozen=True)
class Table:
    """Rows and where they stand.

    Attributes:
        rows: (place, row), the place as shown in errors: `file:line`, or `name, row number`.
        columns: every column that some row has.
        origin: what the manifest says of it: files with their hashes, or the hub's repository and revision.
    """

    rows: list[tuple[str, Row]]
    columns: tuple[str, ...]
    origin: dict[str, Any]


def read_local(path: Path, stems: Iterable[str]) -> Table:
    """Read a file, or the files of a folder that are called one of `stems` (or `STEM-00000-of-00003`, or lie in STEM/).

    Raises:
        JaxguardError: no such file, another format, a malformed line, a truncated file.
    """
    files = _find_files(path, tuple(stems))
    rows = [row for file in files for row in _read_file(file)]
    # One pass over all rows, since in JSON lines any row may bring a column of its own.
    columns = tuple(dict.fromkeys(name for _, row in rows for name in row))
    return Table(rows, columns, {"files": {str(file): file_digest(file) for file in files}})


def read_hub(repository: str, config: str | None, split: str, file: str | None) -> Table:
    """Read one split, or one file, of a data set on the hub.

    Raises:
        JaxguardError: no such data set or split, terms not accepted yet, hub out of reach.
    """
    try:
        data = datasets.load_dataset(repository, name=config, split="train" if file else split, data_files=file)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise JaxguardError(_missing(repository, str(error))) from None
    except (
        ConnectionError,
        huggingface_hub.errors.HfHubHTTPError,
        huggingface_hub.errors.OfflineModeIsEnabled,
    ) as error:
        raise JaxguardError(
            f"cannot reach data set {repository} on the hub ({error}); with a copy on disk, set the source's path"
        ) from None
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise JaxguardError(f"data set {repository}, split {split!r}: {error}") from None
    rows = [(f"{repository} {split}, row {i}", dict(row)) for i, row in enumerate(data)]
    return Table(rows, tuple(data.column_names), {"hub": repository, "split": split, "urls": _urls(data)})


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _missing(repository: str, message: str) -> str:
    page = f"https://huggingface.co/datasets/{repository}"
    login = "run `hf auth login` or set HF_TOKEN"
    if "gated" in message.casefold():
        return f"data set {repository} is gated: accept its terms at {page} with your account, then {login}"
    return (
        f"data set {repository} is not to be found at {page}; if it is private or gated, get access there and {login}"
    )


def _urls(data: datasets.Dataset) -> list[str]:
    """The files that were read; their addresses hold the revision."""
    return sorted(data.info.download_checksums or {})


def _find_files(path: Path, stems: tuple[str, ...]) -> list[Path]:
    if path.is_file():
        _suffix(path)
        return [path]
    if not path.is_dir():
        raise JaxguardError(f"no data file or folder {path}")
    usable = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
    for stem in stems:
        found = [p for p in usable if _stem(p) == stem or p.name.startswith(f"{stem}-0") or p.parent == path / stem]
        if found:
            return found
    wanted = " or ".join(repr(stem) for stem in stems)
    names = ", ".join(str(p.relative_to(path)) for p in usable[:10]) or "no data files"
    raise JaxguardError(
        f"{path} has no file called {wanted} ({', '.join(SUFFIXES)}); found: {names}; set the source's split"
    )


def _stem(path: Path) -> str:
    return path.name.removesuffix(_suffix(path))


def _suffix(path: Path) -> str:
    suffix = next((s for s in SUFFIXES if path.name.endswith(s)), None)
    if suffix is None:
        raise JaxguardError(f"{path}: not a format that can be read; expected {', '.join(SUFFIXES)}")
    return suffix


def _read_file(path: Path) -> Iterator[tuple[str, Row]]:
    reader: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {
        ".jsonl": _json_lines,
        ".json": _json_document,
        ".parquet": _parquet,
        ".csv": _csv,
    }
    try:
        yield from reader[_suffix(path).removesuffix(".gz")](path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise JaxguardError(f"{path}: truncated or damaged gzip file ({error}); fetch it again") from None
    except UnicodeDecodeError as error:
        raise JaxguardError(f"{path}: not UTF-8 text ({error})") from None


def _text(path: Path) -> Any:
    return gzip.open(path, "rt", encoding="utf-8") if path.name.endswith(".gz") else path.open(encoding="utf-8")


def _json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    with _text(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield f"{path}:{number}", _object(line, f"{path}:{number}")


def _object(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise JaxguardError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise JaxguardError(f"{place}: expected a JSON object, found {type(row).__name__}")
    return row


def _json_document(path: Path) -> Iterator[tuple[str, Row]]:
    """One array of objects; or JSON lines under the name .json, as some hubs have it."""
    with _text(path) as stream:
        text = stream.read()
    if not text.lstrip().startswith("["):
        yield from _json_lines(path)
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise JaxguardError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise JaxguardError(f"{path}, row {i}: expected a JSON object, found {type(row).__name__}")
        yield f"{path}, row {i}", row


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise JaxguardError(f"{path}: truncated or damaged Parquet file ({error}); fetch it again") from None
    for i, row in enumerate(rows):
        yield f"{path}, row {i}", row


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    """Every cell is text, and an empty one is null."""
    csv.field_size_limit(_LONGEST_CELL)
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, [])
            for cells in reader:
                place = f"{path}:{reader.line_num}"
                if cells and len(cells) != len(header):
                    raise JaxguardError(
                        f"{place}: {len(cells)} cells under {len(header)} column names; is a quote missing?"
                    )
                if cells:
                    yield place, {name: cell or None for name, cell in zip(header, cells, strict=True)}
        except csv.Error as error:
            raise JaxguardError(f"{path}:{reader.line_num}: not CSV: {error}") from None
