"""Send requests at their times, whatever became of the ones before, and keep when each was answered."""

import asyncio
import json
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self
from urllib.parse import urlsplit

import httptools

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


class _Connection(asyncio.Protocol):
    """A connection for one request at a time. The parser calls the methods that begin with `on_`."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._body = bytearray()
        self._transport: Any = None
        self.open = True

    async def request(self, request: bytes) -> tuple[int, bytes]:
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()

    def connection_lost(self, _: Exception | None) -> None:
        self.open = False
        if self._answer and not self._answer.done():
            self._answer.set_exception(ConnectionError("the connection ended"))

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        self.open = self.open and self._parser.should_keep_alive()
        body, self._body = bytes(self._body), bytearray()
        if self._answer and not self._answer.done():
            self._answer.set_result((self._parser.get_status_code(), body))


class Client:
    """Sends small requests to a service, over as many connections as are under way; close it, or use it in `async with`.

    httpx would take longer than a quick service does, on a machine that has to run both.
    """

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        address = urlsplit(url)
        self._tls = ssl.create_default_context() if address.scheme == "https" else None
        self._host, self._port = address.hostname or "", address.port or (443 if self._tls else 80)
        self._path = address.path.rstrip("/")
        lines = {"host": address.netloc.rpartition("@")[2], "content-type": "application/json", **headers}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._free = list[_Connection]()

    async def request(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body of the answer; OSError: there is none."""
        while self._free:
            connection = self._free.pop()
            if connection.open:
                break
        else:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._head}content-length: {len(body)}\r\n\r\n"
        try:
            answer = await connection.request(head.encode() + body)
        except asyncio.CancelledError:
            connection.close()  # an answer that still came would be taken for that of the next request
            raise
        if connection.open:
            self._free.append(connection)
        else:
            connection.close()
        return answer

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._free:
            connection.close()


async def send(http: Client, planned: Iterable[Planned], seconds: float) -> list[Outcome]:
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
                status, content = await http.request("POST", PATH, plan.body)
        except (OSError, TimeoutError):
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
