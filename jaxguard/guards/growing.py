"""What was answered about a text that grows, for its next piece: a part of a request that is the same is not asked again."""

from dataclasses import replace
from typing import TypeAlias

from jaxguard.data.format.dialogue import Mode
from jaxguard.guards.protocol import Prediction, Request

Answered: TypeAlias = dict[tuple[Mode, int], tuple[Request, Prediction]]
"""By mode and number of the part."""
Kept: TypeAlias = dict[str, tuple[Answered, int, Request]]
"""By the example's id of a part: where its answer belongs."""


def known(kept: Kept) -> dict[str, Prediction]:
    """The answers of parts that were asked before, by id; they cost nothing."""
    predictions = {}
    for id, (answered, number, part) in kept.items():
        earlier, prediction = answered.get((part.mode, number), (None, None))
        if prediction is not None and earlier == _without_id(part):
            predictions[id] = replace(prediction, example_id=id, prompt_tokens=0, completion_tokens=0, seconds=0.0)
    return predictions


def keep(kept: Kept, prediction: Prediction) -> None:
    """Remember an answer if it is about a text that grows."""
    if prediction.example_id in kept:
        answered, number, part = kept[prediction.example_id]
        answered[part.mode, number] = _without_id(part), prediction


def _without_id(part: Request) -> Request:
    return replace(part, example=replace(part.example, id=""))
