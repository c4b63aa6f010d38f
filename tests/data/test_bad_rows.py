"""A row that holds anything is read, skipped and counted, or named."""

import json

import pytest

from jaxguard.config.data import SourceConfig
from jaxguard.data.sources import load
from jaxguard.utils.errors import JaxguardError

ROW = {"id": "1", "prompt": "How do I bake bread?", "prompt_label": "unharmful"}


def read(tmp_path, text, name="some.jsonl"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return load(SourceConfig(kind="jsonl", path=str(path)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"categories": 1}, "categories"),
        ({"categories": {"a": 1}}, "categories"),
        ({"categories": [1]}, "categories"),
        ({"prompt": ["x"]}, "prompt"),
        ({"prompt_label": "x" * 10_000}, "prompt_label"),
        ({"mode": []}, "mode"),
        ({"more": 2**70}, "integer"),
        ({"more": float("nan")}, "NaN"),
    ],
)
def test_a_row_of_another_type_is_named(tmp_path, change, words):
    with pytest.raises(JaxguardError, match=rf"some\.jsonl:2.*{words}") as error:
        read(tmp_path, json.dumps(ROW) + "\n" + json.dumps({**ROW, "id": "2", **change}))
    assert len(str(error.value)) < 1_000


@pytest.mark.parametrize("row", ["[" * 100_000, '{"a": ' * 100 + "1" + "}" * 100, '{"prompt": 1' + "0" * 5000 + "}"])
def test_a_deep_row_and_a_huge_number_are_named(tmp_path, row):
    with pytest.raises(JaxguardError, match=r"some\.jsonl:1"):
        read(tmp_path, row)


def test_ids_that_become_equal_are_refused(tmp_path):
    rows = [{**ROW, "id": "x\ud800"}, {**ROW, "id": "x\ud801"}]
    with pytest.raises(JaxguardError, match="unique"):
        read(tmp_path, "\n".join(map(json.dumps, rows)))
