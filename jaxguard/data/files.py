"""Read the rows of a data set: from the hub with `datasets`, from local files directly.

`datasets` guesses column types, which turns prompts that look like dates into timestamps and the prompt `NA` into null, and its
errors do not name the line; hence local files are read here.
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
    """Rows and their locations.

    Attributes:
        rows: (location, row); the location is shown in errors: `file:line`, or `name, row number`.
        columns: every column of any row.
        origin: manifest entry: files with their hashes, or the hub's repository and revision.
    """

    rows: list[tuple[str, Row]]
    columns: tuple[str, ...]
    origin: dict[str, Any]


def read_local(path: Path, stems: Iterable[str]) -> Table:
    """Read a file, or the files of a folder named after one of `stems` (STEM.*, STEM-00000-of-00003.*, STEM/*).

    Raises:
        JaxguardError: no such file, unknown format, malformed line, truncated file.
    """
    files = _find_files(path, tuple(stems))
    rows = [row for file in files for row in _read_file(file)]
    # In JSON lines any row may add a column.
    columns = tuple(dict.fromkeys(name for _, row in rows for name in row))
    return Table(rows, columns, {"files": {str(file): file_digest(file) for file in files}})


def read_hub(repository: str, config: str | None, split: str, file: str | None) -> Table:
    """Read one split, or one file, of a data set on the hub.

    Raises:
        JaxguardError: no such data set or split, terms not accepted, hub unreachable.
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
    urls = sorted(data.info.download_checksums or {})  # they contain the revision
    return Table(rows, tuple(data.column_names), {"hub": repository, "split": split, "urls": urls})


def file_digest(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _missing(repository: str, message: str) -> str:
    page = f"https://huggingface.co/datasets/{repository}"
    login = "run `hf auth login` or set HF_TOKEN"
    if "gated" in message.casefold():
        return f"data set {repository} is gated: accept its terms at {page} with your account, then {login}"
    return f"data set {repository} does not exist at {page}; if it is private or gated, get access there and {login}"


def _find_files(path: Path, stems: tuple[str, ...]) -> list[Path]:
    if path.is_file():
        _suffix(path)
        return [path]
    if not path.is_dir():
        raise JaxguardError(f"no data file or folder {path}")
    usable = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
    for stem in stems:
        files = [p for p in usable if _stem(p) == stem or p.name.startswith(f"{stem}-0") or p.parent == path / stem]
        if files:
            return files
    wanted = " or ".join(repr(stem) for stem in stems)
    names = ", ".join(str(p.relative_to(path)) for p in usable[:10]) or "no data files"
    raise JaxguardError(
        f"{path} has no file named {wanted} ({', '.join(SUFFIXES)}); found: {names}; set the source's split"
    )


def _stem(path: Path) -> str:
    return path.name.removesuffix(_suffix(path))


def _suffix(path: Path) -> str:
    suffix = next((s for s in SUFFIXES if path.name.endswith(s)), None)
    if suffix is None:
        raise JaxguardError(f"{path}: unknown format; expected {', '.join(SUFFIXES)}")
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


def _object(line: str, location: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise JaxguardError(f"{location}: not JSON: {error.msg} at column {error.colno}") from None
    return _checked(row, location)


def _checked(row: Any, location: str) -> Row:
    if not isinstance(row, dict):
        raise JaxguardError(f"{location}: expected a JSON object, found {type(row).__name__}")
    return row


def _json_document(path: Path) -> Iterator[tuple[str, Row]]:
    """Read an array of objects, or JSON lines in a file named .json."""
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
        yield f"{path}, row {i}", _checked(row, f"{path}, row {i}")


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise JaxguardError(f"{path}: truncated or damaged Parquet file ({error}); fetch it again") from None
    for i, row in enumerate(rows):
        yield f"{path}, row {i}", row


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    """Read cells as text, empty ones as null."""
    csv.field_size_limit(_LONGEST_CELL)
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, [])
            for cells in reader:
                location = f"{path}:{reader.line_num}"
                if cells and len(cells) != len(header):
                    raise JaxguardError(
                        f"{location}: {len(cells)} cells under {len(header)} column names; is a quote missing?"
                    )
                if cells:
                    yield location, {name: cell or None for name, cell in zip(header, cells, strict=True)}
        except csv.Error as error:
            raise JaxguardError(f"{path}:{reader.line_num}: not CSV: {error}") from None
