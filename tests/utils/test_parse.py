"""Whatever a file or a server holds becomes a checked value, or an error that names it, quickly."""

import gzip
import json
import lzma
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxguard.utils import parse
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import (
    Fields,
    PathPart,
    PathText,
    check,
    front_matter,
    parse_json,
    parse_yaml,
    read_json,
    read_lines,
)


@dataclass
class Bread:
    flour: int
    loaves: tuple[str, ...] = ()


def refused(function, *arguments, holds=(), seconds=2.0):
    """The message of the JaxguardError, which comes soon."""
    start = time.perf_counter()
    with pytest.raises(JaxguardError) as error:
        function(*arguments)
    assert time.perf_counter() - start < seconds
    assert all(word in str(error.value) for word in holds), error.value
    assert len(str(error.value)) < 2_000
    return str(error.value)


def test_json_becomes_the_shape():
    assert parse_json('{"flour": 1, "loaves": ["rye"]}', Bread, "here") == Bread(1, ("rye",))
    assert parse_json(b'{"a": [1, 2.5, null, true, "\\u00e9"]}', Fields, "here") == {"a": [1, 2.5, None, True, "é"]}
    assert parse_json('"\\ud83c\\udf5e"', str, "here") == "🍞"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"flour": "much"}', ["flour", "'much'"]),
        ("{}", ["flour", "missing"]),
        ("[1]", ["expected fields"]),
        ('{"flour": 1, "loaves": {"a": 1}}', ["loaves"]),
        ('{\n"flour": }', ["bread.json:2", "JSON"]),
        ("", ["JSON"]),
        ('{"flour": ' + "9" * 5000 + "}", ["integer", "99999"]),
        ('{"flour": ' + str(2**63) + "}", ["integer"]),
        ('{"flour": NaN}', ["NaN"]),
        ('{"flour": 1e999}', ["1e999"]),
        ('{"flour": -Infinity}', ["Infinity"]),
        ("[" * 100_000, ["nested"]),
        ("[" * 100_000 + "]" * 100_000, ["nested"]),
        ('{"a":' * 65 + "1" + "}" * 65, ["nested"]),
        (b'{"flour": "\xff"}', ["UTF-8"]),
        ("[" + "1," * parse.JSON_VALUES + "1]", ["large"]),
        (" " * (parse.JSON_BYTES + 1), ["large"]),
    ],
    ids=lambda value: str(value)[:12] if isinstance(value, str | bytes) else "",
)
def test_json_that_is_refused(text, words):
    refused(parse_json, text, Bread, "bread.json", holds=["bread.json", *words])


def test_half_a_surrogate_pair_becomes_a_character():
    assert parse_json('{"a\\ud800": ["\\udc00x", "\\ud83c\\udf5e"]}', Fields, "x") == {"a\ufffd": ["\ufffdx", "🍞"]}
    assert parse_json('["a\ud800"]', list[str], "x") == ["a\ufffd"]


def nine_levels():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    return "\n".join(lines)


MERGES = "\n".join(
    ["a0: &a0 {k: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 10))]
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (nine_levels(), ["aliases"]),
        (MERGES, ["aliases"]),
        ("a: {<<: {b: 1}}", ["YAML"]),
        ("a: &a [*a]", ["*a"]),
        ("a: &a {b: *a}", ["*a"]),
        ("[" * 100_000, ["nest"]),
        ("- " * 1000 + "a", ["nest"]),
        ("{a: " * 65 + "1" + "}" * 65, ["nest"]),
        ("a: " + "9" * 5000, ["integer"]),
        ("a: 0x" + "f" * 17, ["integer"]),
        ("a: " + "1:" * 60 + "1", ["integer"]),
        ("a: 2024-99-99", ["YAML"]),
        ('a: "\\0"', ["NUL"]),
        ("a: 1\na: 2", ["'a'", "twice"]),
        ("? [a]\n: 1", ["YAML"]),
        ("1: 2", ["1"]),
        ("a: !!python/object:os.system x", ["YAML"]),
        ("- 1", ["expected fields", "list"]),
        ("", ["expected fields"]),
        ("a: [", ["YAML"]),
        ("x" * (parse.YAML_BYTES + 1), ["large"]),
        ("\n".join(f"{i}: 1" for i in range(parse.YAML_VALUES)), ["values"]),
    ],
    ids=lambda value: str(value)[:12] if isinstance(value, str) else "",
)
def test_yaml_that_is_refused(text, words):
    refused(parse_yaml, text, Fields, "bread.yaml", holds=["bread.yaml", *words], seconds=5)


def test_yaml_is_as_before():
    text = "a: 1e-6\nb: &x [1, 0x10, yes, null, 2024-01-02]\nc: *x\n"
    tree = parse_yaml(text, Fields, "x")
    assert tree == yaml.safe_load(text) | {"a": 1e-6}


def test_a_large_mapping_takes_no_quadratic_time():
    text = "\n".join(f"k{i}: 1" for i in range(40_000))
    start = time.perf_counter()
    assert len(parse_yaml(text, Fields, "x")) == 40_000
    assert time.perf_counter() - start < 10  # comparing all pairs takes minutes


def test_front_matter(tmp_path):
    card = tmp_path / "README.md"
    for text, fields in (
        ("---\nlicense: mit\n---\n# Bread\n---\n", {"license": "mit"}),
        ("\n---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("# Bread\n---\na: 1\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("", {}),
    ):
        card.write_bytes(text.encode())
        assert front_matter(card) == fields
    card.write_text(f"---\n{nine_levels()}\n---\n", encoding="utf-8")
    refused(front_matter, card, holds=["README.md", "aliases"])
    for hostile in ("\n" * 2**20, "---\n" * 2**18, "---" + "\n-" * 2**19, " " * 2**20 + "---\n"):
        card.write_text(hostile, encoding="utf-8")
        start = time.perf_counter()
        with suppress(JaxguardError):
            front_matter(card)
        assert time.perf_counter() - start < 1


@pytest.mark.parametrize("packed", [gzip.open, lzma.open])
def test_a_small_file_that_unpacks_to_much(tmp_path, packed):
    path = tmp_path / f"rows.jsonl.{'gz' if packed is gzip.open else 'xz'}"
    fast = {} if packed is gzip.open else {"preset": 0}
    with packed(path, "wb", **fast) as file:
        for _ in range(80):
            file.write((b" " * 1023 + b"\n") * 1024)
    assert path.stat().st_size < 1_000_000
    refused(lambda: sum(1 for _ in read_lines(path)), holds=[str(path), "bytes"], seconds=5)


def test_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes("a\r\n\u2028\n\nb".encode())
    assert list(read_lines(path)) == [(1, "a"), (2, "\u2028"), (3, ""), (4, "b")]
    path.write_bytes(b"x" * (parse.LINE_BYTES + 1))
    refused(lambda: list(read_lines(path)), holds=[f"{path}:1", "large"])
    path.write_bytes(b"a\n\xff\n")
    refused(lambda: list(read_lines(path)), holds=[f"{path}:2", "UTF-8"])


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "absent.json", tmp_path, tmp_path / "a\0b"):
        refused(read_json, path, Fields, holds=["json" if "absent" in path.name else str(tmp_path)])


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", "a\0b", "a\nb", "a\x1bb", "\ud800", "x" * 300])
def test_names_that_leave_their_folder(name):
    refused(check, name, PathPart, "label", holds=["label"])


@pytest.mark.parametrize("name", ["bread", "Brot.2", "$x^2$", "a b", "日本", "..x"])
def test_names_that_do_not(name):
    assert check(name, PathPart, "label") == name


def test_many_errors_are_cut():
    text = refused(check, [{"a": "x" * 10_000}] * 1000, list[int], "here", holds=["990 more"])
    assert text.count("\n") == 10


def test_any_value_passes_where_any_is_expected():
    value: Any = parse_json("[1]", object, "x")
    assert value == json.loads("[1]")


@pytest.mark.parametrize("path", ["a\0b", "x" * 256, "a/" + "é" * 128, "~nobody-of-this-name/x", "\ud800"])
def test_texts_that_are_no_path(path):
    refused(check, path, PathText, "data.train.0.path", holds=["data.train.0.path", "no path"])
    assert check("~/a/../b", PathText, "x") == f"{Path.home()}/a/../b"
