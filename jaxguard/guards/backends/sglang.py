"""The backend behind an SGLang server, by its own /generate: token ids in, token ids out.

What passes is tried again: broken connections, timeouts, 408, 409, 425, 429, 5xx, and answers that are none. What will not
change is an error at once, with the server's words. Nothing that a server says is believed before it is looked at.

Where the server draws as it likes, SGLang's default, the run's seed means nothing; with --enable-deterministic-inference it
decides.
"""

import asyncio
import hashlib
import logging
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.guards.protocol import Completion
from jaxguard.utils.errors import JaxguardError

if TYPE_CHECKING:
    import httpx2

logger = logging.getLogger(__name__)

T = TypeVar("T")

KEY = "JAXGUARD_API_KEY"
TRIES = 8
SECONDS = 900.0
_PASSING_STATUS = {408, 409, 425, 429}
_IMPOSSIBLE = -1e30
"""Stands for minus infinity, so that differences are numbers."""


class BadReplyError(Exception):
    """No answer, or none that can be used; another try may bring one."""


class NoSuchAddressError(JaxguardError):
    """The server has no such address."""


@dataclass(frozen=True)
class SglangBackend:
    """A server as an Backend; see judging.py, and `open_sglang`.

    Attributes:
        seeded: whether the server's draws depend on a seed alone.
        group: one example after the other: the server makes its own batches.
    """

    settings: EvaluateConfig
    server: "_Server"
    seeded: bool = False
    group: int = 1

    @property
    def workers(self) -> int:
        return self.settings.batch

    async def sample(
        self, prompts: Sequence[Sequence[int]], n: int, max_tokens: int, stop_ids: tuple[int, ...], /
    ) -> list[list[Completion]]:
        return await _together(self._sample(_ids(prompt), n, max_tokens, stop_ids) for prompt in prompts)

    async def log_odds(self, prefixes: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]], /) -> list[float]:
        asked = zip(prefixes, pairs, strict=True)
        return await _together(self._log_odds(_ids(prefix), *pair) for prefix, pair in asked)

    async def _sample(self, prompt: list[int], n: int, max_tokens: int, stop_ids: tuple[int, ...]) -> list[Completion]:
        sampling = {
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            "max_new_tokens": max_tokens,
            "stop_token_ids": list(stop_ids),
            "skip_special_tokens": False,
        }
        if self.seeded:  # n of one seed would be the same answer n times
            seeds = [_seed(self.settings.seed, prompt, i) for i in range(n)]
            body: dict[str, Any] = {
                "input_ids": [prompt] * n,
                "sampling_params": [{**sampling, "sampling_seed": seed} for seed in seeds],
            }
        else:
            body = {"input_ids": prompt, "sampling_params": {**sampling, "n": n}}

        def read(reply: Any) -> list[Completion]:
            return [self._sampled(one, max_tokens, stop_ids) for one in self.server.answers(reply, n)]

        return await self.server.ask("/generate", body, read)

    def _sampled(self, answer: Any, max_tokens: int, stop_ids: tuple[int, ...]) -> Completion:
        ids, reason = answer["output_ids"], answer["meta_info"]["finish_reason"]
        if not all(type(token) is int for token in ids) or len(ids) > max_tokens:
            raise BadReplyError(f"{self.server.url} sent {len(ids)} token ids of {max_tokens}, or something else")
        end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
        if end is not None:
            return Completion(tuple(ids[:end]), stopped=True)
        if reason["type"] == "stop" and ids and reason["matched"] == ids[-1]:  # an end that only the model's files name
            return Completion(tuple(ids[:-1]), stopped=True)
        if reason["type"] == "length" and len(ids) == max_tokens:
            return Completion(tuple(ids), stopped=False)
        if reason["type"] == "length":
            raise JaxguardError(
                f"{self.server.url} ended an answer after {len(ids)} tokens of {max_tokens}: it has no room for more in one "
                "request. Lower evaluate.reasoning_tokens, or start it with a larger --max-total-tokens or --mem-fraction-static"
            )
        raise BadReplyError(f"{self.server.url} ended an answer by {reason}")

    async def _log_odds(self, prefix: list[int], positive_id: int, negative_id: int) -> float:
        pair = [int(positive_id), int(negative_id)]
        body = {
            "input_ids": prefix,
            "sampling_params": {
                "temperature": 1.0,
                "top_p": 1.0,
                "max_new_tokens": 1,
            },  # SGLang's are after temperature
            "return_logprob": True,
            "token_ids_logprob": pair,
        }

        def read(reply: Any) -> float:
            [answer] = self.server.answers(reply, 1)
            [place] = answer["meta_info"]["output_token_ids_logprobs"]
            if [entry[1] for entry in place] != pair:
                raise BadReplyError(f"{self.server.url} sent log-probabilities of other tokens than {pair}")
            positive, negative = (_log_probability(entry[0]) for entry in place)
            return positive - negative

        return await self.server.ask("/generate", body, read)


@asynccontextmanager
async def open_sglang(
    url: str, model: str | None, settings: EvaluateConfig, version: str | None = None
) -> AsyncIterator[SglangBackend]:
    """Connect to a server that runs. The environment variable JAXGUARD_API_KEY holds the key, if it wants one.

    Args:
        url: with or without /v1 at its end.
        model: what it must serve; None takes anything. After `swap_weights` SGLang calls it by the new folder.
        settings: sampling, and how many requests may be under way.
        version: SGLang's weight_version that every answer must carry; None takes any.

    Raises:
        JaxguardError: it does not answer, or serves another model.
    """
    async with _connected(url, settings.batch, version) as server:
        names = await server.ask("/v1/models", None, _names)
        if model is not None and model not in names:
            raise JaxguardError(
                f"{server.url} serves {', '.join(names) or 'nothing'}, not {model!r}; set the guard's model, or start the "
                "server with --served-model-name"
            )
        yield SglangBackend(settings, server, await _is_seeded(server))


async def served(url: str) -> dict[str, Any]:
    """What a server says of the model that it serves: where its weights lie and their version, as SGLang does, or its names.

    Raises:
        JaxguardError: it does not answer.
    """
    async with _connected(url, 1, None) as server:
        for path in ("/get_model_info", "/model_info"):  # older servers know the first, newer ones will drop it
            try:
                return await server.ask(path, None, _model)
            except NoSuchAddressError:
                continue
        return {"models": await server.ask("/v1/models", None, _names)}


async def swap_weights(url: str, folder: Path, version: str) -> None:
    """Have a server load another checkpoint of the same shape, and see that its answers say so.

    Args:
        url: one server's, not a router's.
        folder: a Hugging Face folder that the server can read.
        version: what its answers are to carry from then on.

    Raises:
        JaxguardError: it refuses, or goes on answering with other weights.
    """
    async with _connected(url, 1, version) as server:
        body = {"model_path": str(folder.resolve()), "weight_version": version}
        await server.ask("/update_weights_from_disk", body, lambda reply: _succeeded(server.url, reply))
        probe = {"input_ids": [0], "sampling_params": {"temperature": 0, "max_new_tokens": 1}}
        await server.ask("/generate", probe, lambda reply: server.answers(reply, 1))


@dataclass(frozen=True)
class _Server:
    """A connection: requests, tried again where that may help, and answers of the right number and version."""

    url: str
    client: "httpx2.AsyncClient"
    version: str | None
    room: asyncio.Semaphore = field(repr=False)

    async def ask(self, path: str, body: dict[str, Any] | None, read: Callable[[Any], T]) -> T:
        """What `read` makes of a JSON answer.

        Raises:
            JaxguardError: the server refuses, or all tries failed.
        """
        import tenacity

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(BadReplyError),
            stop=tenacity.stop_after_attempt(TRIES),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=60),
            before_sleep=_log_retry,
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    async with self.room:
                        reply = await self.once(path, body)
                    try:
                        return read(reply)
                    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                        raise BadReplyError(
                            f"{self.url} sent an answer that lacks something: {type(error).__name__}: {error}"
                        ) from None
        except BadReplyError as error:
            raise JaxguardError(f"{self.url} gave no answer in {TRIES} tries, the last time: {error}") from error
        raise AssertionError("tenacity ends with an answer or an error")

    async def once(self, path: str, body: dict[str, Any] | None) -> Any:
        """One try's JSON.

        Raises:
            BadReplyError, JaxguardError: another try may help, or not.
        """
        import httpx2

        try:
            response = await self.client.request("POST" if body else "GET", self.url + path, json=body)
        except httpx2.RequestError as error:
            raise BadReplyError(f"{type(error).__name__}: {error}") from error
        status, words = response.status_code, _words(response)
        if status in _PASSING_STATUS or status >= 500:
            raise BadReplyError(f"status {status}: {words}")
        if status in (401, 403):
            raise JaxguardError(f"{self.url} refuses the key: set {KEY}; it says: {words}")
        if status == 404:
            raise NoSuchAddressError(f"{self.url} has no {path}: is it an SGLang server, and the address right?")
        if status != 200:
            raise JaxguardError(f"{self.url} refuses {path}, and would again: status {status}: {words}")
        try:
            return response.json()
        except ValueError:
            raise BadReplyError(f"{self.url} sent no JSON: {words}") from None

    def answers(self, reply: Any, count: int) -> list[Any]:
        """The answers in a reply of /generate: one comes as it is, several in a list."""
        found = reply if isinstance(reply, list) else [reply]
        if len(found) != count:
            raise BadReplyError(f"{self.url} sent {len(found)} answers, not {count}")
        for one in found:
            meta = one["meta_info"]
            versions = {meta.get("weight_version"), *(span["version"] for span in meta.get("weight_versions") or ())}
            if self.version is not None and versions != {self.version}:
                said = " and ".join(sorted(map(repr, versions)))
                raise JaxguardError(f"{self.url} answered with weights {said}, not {self.version!r}")
        return found


@asynccontextmanager
async def _connected(url: str, requests: int, version: str | None) -> AsyncIterator[_Server]:
    try:
        import httpx2
        import tenacity  # noqa: F401
    except ImportError as error:
        raise JaxguardError(f"{error.name} is absent, which SGLang needs: pip install 'jaxguard[sglang]'") from None
    base = re.sub(r"(/v1)?/*$", "", url.strip())
    key = os.environ.get(KEY)
    async with httpx2.AsyncClient(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx2.Timeout(SECONDS, connect=30.0),
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
        mounts={"all://127.0.0.1": None, "all://localhost": None},  # whatever proxy there is
    ) as client:
        try:
            await client.get(base + "/health")
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            raise JaxguardError(
                f"{url} does not answer: {type(error).__name__}: {error}; is the server up, and the address right?"
            ) from None
        yield _Server(base, client, version, asyncio.Semaphore(requests))


async def _is_seeded(server: _Server) -> bool:
    try:
        about = await server.once("/server_info", None)
    except (JaxguardError, BadReplyError):  # a router, or an older server, has no such address
        return False
    return isinstance(about, dict) and about.get("enable_deterministic_inference") is True


def _model(body: Any) -> dict[str, Any]:
    return {"model_path": str(body["model_path"]), "weight_version": body.get("weight_version")}


def _names(body: Any) -> list[str]:
    return [str(one["id"]) for one in body["data"]]


async def _together(requests: Iterable[Awaitable[T]]) -> list[T]:
    """All results; the first error ends the rest."""
    tasks = [asyncio.ensure_future(request) for request in requests]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _ids(prompt: Sequence[int]) -> list[int]:
    return [int(token) for token in prompt]  # numpy's are no JSON


def _seed(seed: int, prompt: Sequence[int], sample: int) -> int:
    text = f"{seed} {sample} {' '.join(map(str, prompt))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def _log_probability(value: Any) -> float:
    found = float(value)
    if not found < 1e-3:  # NaN is not, either
        raise BadReplyError(f"{found} is no log-probability")
    return max(found, _IMPOSSIBLE)


def _succeeded(url: str, reply: Any) -> None:
    if reply["success"] is not True:
        raise JaxguardError(f"{url} did not load the weights: {reply.get('message')}")


def _words(response: "httpx2.Response") -> str:
    """What a server says of its refusal, as far as it can be found."""
    try:
        body = response.json()
        error = body.get("error", body)
        said = error.get("message", error) if isinstance(error, dict) else error
    except (AttributeError, ValueError):
        said = response.text
    return str(said)[:500]


def _log_retry(state: Any) -> None:
    error = state.outcome.exception() if state.outcome else None
    logger.debug("try %d of %d failed: %s", state.attempt_number, TRIES, error)
