"""Shipped benchmarks on the public pool's real rows, where it lies beside the project."""

import gzip
import json
import os
from pathlib import Path

import pytest
from benchmark_examples import HARM, ROOT, SAFE, shipped

from jaxguard.data.format.dialogue import LABEL

POOL = Path(os.environ.get("JAXGUARD_POOL", ROOT.parent / "shared" / "data"))


@pytest.fixture
def pool():
    """pool(stem): path and rows of one of its files."""

    def read(stem):
        path = POOL / f"{stem}.jsonl.gz"
        if not path.is_file():
            pytest.skip(f"no {path}; JAXGUARD_POOL names the folder")
        return path, [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]

    return read


@pytest.fixture
def mapped(tmp_path):
    """mapped(rows): a file of them."""

    def write(rows):
        path = tmp_path / "mapped.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("own_prompts", "eval_aegis1_test"),
        ("own_prompts", "eval_xstest_prompts"),
        ("own_responses", "eval_diasafety_test"),
        ("own_prompts", "eval_hatemoji_test"),
    ],
)
def test_own_examples(name, stem, pool):
    path, rows = pool(stem)
    benchmark = shipped(name, path)
    label = LABEL[benchmark.definition.question]
    result = [(e.prompt, e.response, getattr(e, label)) for e in benchmark.examples]
    judged = benchmark.definition.question == "response_harm"
    assert result == [(row["prompt"], row["response"] if judged else None, row[label]) for row in rows]
    assert not benchmark.skipped


def test_aegis1(pool, mapped, caplog):
    """The published counts. The pool keeps what three people's labels came to, not the labels: here they agree."""
    _, rows = pool("eval_aegis1_test")
    said = {HARM: "Needs Caution", SAFE: "Safe"}
    votes = [dict.fromkeys(("labels_0", "labels_1", "labels_2"), said[row["prompt_label"]]) for row in rows]
    chosen = [
        {"text": row["prompt"], "text_type": "user_message", **vote} for row, vote in zip(rows, votes, strict=True)
    ]
    benchmark = shipped("aegis1_prompt", mapped(chosen))
    assert [(e.prompt, e.prompt_label) for e in benchmark.examples] == [(r["prompt"], r["prompt_label"]) for r in rows]
    assert benchmark.counts == {"positive": 232, "negative": 127, "total": 359}
    assert not caplog.messages


def test_xstest(pool, mapped, caplog):
    """The published counts, but for number 208, a definition that is safe.

    The pool was cleared of rows about minors, and it is one by its words. There is no duplicate among the others.
    """
    _, rows = pool("eval_xstest_prompts")
    said = {HARM: "unsafe", SAFE: "safe"}
    chosen = [
        {"prompt": row["prompt"], "label": said[row["prompt_label"]], "type": row["categories"][0], "focus": None}
        for row in rows
    ]
    benchmark = shipped("xstest_prompt", mapped(chosen))
    assert [(e.prompt, e.prompt_label) for e in benchmark.examples] == [(r["prompt"], r["prompt_label"]) for r in rows]
    missing = {f"xstest:{number}" for number in range(1, 451)} - {row["id"] for row in rows}
    assert missing <= {"xstest:208"}
    assert (benchmark.counts["positive"], benchmark.counts["negative"]) == (200, 250 - len(missing))
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert len(caplog.messages) == len(missing)
    sizes = {name: len(ids) for name, ids in benchmark.slices["category"].items()}
    assert len(sizes) == 18
    assert sizes.pop("definitions") == 25 - len(missing)
    assert set(sizes.values()) == {25}


def test_topics(pool, mapped):
    """A file with allowed topics as policy; as it is, and in our own columns, off topic being harmful."""
    path, rows = pool("topic_clinc_eval")
    said = {"off-topic": HARM, "on-topic": SAFE}
    benchmark = shipped("own_topics", path)
    assert [(e.prompt, e.policy, e.prompt_label) for e in benchmark.examples] == [
        (row["prompt"], row["policy"], said[row["label"]]) for row in rows
    ]
    assert benchmark.counts == {"positive": 1000, "negative": 1000, "total": 2000}
    ours = [{"prompt": row["prompt"], "policy": row["policy"], "prompt_label": said[row["label"]]} for row in rows]
    own = shipped("own_prompts", mapped(ours))
    assert [(e.prompt, e.policy, e.prompt_label) for e in own.examples] == [
        (e.prompt, e.policy, e.prompt_label) for e in benchmark.examples
    ]


def test_pyrit_answers(pool):
    """Each answer with its own definition of harm; borderline ones are left out."""
    path, rows = pool("custom_policy_pyrit_harm")
    benchmark = shipped("pyrit_answers", path)
    chosen = [row for row in rows if row["label"] != "borderline"]
    assert [(e.prompt, e.response, e.policy, e.response_label) for e in benchmark.examples] == [
        (row["prompt"], row["response"], row["policy"].strip(), HARM if row["label"] == "violation" else SAFE)
        for row in chosen
    ]
    assert benchmark.counts == {"positive": 525, "negative": 254, "total": 779}
