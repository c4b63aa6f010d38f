"""The rows of a benchmark: from the hub, an address, a data source, or a local copy with the same columns."""

import dataclasses
import http.client
import json
import lzma
import tempfile
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import huggingface_hub
import huggingface_hub.errors

from jaxguard.config.data import SourceConfig
from jaxguard.config.lookup import locate
from jaxguard.data.examples import Example
from jaxguard.data.files import SUFFIXES, Row, Table, file_digest, read_hub, read_local
from jaxguard.data.sources import load
from jaxguard.evaluate.benchmarks.schema import BenchmarkSource
from jaxguard.utils.errors import JaxguardError

_SECONDS = 60


def read_rows(source: BenchmarkSource, name: str, local: Path | None) -> tuple[Table, Counter[str]]:
    """The rows of a source, or of the local copy of it, and what was skipped in reading (reason -> count).

    In a local folder the file is looked for that is called after the split, the source's own file, or the benchmark; a
    clone of the source has it.

    Raises:
        JaxguardError: it cannot be reached, found or read.
    """
    if source.data is not None:
        return _read_data(source.data, local)
    return _read_table(source, name, local), Counter()


def _read_data(source: SourceConfig, local: Path | None) -> tuple[Table, Counter[str]]:
    """The examples of a data source, one row for each."""
    if local is not None:
        source = source.model_copy(update={"path": str(local.expanduser())})
    loaded = load(source)
    rows = [(f"{source.path or source.kind}, example {example.id!r}", example.to_json()) for example in loaded.examples]
    return Table(rows, tuple(f.name for f in dataclasses.fields(Example)), loaded.origin), loaded.skipped


def _read_table(source: BenchmarkSource, name: str, local: Path | None) -> Table:
    path = local or (locate(Path(source.path)) if source.path else None)
    if path is not None:
        return _read_copy(path.expanduser(), source, name)
    if source.url:
        return _read_url(source.url, source.keys_as)
    assert source.hub is not None
    if source.file:
        return _read_hub_file(source.hub, source.file, source.revision, source.keys_as)
    return _joined([(split, read_hub(source.hub, source.config, split, None)) for split in source.splits])


def _read_copy(path: Path, source: BenchmarkSource, name: str) -> Table:
    remote = source.file or source.url
    stem = [_stem(PurePosixPath(remote).name)] if remote else []
    if source.file and (path / source.file).is_file():
        path = path / source.file
    if not path.is_dir():
        return _read_file(path, source.keys_as)
    if len(source.splits) > 1:
        return _joined([(split, read_local(path, [split])) for split in source.splits])
    if source.keys_as or (remote and remote.endswith(".xz")):
        found = sorted(p for p in path.rglob("*") if p.is_file() and _stem(p.name) in {*stem, name})
        if not found:
            raise JaxguardError(f"{path} has no file called {' or '.join(map(repr, [*stem, name]))}")
        return _read_file(found[0], source.keys_as)
    return read_local(path, [*source.splits, *stem, name])


def _read_file(path: Path, keys_as: str | None) -> Table:
    """A file in a format of read_local, or packed by xz, or an object of lists of rows."""
    if path.name.endswith(".xz") and path.is_file():
        try:
            table = _read_bytes(lzma.decompress(path.read_bytes()), path.name.removesuffix(".xz"), str(path), keys_as)
        except (lzma.LZMAError, EOFError) as error:
            raise JaxguardError(f"{path}: truncated or damaged xz file ({error}); fetch it again") from None
        return Table(table.rows, table.columns, {"files": {str(path): file_digest(path)}})
    if keys_as is None or not path.is_file():
        return read_local(path, ())
    rows = _lists_of_rows(path, keys_as)
    return Table(rows, _columns(rows), {"files": {str(path): file_digest(path)}})


def _lists_of_rows(path: Path, keys_as: str) -> list[tuple[str, Row]]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise JaxguardError(f"{path}: not JSON: {error}") from None
    if not isinstance(tree, dict) or not all(
        isinstance(rows, list) and all(isinstance(row, dict) for row in rows) for rows in tree.values()
    ):
        raise JaxguardError(
            f"{path}: source.keys_as is set, so expected one JSON object whose values are lists of rows"
        )
    return [
        (f"{path}, {key!r} row {i}", {keys_as: key, **row}) for key, rows in tree.items() for i, row in enumerate(rows)
    ]


def _read_url(url: str, keys_as: str | None) -> Table:
    hint = "with a copy on disk, give it as the benchmark's local file"
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:  # noqa: S310 (https only, see BenchmarkSource)
            data = answer.read()
    except (OSError, urllib.error.URLError, http.client.HTTPException) as error:
        raise JaxguardError(f"cannot fetch {url} ({error}); {hint}") from None
    return _read_bytes(data, PurePosixPath(url).name, url, keys_as)


def _read_bytes(data: bytes, name: str, origin: str, keys_as: str | None) -> Table:
    """A file's contents, with `origin` in the rows' places."""
    with tempfile.TemporaryDirectory() as scratch:
        # Some hubs call an array of rows .jsonl; what is called .json may be either.
        path = Path(scratch) / name.replace(".jsonl", ".json")
        path.write_bytes(data)
        try:
            table = _read_file(path, keys_as)
        except JaxguardError as error:
            raise JaxguardError(str(error).replace(str(path), origin)) from None
        rows = [(place.replace(str(path), origin), row) for place, row in table.rows]
        return Table(rows, table.columns, {"files": {origin: file_digest(path)}})


def _read_hub_file(repository: str, file: str, revision: str | None, keys_as: str | None) -> Table:
    at = f" at revision {revision!r}" if revision else ""
    page = f"https://huggingface.co/datasets/{repository}"
    try:
        path = huggingface_hub.hf_hub_download(repository, file, repo_type="dataset", revision=revision)
    except huggingface_hub.errors.GatedRepoError:
        raise JaxguardError(
            f"data set {repository} is gated: accept its terms at {page} with your account, then run `hf auth login` "
            "or set HF_TOKEN"
        ) from None
    except huggingface_hub.errors.LocalEntryNotFoundError:
        raise JaxguardError(
            f"{file} of data set {repository}{at} is not in the local cache and the hub cannot be reached; with a copy "
            "on disk, give it as the benchmark's local file"
        ) from None
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.EntryNotFoundError, OSError) as error:
        raise JaxguardError(f"cannot get {file} of data set {repository}{at}; see {page} ({error})") from None
    table = _read_bytes(Path(path).read_bytes(), PurePosixPath(file).name, f"{repository}/{file}", keys_as)
    return Table(table.rows, table.columns, {"hub": repository, "revision": revision, **table.origin})


def _joined(tables: list[tuple[str, Table]]) -> Table:
    """One table; of several splits each row says which it is from."""
    if len(tables) == 1:
        return tables[0][1]
    rows = [(place, {"split": split, **row}) for split, table in tables for place, row in table.rows]
    return Table(rows, _columns(rows), {"splits": {split: table.origin for split, table in tables}})


def _columns(rows: Iterable[tuple[str, Row]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(column for _, row in rows for column in row))


def _stem(name: str) -> str:
    name = name.removesuffix(".xz")
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
    return name.removesuffix(suffix)
