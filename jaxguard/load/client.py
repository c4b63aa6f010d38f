"""Send requests at their times, whatever became of the ones before, and keep when each was answered."""

import asyncio
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import httpx2

from jaxguard.load.traffic import Planned

PATH: Final = "/v1/check"
MOST_OPEN: Final = 1500
"""Requests under way; one that would be beyond is not sent, and makes the measurement void."""


@dataclass(frozen=True)
class Outcome:
    """What became of a request. Times are seconds after the start of its phase.

    Attributes:
        at: when it was to be sent; latency counts from here.
        sent: when it was; None if too many were under way.
        done: when its answer was there, or it was given up.
        status: of the answer; 0 if there was none.
        answer: the JSON object of a 200; empty if malformed, and for other statuses.
        labels: of the request, by question.
    """

    at: float
    sent: float | None
    done: float
    status: int
    answer: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def latency(self) -> float:
        return self.done - self.at

    @property
    def right(self) -> bool:
        """Whether the verdicts on all labelled questions are right."""
        verdict = self.answer.get("verdict", {})
        return bool(self.answer) and all(verdict.get(question) == label for question, label in self.labels.items())


def client(url: str, headers: Mapping[str, str]) -> httpx2.AsyncClient:
    """Open a client of the service at a base address, without a limit of connections."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx2.AsyncClient(
        base_url=url,
        headers={**headers, "content-type": "application/json"},
        limits=limits,
        timeout=None,
        trust_env=False,
    )


async def send(http: httpx2.AsyncClient, planned: Iterable[Planned], seconds: float) -> list[Outcome]:
    """Send each request at its time, and give each up after `seconds`; outcomes in the order of the requests."""
    loop, active, tasks = asyncio.get_running_loop(), 0, list[asyncio.Task[Outcome]]()
    start = loop.time()

    async def request(plan: Planned) -> Outcome:
        nonlocal active
        sent, status, content = loop.time() - start, 0, b""
        if active >= MOST_OPEN:
            return Outcome(plan.at, None, sent, 0, labels=plan.labels)
        active += 1
        try:
            async with asyncio.timeout(seconds):
                response = await http.post(PATH, content=plan.body)
            status, content = response.status_code, response.content
        except (httpx2.RequestError, TimeoutError):
            pass
        finally:
            active -= 1
        done = loop.time() - start
        return Outcome(plan.at, sent, done, status, _answer(content) if status == 200 else {}, plan.labels)

    async with asyncio.TaskGroup() as group:
        for plan in planned:
            await asyncio.sleep(start + plan.at - loop.time())
            tasks.append(group.create_task(request(plan)))
    return [task.result() for task in tasks]


def _answer(content: bytes) -> dict[str, Any]:
    """The answer if it has an id and a verdict, else nothing."""
    try:
        answer = json.loads(content)
    except ValueError:
        return {}
    has_verdict = isinstance(answer, dict) and answer.get("id") and isinstance(answer.get("verdict"), dict)
    return answer if has_verdict else {}
