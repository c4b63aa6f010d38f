"""Benchmarks: the shipped ones on hand-made rows with their columns, a user's own, and what is wrong with the rest."""

import csv
import gzip
import io
import json
import logging
import lzma
import os
import re
import urllib.error
import urllib.request
from pathlib import Path

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import yaml

import document_benchmarks
from generated import written
from jaxguard.data.policies import POLICY_FOLDER, load_policy, policy_for
from jaxguard.errors import JaxguardError
from jaxguard.evaluate.benchmark_fields import Condition, Slice, read_benchmark
from jaxguard.evaluate.benchmarks import LABEL, list_benchmarks, load_benchmark

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "configs" / "benchmarks"
POOL = Path(os.environ.get("JAXGUARD_POOL", ROOT.parent / "shared" / "data"))

HARM, SAFE = "harmful", "unharmful"
WILDGUARD = [
    {"prompt": "A", "response": "a", "adversarial": True, "subcategory": "fraud"},
    {"prompt": "B", "response": "b", "adversarial": False, "subcategory": "benign"},
    {"prompt": "C", "response": "c", "adversarial": None, "subcategory": None},
]
for row, harm, refusal in zip(WILDGUARD, (HARM, SAFE, None), ("refusal", "compliance", None), strict=True):
    row |= {"prompt_harm_label": harm, "response_harm_label": harm, "response_refusal_label": refusal}
AEGIS2 = [
    {"id": "x", "prompt": "A", "response": "a", "prompt_label": "safe", "response_label": "unsafe"},
    {"id": "y", "prompt": "B", "response": "", "prompt_label": "unsafe", "response_label": "safe"},
    {"id": "z", "prompt": "C", "response": None, "prompt_label": "unsafe", "response_label": None},
    {"id": "u", "prompt": "D", "response": "d", "prompt_label": "safe", "response_label": ""},
    {"id": "v", "prompt": "REDACTED", "response": "e", "prompt_label": "unsafe", "response_label": "unsafe"},
]
for row in AEGIS2:
    row["violated_categories"] = "Bread, Cake" if row["id"] == "x" else None
KEYS = ("S", "H", "V", "HR", "SH", "S3", "H2", "V2")
# Rows with the columns of each benchmark's source, and the answers that must come out, in order.
ROWS = {
    "wildguardtest_prompt": (WILDGUARD, [HARM, SAFE]),
    "wildguardtest_response": (WILDGUARD, [HARM, SAFE]),
    "wildguardtest_refusal": (WILDGUARD, ["refusal", "compliance"]),
    "aegis2_prompt": (AEGIS2, [SAFE, HARM, HARM, SAFE]),
    "aegis2_response": (AEGIS2, [HARM, SAFE]),
    "openai_moderation": (
        [
            {"prompt": "A", **dict.fromkeys(KEYS, 0)},
            {"prompt": "B", "S": 0, "V2": 1},
            {"prompt": "C", "H": 0},
            {"prompt": "D"},
            {"prompt": "E", **dict.fromkeys(KEYS, 0), "HR": 1.0},
        ],
        [SAFE, HARM, SAFE, SAFE, HARM],
    ),
    "simple_safety_tests": ([{"prompt": "A", "harm_area": "Bread, Cake"}, {"prompt": " ", "harm_area": "x"}], [HARM]),
    "toxic_chat": (
        [
            {"user_input": "A", "human_annotation": True, "toxicity": 1, "jailbreaking": 1},
            {"user_input": "B", "human_annotation": "True", "toxicity": "0", "jailbreaking": 0},
            {"user_input": "C", "human_annotation": False, "toxicity": 1, "jailbreaking": 0},
        ],
        [HARM, SAFE],
    ),
    "xstest_response": (
        [
            {"prompt": "A", "response": "a", "label": "harmful", "prompt_type": "prompt_harmful"},
            {"prompt": "B", "response": "b", "label": "unharmful", "prompt_type": "prompt_safe"},
        ],
        [HARM, SAFE],
    ),
    "jbb_response": (
        [
            {"prompt": "A", "goal": "g", "target_response": "a", "human_majority": 1},
            {"prompt": "B", "goal": "g", "target_response": "b", "human_majority": 0},
        ],
        [HARM, SAFE],
    ),
    "aegis1_prompt": (
        [
            {"text": "A", "text_type": "user_message", "labels_0": "Safe", "labels_1": "Safe", "labels_2": "Bread"},
            {"text": "B", "text_type": "user_message", "labels_0": "Safe", "labels_1": "Bread", "labels_2": None},
            {"text": "C", "text_type": "llm_response", "labels_0": "Bread", "labels_1": "Bread", "labels_2": "Bread"},
            {"text": "D", "text_type": "user_message", "labels_0": "Needs Caution", "labels_1": None, "labels_2": None},
        ],
        [SAFE, HARM, HARM],
    ),
    "harmbench_prompt": (
        [
            {"Behavior": what, "FunctionalCategory": what, "SemanticCategory": "bread", "BehaviorID": f"id_{what}"}
            for what in ("standard", "contextual", "copyright")
        ],
        [HARM, HARM],
    ),
    "harmbench_response": (
        {
            "bake": [
                {"test_case": "A", "generation": "a", "human_0": 1, "human_1": 0, "human_2": 1, "experiment": "x"},
                {
                    "test_case": "A",
                    "generation": "b",
                    "human_0": 1,
                    "human_1": 0,
                    "human_2": 0,
                    "experiment": "default",
                },
            ],
            "fry": [{"test_case": "B", "generation": "", "human_0": 1, "human_1": 1, "human_2": 1, "experiment": "x"}],
        },
        [HARM, SAFE, HARM],
    ),
    "beavertails": (
        [
            {"prompt": "A", "response": "a", "is_safe": False, "category": {"bread": True, "cake": False}},
            {"prompt": "A", "response": "b", "is_safe": True, "category": {"bread": False, "cake": False}},
        ],
        [HARM, SAFE],
    ),
    "saferlhf": (
        [
            {"prompt": "A", "response_0": "a", "response_1": "b", "is_response_0_safe": one, "is_response_1_safe": two}
            for one, two in ((True, False), (False, True), (True, True), (False, False))
        ],
        [SAFE, HARM, HARM, SAFE],
    ),
    "xstest_prompt": (
        [
            {"prompt": "A", "label": "unsafe", "type": "contrast_bread", "focus": "x"},
            {"prompt": "B", "label": "safe", "type": "bread", "focus": "x"},
        ],
        [HARM, SAFE],
    ),
    "dynaguardrail": (
        [
            {"prompt": "A", "label": "unsafe", "dataset_type": "finance"},
            {"prompt": "B", "label": "safe", "dataset_type": "injection"},
        ],
        [HARM, SAFE],
    ),
    "dynabench": (
        [
            {"transcript": "User: A\nAgent: a", "label": "FAIL", "policy": "Only bread."},
            {"transcript": "User: B\nAgent: b", "label": "PASS", "policy": "1. Only cake."},
        ],
        [HARM, SAFE],
    ),
    "cosapien": (
        [
            {"prompt": what, "scenario": "Only bread.", "type": what}
            for what in ("allowed", "disallowed", "partial", "safe")
        ],
        [SAFE, HARM, HARM, SAFE] * 5,
    ),
}


@pytest.fixture
def write(tmp_path):
    """write(name): the hand-made rows of a shipped benchmark, in the format of its source."""

    def write(name, form=None):
        rows, fields = ROWS[name][0], read_benchmark(name, SHIPPED)
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


def answers(benchmark):
    return [getattr(example, LABEL[benchmark.question]) for example in benchmark.examples]


def texts(benchmark, ids):
    return {(e.prompt, e.response) for e in benchmark.examples if e.id in ids}


def shipped(name, local):
    return load_benchmark(name, local, SHIPPED)


def test_every_benchmark_of_the_papers_table_is_there():
    assert set(list_benchmarks(SHIPPED)) == set(ROWS)
    fields = [read_benchmark(name, SHIPPED) for name in ROWS]
    groups = [f.group for f in fields]
    # What Avg(safety) = (5 x mean prompt F1 + 4 x mean response F1) / 9 and the custom average are taken over.
    assert [groups.count(g) for g in ("safety_prompt", "safety_response", "custom_policy")] == [5, 4, 2]
    asked = {"safety_prompt": "prompt_harm", "safety_response": "response_harm", "custom_policy": "prompt_harm"}
    assert all(f.question == asked.get(f.group, f.question) for f in fields)


@pytest.mark.parametrize("name", ROWS)
def test_a_shipped_benchmark_gives_the_right_labels(name, write):
    path, fields = write(name), read_benchmark(name, SHIPPED)
    benchmark = shipped(name, path)
    assert fields.name == name
    assert answers(benchmark) == ROWS[name][1]
    assert (benchmark.name, benchmark.question, benchmark.group) == (name, fields.question, fields.group)
    for example in benchmark.examples:
        others = {LABEL[q] for q in LABEL if q != benchmark.question}
        assert all(getattr(example, other) is None for other in others)
        assert (example.response is None) == (benchmark.question == "prompt_harm")
        assert example.source == name
    assert len({e.id for e in benchmark.examples}) == len(benchmark.examples) == benchmark.counts["total"]
    assert shipped(name, path) == benchmark


def test_what_is_left_out_is_counted(write):
    assert shipped("aegis2_prompt", write("aegis2_prompt")).skipped == {"not where prompt is not 'REDACTED'": 1}
    assert shipped("aegis2_response", write("aegis2_response")).skipped == {
        "not where prompt is not 'REDACTED'": 1,
        "not where response_label is not empty": 2,
    }
    assert shipped("wildguardtest_refusal", write("wildguardtest_refusal")).skipped == {"no label": 1}
    assert shipped("simple_safety_tests", write("simple_safety_tests")).skipped == {"empty prompt": 1}


def test_an_empty_response_is_one_that_says_nothing(write):
    (_, empty) = shipped("aegis2_response", write("aegis2_response")).examples
    assert (empty.id, empty.response) == ("y", "")


def test_slices(write):
    benchmark = shipped("wildguardtest_prompt", write("wildguardtest_prompt"))
    assert {v: texts(benchmark, ids) for v, ids in benchmark.slices["adversarial"].items()} == {
        "yes": {("A", None)},
        "no": {("B", None)},
    }
    assert list(benchmark.slices["category"]) == ["benign", "fraud"]
    assert shipped("aegis2_prompt", write("aegis2_prompt")).slices == {
        "category": {"Bread": frozenset({"x"}), "Cake": frozenset({"x"})}
    }
    # A category's own comma separates nothing.
    assert list(shipped("simple_safety_tests", write("simple_safety_tests")).slices["category"]) == ["Bread, Cake"]
    moderation = shipped("openai_moderation", write("openai_moderation"))
    assert {v: texts(moderation, ids) for v, ids in moderation.slices["category"].items()} == {
        "HR": {("E", None)},
        "V2": {("B", None)},
    }
    assert list(shipped("beavertails", write("beavertails")).slices["category"]) == ["bread"]
    responses = shipped("harmbench_response", write("harmbench_response")).slices["adversarial"]
    assert {value: len(ids) for value, ids in responses.items()} == {"no": 1, "yes": 2}
    scenarios = shipped("cosapien", write("cosapien")).slices["scenario"]
    assert {len(ids) for ids in scenarios.values()} == {4}
    assert "game_development" in scenarios


def test_slices_of_lists_and_truths():
    assert Slice(name="s", column="c").values({"c": ["a", " b ", ""]}) == ["a", "b"]
    assert Slice(name="s", column="c").values({"c": False}) == ["no"]
    assert Slice(name="s", column="c").values({"c": 0}) == ["0"]
    assert Slice(name="s", when=Condition(column="c", equals=1)).values({"c": None}) == []


def test_policies_come_from_the_rows_or_from_the_yaml(write):
    own = shipped("cosapien", write("cosapien")).examples[0]
    assert own.policy == "Only bread."
    finance, injection = shipped("dynaguardrail", write("dynaguardrail")).examples
    default = load_policy("wildguard", ROOT / POLICY_FOLDER)
    assert "Financial" in policy_for(finance, default, ROOT / POLICY_FOLDER).rules
    assert finance.policy != injection.policy
    assert all(e.policy is None for e in shipped("toxic_chat", write("toxic_chat")).examples)


def test_pairs_are_drawn_by_seed(write, tmp_path):
    rows = [{**ROWS["saferlhf"][0][i % 3], "prompt": f"prompt {i}"} for i in range(3000)]  # two of three pairs differ
    path = tmp_path / "many.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    benchmark = shipped("saferlhf", path)
    assert benchmark.counts == {"positive": 1000, "negative": 1000, "total": 2000}
    assert benchmark.skipped["not in the sample"] == 1000
    # Python promises the same sample for the same seed; the first of 2,000 is number 1,309.
    assert benchmark.examples[0].prompt == benchmark.examples[1].prompt == "prompt 1963"


def test_a_count_that_differs_is_a_warning_with_both(write, caplog):
    with caplog.at_level(logging.WARNING):
        shipped("wildguardtest_refusal", write("wildguardtest_refusal"))
    assert [r.getMessage() for r in caplog.records] == [
        "benchmark wildguardtest_refusal: expected 563 refusal, 1,157 compliance; found 1 refusal, 1 compliance"
    ]
    caplog.clear()
    shipped("jbb_response", write("jbb_response"))
    assert caplog.messages == ["benchmark jbb_response: expected 300 in all; found 2 in all"]


def test_counts_that_agree_are_no_warning(write, caplog, own):
    benchmark = load_benchmark(own(expected={"positive": 1, "negative": 2, "total": 3}))
    assert benchmark.counts == benchmark.expected
    assert not caplog.messages


def test_local_copies_in_folders(write, tmp_path):
    (tmp_path / "round0").mkdir()
    write("saferlhf").rename(tmp_path / "round0" / "test.jsonl.xz")
    assert len(shipped("saferlhf", tmp_path).examples) == 4
    write("jbb_response", ".jsonl").rename(tmp_path / "judge-comparison.jsonl")
    assert len(shipped("jbb_response", tmp_path).examples) == 2
    write("harmbench_response").rename(tmp_path / "text_behaviors_val_set.json")
    assert len(shipped("harmbench_response", tmp_path).examples) == 3
    write("toxic_chat").rename(tmp_path / "toxic_chat.jsonl")
    assert len(shipped("toxic_chat", tmp_path).examples) == 2


def test_several_splits_in_one_file_need_to_be_told_apart(tmp_path):
    rows = [{**row, "split": "film_production"} for row in ROWS["cosapien"][0]]
    path = tmp_path / "all.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    assert list(shipped("cosapien", path).slices["scenario"]) == ["film_production"]
    path.write_text(json.dumps(ROWS["cosapien"][0][0]), encoding="utf-8")
    with pytest.raises(
        JaxguardError, match=r"slices.0.*no column 'split'; give a folder with a file for each of game_"
    ):
        shipped("cosapien", path)


def test_files_of_the_hub(monkeypatch, write, tmp_path):
    asked = []
    path = tmp_path / "cached"

    def download(repository, file, **more):
        asked.append((repository, file, more))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for rows in (lzma.compress(json.dumps(ROWS["saferlhf"][0]).encode()), write("saferlhf").read_bytes()):
        path.write_bytes(rows)  # once an array in spite of its name, once lines
        benchmark = load_benchmark("saferlhf", folder=SHIPPED)
        assert answers(benchmark) == ROWS["saferlhf"][1]
    assert (benchmark.origin["hub"], benchmark.origin["revision"]) == ("PKU-Alignment/PKU-SafeRLHF", "v0")
    assert list(benchmark.origin["files"]) == ["PKU-Alignment/PKU-SafeRLHF/round0/test.jsonl.xz"]
    assert asked[0][1:] == ("round0/test.jsonl.xz", {"repo_type": "dataset", "revision": "v0"})
    path.write_bytes(lzma.compress(b'{"prompt": "A"}\n{'))
    with pytest.raises(JaxguardError, match=r"^PKU-Alignment/PKU-SafeRLHF/round0/test.jsonl.xz:2: not JSON"):
        load_benchmark("saferlhf", folder=SHIPPED)


def test_damaged_copies_are_named(tmp_path):
    (tmp_path / "x.jsonl.xz").write_bytes(lzma.compress(b"{}" * 100)[:-20])
    with pytest.raises(JaxguardError, match="truncated or damaged xz file"):
        shipped("saferlhf", tmp_path / "x.jsonl.xz")
    (tmp_path / "x.json").write_text('{"a": [1]}', encoding="utf-8")
    with pytest.raises(JaxguardError, match="one JSON object whose values are lists"):
        shipped("harmbench_response", tmp_path / "x.json")


def test_files_are_fetched_from_their_address(monkeypatch, write):
    fetched = []

    def urlopen(url, timeout):
        fetched.append(url)
        return io.BytesIO(write("openai_moderation").read_bytes())

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    benchmark = load_benchmark("openai_moderation", folder=SHIPPED)
    assert answers(benchmark) == ROWS["openai_moderation"][1]
    assert fetched == list(benchmark.origin["files"]) == [read_benchmark("openai_moderation", SHIPPED).source.url]


def test_an_address_out_of_reach_says_what_to_do(monkeypatch):
    def urlopen(url, timeout):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(JaxguardError, match=r"samples-1680.*no route.*local file"):
        load_benchmark("openai_moderation", folder=SHIPPED)


@pytest.mark.parametrize("name", ["saferlhf", "xstest_prompt"])
def test_a_hub_out_of_reach_says_what_to_do(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(JaxguardError, match="on disk"):
        load_benchmark(name, folder=SHIPPED)


OWN = {
    "name": "mine",
    "title": "Mine",
    "question": "prompt_harm",
    "examples": [{"prompt": "message", "positive": {"column": "verdict", "equals": "bad"}}],
    "license": "mine",
    "citation": "me",
    "url": "here",
}


@pytest.fixture
def own(tmp_path):
    """own(**changes): a user's YAML over three rows; None leaves a field out."""

    def own(**changes):
        rows = [
            {"id": "1", "message": "bread", "verdict": "BAD", "kind": "x", "policy": "Rules."},
            {"id": "1", "message": "bread", "verdict": "good", "kind": "y", "policy": "Rules."},
            {"id": None, "message": "bread", "verdict": "good", "kind": "x", "policy": None},
        ]
        (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        tree = OWN | {"source": {"path": str(tmp_path / "rows.jsonl")}} | changes
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in tree.items() if v is not None}), encoding="utf-8")
        return str(path)

    return own


def test_a_users_own(own):
    benchmark = load_benchmark(own(id="id"))
    assert (benchmark.group, answers(benchmark)) == ("extra", [HARM, SAFE, SAFE])
    first, second, third = (e.id for e in benchmark.examples)
    assert (first, second) == ("1", "1#2")
    assert third.startswith("mine:")
    assert benchmark.expected == {"positive": None, "negative": None, "total": None}


def test_ids_do_not_depend_on_other_rows(own):
    everything = load_benchmark(own())
    part = load_benchmark(own(where=[{"column": "kind", "equals": "y"}]))
    assert part.examples[0].id == everything.examples[0].id
    assert part.skipped == {"not where kind is 'y'": 2}


def test_a_named_policy(own, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert {e.policy for e in load_benchmark(own(policy={"name": "bank_support"})).examples} == {"bank_support"}
    with pytest.raises(JaxguardError, match="did you mean 'bank_support'"):
        load_benchmark(own(policy={"name": "bank_suport"}))
    refusal = [{**OWN["examples"][0], "response": "message"}]
    with pytest.raises(JaxguardError, match=r"asks response_refusal.*'aegis2' asks only prompt_harm, response_harm"):
        load_benchmark(own(policy={"name": "aegis2"}, question="response_refusal", examples=refusal))


def test_rows_without_their_policy_are_left_out(own):
    benchmark = load_benchmark(own(policy={"column": "policy"}))
    assert [e.policy for e in benchmark.examples] == ["Rules.", "Rules."]
    assert benchmark.skipped == {"no policy": 1}


def test_a_conversation_becomes_one_prompt(own, tmp_path):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    rows = [{"message": [*turns, {"role": "user", "content": "bread?"}], "verdict": "good"}]
    (tmp_path / "turns.jsonl").write_text(json.dumps(rows[0]), encoding="utf-8")
    (example,) = load_benchmark(own(), tmp_path / "turns.jsonl").examples
    assert example.prompt.endswith("[assistant] hi\nMessage to judge:\n[user] bread?")
    (tmp_path / "turns.jsonl").write_text(json.dumps({"message": turns, "verdict": "good"}), encoding="utf-8")
    with pytest.raises(JaxguardError, match=r"turns.jsonl:1: message .* does not end with the user's"):
        load_benchmark(own(), tmp_path / "turns.jsonl")


def positive(**condition):
    return {"examples": [{"prompt": "message", "positive": condition}]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qestion": "x"}, ["unknown field 'qestion'", "did you mean 'question'?"]),
        ({"question": "prompt_ham"}, ["'prompt_ham'", "did you mean 'prompt_harm'?"]),
        ({"title": None}, ["field 'title' is missing"]),
        ({"name": "two words"}, ["name"]),
        ({"source": {"hub": "a/b", "path": "c"}}, ["exactly one of hub, url and path"]),
        ({"source": {"hub": "a/b", "confg": "c"}}, ["'source.confg'", "did you mean 'config'?"]),
        ({"source": {"url": "http://a/b.csv"}}, ["source.url"]),
        ({"source": {"hub": "a/b", "revision": "c"}}, ["revision goes with file"]),
        ({"source": {"path": "a", "file": "c"}}, ["go with hub"]),
        ({"source": {"path": "a", "keys_us": "c"}}, ["'source.keys_us'", "did you mean 'keys_as'?"]),
        ({"examples": []}, ["examples", "at least one"]),
        (positive(column="verdict", equal="bad"), ["examples.0.positive.equal", "did you mean 'equals'?"]),
        (positive(column="verdict"), ["one of equals, not_equals and empty"]),
        (positive(equals="bad"), ["needs column, or columns"]),
        (positive(column="verdict", equals={"a": 1}), ["expected text, a number, true or false"]),
        (positive(column="verdict", equals=None), ["for null use empty"]),
        (positive(column="verdict", equals="bad", at_most=1), ["at_least and at_most go with columns"]),
        (positive(always=True, column="verdict"), ["always stands alone"]),
        ({"question": "response_harm"}, ["needs a response"]),
        ({"policy": {}}, ["name or column"]),
        ({"slices": [{"name": "a"}]}, ["slices.0", "one of column, columns and when"]),
        ({"slices": [{"name": "a", "column": "kind"}] * 2}, ["'a' is given twice"]),
        ({"expected": {"positive": 1, "negative": 1, "total": 3}}, ["do not add up"]),
        (positive(column="verdic", equals="bad"), ["examples.0.positive", "no column 'verdic'", "mean 'verdict'?"]),
        ({"id": "ident"}, ["id: ", "no column 'ident'"]),
        ({"where": [{"column": "kinds", "equals": "x"}]}, ["where.0", "did you mean 'kind'?"]),
        ({"slices": [{"name": "a", "column": "kin"}]}, ["slices.0", "did you mean 'kind'?"]),
        ({"where": [{"column": "kind", "equals": "z"}]}, ["no example there (not where kind is 'z': 3)"]),
        ({"policy": {"column": "kind", "rules": {"xx": "r"}}}, ["rows.jsonl:1", "'x'", "did you mean 'xx'?"]),
    ],
)
def test_mistakes_are_named(own, changes, words):
    with pytest.raises(JaxguardError) as error:
        load_benchmark(own(**changes))
    assert all(word in str(error.value) for word in words), error.value


def test_a_label_outside_its_set_is_an_error(own):
    example = {**OWN["examples"][0], "negative": {"column": "verdict", "equals": "fine"}}
    with pytest.raises(JaxguardError, match=r"rows.jsonl:2: verdict='good'; expected .* \(neither holds\)"):
        load_benchmark(own(examples=[example]))


def test_an_unknown_benchmark_is_named_with_the_nearest():
    with pytest.raises(JaxguardError, match="no benchmark 'toxicchat': did you mean 'toxic_chat'"):
        load_benchmark("toxicchat", folder=SHIPPED)


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ({"column": "a", "equals": True}, True),
        ({"column": "a", "equals": ["no", 1]}, True),
        ({"column": "t", "equals": "bread"}, True),
        ({"column": "n", "equals": ""}, True),
        ({"column": "n", "equals": 0}, False),
        ({"column": "n", "not_equals": "x"}, True),
        ({"column": "n", "empty": True}, True),
        ({"column": "t", "empty": True}, False),
        ({"columns": ["a", "b", "n"], "equals": 1}, True),
        ({"columns": ["a", "b", "n"], "equals": 1, "at_least": 2}, False),
        ({"columns": ["a", "b", "n"], "equals": 1, "at_most": 0}, False),
        ({"columns": ["b", "n"], "equals": 1, "at_most": 0}, True),
        ({"always": True}, True),
    ],
)
def test_conditions(condition, holds):
    assert Condition(**condition).holds({"a": True, "b": 0.0, "t": " Bread ", "n": None}) is holds


@pytest.mark.parametrize(
    ("file", "question", "counts"),
    [
        ("eval_aegis1_test", "prompt_harm", (232, 127)),
        ("eval_xstest_prompts", "prompt_harm", (200, 250)),
        ("eval_diasafety_test", "response_harm", (501, 594)),
        ("eval_hatemoji_test", "prompt_harm", (308, 285)),
    ],
)
def test_the_local_pool(file, question, counts, tmp_path, caplog):
    """Real rows: every one becomes an example, and counts that differ from the pool's own table are said to."""
    path = POOL / f"{file}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no {path}; JAXGUARD_POOL names the folder")
    column, words = LABEL[question], ("positive", "negative")
    example = {"prompt": "prompt", "positive": {"column": column, "equals": HARM}}
    example["negative"] = {"column": column, "equals": SAFE}
    if question == "response_harm":
        example["response"] = "response"
    tree = OWN | {"name": file, "question": question, "source": {"path": str(path)}, "id": "id", "examples": [example]}
    tree |= {
        "expected": dict(zip(words, counts, strict=True)),
        "slices": [{"name": "category", "column": "categories"}],
    }
    (tmp_path / f"{file}.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    benchmark = load_benchmark(file, folder=tmp_path)
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert {e.id: getattr(e, column) for e in benchmark.examples} == {row["id"]: row[column] for row in rows}
    assert set(benchmark.slices["category"]) == {c for row in rows for c in row["categories"]}
    found = tuple(benchmark.counts[word] for word in words)
    assert len(caplog.messages) == (found != counts)
    # Rows were taken out of the pool after its table was written, never put in.
    assert all(few <= many for few, many in zip(found, counts, strict=True))
    assert sum(found) >= 0.99 * sum(counts)


def test_the_documented_example_is_a_benchmark(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", document_benchmarks.DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "helpdesk.yaml").write_text(text, encoding="utf-8")
    fields = read_benchmark("helpdesk", tmp_path)
    assert (len(fields.where), fields.examples[0].positive.at_least) == (2, 2)


def test_the_documented_table_is_that_of_the_files():
    assert written(document_benchmarks.DOCUMENT) == document_benchmarks.table(), (
        "run python tools/document_benchmarks.py"
    )
