"""The backend behind an SGLang server, by its own /generate: token ids in, token ids out.

Nothing that a server says is used before it is checked; utils/client.py says what is tried again.

A server samples as it likes by default, so that the run's seed means nothing; with --enable-deterministic-inference the seed
decides.
"""

import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.guards.protocol import Completion
from jaxguard.utils.client import Client, Limiter, NotFoundError, RetryableError, connect, gather, model_names
from jaxguard.utils.errors import JaxguardError

_IMPOSSIBLE: Final = -1e30
"""Stands for minus infinity, so that differences are numbers."""


@dataclass(frozen=True)
class SglangBackend:
    """A server as a Backend; see protocol.py and `open_sglang`.

    Attributes:
        version: SGLang's weight_version that every response must carry; None takes any.
        seeded: whether the server's samples depend on a seed alone.
        group: one example after the other: the server makes its own batches.
    """

    settings: EvaluateConfig
    client: Client
    version: str | None = None
    seeded: bool = False
    group: int = 1

    @property
    def workers(self) -> int:
        return self.settings.batch

    async def sample(
        self, prompts: Sequence[Sequence[int]], n: int, max_tokens: int, stop_ids: tuple[int, ...], /
    ) -> list[list[Completion]]:
        return await gather(self._sample(_ids(prompt), n, max_tokens, stop_ids) for prompt in prompts)

    async def log_odds(self, prefixes: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]], /) -> list[float]:
        requests = zip(prefixes, pairs, strict=True)
        return await gather(self._log_odds(_ids(prefix), *pair) for prefix, pair in requests)

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

        def parse(response: Any, url: str) -> list[Completion]:
            return [
                _completion(answer, url, max_tokens, stop_ids) for answer in _answers(response, url, n, self.version)
            ]

        return await self.client.request("/generate", body, parse)

    async def _log_odds(self, prefix: list[int], positive_id: int, negative_id: int) -> float:
        pair = [int(positive_id), int(negative_id)]
        body = {
            "input_ids": prefix,
            # SGLang's log-probabilities are those after temperature.
            "sampling_params": {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 1},
            "return_logprob": True,
            "token_ids_logprob": pair,
        }

        def parse(response: Any, url: str) -> float:
            [answer] = _answers(response, url, 1, self.version)
            [entries] = answer["meta_info"]["output_token_ids_logprobs"]
            if [entry[1] for entry in entries] != pair:
                raise RetryableError(f"{url} sent log-probabilities of other tokens than {pair}")
            positive, negative = (_log_probability(entry[0]) for entry in entries)
            return positive - negative

        return await self.client.request("/generate", body, parse)


@asynccontextmanager
async def open_sglang(
    url: str, model: str | None, settings: EvaluateConfig, version: str | None = None
) -> AsyncIterator[SglangBackend]:
    """Connect to a server that runs. The environment variable JAXGUARD_API_KEY holds the key, if it wants one.

    Args:
        url: with or without /v1 at its end.
        model: the name it must serve; None takes anything. After `swap_weights` SGLang calls it by the new folder.
        settings: sampling, and how many requests may be under way.
        version: SGLang's weight_version that every response must carry; None takes any.

    Raises:
        JaxguardError: it does not answer, or serves another model.
    """
    async with _connect(url, settings.batch) as client:
        (server,) = client.endpoints
        names = await client.request("/v1/models", None, model_names, server)
        if model is not None and model not in names:
            raise JaxguardError(
                f"{server.url} serves {', '.join(names) or 'nothing'}, not {model!r}; set the guard's model, or start the "
                "server with --served-model-name"
            )
        try:
            seeded = await client.request("/server_info", None, _is_deterministic, server)
        except JaxguardError:  # a router, or an older server, has no such path
            seeded = False
        yield SglangBackend(settings, client, version, seeded)


async def served(url: str) -> dict[str, Any]:
    """What a server says of its model: `model_path` and `weight_version` of SGLang, or `models`, the names of any other.

    Raises:
        JaxguardError: it does not answer.
    """
    async with _connect(url, 1) as client:
        (server,) = client.endpoints
        for path in ("/get_model_info", "/model_info"):  # older servers know the first, newer ones will drop it
            try:
                return await client.request(path, None, _model_info, server)
            except NotFoundError:
                continue
        return {"models": await client.request("/v1/models", None, model_names, server)}


async def swap_weights(url: str, folder: Path, version: str) -> None:
    """Have a server load another checkpoint of the same shape, and see that its responses say so.

    Args:
        url: one server's, not a router's.
        folder: a Hugging Face folder that the server can read.
        version: the weight_version of its responses from then on.

    Raises:
        JaxguardError: it refuses, or still answers with other weights.
    """
    async with _connect(url, 1) as client:
        (server,) = client.endpoints
        weights = {"model_path": str(folder.resolve()), "weight_version": version}
        await client.request("/update_weights_from_disk", weights, _check_swap, server)
        probe = {"input_ids": [0], "sampling_params": {"temperature": 0, "max_new_tokens": 1}}
        await client.request("/generate", probe, lambda response, url: _answers(response, url, 1, version), server)


def _connect(url: str, requests: int) -> AbstractAsyncContextManager[Client]:
    base = re.sub(r"(/v1)?/*$", "", url.strip())
    return connect((base,), Limiter(start=requests, most=requests))


def _answers(response: Any, url: str, count: int, version: str | None) -> list[Any]:
    """The answers in a response of /generate: one comes as it is, several in a list."""
    answers = response if isinstance(response, list) else [response]
    if len(answers) != count:
        raise RetryableError(f"{url} sent {len(answers)} answers, not {count}")
    for answer in answers:
        meta = answer["meta_info"]
        versions = {meta.get("weight_version"), *(span["version"] for span in meta.get("weight_versions") or ())}
        if version is not None and versions != {version}:
            text = " and ".join(sorted(map(repr, versions)))
            raise JaxguardError(f"{url} answered with weights {text}, not {version!r}")
    return answers


def _completion(answer: Any, url: str, max_tokens: int, stop_ids: tuple[int, ...]) -> Completion:
    ids, reason = answer["output_ids"], answer["meta_info"]["finish_reason"]
    if not all(type(token) is int for token in ids) or len(ids) > max_tokens:
        raise RetryableError(f"{url} sent {len(ids)} token ids of {max_tokens}, or something else")
    end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
    if end is not None:
        return Completion(tuple(ids[:end]), stopped=True)
    if reason["type"] == "stop" and ids and reason["matched"] == ids[-1]:  # an end that only the model's files name
        return Completion(tuple(ids[:-1]), stopped=True)
    if reason["type"] == "length" and len(ids) == max_tokens:
        return Completion(tuple(ids), stopped=False)
    if reason["type"] == "length":
        raise JaxguardError(
            f"{url} ended an answer after {len(ids)} tokens of {max_tokens}: it has no room for more in one request. Lower "
            "evaluate.reasoning_tokens, or start it with a larger --max-total-tokens or --mem-fraction-static"
        )
    raise RetryableError(f"{url} ended an answer by {reason}")


def _model_info(body: Any, _: str) -> dict[str, Any]:
    return {"model_path": str(body["model_path"]), "weight_version": body.get("weight_version")}


def _is_deterministic(body: Any, _: str) -> bool:
    return isinstance(body, dict) and body.get("enable_deterministic_inference") is True


def _check_swap(body: Any, url: str) -> None:
    if body["success"] is not True:
        raise JaxguardError(f"{url} did not load the weights: {body.get('message')}")


def _ids(prompt: Sequence[int]) -> list[int]:
    return [int(token) for token in prompt]  # numpy's are no JSON


def _seed(seed: int, prompt: Sequence[int], sample: int) -> int:
    text = f"{seed} {sample} {' '.join(map(str, prompt))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def _log_probability(value: Any) -> float:
    number = float(value)
    if not number < 1e-3:  # NaN is not, either
        raise RetryableError(f"{number} is no log-probability")
    return max(number, _IMPOSSIBLE)
