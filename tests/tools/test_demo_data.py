import zipfile

import pytest

import demo_data
from jaxguard.data.examples import Example

HARM = """\
# dataset_version=1.0,,,,
harm_category,objective,assistant_response,human_score_1,human_score_2,data_type
x,How do I open a tin?,"Pull the ring, then lift.",0,0.2,text
x,How do I open a door?,Kick it.,1,0.75,text
x,How do I open a jar?,Twist it.,0.5,0.25,text
x,How do I open a box?,,0,0,text
"""
OBJECTIVE = """\
# dataset_version=1.1
# and a second line
objective,assistant_response,human_score,data_type,harm_category
How do I open a door?,Kick it.,0,text,x
How do I shut a window?,Slam it.,1,text,x
"""


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "sheets.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pyrit/datasets/scorer_evals/harm/things.csv", HARM)
        archive.writestr("pyrit/datasets/scorer_evals/objective/things.csv", OBJECTIVE)
        archive.writestr("pyrit/datasets/scorer_evals/harm/mini_things.csv", HARM.replace("tin", "can"))
        archive.writestr("pyrit/datasets/scorer_evals/refusal_scorer/other.csv", OBJECTIVE.replace("door", "gate"))
    return path


def test_severity_decides_and_what_lies_between_is_left_out(wheel):
    examples = demo_data.label(demo_data.read_judgements(wheel))
    labels = {(e.prompt, e.response): e.response_label for e in examples}
    assert labels == {
        ("How do I open a tin?", "Pull the ring, then lift."): "unharmful",
        ("How do I open a door?", "Kick it."): "harmful",  # severity goes before the objective
        ("How do I shut a window?", "Slam it."): "harmful",
    }


def example(number, prompt, response="yes"):
    return Example(str(number), "test", prompt, response, response_label="unharmful")


def test_long_exchanges_are_left_out():
    judged = {("short", "long " * 400): {"harm": [0.0]}, ("short", "short"): {"harm": [0.0]}}
    assert [e.response for e in demo_data.label(judged)] == ["short"]


def test_alike_questions_are_one_group_even_through_a_third():
    chain = ["a b c d e f g h", "a b c d e f g h i j", "a b c d e f g h i j k l", "z y x"]
    group = demo_data.group_questions(chain)
    assert [len({group[q] for q in chain[:3]}), group["z y x"]] == [1, "z y x"]
    assert demo_data.group_questions(["Open the door!", "open THE door"])["open THE door"] == "Open the door!"


def test_no_question_is_on_both_sides_and_the_split_is_the_same_each_time():
    words = ["bread", "river", "lamp", "cloud", "paper"]
    examples = [example(i, f"{words[i % 5]} {words[i // 5 % 5]} {i // 4}", f"answer {i}") for i in range(100)]
    first, again = demo_data.split(examples), demo_data.split(examples[::-1])
    group = demo_data.group_questions({e.prompt for e in examples})
    sides = [{group[e.prompt] for e in first[name]} for name in ("train", "validation")]
    assert not sides[0] & sides[1]
    assert len(first["train"]) + len(first["validation"]) == 100
    assert 25 <= len(first["validation"]) < 40
    assert {e.id for e in first["validation"]} == {e.id for e in again["validation"]}
