"""What the conventions share: chat messages as an exchange, and how sure a verdict is."""

from collections.abc import Sequence
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints

from jaxguard.data.policies import QUESTIONS, Question
from jaxguard.serve.errors import ServiceError
from jaxguard.serve.service import CheckAnswer, CheckRequest, Turn

MOST_TEXTS: Final = 256
"""Of a request, as in the native API."""
HARM: Final = tuple(question for question in QUESTIONS if question.endswith("_harm"))


class Body(BaseModel):
    """What is read of a client's JSON; clients send more, which has no bearing on a verdict."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


Text = Annotated[str, StringConstraints(pattern=r"\S")]


class Part(Body):
    """A part of a message: text, a refusal, or what this guard cannot read."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Function(Body):
    """What is called, with which arguments in JSON."""

    name: str | None = None
    arguments: str | None = None

    @property
    def text(self) -> str:
        """What is judged."""
        return f"{self.name or ''}({self.arguments or ''})"


class ToolCall(Body):
    """A tool call."""

    function: Function


class Message(Body):
    """A chat message. Whatever its role, it is conversation: no message is a policy."""

    role: str
    content: str | tuple[Part, ...] | None = None
    refusal: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    function_call: Function | None = None
    """What came before `tool_calls`."""
    audio: JsonValue = None

    @property
    def text(self) -> str:
        """ServiceError 422: a part is no text."""
        if self.audio is not None:
            raise _no_text()
        content = self.content if isinstance(self.content, str) else text_of(self.content or ())
        calls = [*(call.function for call in self.tool_calls or ()), self.function_call]
        return "\n".join(filter(str.strip, (content, self.refusal or "", *(call.text for call in calls if call))))


def _no_text() -> ServiceError:
    """A new one each time: an error keeps the frames that it passed, and what they hold."""
    return ServiceError(422, "unsupported", "this guard judges text only; a part of a message is no text")


Messages = Annotated[tuple[Message, ...], Field(min_length=1)]


def text_of(parts: Sequence[Part]) -> str:
    """Join text parts. ServiceError 422: one is an image, audio or another thing that would go unjudged."""
    texts = [
        part.refusal if part.type == "refusal" else part.text
        for part in parts
        if part.type.endswith(("text", "refusal"))
    ]
    known = [text for text in texts if text is not None]
    if len(known) < len(parts):
        raise _no_text()
    return "\n".join(known)


def exchange(messages: Sequence[Message]) -> CheckRequest:
    """Make an exchange of a conversation: a response if the assistant's turn is last, and the prompt before it.

    The prompt is all that came since the assistant's turn before. Instructions of the system in between are read, not judged, so
    that a reminder behind a prompt does not take its place. A response to nothing is judged as a text, in the place of a prompt.
    ServiceError 422: there is no text to judge.
    """
    turns = [Turn(role=message.role, content=text) for message in messages if (text := message.text)]
    end = len(turns)
    while end and turns[end - 1].role == "assistant":
        end -= 1
    response = _joined(turns[end:]) or None
    if not end:
        return as_text(response or "")
    start = end
    while start and turns[start - 1].role != "assistant":
        start -= 1
    asked = [turn for turn in turns[start:end] if turn.role not in ("system", "developer")] or turns[end - 1 : end]
    earlier = tuple(turn for turn in turns[:end] if not any(turn is each for each in asked))
    return CheckRequest(prompt=_joined(asked), response=response, history=earlier)


def _joined(turns: Sequence[Turn]) -> str:
    return "\n\n".join(turn.content for turn in turns)


def as_text(text: str) -> CheckRequest:
    """Make a request of a text of unknown origin. ServiceError 422: it is blank."""
    if not text.strip():
        raise ServiceError(422, "no_text", "there is no text to judge")
    return CheckRequest(prompt=text)


def certain(answer: CheckAnswer) -> CheckAnswer:
    """Return a verdict that needs no word beside it. ServiceError 422: harmless, as far as it was judged."""
    if answer.result.problems and not answer.result.harmful:
        raise ServiceError(422, "unreliable", "the guard could not judge all of it; POST /v1/check says why")
    return answer


def probability(answer: CheckAnswer, question: Question | None = None) -> float:
    """Return the probability of a question, or the highest of harm. ServiceError 422: there is none to rely on."""
    chosen = HARM if question is None else (question,)
    values = [p for q, p in answer.result.probabilities.items() if q in chosen]
    known = [p for p in values if p is not None]
    if answer.result.problems or not known or len(known) < len(values):
        raise ServiceError(422, "no_probability", "the guard gives no probability to rely on; POST /v1/check says why")
    return max(known)


def usage(answers: Sequence[CheckAnswer]) -> dict[str, Any]:
    """Return the tokens of some answers as OpenAI's newer APIs count them."""
    prompt = sum(answer.result.prompt_tokens for answer in answers)
    completion = sum(answer.result.completion_tokens for answer in answers)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + completion,
    }


def reason(answer: CheckAnswer) -> str:
    """Say why something does not pass, in words that quote nothing."""
    result = answer.result
    harmful = [q for q in result.questions if getattr(result.verdict, q) == "harmful"]
    found = [f"{q} {'' if (p := result.probabilities[q]) is None else f'{p:.2f}'}".strip() for q in harmful]
    return f"{', '.join(found) or 'not judged as a whole'} by policy {answer.policy_name}"
