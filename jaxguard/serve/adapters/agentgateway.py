"""agentgateway's prompt guard webhook: `POST /request` and `POST /response`.

A rejection always has its status code: agentgateway reads one without as a pass. A response comes without its prompt, and is judged
as a text.
"""

from typing import Annotated, Any

from pydantic import Field

from jaxguard.serve.adapters.common import MOST_TEXTS, Body, Message, Messages, exchange, reason
from jaxguard.serve.app import Api, Caller
from jaxguard.serve.service import CheckAnswer


class Prompts(Body):
    """The messages of a request."""

    messages: Messages


class PromptRequest(Body):
    """What a client sends to the language model."""

    body: Prompts


class Choice(Body):
    """One of several independent answers."""

    message: Message


class Choices(Body):
    """The answers of the language model."""

    choices: Annotated[tuple[Choice, ...], Field(min_length=1, max_length=MOST_TEXTS)]


class ResponseRequest(Body):
    """What the language model answers."""

    body: Choices


def add_routes(api: Api) -> None:
    """Register the webhook."""

    @api.post("/request", PromptRequest)
    async def request(body: PromptRequest, caller: Caller) -> dict[str, Any]:
        """Reject or pass a request (agentgateway)."""
        return _action(await caller.check([exchange(body.body.messages)]))

    @api.post("/response", ResponseRequest)
    async def response(body: ResponseRequest, caller: Caller) -> dict[str, Any]:
        """Reject or pass a response, each choice judged as a text (agentgateway)."""
        return _action(await caller.check([exchange([choice.message]) for choice in body.body.choices]))


def _action(answers: list[CheckAnswer]) -> dict[str, Any]:
    blocked = [answer for answer in answers if not answer.result.passes]
    if not blocked:
        return {"action": {"reason": "judged harmless"}}
    body = "blocked by a guard"
    return {"action": {"body": body, "status_code": 403, "reason": "; ".join(dict.fromkeys(map(reason, blocked)))}}
