"""The rows of a benchmark: from the hub, a URL, a training source, or a local copy with the same columns."""

import dataclasses
import json
import lzma
import tempfile
import urllib.request
from collections import Counter
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
from huggingface_hub import errors

from jaxguard.config.lookup import locate
from jaxguard.data.examples import Example
from jaxguard.data.files import SUFFIXES, Row, Table, file_digest, read_hub, read_local
from jaxguard.data.sources import load
from jaxguard.evaluate.benchmarks.schema import BenchmarkSource
from jaxguard.utils.errors import JaxguardError

_SECONDS = 60
_COPY = "with a copy on disk, give it as the benchmark's local file"


def read_rows(source: BenchmarkSource, name: str, local: Path | None) -> tuple[Table, Counter[str]]:
    """Read the rows of a source, or of a local copy of it.

    Args:
        source: where they are.
        name: of the benchmark.
        local: a file, or a folder with a file named after the split, the source's own file, or the benchmark, as a clone of
            the source has it.

    Returns:
        The rows, and what was skipped in reading (reason -> count).

    Raises:
        JaxguardError: they cannot be reached, are not there, or malformed.
    """
    if source.data is not None:
        data = source.data if local is None else source.data.model_copy(update={"path": str(local.expanduser())})
        loaded = load(data)
        rows = [(f"{data.path or data.kind}, example {each.id!r}", each.to_json()) for each in loaded.examples]
        return Table(rows, tuple(f.name for f in dataclasses.fields(Example)), loaded.origin), loaded.skipped
    path = local or (locate(Path(source.path)) if source.path else None)
    if path is not None:
        table = _read_copy(path.expanduser(), source, name)
    elif source.url:
        table = _read_bytes(_fetch(source.url), PurePosixPath(source.url).name, source.url, source.keys_as)
    elif source.file:
        table = _read_hub_file(source.hub or "", source.file, source.revision, source.keys_as)
    else:
        table = _joined({split: read_hub(source.hub or "", source.config, split, None) for split in source.splits})
    return table, Counter()


def _read_copy(path: Path, source: BenchmarkSource, name: str) -> Table:
    remote = source.file or source.url
    stems = [*([_stem(PurePosixPath(remote).name)] if remote else []), name]
    if source.file and (path / source.file).is_file():
        path = path / source.file
    if path.is_dir():
        if len(source.splits) > 1:
            return _joined({split: read_local(path, [split]) for split in source.splits})
        if not source.keys_as and not (remote or "").endswith(".xz"):
            return read_local(path, [*source.splits, *stems])
        files = sorted(each for each in path.rglob("*") if each.is_file() and _stem(each.name) in stems)
        if not files:
            raise JaxguardError(f"{path} has no file named {' or '.join(map(repr, stems))}")
        path = files[0]
    return _read_file(path, source.keys_as)


def _read_file(path: Path, keys_as: str | None) -> Table:
    """A file in a format of read_local, one compressed by xz, or one object of lists of rows."""
    if path.name.endswith(".xz") and path.is_file():
        try:
            data = lzma.decompress(path.read_bytes())
        except (lzma.LZMAError, EOFError) as error:
            raise JaxguardError(f"{path}: truncated or damaged xz file ({error}); fetch it again") from None
        table = _read_bytes(data, path.name.removesuffix(".xz"), str(path), keys_as)
    elif keys_as is None or not path.is_file():
        return read_local(path, ())
    else:
        table = _table(_lists_of_rows(path, keys_as), {})
    return Table(table.rows, table.columns, {"files": {str(path): file_digest(path)}})


def _lists_of_rows(path: Path, keys_as: str) -> list[tuple[str, Row]]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise JaxguardError(f"{path}: not JSON: {error}") from None
    lists: dict[str, Any] = tree if isinstance(tree, dict) else {"": None}
    if not all(isinstance(rows, list) and all(isinstance(row, dict) for row in rows) for rows in lists.values()):
        raise JaxguardError(f"{path}: source.keys_as expects one JSON object whose values are lists of rows")
    return [
        (f"{path}, {key!r} row {i}", {keys_as: key, **row}) for key, rows in lists.items() for i, row in enumerate(rows)
    ]


def _fetch(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:  # noqa: S310 (https only, see BenchmarkSource)
            data: bytes = answer.read()
            return data
    except (OSError, HTTPException) as error:
        raise JaxguardError(f"cannot fetch {url} ({error}); {_COPY}") from None


def _read_bytes(data: bytes, name: str, origin: str, keys_as: str | None) -> Table:
    """The contents of a file, with `origin` in the rows' locations."""
    with tempfile.TemporaryDirectory() as folder:
        # Some hubs call an array of rows .jsonl; what is called .json may be either.
        path = Path(folder) / name.replace(".jsonl", ".json")
        path.write_bytes(data)
        try:
            table = _read_file(path, keys_as)
        except JaxguardError as error:
            raise JaxguardError(str(error).replace(str(path), origin)) from None
        rows = [(location.replace(str(path), origin), row) for location, row in table.rows]
        return Table(rows, table.columns, {"files": {origin: file_digest(path)}})


def _read_hub_file(repository: str, file: str, revision: str | None, keys_as: str | None) -> Table:
    source = f"{file} of data set {repository}" + (f" at revision {revision!r}" if revision else "")
    page = f"https://huggingface.co/datasets/{repository}"
    try:
        path = huggingface_hub.hf_hub_download(repository, file, repo_type="dataset", revision=revision)
    except errors.GatedRepoError:
        raise JaxguardError(
            f"data set {repository} is gated: accept its terms at {page} with your account, then run `hf auth login` "
            "or set HF_TOKEN"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise JaxguardError(f"{source} is not in the local cache and the hub cannot be reached; {_COPY}") from None
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, OSError) as error:
        raise JaxguardError(f"cannot get {source}; see {page} ({error})") from None
    table = _read_bytes(Path(path).read_bytes(), PurePosixPath(file).name, f"{repository}/{file}", keys_as)
    return Table(table.rows, table.columns, {"hub": repository, "revision": revision, **table.origin})


def _joined(tables: dict[str, Table]) -> Table:
    """One table of several splits, with each row's split as a column."""
    if len(tables) == 1:
        return next(iter(tables.values()))
    rows = [(location, {"split": split, **row}) for split, table in tables.items() for location, row in table.rows]
    return _table(rows, {"splits": {split: table.origin for split, table in tables.items()}})


def _table(rows: list[tuple[str, Row]], origin: dict[str, object]) -> Table:
    return Table(rows, tuple(dict.fromkeys(column for _, row in rows for column in row)), origin)


def _stem(name: str) -> str:
    name = name.removesuffix(".xz")
    return name.removesuffix(next((suffix for suffix in SUFFIXES if name.endswith(suffix)), ""))
