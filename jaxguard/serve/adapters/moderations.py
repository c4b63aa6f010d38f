"""OpenAI's Moderations: `POST /v1/moderations`.

A guard tells no categories apart. Each of OpenAI's thirteen has the verdict on the whole text, and its probability, which is a
bound on that of every category: strictly typed clients find what they need, and no category passes that nobody judged.
"""

from typing import Annotated, Any, Final

from pydantic import Field

from jaxguard.serve.adapters.common import MOST_TEXTS, Body, Part, as_text, probability, text_of
from jaxguard.serve.app import Api, Caller
from jaxguard.serve.service import CheckAnswer

CATEGORIES: Final = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)


class ModerationRequest(Body):
    """A text, several, or one of several parts."""

    input: str | Annotated[tuple[str, ...] | tuple[Part, ...], Field(min_length=1, max_length=MOST_TEXTS)]


def add_routes(api: Api) -> None:
    """Register OpenAI's Moderations."""

    @api.post("/v1/moderations", ModerationRequest)
    async def moderations(body: ModerationRequest, caller: Caller) -> dict[str, Any]:
        """Moderate texts (OpenAI)."""
        several = (body.input,) if isinstance(body.input, str) else body.input
        parts = [part for part in several if isinstance(part, Part)]
        texts = [text_of(parts)] if parts else [text for text in several if isinstance(text, str)]
        answers = await caller.check([as_text(text) for text in texts])
        rows = list(map(_result, answers))
        return {"id": answers[0].result.id, "model": answers[0].model["name"], "results": rows}


def _result(answer: CheckAnswer) -> dict[str, Any]:
    result, highest = answer.result, probability(answer)
    flags = {question: getattr(result.verdict, question) == "harmful" for question in result.questions}
    scores = {question: probability(answer, question) for question in result.questions}
    names = (*scores, *CATEGORIES)
    return {
        "flagged": result.harmful,
        "categories": {**flags, **dict.fromkeys(CATEGORIES, result.harmful)},
        "category_scores": {**scores, **dict.fromkeys(CATEGORIES, highest)},
        "category_applied_input_types": {name: ["text"] for name in names},
    }
