"""Read the rows of a data set, from the hub with `datasets` and from local files directly, and the cells of a row.

`datasets` guesses column types, which turns prompts that look like dates into timestamps and the prompt `NA` into null, and its
errors do not name the line; hence local files are read here.
"""

import csv
import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import absent
from jaxguard.utils.hub import HTTP_ERROR
from jaxguard.utils.parse import (
    LINE_BYTES,
    ROWS_BYTES,
    check,
    check_unpacked,
    parse_json,
    read_lines,
    read_packed,
    shown,
    whole_text,
)

Row = dict[str, Any]
T = TypeVar("T")
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".json", ".json.gz", ".json.xz", ".parquet", ".csv")
_BATCH = 64
"""Rows of a parquet file that are read at once."""


class Table(NamedTuple):
    """Rows and their locations.

    Attributes:
        rows: (location, row); the location is shown in errors: `file:line`, or `name, row number`.
        origin: manifest entry: files with their hashes, or the hub's repository and revision.
    """

    rows: list[tuple[str, Row]]
    columns: tuple[str, ...]
    origin: dict[str, Any]


class Skip(Exception):  # noqa: N818 (not an error)
    """Skips a row; the text is the reason under which it is counted."""


def read_local(path: Path, stems: Iterable[str]) -> Table:
    """Read a file, or the files of a folder named after one of `stems` (STEM.*, STEM-00000-of-00003.*, STEM/*)."""
    files = find_files(path, stems)
    rows = [row for file in files for row in _read_file(file)]
    # In JSON lines any row may add a column.
    columns = tuple(dict.fromkeys(name for _, row in rows for name in row))
    return Table(rows, columns, {"files": {str(file): file_digest(file) for file in files}})


def read_hub(repository: str, config: str | None, split: str, file: str | None, revision: str | None) -> Table:
    """Read one split, or one file, of a data set on the hub, at a branch, tag or commit."""
    page, login = f"https://huggingface.co/datasets/{repository}", "run `hf auth login` or set HF_TOKEN"
    try:
        if revision is not None and not re.fullmatch("[0-9a-f]{40}", revision):
            revision = huggingface_hub.HfApi().dataset_info(repository, revision=revision).sha
        data = datasets.load_dataset(
            repository,
            name=config,
            split="train" if file else split,
            data_files=file,
            revision=revision,
            trust_remote_code=False,
        )
    except datasets.exceptions.DatasetNotFoundError as error:
        if "gated" in str(error).casefold():
            reason = f"is gated: accept its terms at {page} with your account, then {login}"
        else:
            reason = f"does not exist at {page}; if it is private or gated, get access there and {login}"
        raise JaxguardError(f"data set {repository} {reason}") from None
    except (ConnectionError, HfHubHTTPError, OfflineModeIsEnabled, HTTP_ERROR) as error:
        raise JaxguardError(
            f"cannot reach data set {repository} on the hub ({error}); with a copy on disk, set the source's path"
        ) from None
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise JaxguardError(f"data set {repository}, split {split!r}: {error}") from None
    rows = [(f"{repository} {split}, row {i}", dict(row)) for i, row in enumerate(data)]
    urls = sorted(data.info.download_checksums or {})
    commits = sorted({commit for url in urls for commit in re.findall("@([0-9a-f]{40})/", url)})
    commit = ", ".join(commits) or None
    if revision not in (None, commit):  # without a connection `datasets` takes the newest copy of its cache
        raise JaxguardError(f"data set {repository}: commit {revision} was asked for, but the local cache has {commit}")
    return Table(rows, tuple(data.column_names), {"hub": repository, "commit": commit, "split": split, "urls": urls})


def file_digest(path: Path) -> str:
    """Return the sha256 of a file, which is read again only if its size or time of change is another."""
    known = path.stat()
    return _digest(path.absolute(), known.st_size, known.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest(path: Path, _size: int, _changed: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def find_files(path: Path, stems: Iterable[str]) -> list[Path]:
    """Return a file, or the files of a folder that read_local reads."""
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise JaxguardError(f"{path}: unknown format; expected {', '.join(SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise JaxguardError(f"no data file or folder {path}: {absent(path)}")
    usable = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
    for stem in stems:
        names = {stem + suffix for suffix in SUFFIXES}
        files = [p for p in usable if p.name in names or p.name.startswith(f"{stem}-0") or p.parent == path / stem]
        if files:
            return files
    wanted = " or ".join(map(repr, stems))
    found = ", ".join(str(p.relative_to(path)) for p in usable[:10]) or "no data files"
    raise JaxguardError(
        f"{path} has no file named {wanted} ({', '.join(SUFFIXES)}); found: {found}; set the source's split"
    )


def _read_file(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        if path.name.endswith(".parquet"):
            yield from _parquet(path)
        elif path.name.endswith(".csv"):
            yield from _csv(path)
        else:
            yield from _json(path)
    except UnicodeDecodeError as error:
        raise JaxguardError(f"{path}: not UTF-8 text ({error})") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise JaxguardError(f"{path}: truncated or damaged file ({error}); fetch it again") from None


def _json(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the objects of JSON lines or, in a file named .json, of an array."""
    if ".json" in path.suffixes[-2:]:
        text = read_packed(path, ROWS_BYTES)
        if text.lstrip().startswith("["):
            rows = parse_json(text, list[Any], str(path), ROWS_BYTES)
            yield from ((place, check(row, Row, place)) for place, row in _numbered(path, rows))
            return
    for number, line in read_lines(path):
        if line.strip():
            yield f"{path}:{number}", parse_json(line, Row, f"{path}:{number}", LINE_BYTES)


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield rows in small batches: a value may stand in the file once and in a million rows."""
    total = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for place, row in _numbered(path, (row for batch in file.iter_batches(_BATCH) for row in batch.to_pylist())):
            total += sum(len(cell) for cell in row.values() if isinstance(cell, str | bytes | list))
            check_unpacked(path, total)
            yield place, row


def _numbered(path: Path, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{path}, row {i}", row) for i, row in enumerate(rows))


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    """Read cells as text, empty ones as null."""
    csv.field_size_limit(LINE_BYTES)
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.reader(iter(lambda: stream.readline(LINE_BYTES), ""), strict=True)
        try:
            header = next(reader, [])
            for cells in filter(None, reader):
                location = f"{path}:{reader.line_num}"
                if len(cells) != len(header):
                    raise JaxguardError(
                        f"{location}: {len(cells)} cells under {len(header)} column names; is a quote missing?"
                    )
                yield location, {name: cell or None for name, cell in zip(header, cells, strict=True)}
        except csv.Error as error:
            raise JaxguardError(f"{path}:{reader.line_num}: not CSV: {error}") from None


def weights_digest(folder: Path) -> str | None:
    """Hash of a folder's weights; None where there are none that can be read."""
    if not os.access(folder, os.R_OK):  # a server's own folder
        return None
    digests = [file_digest(path) for path in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(digests).encode()).hexdigest() if digests else None


def text(row: Row, column: str, location: str) -> str | None:
    """Read a cell of text."""
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise JaxguardError(f"{location}: {column} is {shown(value)}; expected text or null")
    return None if value is None else whole_text(value)


def label(row: Row, column: str, meaning: Mapping[str, T], location: str) -> T | None:
    """Read a label, one of the words of `meaning`."""
    value = row.get(column)
    if value is None or value == "":
        return None
    known = meaning.get(str(value).strip().casefold())
    if known is None:
        name = f" (id {shown(row['id'])})" if row.get("id") is not None else ""
        raise JaxguardError(f"{location}{name}: {column} is {shown(value)}; expected {', '.join(meaning)} or null")
    return known


def positive(row: Row, column: str, location: str) -> float | None:
    """Read a positive, finite number."""
    value = row.get(column)
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf):
        return value
    raise JaxguardError(f"{location}: {column} is {shown(value)}; expected a positive number or null")


def words(value: Any, location: str) -> tuple[str, ...]:
    """Read categories: a list, or text separated by commas."""
    parts = value.split(",") if isinstance(value, str) else [] if value is None else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise JaxguardError(f"{location}: categories are {shown(value)}; expected a list of texts")
    return tuple(part.strip() for part in parts if part.strip())


def objects(row: Row, column: str, keys: tuple[str, str], location: str) -> list[tuple[str, str]]:
    """Read a column of JSON objects, or their JSON text, as pairs of stripped texts; a missing one is empty."""
    value = row.get(column)
    place = f"{location}, {column}"
    value = parse_json(value, object, place) if isinstance(value, str) and value.strip() else value
    items = check(value or [], list[Row], place)
    first, second = keys
    return [((text(item, first, place) or "").strip(), (text(item, second, place) or "").strip()) for item in items]
