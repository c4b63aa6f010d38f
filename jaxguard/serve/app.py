"""The HTTP API. Whatever is sent, no answer to an error, no log and no metric repeats any of it."""

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, TypeVar

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import jaxguard
from jaxguard.serve.errors import ServiceError
from jaxguard.serve.keys import Key
from jaxguard.serve.service import CheckAnswer, CheckRequest, Service
from jaxguard.serve.telemetry import Metrics, where
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import parse_json

logger = logging.getLogger(__name__)

MOST_BYTES: Final = 2**21
"""Of a request's body."""
BODY_SECONDS: Final = 10.0
"""In which a body must have come."""
TIMEOUT_HEADER: Final = "x-timeout-ms"
POLICY_HEADER: Final = "x-policy"
"""Names the registered policy of requests that name none in their body."""
_GONE: Final = (499, "client_gone", "the client closed the connection")

Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True)
class Caller:
    """Who sent a request, for the handler of a route."""

    service: Service
    key: Key | None
    request: Request
    route: str

    async def check(self, requests: Sequence[CheckRequest]) -> list[CheckAnswer]:
        """Check exchanges within the caller's deadline, as long as the caller waits. Raises as `Service.check`."""
        policy = self.request.headers.get(POLICY_HEADER)
        requests = [each if each.policy else each.model_copy(update={"policy": policy}) for each in requests]
        work = asyncio.ensure_future(self.service.check(requests, self.key, self._timeout(), self.route))
        gone = asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ServiceError(*_GONE)
            return work.result()
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _gone(self) -> None:
        """Wait for the end of the connection."""
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    def _timeout(self) -> float | None:
        text = self.request.headers.get(TIMEOUT_HEADER)
        if text is None:
            return None
        if not (text.isascii() and text.isdigit() and int(text[:9]) > 0):
            raise ServiceError(400, "invalid_header", f"{TIMEOUT_HEADER}: expected a number of milliseconds above 0")
        return int(text[:9]) / 1000


Handler = Callable[[Body, Caller], Awaitable[Any]]
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
                return as_json(await handler(body, Caller(self.service, key, request, path)))

            schema = {"$id": f"/schemas/{shape.__name__}", **shape.model_json_schema()}  # its $defs are its own
            body = {"content": {"application/json": {"schema": schema}}, "required": True}
            self._add("POST", path, endpoint, handler.__doc__, {"requestBody": body})
            return handler

        return register

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
    app = FastAPI(title="jaxguard", version=jaxguard.__version__, docs_url=None, redoc_url=None)
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

    return app


def as_json(tree: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a response in ASCII, which half a surrogate pair cannot break."""
    return Response(json.dumps(tree), status, headers, "application/json")


async def _read(request: Request) -> bytes:
    """Return the body; ServiceError: it is too large, or comes too slowly."""
    length, data = request.headers.get("content-length", ""), bytearray()
    too_large = ServiceError(413, "too_large", f"a body may have at most {MOST_BYTES:,} bytes")
    if length.isdigit() and (len(length) > 12 or int(length) > MOST_BYTES):
        raise too_large
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                data += chunk
                if len(data) > MOST_BYTES:
                    raise too_large
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
                internal = ServiceError(500, "internal", "an error of the service; see its log")
                response = as_json(error_json(internal), 500)
                with contextlib.suppress(OSError):
                    await response(scope, receive, noting)
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(route, str(status)).observe(time.monotonic() - started)
