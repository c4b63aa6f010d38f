"""Predictions on disk. tests/utils/test_store.py kills and damages their file."""

import math
from dataclasses import asdict, replace

import pytest

from jaxguard.guards.loading import open_predictions
from jaxguard.guards.protocol import Completion, Prediction
from jaxguard.utils.errors import ProvenanceError
from jaxguard.utils.store import open_store, read_records

SETTINGS = {"temperature": 0.6, "guard": {"checkpoint": "somewhere"}}
ANSWERS = [
    Prediction(
        "a",
        {"prompt_harm": (1, 0, -1), "response_harm": (0, 0, 0)},
        {"prompt_harm": 0.25, "response_harm": None},
        ("Prompt harm: harmful", "?", "\u2028\ud83d"),
        1,
        7,
        9,
        0.5,
        0.25,
        {"prompt_harm": 0, "response_harm": 1},
    ),
    Prediction("b", {"prompt_harm": (0,)}, {"prompt_harm": None}),
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


def test_tokens_are_kept_where_they_are_wanted(tmp_path):
    sampled = (Completion((5, 6), stopped=True, stop_id=0, logprobs=(-0.25, -1.5, -0.125)), None)
    for name, completions in (("with", sampled), ("without", ())):
        for _ in range(2):  # begun, and read again
            with open_predictions(tmp_path / name, SETTINGS, completions=name == "with") as predictions:
                predictions.append(replace(ANSWERS[0], completions=sampled))
        stored = list(read_records(tmp_path / name, Prediction))
        assert [each.completions for each in stored] == [completions] * 2
        assert all(own is None or own.logprobs == sampled[0].logprobs for each in stored for own in each.completions)
        assert read(tmp_path / name)["a"].completions == ()


def test_a_cut_prediction_is_made_again(tmp_path):
    path = tmp_path / "answers.jsonl"
    fill(path)
    path.write_bytes(path.read_bytes()[:-10])
    assert list(read(path)) == ["a"]
    with open_predictions(path, SETTINGS) as predictions:
        predictions.append(ANSWERS[1])
    assert read(path) == {answer.example_id: answer for answer in ANSWERS}


def test_a_record_of_another_shape_is_predicted_again(tmp_path):
    path = tmp_path / "answers.jsonl"
    with open_store(path, SETTINGS, "") as store:
        store.append({"example_id": "a", "verdict": 1})
    assert read(path) == {}


@pytest.mark.parametrize("probability", [math.nan, math.inf, -0.25, 1.5, "0.5", True])
def test_what_is_no_probability_is_predicted_again(tmp_path, caplog, probability):
    path = tmp_path / "answers.jsonl"
    fill(path)
    with open_store(path, SETTINGS, "") as store:
        store.append(asdict(ANSWERS[1]) | {"example_id": "c", "probabilities": {"prompt_harm": probability}})
    assert set(read(path)) == {"a", "b"}
    assert "1 damaged" in caplog.text


def test_other_settings_are_refused_by_name(tmp_path):
    fill(tmp_path / "answers.jsonl")
    with pytest.raises(ProvenanceError, match=r"temperature: 0\.6 there, 1\.0 now"):
        read(tmp_path / "answers.jsonl", SETTINGS | {"temperature": 1.0})
    assert len(read(tmp_path / "answers.jsonl")) == 2
