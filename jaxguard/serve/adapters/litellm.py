"""LiteLLM's generic guardrail: `POST /beta/litellm_basic_guardrail_api`.

The action is always written: LiteLLM reads a missing one as a pass. Of a response it sends the text without the prompt, which is
then judged as a text. The policy is the service's, or the operator's in the header x-policy: LiteLLM's
`additional_provider_specific_params` may come from the user whose text is judged, and are not read.
"""

from typing import Any, Literal

from pydantic import Field, JsonValue

from jaxguard.serve.adapters.common import MOST_TEXTS, Body, Message, ToolCall, as_text, exchange, reason
from jaxguard.serve.app import Api, Caller
from jaxguard.serve.errors import ServiceError


class GuardrailRequest(Body):
    """Texts, and of requests also the conversation."""

    input_type: Literal["request", "response"]
    texts: tuple[str, ...] | None = Field(None, max_length=MOST_TEXTS)
    structured_messages: tuple[Message, ...] | None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    images: tuple[JsonValue, ...] | None = None


def add_routes(api: Api) -> None:
    """Register LiteLLM's generic guardrail."""

    @api.post("/beta/litellm_basic_guardrail_api", GuardrailRequest)
    async def guardrail(body: GuardrailRequest, caller: Caller) -> dict[str, Any]:
        """Block or pass a request or a response (LiteLLM)."""
        if body.images:
            raise ServiceError(422, "unsupported", "images: this guard judges text only")
        if body.input_type == "request" and body.structured_messages:
            requests, alone = [exchange(body.structured_messages)], ""
        else:
            texts = [*(body.texts or ()), *(call.function.text for call in body.tool_calls or ())]
            requests = [as_text(text) for text in texts if text.strip()] or [as_text("")]
            alone = " (judged without its prompt)" if body.input_type == "response" else ""
        answers = await caller.check(requests)
        blocked = [answer for answer in answers if not answer.result.passes]
        if not blocked:
            return {"action": "NONE"}
        return {"action": "BLOCKED", "blocked_reason": f"{'; '.join(dict.fromkeys(map(reason, blocked)))}{alone}"}
