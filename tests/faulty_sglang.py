"""SGLang's native HTTP interface as far as the backend uses it, misbehaving as it is told."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from faulty_http import http, listen

STOP = 4
SAMPLE = [7, 8, 9, STOP]
LOG_PROBABILITIES = (-0.5, -2.0)


@dataclass
class FaultySglang:
    """Answers /generate request i with the fault that `script(i)` names; "" is a good answer, JSON is sent as it is.

    Attributes:
        version: of the weights, in each answer.
        model_path: what /get_model_info says; None has no such address.
        deterministic: what /server_info says; None has no such address.
        requests: bodies of the requests, in order, and `paths` what was asked for besides.
        busiest: most requests under way at once.
    """

    script: Callable[[int], str | bytes]
    version: str = "default"
    model_path: str | None = None
    deterministic: bool | None = False
    swaps: bool = True
    requests: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    authorizations: set[str] = field(default_factory=set)
    busiest: int = 0
    url: str = ""
    route: str = "/generate"
    _active: int = 0

    async def handle(self, path: str, headers: dict[str, str], body: Any, writer: asyncio.StreamWriter) -> bool:
        self.authorizations.add(headers.get("authorization", ""))
        if path == self.route:
            self._active += 1
            self.busiest = max(self.busiest, self._active)
            self.requests.append(body)
            try:
                return await self._answer(self.script(len(self.requests) - 1), body, writer)
            finally:
                self._active -= 1
        self.paths.append(path)
        if path == "/v1/models":
            writer.write(http(200, {"data": [{"id": "guard"}]}))
        elif path == "/get_model_info" and self.model_path is not None:
            writer.write(http(200, {"model_path": self.model_path, "weight_version": self.version}))
        elif path == "/server_info" and self.deterministic is not None:
            writer.write(http(200, {"enable_deterministic_inference": self.deterministic}))
        elif path == "/update_weights_from_disk":
            if "nowhere" in body["model_path"]:
                writer.write(http(400, {"success": False, "message": "no such folder"}))
            else:
                self.version = body["weight_version"] if self.swaps else self.version
                writer.write(http(200, {"success": True, "message": "done"}))
        else:
            writer.write(http(200 if path == "/health" else 404, b"", "text/plain"))
        await writer.drain()
        return True

    def good(self, request: dict[str, Any]) -> Any:
        return answers(request, self.version)

    def fewer(self, body: Any) -> Any:
        return body[:-1] if isinstance(body, list) else []

    async def _answer(self, fault: str | bytes, request: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        """Send an answer; False if the connection is to be cut after it."""
        body = self.good(request)
        if fault == "slow":
            await asyncio.sleep(5)
        if fault in ("slow", "reset"):
            return False
        await asyncio.sleep(0.005)
        if isinstance(fault, bytes):
            writer.write(http(200, fault))
        elif fault.isdigit():
            writer.write(http(int(fault), {"error": {"message": f"words of {fault}"}}))
        elif fault == "cut":
            writer.write(http(200, body)[:-40])
        elif fault == "html":
            writer.write(http(200, b"<html>busy</html>", "text/html"))
        elif fault == "fewer":
            writer.write(http(200, self.fewer(body)))
        else:
            writer.write(http(200, json.loads(fault) if fault else body))
        await writer.drain()
        return fault != "cut"


def answers(request: dict[str, Any], version: str = "default") -> Any:
    """What SGLang sends: one answer as it is, several in a list."""
    batch = isinstance(request["sampling_params"], list)
    n = len(request["sampling_params"]) if batch else request["sampling_params"].get("n", 1)
    one = sample(version=version)
    if request.get("return_logprob"):
        one["meta_info"] |= places(request["token_ids_logprob"], LOG_PROBABILITIES)
    return [one] * n if batch or n > 1 else one


def sample(ids: Any = SAMPLE, reason: Any = None, version: str = "default") -> dict[str, Any]:
    reason = reason or {"type": "stop", "matched": STOP}
    span = {"version": version, "start": 0, "end": len(SAMPLE)}
    return {
        "text": "x",
        "output_ids": ids,
        "meta_info": {"finish_reason": reason, "weight_version": version, "weight_versions": [span]},
    }


def places(ids: Any, values: Any) -> dict[str, Any]:
    entries = [[value, token, None] for value, token in zip(values, ids, strict=True)]
    return {"output_token_ids_logprobs": [entries]}


@asynccontextmanager
async def serve(
    script: Callable[[int], str | bytes], kind: type[FaultySglang] = FaultySglang, **how: Any
) -> AsyncIterator[FaultySglang]:
    faulty = kind(script, **how)
    async with listen(faulty.handle) as faulty.url:
        yield faulty
