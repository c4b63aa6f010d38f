"""Benchmarks: the shipped ones on hand-made rows with their columns, a user's own, and what is wrong with the rest."""

import json
import logging
import re

import pytest
import yaml
from benchmark_examples import HARM, ROOT, ROWS, SAFE, answers, shipped, texts

import document_guard_benchmarks
from generated import written
from jaxguard.config import load
from jaxguard.data.benchmarks.loading import list_benchmarks, load_benchmark, load_benchmarks
from jaxguard.data.benchmarks.schema import read_benchmark
from jaxguard.data.format.dialogue import LABEL
from jaxguard.data.policies import POLICY_FOLDER, load_policy, policy_for
from jaxguard.evaluate.run import read_tasks
from jaxguard.utils.errors import JaxguardError


def test_every_benchmark_of_the_papers_table_is_there():
    ours = {"novel_policies", "novel_policies_response", "pyrit_answers"}  # test_novel.py, test_pool_benchmarks.py
    assert set(list_benchmarks()) == set(ROWS) | ours
    fields = [read_benchmark(name) for name in ROWS]
    groups = [f.group for f in fields]
    # What Avg(safety) = (5 x mean prompt F1 + 4 x mean response F1) / 9 and the custom average are taken over.
    assert [groups.count(g) for g in ("safety_prompt", "safety_response", "custom_policy")] == [5, 4, 2]
    asked = {"safety_prompt": "prompt_harm", "safety_response": "response_harm", "custom_policy": "prompt_harm"}
    assert all(f.question == asked.get(f.group, f.question) for f in fields)


@pytest.mark.parametrize("name", ROWS)
def test_a_shipped_benchmark_gives_the_right_labels(name, write):
    path, fields = write(name), read_benchmark(name)
    benchmark = shipped(name, path)
    assert fields.name == name
    assert answers(benchmark) == ROWS[name][1]
    assert benchmark.definition == fields
    for example in benchmark.examples:
        others = {LABEL[q] for q in LABEL if q != fields.question}
        assert all(getattr(example, other) is None for other in others)
        assert (example.response is None) == (fields.question == "prompt_harm")
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


def own_rows(tmp_path, *rows):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


LOAF = {"id": "loaf", "prompt": "A", "response": "a", "prompt_label": HARM, "response_label": SAFE, "source": "shop"}


def test_own_examples_have_their_ids_and_slices(tmp_path):
    path = own_rows(
        tmp_path,
        {**LOAF, "categories": ["bread", "cake"]},
        {"prompt": "B", "prompt_label": SAFE},
        {
            "id": "roll",
            "prompt": "C",
            "response": "c",
            "response_label": HARM,
            "categories": ["cake"],
            "adversarial": True,
        },
    )
    prompts, responses = load_benchmarks("own", path)
    assert [e.id for e in responses.examples] == ["loaf", "roll"]
    assert prompts.examples[0].id == "loaf"
    assert len({e.id for e in prompts.examples}) == 2
    assert responses.slices == {
        "category": {"bread": {"loaf"}, "cake": {"loaf", "roll"}},
        "source": {"shop": {"loaf"}, "mine": {"roll"}},
        "adversarial": {"yes": {"roll"}},
    }
    (tmp_path / "test.jsonl").write_bytes(path.read_bytes())
    path.unlink()
    assert [e.id for e in shipped("own_responses", tmp_path).examples] == ["loaf", "roll"]
    with pytest.raises(JaxguardError, match="loaf"):
        shipped("own_prompts", own_rows(tmp_path, LOAF, LOAF))


def test_a_file_with_several_labels_is_named_once(tmp_path):
    path = own_rows(tmp_path, LOAF, {"id": "b", "prompt": "B", "prompt_label": SAFE})
    assert [each.definition.question for each in load_benchmarks("own", path)] == ["prompt_harm", "response_harm"]
    assert [each.definition.name for each in load_benchmarks("own_prompts", path)] == ["own_prompts"]
    path = own_rows(tmp_path, {"id": "b", "prompt": "B", "prompt_label": SAFE})
    assert [each.definition.question for each in load_benchmarks("own", path)] == ["prompt_harm"]
    path = own_rows(tmp_path, {"id": "b", "prompt": "B", "response": "b", "refusal_label": "refusal"})
    with pytest.raises(JaxguardError, match="no example for benchmark 'own_responses'"):
        load_benchmarks("own", path)


def test_tasks_of_a_file_with_several_labels(tmp_path):
    path = own_rows(tmp_path, LOAF, {"id": "b", "prompt": "B", "prompt_label": SAFE}, {**LOAF, "id": "c"})

    def tasks(*benchmarks, **more):
        evaluate = {"benchmarks": [{"path": str(path), **each} for each in benchmarks], **more}
        config = load(
            {"name": "t", "model": {"checkpoint": "x"}, "data": {"train": [OWN_SOURCE]}, "evaluate": evaluate}
        )
        return {task.label: len(task.examples) for task in read_tasks(config.evaluate, config)}

    OWN_SOURCE = {"kind": "jsonl", "path": str(path)}
    assert tasks({"name": "own"}) == {"own_prompts": 3, "own_responses": 2}
    assert tasks({"name": "own", "label": "mine"}) == {"mine_prompt_harm": 3, "mine_response_harm": 2}
    # Validation is whole: a threshold chosen on a few examples would be another one.
    limited = tasks({"name": "own"}, limit=1, validation=[OWN_SOURCE])
    assert limited == {"own_prompts": 1, "own_responses": 1, "validation-prompt_harm": 3, "validation-response_harm": 2}
    with pytest.raises(JaxguardError, match="own_prompts"):
        tasks({"name": "own"}, {"name": "own_prompts"})


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
    assert benchmark.counts == benchmark.definition.expected.model_dump()
    assert not caplog.messages


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
    assert (benchmark.definition.group, answers(benchmark)) == ("extra", [HARM, SAFE, SAFE])
    first, second, third = (e.id for e in benchmark.examples)
    assert (first, second) == ("1", "1#2")
    assert third.startswith("mine:")


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


def test_rows_without_an_optional_policy_have_the_runs(own):
    benchmark = load_benchmark(own(policy={"column": "policy", "optional": True}))
    assert [e.policy for e in benchmark.examples] == ["Rules.", "Rules.", None]
    absent = load_benchmark(own(policy={"column": "rules", "optional": True}))
    assert {e.policy for e in absent.examples} == {None}


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
        ({"source": {"hub": "a/b", "path": "c"}}, ["exactly one of hub, url, path, data"]),
        ({"source": {"hub": "a/b", "confg": "c"}}, ["'source.confg'", "did you mean 'config'?"]),
        ({"source": {"url": "http://a/b.csv"}}, ["source.url"]),
        ({"source": {"path": "a", "revision": "c"}}, ["revision goes with hub"]),
        ({"source": {"path": "a", "file": "c"}}, ["file goes with hub"]),
        ({"source": {"hub": "a/b", "data": {"kind": "aegis2"}}}, ["exactly one of hub, url, path, data"]),
        ({"source": {"data": {"kind": "aegis"}}}, ["source.data.kind", "'aegis'", "did you mean 'aegis2'?"]),
        ({"source": {"data": {"kind": "aegis2"}, "splits": ["train"]}}, ["splits goes with"]),
        ({"source": {"data": {"kind": "aegis2"}, "keys_as": "c"}}, ["keys_as goes with"]),
        ({"source": {"path": "a", "keys_us": "c"}}, ["'source.keys_us'", "did you mean 'keys_as'?"]),
        ({"examples": []}, ["examples", "at least one"]),
        (positive(column="verdict", equal="bad"), ["examples.0.positive.equal", "did you mean 'equals'?"]),
        (positive(column="verdict"), ["one of equals, not_equals, empty"]),
        (positive(equals="bad"), ["one of column, columns"]),
        (positive(column="verdict", equals={"a": 1}), ["expected text, a number, true or false"]),
        (positive(column="verdict", equals=None), ["for null use empty"]),
        (positive(column="verdict", equals="bad", at_most=1), ["at_most goes with columns"]),
        (positive(always=True, column="verdict"), ["one of column, columns, always"]),
        ({"question": "response_harm"}, ["needs a response"]),
        ({"policy": {}}, ["one of name, column"]),
        ({"slices": [{"name": "a"}]}, ["slices.0", "one of column, columns, when"]),
        ({"slices": [{"name": "a", "column": "kind"}] * 2}, ["'a' is given twice"]),
        ({"expected": {"positive": 1, "negative": 1, "total": 3}}, ["do not add up"]),
        (positive(column="verdic", equals="bad"), ["examples.0.positive", "no column 'verdic'", "mean 'verdict'?"]),
        ({"id": "ident"}, ["id: ", "no column 'ident'"]),
        ({"where": [{"column": "kinds", "equals": "x"}]}, ["where.0", "did you mean 'kind'?"]),
        ({"slices": [{"name": "a", "column": "kin"}]}, ["slices.0", "did you mean 'kind'?"]),
        ({"where": [{"column": "kind", "equals": "z"}]}, ["no example for", "(not where kind is 'z': 3)"]),
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
        load_benchmark("toxicchat")


def test_the_documented_example_is_a_benchmark(tmp_path):
    (text,) = re.findall(
        r"```yaml\n(.*?)```", document_guard_benchmarks.DOCUMENT.read_text(encoding="utf-8"), re.DOTALL
    )
    (tmp_path / "helpdesk.yaml").write_text(text, encoding="utf-8")
    fields = read_benchmark(str(tmp_path / "helpdesk.yaml"))
    assert (len(fields.where), fields.examples[0].positive.at_least) == (2, 2)


def test_the_documented_table_is_that_of_the_files():
    assert written(document_guard_benchmarks.DOCUMENT) == document_guard_benchmarks.table(), (
        "run python tools/document_guard_benchmarks.py"
    )
