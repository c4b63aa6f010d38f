"""An OpenAI-style server that misbehaves as it is told: it stands in for a real one only where faults are wanted."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from faulty_http import http, listen

REASONING = "<think>\nThe user asks about bread, which no rule forbids.\n</think>\n\n"
VERDICT = "Prompt harm: unharmful"


@dataclass
class FaultyServer:
    """Answers request i with the fault that `script(i)` names; "" is a good answer.

    Attributes:
        starting: how often it answers 503 when asked for its models, before it names them.
        keep: whether requests are kept for the test to look at.
        count: chat requests so far.
        requests: bodies of the chat requests, in order.
        busiest: most requests under way at once.
    """

    script: Callable[[int], str | bytes]
    model: str = "teacher"
    keep: bool = True
    starting: int = 0
    count: int = 0
    requests: list[dict[str, Any]] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)
    busiest: int = 0
    url: str = ""
    _active: int = 0

    async def handle(
        self, path: str, headers: dict[str, str], request: dict[str, Any], writer: asyncio.StreamWriter
    ) -> bool:
        if path.endswith("/models"):
            self.starting -= 1
            served = {"object": "list", "data": [{"id": self.model, "object": "model"}]}
            writer.write(http(503, {"error": "starting"}) if self.starting >= 0 else http(200, served))
            await writer.drain()
            return True
        self._active += 1
        self.busiest = max(self.busiest, self._active)
        self.count += 1
        if self.keep:
            self.requests.append(request)
            self.authorizations.append(headers.get("authorization", ""))
        try:
            return await self._answer(self.script(self.count - 1), request, writer)
        finally:
            self._active -= 1

    async def _answer(self, fault: str | bytes, request: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        """Send an answer; False if the connection is to be cut after it."""
        body = completion(request.get("n") or 1, self.model)
        if isinstance(fault, bytes):
            writer.write(http(200, fault))
        elif fault.isdigit():
            writer.write(http(int(fault), {"error": {"message": f"status {fault}"}}))
        elif fault.startswith("wait "):
            writer.write(http(429, {"error": "busy"}, retry_after=fault.removeprefix("wait ")))
        elif fault == "cut":
            writer.write(http(200, body)[:-40])
        elif fault == "html":
            writer.write(http(200, b"<html>busy</html>", "text/html"))
        elif fault == "garbage":
            writer.write(http(200, b'{"choices": [{"mess'))
        elif fault == "empty":
            writer.write(http(200, {**body, "choices": []}))
        elif fault == "null":
            writer.write(http(200, {**body, "choices": None}))
        elif fault == "list":
            writer.write(http(200, [1, 2]))
        elif fault == "other model":
            writer.write(http(200, {**body, "model": "another"}))
        elif fault == "slow":
            await asyncio.sleep(5)
        elif fault != "reset":
            await asyncio.sleep(0.005)
            writer.write(http(200, json.loads(fault) if fault else body))
        if fault not in ("reset", "slow"):
            await writer.drain()
        return fault not in ("reset", "cut", "slow")


def completion(n: int, model: str = "teacher", content: str = REASONING + VERDICT, **message: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, **message}
    choices = [{"index": i, "message": message, "finish_reason": "stop"} for i in range(n)]
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": choices,
        "usage": {"prompt_tokens": 10, "completion_tokens": 20 * n, "total_tokens": 10 + 20 * n},
        "metadata": {"weight_version": "default"},
    }


@asynccontextmanager
async def serve(
    script: Callable[[int], str | bytes], model: str = "teacher", keep: bool = True
) -> AsyncIterator[FaultyServer]:
    faulty = FaultyServer(script, model, keep)
    async with listen(faulty.handle) as address:
        faulty.url = f"{address}/v1"
        yield faulty
