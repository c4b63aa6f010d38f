"""Decisions: OpenAI's `POST /v1/decisions`, and `POST /v1/systemone` of System One.

A guard answers one question, whether a policy is violated, and policies are registered: a predicate is answered by its name, which
is a registered policy's, or one of the default policy's questions. What a request writes as instructions is not read.
"""

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import Field

from jaxguard.data.policies import QUESTIONS, Question
from jaxguard.serve.adapters.common import Body, Message, Messages, Text, exchange, probability, usage
from jaxguard.serve.app import Api, Caller
from jaxguard.serve.errors import ServiceError
from jaxguard.serve.service import CheckAnswer, CheckRequest


class Predicate(Body):
    """A question; only predicates can be answered."""

    type: str
    name: str | None = None


class DecisionRequest(Body):
    """Questions about a text, or about a conversation's last message."""

    input: Text | Messages
    questions: Annotated[tuple[Predicate, ...], Field(min_length=1, max_length=400)]


class SystemOneQuestion(Body):
    """A question; only `noul` can be answered."""

    type: str


class SystemOneRequest(Body):
    """Questions about a text, by name."""

    state: Text
    questions: Annotated[dict[str, SystemOneQuestion], Field(min_length=1, max_length=400)]


def add_routes(api: Api) -> None:
    """Register decisions."""

    @api.post("/v1/decisions", DecisionRequest)
    async def decisions(body: DecisionRequest, caller: Caller) -> dict[str, Any]:
        """Answer predicates with probabilities (OpenAI); a refusal where the guard cannot."""
        names = [question.name if question.type == "predicate" else None for question in body.questions]
        messages = (Message(role="user", content=body.input),) if isinstance(body.input, str) else body.input
        probabilities, answers = await _decide(exchange(messages), names, caller)
        rows = [
            {"type": "refusal", "name": question.name}
            if (p := probabilities.get(name)) is None
            else {"type": "predicate", "name": name, "probability": p}
            for question, name in zip(body.questions, names, strict=True)
        ]
        return {"model": caller.service.model["name"], "answers": rows, "usage": usage(answers)}

    @api.post("/v1/systemone", SystemOneRequest)
    async def system_one(body: SystemOneRequest, caller: Caller) -> dict[str, Any]:
        """Answer `noul` questions with probabilities (System One); an error where the guard cannot answer all."""
        if any(question.type != "noul" for question in body.questions.values()):
            raise _unanswerable()
        probabilities, answers = await _decide(CheckRequest(prompt=body.state), body.questions, caller)
        if len(probabilities) < len(body.questions):
            raise _unanswerable()
        rows = {name: {"type": "noul", "noul": p} for name, p in probabilities.items()}
        tokens = usage(answers)
        return {
            "model": caller.service.model["name"],
            "answers": rows,
            "usage": {name: tokens[name] for name in ("input_tokens", "output_tokens")},
        }


async def _decide(
    request: CheckRequest, names: Iterable[str | None], caller: Caller
) -> tuple[dict[str | None, float], list[CheckAnswer]]:
    """Return the probabilities by name, and one answer of each policy. ServiceError 422: no question can be answered."""
    registered = caller.service.policies.current
    asked: dict[str, tuple[str | None, Question | None]] = {}
    for name in names:
        if name in QUESTIONS:
            asked[name] = None, name
        elif name in registered:
            asked[name] = name, None
    policies = list(dict.fromkeys(policy for policy, _ in asked.values()))
    if not policies:
        raise _unanswerable()
    answers = await caller.check([request.model_copy(update={"policy": policy}) for policy in policies])
    by_policy = dict(zip(policies, answers, strict=True))
    probabilities = dict[str | None, float]()
    for name, (policy, question) in asked.items():
        try:
            probabilities[name] = probability(by_policy[policy], question)
        except ServiceError:
            continue
    if not probabilities:
        raise _unanswerable()
    return probabilities, answers


def _unanswerable() -> ServiceError:
    names = "a registered policy, or a question of the default one; GET /v1/policies lists them"
    return ServiceError(422, "unanswerable", f"questions: only predicates are answered whose name is that of {names}")
