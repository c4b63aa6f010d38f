"""What tests of benchmarks share."""

import csv
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from benchmark_examples import ROWS

from jaxguard.data.benchmarks.schema import read_benchmark


@pytest.fixture
def write(tmp_path):
    """write(name): the hand-made rows of a shipped benchmark, in the format of its source."""

    def write(name, form=None):
        rows, fields = ROWS[name][0], read_benchmark(name)
        remote = fields.source.file or fields.source.url or "rows.jsonl"
        path = tmp_path / f"{name}{form or ''.join(Path(remote).suffixes[-2:])}"
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        if len(fields.source.splits) > 1:
            path = tmp_path / name
            path.mkdir()
            for split in fields.source.splits:
                (path / f"{split}.jsonl").write_text(text, encoding="utf-8")
        elif fields.source.keys_as:
            path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        elif path.suffix == ".csv":
            with path.open("w", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows([list(rows[0]), *(list(row.values()) for row in rows)])
        elif path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
            path.write_bytes(pack(text.encode()))
        return path

    return write
