"""The HTTP API. Whatever is sent, no answer to an error, no log and no metric repeats any of it."""

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Final, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import jaxguard
from jaxguard.guards.growing import Answered
from jaxguard.serve.errors import ServiceError
from jaxguard.serve.keys import Key
from jaxguard.serve.service import CheckAnswer, CheckRequest, Service
from jaxguard.serve.telemetry import Metrics
from jaxguard.utils.errors import JaxguardError, where
from jaxguard.utils.parse import parse_json

logger = logging.getLogger(__name__)

MOST_BYTES: Final = 2**21
"""Of a request's body."""
BODY_SECONDS: Final = 10.0
"""In which a body must have come."""
LINE_SECONDS: Final = 60.0
"""In which a stream's next line must have come."""
TIMEOUT_HEADER: Final = "x-timeout-ms"
POLICY_HEADER: Final = "x-policy"
"""Names the registered policy of requests that name none in their body."""
_GONE: Final = (499, "client_gone", "the client closed the connection")
_INTERNAL: Final = (500, "internal", "an error of the service; see its log")

Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True)
class Caller:
    """Who sent a request, for the handler of a route."""

    service: Service
    key: Key | None
    request: Request
    route: str
    gone: Callable[[], Awaitable[None]]

    async def check(self, requests: Sequence[CheckRequest], growing: Sequence[Answered] = ()) -> list[CheckAnswer]:
        """Check exchanges within the caller's deadline, as long as the caller waits. Raises as `Service.check`."""
        policy = self.request.headers.get(POLICY_HEADER)
        requests = [each.model_copy(update={"policy": policy}) if each.policy is None else each for each in requests]
        work = asyncio.ensure_future(self.service.check(requests, self.key, self._timeout(), self.route, growing))
        gone = asyncio.ensure_future(self.gone())
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ServiceError(*_GONE)
            return work.result()
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    def _timeout(self) -> float | None:
        text = self.request.headers.get(TIMEOUT_HEADER)
        if text is None:
            return None
        if not (text.isascii() and text.isdigit() and int(text[:9]) > 0):
            raise ServiceError(400, "invalid_header", f"{TIMEOUT_HEADER}: expected a number of milliseconds above 0")
        return int(text[:9]) / 1000


Handler = Callable[[Body, Caller], Awaitable[Any]]
StreamHandler = Callable[[AsyncIterator[bytes], Caller], AsyncIterator[Any]]
ErrorShape = Callable[[ServiceError], dict[str, Any]]


def error_json(error: ServiceError) -> dict[str, Any]:
    """Return an error in OpenAI's shape."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"error": {"code": error.code, "message": error.message, "type": kind, "param": None}}


@dataclass(frozen=True)
class Api:
    """What an API registers its routes with: a module with a function `add_routes(api)`, such as native.py."""

    app: FastAPI
    service: Service
    errors: dict[str, ErrorShape]

    def post(
        self, path: str, shape: type[Body], error: ErrorShape = error_json
    ) -> Callable[[Handler[Body]], Handler[Body]]:
        """Register an `async def handler(body: shape, caller: Caller)` that returns JSON, and what an error looks like.

        It is called for known keys with bodies of that shape, and calls `caller.check`.
        """
        self.errors[path] = error

        def register(handler: Handler[Body]) -> Handler[Body]:
            async def endpoint(request: Request) -> Response:
                key = self.service.keys.authenticate(request.headers)
                body = parse_body(await _read(request), shape)
                caller = Caller(self.service, key, request, path, partial(_closed, request))
                return as_json(await handler(body, caller))

            schema = {"$id": f"/schemas/{shape.__name__}", **shape.model_json_schema()}  # its $defs are its own
            self._add("POST", path, endpoint, handler.__doc__, _body("application/json", schema))
            return handler

        return register

    def stream(self, path: str) -> Callable[[StreamHandler], StreamHandler]:
        """Register a `handler(lines, caller)` that yields JSON for the lines of a body, while they come.

        An error before the first value has its status; a later one is the last line, since the status was sent.
        """

        def register(handler: StreamHandler) -> StreamHandler:
            async def endpoint(request: Request) -> Response:
                key = self.service.keys.authenticate(request.headers)
                lines = _Lines(request)
                values = handler(lines, Caller(self.service, key, request, path, lines.closed))
                try:
                    first = await anext(values)
                except BaseException as error:
                    lines.close()
                    if isinstance(error, StopAsyncIteration):
                        raise ServiceError(400, "invalid_json", "the body has no line") from None
                    raise
                return _Stream(self._written(first, values, lines), media_type="application/x-ndjson")

            self._add("POST", path, endpoint, handler.__doc__, _body("application/x-ndjson", {}))
            return handler

        return register

    async def _written(self, first: Any, values: AsyncIterator[Any], lines: "_Lines") -> AsyncIterator[str]:
        """Write values as lines, and an error as the last one."""
        try:
            yield json.dumps(first) + "\n"
            async for value in values:
                yield json.dumps(value) + "\n"
        except Exception as error:
            if not isinstance(error, ServiceError):
                logger.error("error of the service: %s", where(error))
                error = ServiceError(*_INTERNAL)
            self.service.metrics.rejected.labels(error.code).inc()
            yield json.dumps(error_json(error)) + "\n"
        finally:
            lines.close()

    def get(self, path: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
        """Register a function that returns JSON to known keys."""

        def register(handler: Callable[[], Any]) -> Callable[[], Any]:
            async def endpoint(request: Request) -> Response:
                self.service.keys.authenticate(request.headers)
                return as_json(handler())

            self._add("GET", path, endpoint, handler.__doc__)
            return handler

        return register

    def _add(
        self, method: str, path: str, endpoint: Any, summary: str | None, extra: dict[str, Any] | None = None
    ) -> None:
        self.app.add_api_route(
            path, endpoint, methods=[method], summary=summary, openapi_extra=extra, response_class=Response
        )


def create_app(service: Service, *apis: Callable[[Api], None]) -> FastAPI:
    """Return the ASGI application of an open service with the routes of some APIs, besides those of operators."""

    def written_by_a_client(scope: MutableMapping[str, Any]) -> bool:
        return scope["path"] not in paths or bool(scope.get("query_string"))

    # FastAPI's logs would hold the messages of exceptions, and its spans the path.
    telemetry: Any = {"logs": False, "exclude": written_by_a_client}
    app = FastAPI(title="jaxguard", version=jaxguard.__version__, docs_url=None, redoc_url=None, telemetry=telemetry)
    errors = dict[str, ErrorShape]()
    app.add_middleware(_Boundary, metrics=service.metrics)
    for add_routes in apis:
        add_routes(Api(app, service, errors))

    @app.get("/healthz")
    async def healthz() -> Response:
        """Whether the process answers."""
        return as_json({"status": "ok"})

    @app.get("/readyz")
    async def readyz() -> Response:
        """Whether verdicts are to be had: every policy is warm, and the last canary was judged as at the start."""
        return as_json({"status": service.state or "ready"}, 503 if service.state else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(ServiceError)
    async def refused(request: Request, error: ServiceError) -> Response:
        service.metrics.rejected.labels(error.code).inc()
        seconds = error.retry_after
        headers = {} if seconds is None else {"retry-after": str(max(1, math.ceil(seconds)))}
        return as_json(errors.get(request.url.path, error_json)(error), error.status, headers)

    @app.exception_handler(HTTPException)
    async def not_routed(_: Request, error: HTTPException) -> Response:
        reason = ("not_found", "no such path") if error.status_code == 404 else ("bad_request", "not accepted here")
        return as_json(error_json(ServiceError(error.status_code, *reason)), error.status_code)

    paths = {route.path for route in app.routes if isinstance(route, APIRoute)}
    return app


def as_json(tree: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a response in ASCII, which half a surrogate pair cannot break."""
    return Response(json.dumps(tree), status, headers, "application/json")


def _body(media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    """What OpenAPI says of a body."""
    return {"requestBody": {"content": {media_type: {"schema": schema}}, "required": True}}


async def _closed(request: Request) -> None:
    """Wait for the end of the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Lines:
    """The lines of a body as they come, blank ones left out; read ahead, so that the end of the connection is seen.

    ServiceError: the body is too large, or the next line comes too slowly, or never.
    """

    def __init__(self, request: Request) -> None:
        self._lines = asyncio.Queue[bytes | ServiceError | None]()
        self._reader = asyncio.create_task(self._read(request))

    def __aiter__(self) -> "_Lines":
        return self

    async def __anext__(self) -> bytes:
        try:
            async with asyncio.timeout(LINE_SECONDS):
                line = await self._lines.get()
        except TimeoutError:
            raise ServiceError(408, "slow_body", f"no line came within {LINE_SECONDS:g} s") from None
        if isinstance(line, ServiceError):
            raise line
        if line is None:
            raise StopAsyncIteration
        return line

    async def closed(self) -> None:
        """Wait for the end of the connection."""
        await asyncio.wait({self._reader})

    def close(self) -> None:
        """Stop reading."""
        self._reader.cancel()

    async def _read(self, request: Request) -> None:
        size, rest = 0, bytearray()
        try:
            async for chunk in request.stream():
                size += len(chunk)
                if size > MOST_BYTES:
                    raise _too_large()
                rest += chunk
                if b"\n" in chunk:
                    *lines, rest = rest.split(b"\n")
                    for line in filter(bytes.strip, map(bytes, lines)):
                        self._lines.put_nowait(line)
            if rest.strip():
                self._lines.put_nowait(bytes(rest))
            self._lines.put_nowait(None)
        except ClientDisconnect:
            self._lines.put_nowait(ServiceError(*_GONE))
            return
        except ServiceError as error:
            self._lines.put_nowait(error)
        await _closed(request)


class _Stream(StreamingResponse):
    """Starlette's own waits for the end of the connection, and so takes the body's messages."""

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        await self.stream_response(send)


def _too_large() -> ServiceError:
    return ServiceError(413, "too_large", f"a body may have at most {MOST_BYTES:,} bytes")


async def _read(request: Request) -> bytes:
    """Return the body; ServiceError: it is too large, or comes too slowly."""
    length, data = request.headers.get("content-length", ""), bytearray()
    if length.isdigit() and (len(length) > 12 or int(length) > MOST_BYTES):
        raise _too_large()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                data += chunk
                if len(data) > MOST_BYTES:
                    raise _too_large()
    except ClientDisconnect:
        raise ServiceError(*_GONE) from None
    except TimeoutError:
        raise ServiceError(408, "slow_body", f"the body did not come within {BODY_SECONDS:g} s") from None
    return bytes(data)


def parse_body(data: bytes, shape: type[Body]) -> Body:
    """Return a JSON body as a value of `shape`. ServiceError: 400 no JSON; 422 of another shape, naming fields of `shape` only."""
    try:
        tree = parse_json(data, object, "", MOST_BYTES)
    except JaxguardError:
        raise ServiceError(400, "invalid_json", "the body is not JSON in UTF-8, or nested too deeply") from None
    try:
        return shape.model_validate(tree)
    except ValidationError as error:
        known = _fields(shape)
        problems = dict.fromkeys(
            (".".join(str(part) for part in each["loc"] if isinstance(part, int) or part in known) or "body")
            + (": unknown field" if each["type"] == "extra_forbidden" else f": {each['type']}")
            for each in error.errors(include_input=False, include_context=False, include_url=False)[:10]
        )
        text = f"{'; '.join(problems)}. Known fields: {', '.join(sorted(known))}"
        raise ServiceError(422, "invalid_request", text) from None


@lru_cache
def _fields(shape: type[BaseModel]) -> frozenset[str]:
    """All fields that a shape has anywhere."""

    def names(schema: object) -> Iterator[str]:
        for each in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
            yield from names(each)
        if isinstance(schema, dict) and isinstance(schema.get("properties"), dict):
            yield from schema["properties"]

    return frozenset(names(shape.model_json_schema()))


class _Boundary:
    """Measures requests, and turns an exception that nobody expected into a 500 that is logged without its message."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except Exception as error:
            logger.error("error of the service: %s", where(error))
            if not status:
                response = as_json(error_json(ServiceError(*_INTERNAL)), 500)
                with contextlib.suppress(OSError):
                    await response(scope, receive, noting)
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(route, str(status)).observe(time.monotonic() - started)
