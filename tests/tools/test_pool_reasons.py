"""Sentences of reasoning from the annotators' categories of the pool."""

import gzip
import json
import os
from pathlib import Path

import pytest

import pool_reasons

POOL = Path(os.environ.get("JAXGUARD_POOL", Path(__file__).parents[3] / "shared" / "data"))
ROWS = [
    {"id": "1", "prompt": "a", "prompt_label": "unharmful", "response_label": None, "categories": ["counter_ref_nh"]},
    {"id": "2", "prompt": "b", "prompt_label": None, "response_label": "unharmful", "categories": ["Offending User"]},
    {"id": "3", "prompt": "c", "prompt_label": None, "response_label": "harmful", "categories": ["Offending User"]},
    {"id": "4", "prompt": "d", "prompt_label": "harmful", "response_label": None, "categories": []},
    {"id": "5", "prompt": "e", "prompt_label": None, "response_label": None, "categories": []},
]


def test_labelled_rows_get_the_sentence_of_their_category_and_label(tmp_path):
    pool, output = tmp_path / "pool.jsonl.gz", tmp_path / "new" / "train.jsonl"
    pool.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    pool_reasons.main(["--pool", str(pool), "--output", str(output)])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "trace"} for row in rows] == ROWS[:4]
    assert [row["trace"] for row in rows] == [
        "It speaks against hate.",
        "The answer does not insult the user.",
        "The answer insults the user.",
        "It is about doing others harm.",
    ]


def test_every_category_of_the_pool_has_its_sentence():
    path = POOL / "train.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no {path}; JAXGUARD_POOL names the folder")
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    named = {row["categories"][-1] for row in rows if row["categories"] and row["source"] != "clinc150"}
    assert named <= {*pool_reasons.ABOUT_PROMPTS, *pool_reasons.ABOUT_RESPONSES}
    labelled = [row for row in rows if row["prompt_label"] or row["response_label"]]
    assert len(list(pool_reasons.reasoned(rows))) == len(labelled)
