"""Chat completions of a guard: `POST /v1/chat/completions`, as NeMo Guardrails' content safety rails call it.

The messages are the conversation to judge, system messages included; the policy is the service's. The answer is the verdict as
lines. Nothing that a client sets for sampling has a bearing on it: a `max_tokens` below the guard's own would cut its reasoning,
and so its verdict, off.
"""

import time
from typing import Any, Final, Literal

from jaxguard.data.format.dialogue import Mode, written
from jaxguard.serve.adapters.common import Body, Message, Messages, certain, exchange
from jaxguard.serve.app import Api, Caller

MARKERS: Final = {"/think": Mode.REASONING, "/no_think": Mode.DIRECT}
"""What a last system message may hold, alone. In another message they are text: a user must not choose the mode."""


class TemplateKwargs(Body):
    """How servers of reasoning models are told to reason or not."""

    enable_thinking: bool | None = None


class ChatRequest(Body):
    """A conversation."""

    messages: Messages
    n: Literal[1] | None = None
    stream: Literal[False] | None = None
    include_reasoning: bool = False
    chat_template_kwargs: TemplateKwargs | None = None


def add_routes(api: Api) -> None:
    """Register chat completions."""

    @api.post("/v1/chat/completions", ChatRequest)
    async def complete(body: ChatRequest, caller: Caller) -> dict[str, Any]:
        """Judge a conversation, and answer in words (OpenAI)."""
        messages, mode = _mode(body)
        request = exchange(messages).model_copy(update={"mode": mode})
        [answer] = await caller.check([request])
        result = certain(answer).result
        lines = tuple((question, str(getattr(result.verdict, question))) for question in result.questions)
        message = {"role": "assistant", "content": written(lines), "refusal": None}
        if body.include_reasoning:
            message["reasoning_content"] = result.reasoning
        tokens = {"prompt_tokens": result.prompt_tokens, "completion_tokens": result.completion_tokens}
        return {
            "id": result.id,
            "object": "chat.completion",
            "created": int(time.time()),
            "model": answer.model["name"],
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
            "usage": {**tokens, "total_tokens": sum(tokens.values())},
        }


def _mode(body: ChatRequest) -> tuple[tuple[Message, ...], Mode | None]:
    """Return the conversation, and the mode that was asked for."""
    *earlier, last = body.messages
    if earlier and last.role == "system" and last.text.strip() in MARKERS:
        return tuple(earlier), MARKERS[last.text.strip()]
    thinking = body.chat_template_kwargs and body.chat_template_kwargs.enable_thinking
    return body.messages, None if thinking is None else Mode.REASONING if thinking else Mode.DIRECT
