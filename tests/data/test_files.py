"""Files of every format, whole, split over folders, and damaged."""

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from jaxguard.config.data import SourceConfig
from jaxguard.data.examples import Example
from jaxguard.data.sources import load, load_examples
from jaxguard.utils.errors import JaxguardError

OURS = {"id": "x", "prompt": "hello", "prompt_label": "unharmful"}


def source(path, **more):
    return SourceConfig(kind="jsonl", path=path, **more)


def one(path):
    (example,) = load_examples(source(path))
    return example


def message(path, **more):
    with pytest.raises(JaxguardError) as error:
        load(source(path, **more))
    return str(error.value)


@pytest.mark.parametrize(
    "prompt", ["2020-01-01", "NA", "null", "12", "1e5", "true", " spaced ", 'a "quoted", cell\nhere']
)
@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "json", "parquet", "csv"])
def test_a_prompt_is_text_in_every_format(tmp_path, lines, form, prompt):
    row = {"id": "1", "prompt": prompt, "prompt_label": "harmful", "response": None}
    path = str(tmp_path / f"some.{form}")
    if form == "json":
        Path(path).write_text(json.dumps([row], indent=1), encoding="utf-8")
    elif form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    elif form == "csv":
        with Path(path).open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([list(row), [x or "" for x in row.values()]])
    else:
        lines([row], f"some.{form}")
    assert one(path) == Example("1", "some", prompt, prompt_label="harmful")


def test_a_folder_is_searched_for_the_split(lines, tmp_path):
    (tmp_path / "data").mkdir()
    lines([OURS, {**OURS, "id": "y"}], "data/valid.jsonl.gz")
    lines([OURS], "data/train-00000-of-00002.jsonl")
    lines([{**OURS, "id": "y"}, {**OURS, "id": "z"}], "data/train-00001-of-00002.jsonl")
    assert [e.id for e in load_examples(source(str(tmp_path)))] == ["x", "y", "z"]
    assert len(load_examples(source(str(tmp_path), split="valid"))) == 2
    assert "found: data/train-00000-of-00002.jsonl" in message(str(tmp_path), split="test")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([OURS, '{"prompt": '], "some.jsonl:2: not JSON"),
        ([OURS, "", "[1]"], "some.jsonl:3: expected fields, found list"),
        ([], "split 'train' is empty"),
    ],
)
def test_malformed_lines(lines, rows, words):
    assert words in message(lines(rows))


def test_a_malformed_json_document(tmp_path):
    (tmp_path / "some.json").write_text('[\n{"prompt": "a"},\n{"prompt" "b"}\n]', encoding="utf-8")
    assert "some.json:3: not JSON" in message(str(tmp_path / "some.json"))


@pytest.mark.parametrize("keep", [0.5, 0.98])
def test_a_truncated_gzip_file(lines, keep):
    path = Path(lines([{**OURS, "id": i, "prompt": f"hello {i * i}"} for i in range(500)], "some.jsonl.gz"))
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    assert "some.jsonl.gz: truncated or damaged" in message(str(path))


def test_a_file_that_is_not_gzip_at_all(tmp_path):
    (tmp_path / "some.jsonl.gz").write_text("hello", encoding="utf-8")
    assert "truncated or damaged" in message(str(tmp_path / "some.jsonl.gz"))


def test_a_truncated_parquet_file(tmp_path):
    path = tmp_path / "some.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([OURS] * 100), path)
    path.write_bytes(path.read_bytes()[:-40])
    assert "some.parquet: truncated or damaged" in message(str(path))


def test_a_csv_row_of_another_length(tmp_path):
    path = tmp_path / "some.csv"
    path.write_text("prompt,prompt_label\nhello,harmful\nhello, you,harmful\n", encoding="utf-8")
    assert "some.csv:3: 3 cells under 2 column names" in message(str(path))


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "some.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    assert "not UTF-8" in message(str(tmp_path / "some.jsonl"))


def test_no_such_file_and_no_such_format(tmp_path):
    (tmp_path / "train.jsonl").touch()
    said = message(str(tmp_path / "trian.jsonl"))
    assert all(word in said for word in ("trian.jsonl", "'train.jsonl'", str(tmp_path)))
    (tmp_path / "some.xlsx").write_bytes(b"")
    assert "expected .jsonl" in message(str(tmp_path / "some.xlsx"))
