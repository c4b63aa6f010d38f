"""An asynchronous client of model servers, with one policy for offline work and one for a service.

Offline, tried again, on another endpoint where there is one: broken connections, timeouts, the statuses 408, 409, 425, 429 and
5xx, and responses that are malformed. Pauses grow at random, and are no shorter than a Retry-After. An error at once: every other
status, and an endpoint that was asked by itself and cannot be reached. The number of requests under way adapts to the server.

A service has a deadline: a request is tried once within it, without a pause. An endpoint that breaks, lies or is late gets no
requests until a canary, which is sent to it again and again, has a right answer.

Of several endpoints, two are drawn and the one with fewer tokens under way is asked.
"""

import asyncio
import logging
import math
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, TypeVar

import httpx2
from pydantic import Field
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import JSON_BYTES, Fields, parse_json
from jaxguard.utils.secrets import MASK, Masked, password, revealed, without

S = TypeVar("S")
T = TypeVar("T")

logger = logging.getLogger(__name__)

API_KEY: Final = "JAXGUARD_API_KEY"
"""The environment variable that holds the bearer key, unless a config names another one."""
TRIES = 8
SECONDS = 900.0
"""For one response."""
BACKOFF = wait_random_exponential(multiplier=0.5, max=60)

_CONNECT_SECONDS = 30.0
_CONNECT_AT_ONCE = 0.1
"""Within a deadline: a connection to a server that is up takes no longer."""
REST_SECONDS = 5.0
"""For which an endpoint is not preferred after its connection broke; in a service, the pause between two canaries."""
_MOST_RETRY_AFTER = 60.0
_TRANSIENT_STATUS = {408, 409, 425, 429}
_OVERLOAD_STATUS = {429, 503, 529}
_UNREACHABLE = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.UnsupportedProtocol, httpx2.InvalidURL)


class RetryableError(Exception):
    """A failure that a retry may fix; `retry_after`: seconds that the server asks to wait.

    `connection`: it broke. `overload`: the server says that it has too much to do.
    """

    def __init__(
        self, message: str, retry_after: float = 0.0, *, connection: bool = False, overload: bool = False
    ) -> None:
        super().__init__(message)
        self.retry_after, self.connection, self.overload = retry_after, connection, overload


class NotFoundError(JaxguardError):
    """The server has no such path."""


class UnavailableError(JaxguardError):
    """No endpoint is up, or the one that was asked broke or has too much to do: the same request may be answered later."""


class BusyError(UnavailableError):
    """A server says that it has too much to do."""


class RefusedError(JaxguardError):
    """The server does not take such a request, or cannot answer it: it may well answer others."""


class Limiter:
    """How many requests may be under way: additive increase, multiplicative decrease, as TCP shares a line.

    A sign of overload halves the limit; requests that began before a cut do not cut again, since one burst of refusals is
    one sign. Until the first cut every answer raises the limit by one; from then on it takes a limit's worth of answers.
    `active` requests are under way, and `limit` may be, a fraction counting as none.
    """

    def __init__(self, start: int, most: int) -> None:
        self.limit = float(min(start, most))
        self.active = 0
        self._most = most
        self._cuts = 0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Callable[[], None]]:
        """Wait for room and hold it; the value is to be called when the server shows overload."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.active < int(self.limit))
            self.active += 1
        cuts, overloaded = self._cuts, False

        def overload() -> None:
            nonlocal overloaded
            overloaded = True
            if cuts == self._cuts:
                self._cuts += 1
                self.limit = max(1.0, self.limit / 2)

        try:
            yield overload
            if not overloaded:
                self.limit = min(self._most, self.limit + (1 / self.limit if self._cuts else 1))
        finally:
            self.active -= 1
            async with self._changed:
                self._changed.notify_all()


@dataclass
class Client:
    """Open connections to one or several servers of the same model; see `connect`.

    By endpoint: tokens under way (`active`), and when it may be asked again after it failed, by time.monotonic. `secrets` are the
    key and passwords, which no error repeats though a server may. `canary`, of a service: raises a JaxguardError unless an endpoint
    answers as it should; a service has `seconds` for a response.
    """

    endpoints: tuple[Masked, ...]
    limiter: Limiter
    tries: int
    api_key_env: str
    secrets: tuple[str, ...]
    http: httpx2.AsyncClient
    seconds: float = SECONDS
    canary: Callable[[Masked], Awaitable[object]] | None = None
    active: Counter[Masked] = field(default_factory=Counter)
    resting_until: dict[Masked, float] = field(default_factory=dict)
    canaries: dict[Masked, asyncio.Task[None]] = field(default_factory=dict)

    async def request(
        self,
        path: str,
        body: Any,
        shape: type[S],
        parse: Callable[[S, str], T],
        only: Masked | None = None,
        tokens: int = 1,
    ) -> T:
        """Send a request until it is answered.

        Args:
            path: behind an endpoint's address.
            body: JSON to POST; None sends a GET.
            shape: of a response, as parse_json takes it; another one is malformed.
            parse: makes the result of a response and the address that sent it, masked; its RetryableError means a malformed
                response.
            only: the one endpoint to ask, which must be up; default: the less busy one of two.
            tokens: of the request, as a measure of what it costs.

        Raises:
            JaxguardError: the server refuses the request, or all tries failed.
        """
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(RetryableError),
            stop=stop_after_attempt(self.tries),
            wait=_pause,
            reraise=True,
        )
        try:
            return await retrying(self._try, path, body, shape, parse, only, tokens)
        except RetryableError as error:
            kind = BusyError if error.overload else UnavailableError if error.connection else JaxguardError
            raise kind(f"no answer in {self.tries} tries, the last time: {error}") from error

    async def _try(
        self, path: str, body: Any, shape: type[S], parse: Callable[[S, str], T], only: Masked | None, tokens: int
    ) -> T:
        """Ask an endpoint, and draw the consequences for it."""
        slot: AbstractAsyncContextManager[Callable[[], None]] = nullcontext(lambda: None)
        async with self.limiter.slot() if only is None else slot as overload:
            url, started = only or self._choose(), time.monotonic()
            self.active[url] += tokens
            try:
                return await self._send(url, path, body, shape, parse, only, overload)
            except RefusedError:
                raise
            except (RetryableError, JaxguardError) as error:
                failure = error if isinstance(error, RetryableError) else RetryableError("")
                if self.canary is None and failure.connection:
                    self.resting_until[url] = time.monotonic() + REST_SECONDS
                elif self.canary is not None and not failure.overload:
                    self.resting_until[url] = math.inf
                    self._watch(url)
                raise
            except asyncio.CancelledError:
                if self.canary is not None and time.monotonic() - started > self.seconds / 2:  # it may hang
                    self._watch(url)
                raise
            finally:
                self.active[url] -= tokens

    def _choose(self) -> Masked:
        """UnavailableError: a service has no endpoint that is up."""
        now = time.monotonic()
        up = [url for url in self.endpoints if self.resting_until.get(url, now) <= now]
        if not up and self.canary is not None:
            raise UnavailableError(f"no endpoint is up: {', '.join(map(str, self.endpoints))}")
        two = secrets.SystemRandom().sample(up or self.endpoints, min(2, len(up or self.endpoints)))
        return min(two, key=self.active.__getitem__)

    def _watch(self, url: Masked) -> None:
        """Send canaries to an endpoint until one is answered; it is asked nothing else from the first that is not."""

        async def watch(canary: Callable[[Masked], Awaitable[object]]) -> None:
            try:
                while True:
                    try:
                        with suppress(BusyError):  # a server that says that it is busy is up
                            await canary(url)
                    except JaxguardError:
                        logger.warning("%s is out: it does not answer a canary", url)
                        self.resting_until[url] = math.inf
                        await asyncio.sleep(REST_SECONDS)
                    else:
                        logger.warning("%s is in: it answers a canary", url)
                        self.resting_until.pop(url, None)
                        return
            finally:
                del self.canaries[url]

        if self.canary is not None and url not in self.canaries:
            self.canaries[url] = asyncio.create_task(watch(self.canary))

    async def _send(
        self,
        url: Masked,
        path: str,
        body: Any,
        shape: type[S],
        parse: Callable[[S, str], T],
        only: Masked | None,
        overload: Callable[[], None],
    ) -> T:
        method = "GET" if body is None else "POST"
        try:
            async with self.http.stream(method, url.get_secret_value() + path, json=body) as response:
                data = await _read(response)
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            text = f"{url} does not answer: {type(error).__name__}: {error}"
            if self.canary is None and only is not None and isinstance(error, _UNREACHABLE):
                raise JaxguardError(f"{text}; is the server up, and the address right?") from None
            if isinstance(error, httpx2.TimeoutException):
                overload()
            raise RetryableError(text, connection=True) from error
        if response.status_code in _OVERLOAD_STATUS:
            overload()
        status, words = response.status_code, without(_words(data), self.secrets)[:500]
        if status in _TRANSIENT_STATUS or status >= 500:
            pause = re.fullmatch(r"\d+(\.\d+)?", response.headers.get("retry-after", ""))  # or a date
            raise RetryableError(
                f"{url}: status {status}: {words}",
                float(pause[0]) if pause else 0.0,
                overload=status in _OVERLOAD_STATUS,
            )
        if status in (401, 403):
            raise JaxguardError(f"{url} refuses the key: set {self.api_key_env}; it says: {words}")
        if status == 404:
            raise NotFoundError(
                f"{url} has no {path}: is it the right kind of server, and the address right? That of an OpenAI-style "
                f"server ends in /v1. It says: {words}"
            )
        if not response.is_success:
            raise RefusedError(f"{url} refuses {path}, and would again: status {status}: {words}")
        try:
            reply = parse_json(data, shape, "its response", finite=False)
        except JaxguardError as error:
            text = f"{without(str(error), self.secrets)}; it says: {words}"
            raise RetryableError(f"{url} sent a malformed response: {text}") from None
        try:
            return parse(reply, str(url))
        except (RetryableError, JaxguardError) as error:
            raise type(error)(without(str(error), self.secrets)) from None


@asynccontextmanager
async def connect(
    urls: Sequence[str | Masked],
    limiter: Limiter,
    tries: int | None = None,
    seconds: float | None = None,
    api_key_env: str = API_KEY,
    deadline: float | None = None,
) -> AsyncIterator[Client]:
    """Open a client of servers of the same model, by their base addresses; nothing is sent yet.

    A request is sent up to `tries` times (default: TRIES), with `seconds` for each response (default: SECONDS), and with the
    bearer key that the environment variable `api_key_env` holds, if it is set. Redirections are not followed: the key is for
    these addresses. A service gives a `deadline` in seconds instead of both, and sets the client's `canary`. JaxguardError: an
    address was read from a file in which its secrets were masked.
    """
    key, timeout = os.environ.get(api_key_env), deadline or seconds or SECONDS
    endpoints = tuple(Masked(revealed(url).rstrip("/")) for url in urls)
    if masked := [url for url in endpoints if MASK in url.get_secret_value()]:
        raise JaxguardError(f"{masked[0]} was masked where it was written; give the whole address")
    http = httpx2.AsyncClient(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx2.Timeout(timeout, connect=min(timeout, _CONNECT_AT_ONCE if deadline else _CONNECT_SECONDS)),
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
        mounts={"all://127.0.0.1": None, "all://localhost": None},  # whatever proxy there is
        follow_redirects=False,
    )
    async with http:
        hidden = tuple(filter(None, (key, *(password(url.get_secret_value()) for url in endpoints))))
        client = Client(endpoints, limiter, 1 if deadline else tries or TRIES, api_key_env, hidden, http, timeout)
        try:
            yield client
        finally:
            for task in (canaries := list(client.canaries.values())):
                task.cancel()
            await asyncio.gather(*canaries, return_exceptions=True)


@dataclass(frozen=True)
class Model:
    """One of Models; vLLM says as `root` where it comes from."""

    id: str
    root: Annotated[str, Field(pattern=r"^[^\x00]*$")] | None = None


@dataclass(frozen=True)
class Models:
    """The response to GET /v1/models."""

    data: list[Model]

    def names(self, _: str = "") -> list[str]:
        return [model.id for model in self.data]


async def gather(requests: Iterable[Awaitable[T]]) -> list[T]:
    """Return all results; the first error ends the rest."""
    tasks = [asyncio.ensure_future(request) for request in requests]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _pause(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, RetryableError) else 0.0
    return max(BACKOFF(state), min(asked, _MOST_RETRY_AFTER))


async def _read(response: httpx2.Response) -> bytes:
    """Read a response, unpacked, up to one byte more than parse_json takes."""
    data = bytearray()
    async for part in response.aiter_bytes():
        data += part
        if len(data) > JSON_BYTES:
            break
    return bytes(data[: JSON_BYTES + 1])


def _words(data: bytes) -> str:
    """Return a server's error message, or the beginning of its response."""
    try:
        body = parse_json(data, Fields, "")
        error = body.get("error", body)
        text = error.get("message", error) if isinstance(error, dict) else error
    except JaxguardError:
        text = data[:2000].decode("utf-8", "replace")
    return str(text)
