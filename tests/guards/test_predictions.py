"""Answers on disk: kept, refused under other settings, and whole after any cut."""

import pytest

from jaxguard.guards.predictions import open_predictions
from jaxguard.guards.protocol import Prediction
from jaxguard.utils.errors import JaxguardError

SETTINGS = {"temperature": 0.6, "guard": {"checkpoint": "somewhere"}}
ANSWERS = [
    Prediction("a", (1, 0, -1), 0.25, ("Prompt harm: harmful", "?", "\u2028\ud83d"), 1, 7, 9, 0.5, 0.25),
    Prediction("b", (0,), None),
]


def fill(path):
    with open_predictions(path, SETTINGS) as predictions:
        for answer in ANSWERS:
            predictions.append(answer)


def read(path, settings=SETTINGS):
    with open_predictions(path, settings) as predictions:
        return dict(predictions.answers)


def test_answers_come_back(tmp_path):
    path = tmp_path / "some" / "place.jsonl"
    fill(path)
    assert read(path) == {answer.example_id: answer for answer in ANSWERS}
    assert read(path) == {answer.example_id: answer for answer in ANSWERS}


def test_any_cut_loses_only_what_was_cut(tmp_path):
    path = tmp_path / "answers.jsonl"
    fill(path)
    whole = path.read_bytes()
    head, first = (whole.index(b"\n") + 1, whole.index(b"\n", whole.index(b"\n") + 1) + 1)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        kept = [a.example_id for a in ANSWERS[: 0 if size < head else (size >= first) + (size >= len(whole))]]
        assert list(read(path)) == kept, size
        with open_predictions(path, SETTINGS) as predictions:
            predictions.append(ANSWERS[1])
        assert read(path)["b"] == ANSWERS[1]


@pytest.mark.parametrize("place", [30, 120, 300])
def test_a_flipped_byte_is_noticed(tmp_path, place):
    path = tmp_path / "answers.jsonl"
    fill(path)
    broken = bytearray(path.read_bytes())
    broken[place] ^= 1
    path.write_bytes(broken)
    assert all(answer in ANSWERS for answer in read(path).values())
    assert len(read(path)) < 2


def test_other_settings_are_refused_by_name(tmp_path):
    fill(tmp_path / "answers.jsonl")
    with pytest.raises(JaxguardError, match=r"temperature: 0\.6 there, 1\.0 now"):
        read(tmp_path / "answers.jsonl", SETTINGS | {"temperature": 1.0})
    assert len(read(tmp_path / "answers.jsonl")) == 2
