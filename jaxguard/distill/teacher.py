"""The teacher: one or many OpenAI-style servers, SGLang's in particular, that answer the same model.

What passes is tried again, on another endpoint where there is one: broken connections, timeouts, 408, 409, 429, 5xx, and
answers that are none (no JSON, no choices). What will not change is an error at once: every other 4xx, and a model that is not
the one asked for. SGLang takes unknown model names without complaint, so both the list of served models and the name in
each answer are checked.
"""

import json
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import openai
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential

from jaxguard.config.distill import TeacherConfig
from jaxguard.distill.limiter import Limiter
from jaxguard.utils.errors import JaxguardError

logger = logging.getLogger(__name__)

T = TypeVar("T")

Message = dict[str, str]
"""role and content, as in the chat protocol."""

_PASSING_STATUS = {408, 409, 425, 429}
_OVERLOAD_STATUS = {429, 503, 529}
_CLOSE = re.compile(r"<\s*/\s*think\s*>", re.IGNORECASE)
_OPEN = re.compile(r"^\s*<\s*think\s*>", re.IGNORECASE)
_REST_SECONDS = 5.0


class BadReplyError(Exception):
    """An answer that is none."""


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
        trace: the thought, without its tags; empty where there is none.
        answer: what follows it.
        finish_reason: "stop", or why the text may lack its end.
        prompt_tokens, completion_tokens: of this answer; of several to one request, the prompt counts for the first.
    """

    trace: str
    answer: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass
class _Endpoint:
    url: str
    client: openai.AsyncOpenAI
    active: int = 0
    resting_until: float = 0.0


@dataclass
class Teacher:
    """An open teacher; see open_teacher.

    Attributes:
        retries: requests that were sent again, so far.
    """

    config: TeacherConfig
    limiter: Limiter
    retries: int = 0
    _endpoints: list[_Endpoint] = field(default_factory=list)

    async def ask(self, messages: Sequence[Message], n: int = 1, extra: Mapping[str, Any] | None = None) -> list[Reply]:
        """`n` answers to the messages.

        Args:
            messages: the chat so far.
            n: answers to sample.
            extra: more of the request's fields, SGLang's own included, such as {"regex": "..."} or
                {"chat_template_kwargs": {...}}.

        Raises:
            JaxguardError: the server refuses the request, serves another model, or gave no answer in all tries.
        """
        return await self._until_answered(lambda: self._once(messages, n, extra or {}))

    async def check(self) -> None:
        """Make sure that every endpoint serves the model.

        Raises:
            JaxguardError: one does not, or does not answer at all.
        """
        for endpoint in self._endpoints:
            served = await self._until_answered(partial(_served_by, endpoint))
            if self.config.model not in served:
                raise JaxguardError(
                    f"{endpoint.url} serves {', '.join(served) or 'nothing'}, not {self.config.model!r}; set the teacher's "
                    "model, or start the server with --served-model-name"
                )

    async def _until_answered(self, request: Callable[[], Awaitable[T]]) -> T:
        """What a request brings, sent again while it fails in a way that may pass.

        Raises:
            JaxguardError: it fails in another way, or as often as it may be tried.
        """
        retrying = AsyncRetrying(
            retry=retry_if_exception(_passes),
            stop=stop_after_attempt(self.config.tries),
            wait=wait_random_exponential(multiplier=0.5, max=60),
            before_sleep=self._count,
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    return await request()
        except (openai.APIError, BadReplyError) as error:
            raise JaxguardError(self._explained(error)) from error
        raise AssertionError("tenacity ends with an answer or an error")

    async def _once(self, messages: Sequence[Message], n: int, extra: Mapping[str, Any]) -> list[Reply]:
        async with self.limiter.slot() as overload:
            endpoint = self._free_endpoint()
            endpoint.active += 1
            try:
                completion = await endpoint.client.chat.completions.create(
                    model=self.config.model,
                    messages=list(messages),  # type: ignore[arg-type]
                    n=n,
                    temperature=self.config.temperature,
                    top_p=self.config.top_p,
                    max_tokens=self.config.max_tokens,
                    extra_body=dict(extra) or None,
                )
                return self._read(completion, n, endpoint.url)
            except json.JSONDecodeError as error:
                raise BadReplyError(f"{endpoint.url} sent no JSON: {error}") from None
            except openai.APIConnectionError as error:
                endpoint.resting_until = time.monotonic() + _REST_SECONDS
                if isinstance(error, openai.APITimeoutError):
                    overload()
                raise
            except openai.APIStatusError as error:
                if error.status_code in _OVERLOAD_STATUS:
                    overload()
                raise
            finally:
                endpoint.active -= 1

    def _free_endpoint(self) -> _Endpoint:
        """The least busy one; one whose connection just broke only when there is no other."""
        now = time.monotonic()
        return min(self._endpoints, key=lambda e: (e.resting_until > now, e.active))

    def _read(self, completion: Any, n: int, url: str) -> list[Reply]:
        """The answers of a completion that may be anything.

        Raises:
            BadReplyError: it is not a completion with n answers.
            JaxguardError: it is another model's.
        """
        try:
            body = completion.model_dump(warnings=False)  # SGLang adds fields of its own
            served = body["model"]
            version = (body.get("metadata") or {}).get("weight_version")
            usage = body.get("usage") or {}
            replies = [_reply(choice) for choice in body["choices"]]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadReplyError(f"{url} sent no completion: {type(error).__name__}: {error}") from None
        if served != self.config.model:
            raise JaxguardError(f"{url} answered as {served!r}, not as {self.config.model!r}")
        if self.config.version is not None and version != self.config.version:
            raise JaxguardError(f"{url} answered with weights {version!r}, not {self.config.version!r}")
        if len(replies) != n:
            raise BadReplyError(f"{url} sent {len(replies)} answers, not {n}")
        prompt, completion_tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        shares = [completion_tokens // n + (i < completion_tokens % n) for i in range(n)]
        return [
            Reply(trace, answer, reason, prompt if i == 0 else 0, share)
            for i, ((trace, answer, reason), share) in enumerate(zip(replies, shares, strict=True))
        ]

    def _count(self, state: RetryCallState) -> None:
        self.retries += 1
        error = state.outcome.exception() if state.outcome else None
        logger.debug("try %d of %d failed: %s", state.attempt_number, self.config.tries, error)

    def _explained(self, error: Exception) -> str:
        where = f"the teacher {self.config.model!r}"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return f"{where} refuses the key: set {self.config.api_key_env}; it says: {error}"
        if isinstance(error, openai.NotFoundError):
            return f"{where} refuses the request: nothing is at {error.request.url}; the address must end in /v1"
        if not _passes(error):
            return f"{where} refuses the request, and would again: {error}"
        return f"{where} gave no answer in {self.config.tries} tries, the last time: {error}"


@asynccontextmanager
async def open_teacher(config: TeacherConfig) -> AsyncIterator[Teacher]:
    """Connect to the teacher; nothing is sent yet."""
    key = os.environ.get(config.api_key_env) or "none"
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=config.timeout)
            )
            for url in config.endpoints
        ]
        endpoints = [_Endpoint(url, client) for url, client in zip(config.endpoints, clients, strict=True)]
        yield Teacher(config, Limiter(start=8 * len(endpoints), most=config.concurrency), _endpoints=endpoints)


def split_thought(text: str) -> tuple[str, str]:
    """(trace, answer) of a text whose server did not separate them; without `</think>` all of it is answer.

    The opening tag may be missing: R1's chat template writes it, so that the server does not send it.
    """
    closing = list(_CLOSE.finditer(text))
    if not closing:
        return "", text.strip()
    return _OPEN.sub("", text[: closing[-1].start()]).strip(), text[closing[-1].end() :].strip()


async def _served_by(endpoint: _Endpoint) -> list[str]:
    """The models that an endpoint has."""
    try:
        return [model.id async for model in endpoint.client.models.list()]
    except openai.APIConnectionError as error:
        raise JaxguardError(
            f"{endpoint.url} does not answer: {error}; is the server up, and the address right?"
        ) from None
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise BadReplyError(
            f"{endpoint.url} does not answer as an OpenAI-style server ({error}); does the address end in /v1?"
        ) from None


def _reply(choice: dict[str, Any]) -> tuple[str, str, str]:
    message = choice["message"]
    content, thought = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning") or ""
    if not isinstance(content, str) or not isinstance(thought, str):
        raise TypeError("content is no text")
    trace, answer = (thought.strip(), content.strip()) if thought else split_thought(content)
    return trace, answer, str(choice["finish_reason"])


def _passes(error: BaseException) -> bool:
    """May the same request succeed later?"""
    if isinstance(error, openai.APIStatusError):
        return error.status_code in _PASSING_STATUS or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError | openai.APIResponseValidationError | BadReplyError)
