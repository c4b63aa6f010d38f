"""What the tests of sources and files share."""

import gzip
import json

import pytest


@pytest.fixture
def lines(tmp_path):
    """lines(rows, name): writes JSON lines and returns the path; a text is written as it is."""

    def write(rows, name="some.jsonl"):
        path = tmp_path / name
        text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return str(path)

    return write
