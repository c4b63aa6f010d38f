"""The native API: what a guard says, whole."""

from collections.abc import AsyncIterator
from typing import Annotated, Any

from pydantic import Field

from jaxguard.config.base import Schema
from jaxguard.guards.growing import Answered
from jaxguard.serve.app import Api, Caller, parse_body
from jaxguard.serve.service import CheckRequest


class CheckRequests(Schema):
    """Several exchanges; they are judged together, and all of them or none."""

    checks: Annotated[tuple[CheckRequest, ...], Field(min_length=1, max_length=256)]


class Growth(Schema):
    """A line of a stream after the first."""

    append: str
    """What the assistant wrote since the last line."""


def add_routes(api: Api) -> None:
    """Register the native API."""
    service = api.service

    @api.post("/v1/check", CheckRequest)
    async def check(body: CheckRequest, caller: Caller) -> dict[str, Any]:
        """Check an exchange."""
        [answer] = await caller.check([body])
        return answer.to_json()

    @api.post("/v1/checks", CheckRequests)
    async def checks(body: CheckRequests, caller: Caller) -> dict[str, Any]:
        """Check several exchanges."""
        return {"results": [answer.to_json() for answer in await caller.check(body.checks)]}

    @api.stream("/v1/check/stream")
    async def stream(lines: AsyncIterator[bytes], caller: Caller) -> AsyncIterator[dict[str, Any]]:
        """Check a response while it grows: a line with an exchange, then lines with what was appended; a verdict for each."""
        request: CheckRequest | None = None
        answered: Answered = {}
        async for line in lines:
            if request is None:
                request = parse_body(line, CheckRequest)
            else:
                response = (request.response or "") + parse_body(line, Growth).append
                request = request.model_copy(update={"response": response})
            [answer] = await caller.check([request], growing=[answered])
            yield answer.to_json()

    @api.get("/v1/policies")
    def policies() -> dict[str, Any]:
        """List the registered policies."""
        registered = service.policies.current.items()
        rows = [{"name": name, "digest": policy.digest, "questions": policy.asks} for name, policy in registered]
        return {"default": service.policies.default, "policies": rows}

    @api.get("/v1/models")
    def models() -> dict[str, Any]:
        """Say which guard answers, and how."""
        model = {"id": service.model["name"], "object": "model", "created": 0, "owned_by": "jaxguard"}
        return {"object": "list", "data": [{**model, "digest": service.model["digest"], "modes": service.modes}]}
