"""Topic following: benchmarks over data sources, whose rows are whole dialogues or have their message in two columns."""

import json

import pytest
from benchmark_examples import DIALOGUE, HARM, ROOT, ROWS, SAFE, SHIPPED, TOPIC, answers, shipped

from jaxguard.data.benchmarks.loading import load_benchmark
from jaxguard.data.benchmarks.schema import read_benchmark
from jaxguard.data.policies import POLICY_FOLDER, load_policy, policy_for
from jaxguard.data.sources import load
from jaxguard.utils.errors import JaxguardError

TOPICS = ("canttalkaboutthis", "nemotron_topics")


@pytest.mark.parametrize("name", TOPICS)
def test_a_dialogue_is_judged_as_it_is_trained_on(name, write):
    path = write(name)
    source = read_benchmark(name).source.data
    loaded = load(source.model_copy(update={"path": str(path)}))
    benchmark = shipped(name, path)
    trained = [(e.id, e.prompt, e.prompt_label, e.policy) for e in loaded.examples]
    assert [(e.id, e.prompt, e.prompt_label, e.policy) for e in benchmark.examples] == trained
    assert benchmark.skipped == loaded.skipped


@pytest.mark.parametrize("name", TOPICS)
def test_a_message_off_the_topic_is_harmful_under_the_dialogues_instruction(name, write):
    chess = next(e for e in shipped(name, write(name)).examples if e.prompt.endswith("[user] Who won the chess final?"))
    assert chess.prompt_label == HARM
    assert "[user] Rye.\n[assistant] Knead for long.\nMessage to judge:" in chess.prompt
    following = load_policy("topic_following", ROOT / POLICY_FOLDER)
    policy = policy_for(chess, following, ROOT / POLICY_FOLDER)
    assert (policy.rules, policy.asks) == ("Only talk of bread.", ("prompt_harm",))


def test_slices_and_what_is_skipped_in_reading(write, tmp_path):
    assert {v: len(ids) for v, ids in shipped(TOPICS[0], write(TOPICS[0])).slices["domain"].items()} == {"cooking": 6}
    assert shipped(TOPICS[1], write(TOPICS[1])).skipped == {"no system instruction": 1}
    rows = [DIALOGUE, {**DIALOGUE, "conversation": []}, {**DIALOGUE, "system_instruction": " "}]
    path = tmp_path / "more.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    benchmark = shipped(TOPICS[0], path)
    assert answers(benchmark) == [SAFE, SAFE, HARM]
    assert benchmark.skipped == {"bot turn not in the conversation": 1, "no system instruction": 3}


def test_the_human_test_set_of_a_clone_and_of_the_hub(write, tmp_path, monkeypatch):
    clone = tmp_path / "clone"
    clone.mkdir()
    write(TOPICS[0]).rename(clone / "canttalkaboutthis_topic_control_human_test_set.jsonl")
    (clone / "canttalkaboutthis_topic_control_mixtral.jsonl").write_text("not read", encoding="utf-8")
    assert answers(shipped(TOPICS[0], clone)) == ROWS[TOPICS[0]][1]

    asked = []

    def read_hub(*where):
        asked.append(where)
        raise JaxguardError("no network here")

    monkeypatch.setattr("jaxguard.data.sources.read_hub", read_hub)
    for name in TOPICS:
        with pytest.raises(JaxguardError, match="no network"):
            load_benchmark(name)
    assert asked == [
        ("nvidia/CantTalkAboutThis-Topic-Control-Dataset", None, "test", None, None),
        ("nvidia/Nemotron-Content-Safety-Reasoning-Dataset", None, "train", "tf_efficient_reasoning.jsonl", None),
    ]


def test_a_column_that_examples_do_not_have_is_named(tmp_path):
    """The YAML's columns are those of our JSON lines, not those of the set."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(TOPIC), encoding="utf-8")
    text = (SHIPPED / "nemotron_topics.yaml").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(text.replace("column: policy", "column: polcy"), encoding="utf-8")
    with pytest.raises(JaxguardError, match=r"no column 'polcy'; did you mean 'policy'\?"):
        load_benchmark(str(tmp_path / "mine.yaml"), tmp_path / "rows.jsonl")


def test_a_topic_file_of_ones_own(write):
    benchmark = shipped("own_topics", write("own_topics"))
    assert {e.policy for e in benchmark.examples} == {"Only bread."}
    assert benchmark.skipped == {"no policy": 1, "no label": 1}
