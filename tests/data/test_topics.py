"""CantTalkAboutThis: dialogues taken apart into messages on and off their topic."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from jaxguard.config.data import SourceConfig
from jaxguard.data.policies import load_policy, policy_for
from jaxguard.data.sources import load, load_examples
from jaxguard.utils.errors import JaxguardError

GREETING = {"role": "assistant", "content": "Which bread do you bake?"}
ADVICE = {"role": "assistant", "content": "Mix flour\n  and water."}
FIRST, SECOND, THANKS = (
    {"role": "user", "content": text} for text in ("Rye bread.", "How long in the oven?", "Thanks, goodbye.")
)
DIALOGUE = {
    "domain": "cooking",
    "scenario": "first loaf",
    "system_instruction": "Only talk of bread.",
    "conversation": [GREETING, FIRST, ADVICE, SECOND, GREETING, THANKS],
    "distractors": [
        {"bot turn": "mix flour and  water.", "distractor": "Who won the chess final?"},
        {"bot turn": "Which bread do you bake?", "distractor": "Which trains run today?"},
    ],
    "conversation_with_distractors": [],
}


def source(path, **more):
    return SourceConfig(kind="canttalkaboutthis", path=path, **more)


def loaded(lines, **changes):
    return load(source(lines([DIALOGUE, {**DIALOGUE, **changes}])))


def message(lines, **changes):
    with pytest.raises(JaxguardError) as error:
        loaded(lines, **changes)
    return str(error.value)


def turns_of(prompt):
    """The turns of a transcript, those of the message to check last."""
    return [line for line in prompt.splitlines() if line.startswith("[")]


def test_every_user_turn_is_on_topic_and_every_distractor_is_off(lines):
    examples = load_examples(source(lines([DIALOGUE])))
    assert [(turns_of(e.prompt)[-1], e.prompt_label) for e in examples] == [
        ("[user] Rye bread.", "unharmful"),
        ("[user] How long in the oven?", "unharmful"),
        ("[user] Thanks, goodbye.", "unharmful"),
        ("[user] Who won the chess final?", "harmful"),
        ("[user] Which trains run today?", "harmful"),
    ]
    assert {(e.policy, e.categories, e.source) for e in examples} == {
        ("Only talk of bread.", ("cooking",), "canttalkaboutthis")
    }
    assert {(e.response, e.response_label, e.trace) for e in examples} == {(None, None, None)}


def test_a_message_follows_the_earlier_turns(lines):
    _, second, thanks, chess, trains = load_examples(source(lines([DIALOGUE])))
    before = ["[assistant] Which bread do you bake?", "[user] Rye bread.", "[assistant] Mix flour"]
    assert turns_of(second.prompt)[:-1] == before
    assert turns_of(chess.prompt)[:-1] == before, "a distractor follows its bot turn, whatever the spacing"
    assert turns_of(trains.prompt)[:-1] == before[:1], "of two equal bot turns the first is taken"
    assert not any("chess" in e.prompt for e in (second, thanks)), "later turns know nothing of a distractor"
    assert second.prompt.endswith("Message to judge:\n[user] How long in the oven?")


def test_a_first_user_turn_stands_alone(lines):
    first, *_ = load_examples(source(lines([{**DIALOGUE, "conversation": [FIRST, ADVICE, SECOND]}])))
    assert first.prompt == "Rye bread."


def test_ids_are_hashes_of_dialogue_and_policy(lines):
    other = {**DIALOGUE, "system_instruction": "Only talk of rye."}
    ids = [e.id for e in load_examples(source(lines([DIALOGUE, other])))]
    assert ids[0] == "canttalkaboutthis:74bbcc56365dd559", "ids must not change: subsets are drawn by them"
    assert len(set(ids)) == 10
    assert [e.id for e in load_examples(source(lines([other, DIALOGUE])))] == ids[5:] + ids[:5]


def test_the_system_instruction_is_the_policy(lines):
    example = load_examples(source(lines([DIALOGUE])))[0]
    policy = policy_for(example, load_policy("wildguard"))
    assert (policy.rules, policy.categories) == ("Only talk of bread.", ())


def test_columns_that_are_json_text(lines):
    written = {column: json.dumps(DIALOGUE[column]) for column in ("conversation", "distractors")}
    assert load_examples(source(lines([{**DIALOGUE, **written}]))) == load_examples(source(lines([DIALOGUE])))


@pytest.mark.parametrize("distractors", [None, [], "", "null"])
def test_a_dialogue_without_distractors(lines, distractors):
    data = loaded(lines, distractors=distractors)
    assert len(data.examples) == 5 + 3
    assert not data.skipped


@pytest.mark.parametrize(
    ("distractor", "reason"),
    [
        ({"bot turn": "Which cake?", "distractor": "Chess?"}, "bot turn not in the conversation"),
        ({"bot turn": "Rye bread.", "distractor": "Chess?"}, "bot turn not in the conversation"),
        ({"bot turn": None, "distractor": "Chess?"}, "bot turn not in the conversation"),
        ({"distractor": "Chess?"}, "bot turn not in the conversation"),
        ({"bot turn": "Which bread do you bake?"}, "empty prompt"),
        ({"bot turn": "Which bread do you bake?", "distractor": " \n"}, "empty prompt"),
    ],
)
def test_a_distractor_without_its_place_or_text_is_skipped_alone(lines, distractor, reason):
    data = loaded(lines, distractors=[distractor, DIALOGUE["distractors"][0]])
    assert len(data.examples) == 5 + 4
    assert data.skipped == {reason: 1}


@pytest.mark.parametrize(
    ("changes", "skipped"),
    [
        ({"conversation": [], "distractors": []}, {"no user turn": 1}),
        ({"conversation": None, "distractors": None}, {"no user turn": 1}),
        ({"conversation": [GREETING], "distractors": None}, {"no user turn": 1}),
        ({"conversation": []}, {"bot turn not in the conversation": 2}),
        ({"conversation": [FIRST, {"role": "user"}]}, {"a turn without role or text": 1}),
        ({"conversation": [FIRST, {"role": None, "content": "x"}]}, {"a turn without role or text": 1}),
        ({"system_instruction": " "}, {"no system instruction": 5}),
        ({"system_instruction": None}, {"no system instruction": 5}),
    ],
)
def test_an_unusable_dialogue_is_skipped_and_counted(lines, changes, skipped):
    data = loaded(lines, **changes)
    assert len(data.examples) == 5
    assert data.skipped == skipped


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("conversation", "not JSON"),
        ("conversation", ["Rye bread."]),
        ("conversation", {"role": ["user"], "content": ["Rye bread."]}),
        ("distractors", 5),
        ("distractors", [["Chess?"]]),
    ],
)
def test_a_column_of_another_shape_names_the_row(lines, column, value):
    assert f"some.jsonl:2, {column}: " in message(lines, **{column: value})


def test_a_turn_that_is_no_text_names_the_row(lines):
    assert "some.jsonl:2, conversation: content is 5" in message(lines, conversation=[{"role": "user", "content": 5}])


def test_a_missing_column_is_named(lines):
    rest = {key: value for key, value in DIALOGUE.items() if key != "distractors"}
    with pytest.raises(JaxguardError, match="'distractors'"):
        load(source(lines([rest])))


def test_a_clone_and_a_parquet_file_give_the_same_examples(lines, tmp_path):
    want = load_examples(source(lines([DIALOGUE], "canttalkaboutthis_topic_control_mixtral.jsonl")))
    test = {**DIALOGUE, "distractors": None}
    lines([test], "canttalkaboutthis_topic_control_human_test_set.jsonl")
    assert load_examples(source(str(tmp_path))) == want
    assert load_examples(source(str(tmp_path), split="test")) == want[:3]
    rows = [{key: DIALOGUE[key] for key in ("system_instruction", "domain", "conversation", "distractors")}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    assert load_examples(source(str(tmp_path / "train.parquet"))) == want


def test_where_it_lies_on_the_hub(monkeypatch):
    calls = []

    def read_hub(*where):
        calls.append(where)
        raise JaxguardError("no network here")

    monkeypatch.setattr("jaxguard.data.sources.read_hub", read_hub)
    with pytest.raises(JaxguardError, match="no network"):
        load(SourceConfig(kind="canttalkaboutthis", split="test"))
    assert calls == [("nvidia/CantTalkAboutThis-Topic-Control-Dataset", None, "test", None, None)]


def test_a_topic_row_of_the_published_traces_needs_its_instruction(lines):
    """Without it, off-topic would be read as harmful under the run's own policy."""
    row = {
        "system_instruction": "Only talk of bread.",
        "conversation_history": [GREETING],
        "last_user_message": "Who won the chess final?",
        "gt_topic_classification": "off-topic",
        "safety_reasoning_trace_deepseek_r1_0528": "Chess is no bread.",
        "prediction_gt_mismatch_deepseek_r1_0528": False,
    }
    rows = [row, {**row, "system_instruction": None}, {**row, "last_user_message": " "}]
    data = load(SourceConfig(kind="nemotron_topics", path=lines(rows)))
    assert len(data.examples) == 1
    assert data.skipped == {"no system instruction": 1, "empty prompt": 1}
