"""OpenAI-compatible servers, such as vLLM, llama.cpp's and TGI: the backend behind one, by its /v1/completions.

A prompt goes out as token ids; where a server takes only text, as text that the guard's tokenizer makes the same ids of, else it is
refused. The server must count as many tokens. Probabilities come from the log-probabilities of the likeliest next tokens, if it
gives them. Answers come as text, without the token that ended them.
"""

import math
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Annotated, Any, Final, TypeVar

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.data.format.template import token_ids
from jaxguard.guards.backends.sglang import connect_server, log_odds_of, served_name
from jaxguard.guards.protocol import Completion, sample_digest
from jaxguard.utils.client import API_KEY, Client, RefusedError, RetryableError, gather
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import TokenId
from jaxguard.utils.secrets import Masked

T = TypeVar("T")

LIKELIEST: Final = (100, 20, 5, None)
"""Of how many tokens log-probabilities are asked for, until a server agrees: vLLM gives 20 unless told otherwise, OpenAI 5."""
CERTAIN: Final = 1e-3
"""A token that is not among the likeliest is taken to be as likely as the last of them, where that moves no probability further."""
PROBE: Final = "How do I bake bread?"
"""What a server is tried with."""
_CHARACTERS: Final = 1000
"""Most of one token."""
_STOPS: Final = ("stop", "eos_token", "stop_sequence")
_PLAIN: Final = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Servers have their own defaults, and take others from the checkpoint."""


@dataclass(frozen=True)
class Likely:
    """One of the likeliest tokens, as llama.cpp lists them."""

    id: TokenId
    logprob: float


@dataclass(frozen=True)
class Place:
    """The likeliest tokens in one place, as llama.cpp lists them."""

    top_logprobs: list[Likely]


@dataclass(frozen=True)
class LogProbabilities:
    """For each generated token those of the likeliest ones: by text, by vLLM's `token_id:ID`, or in llama.cpp's `content`."""

    top_logprobs: list[dict[str, float]] | None = None
    content: list[Place] | None = None


@dataclass(frozen=True)
class Choice:
    """One answer."""

    text: str
    finish_reason: str
    logprobs: LogProbabilities | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of a prompt and its answer."""

    prompt_tokens: Annotated[int, Field(strict=True)]
    completion_tokens: Annotated[int, Field(strict=True)]


@dataclass(frozen=True)
class Reply:
    """The response to POST /v1/completions, as far as it is used."""

    model: str
    choices: list[Choice]
    usage: Usage


@dataclass(frozen=True)
class OpenAIBackend:
    """A server as a Backend; see protocol.py and `open_openai`. It makes its own batches, so `group` is one example.

    Every response must carry the name `model`. `as_text`: it takes no token ids. `likeliest`: of how many next tokens it gives
    log-probabilities; without any there are no probabilities, only answers.
    """

    settings: EvaluateConfig
    client: Client
    tokenizer: PreTrainedTokenizerBase
    model: str
    as_text: bool = False
    likeliest: int | None = None
    group: int = 1

    @property
    def workers(self) -> int:
        return self.settings.batch

    async def sample(
        self, prompts: Sequence[Sequence[int]], n: int, max_tokens: int, stop_ids: tuple[int, ...], /
    ) -> list[list[Completion]]:
        sampling: dict[str, Any] = {
            "temperature": self.settings.temperature,
            "stop_token_ids": list(stop_ids),
            **_PLAIN,
        }
        if self.settings.top_p < 1:  # TGI refuses 1
            sampling["top_p"] = self.settings.top_p

        def completion(choice: Choice, _: str) -> Completion:
            tokens = token_ids(self.tokenizer, choice.text)
            end = next((i for i, token in enumerate(tokens) if token in stop_ids), None)
            # Without a stop token: these are tokens of its text, which need not be those that it sampled.
            return Completion(tuple(tokens[:end]), end is not None or choice.finish_reason in _STOPS)

        async def request(prompt: list[int], i: int) -> Completion:
            seed = int.from_bytes(sample_digest(self.settings.seed, prompt, i)[:4], "big") >> 1
            return await self._complete(prompt, max_tokens, completion, seed=seed, **sampling)

        answers = await gather(request(list(map(int, prompt)), i) for prompt in prompts for i in range(n))
        return [answers[i * n : (i + 1) * n] for i in range(len(prompts))]

    async def log_odds(self, prefixes: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]], /) -> list[float]:
        async def request(prefix: list[int], pair: tuple[int, int]) -> float:
            def read(choice: Choice, url: str) -> float:
                return self._log_odds(choice, url, prefix, pair)

            # vLLM gives those of these tokens instead of the likeliest.
            return await self.next_token(prefix, read, logprob_token_ids=pair)

        requests = zip(prefixes, pairs, strict=True)
        return await gather(request(list(map(int, prefix)), (int(a), int(b))) for prefix, (a, b) in requests)

    async def declare(self, beginnings: Sequence[Sequence[int]], /) -> None:
        """Nothing to do: a server caches what it computes."""

    async def next_token(self, prefix: list[int], read: Callable[[Choice, str], T], **more: Any) -> T:
        """Ask for the next token's log-probabilities, at temperature 1."""
        sampling = {
            "temperature": 1.0,
            "logprobs": self.likeliest,
            "return_tokens_as_token_ids": True,
            **_PLAIN,
            **more,
        }
        return await self._complete(prefix, 1, read, **sampling)

    async def _complete(
        self,
        ids: list[int],
        max_tokens: int,
        read: Callable[[Choice, str], T],
        only: Masked | None = None,
        **sampling: Any,
    ) -> T:
        """Send a request, and read its answer once it is checked."""

        def parse(reply: Reply, url: str) -> T:
            if reply.model != self.model:
                raise JaxguardError(f"{url} answered as {reply.model!r}, not as {self.model!r}")
            if len(reply.choices) != 1:
                raise RetryableError(f"{url} sent {len(reply.choices)} completions, not 1")
            [choice], usage = reply.choices, reply.usage
            if usage.prompt_tokens != len(ids):
                raise JaxguardError(
                    f"{url} read {usage.prompt_tokens} tokens as the prompt, not {len(ids)}: it has another tokenizer than the "
                    "guard's checkpoint, or cuts prompts"
                )
            if usage.completion_tokens > max_tokens or len(choice.text) > _CHARACTERS * max_tokens:
                raise RetryableError(f"{url} sent no completion of at most {max_tokens} tokens")
            if choice.finish_reason not in ("length", *_STOPS):
                raise RetryableError(f"{url} ended an answer by {choice.finish_reason!r}")
            if choice.finish_reason == "length" and usage.completion_tokens < max_tokens:
                raise RefusedError(
                    f"{url} ended an answer after {usage.completion_tokens} tokens of {max_tokens}: it has no room for more. "
                    "Lower evaluate.reasoning_tokens, or start it with a longer context"
                )
            return read(choice, url)

        body = {
            "model": self.model,
            "prompt": self._text(ids) if self.as_text else ids,
            "max_tokens": max_tokens,
            "skip_special_tokens": False,
            **sampling,
        }
        return await self.client.request("/v1/completions", body, Reply, parse, only, tokens=len(ids))

    def _text(self, ids: list[int]) -> str:
        """A prompt as text, without what tokenizers put before a text by themselves. JaxguardError: its tokens would be others."""
        added = self.tokenizer("").input_ids
        own = ids[len(added) :] if ids[: len(added)] == added else ids
        text = str(self.tokenizer.decode(own, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if self.tokenizer(text).input_ids != ids:
            raise JaxguardError(
                f"{self.client.endpoints[0]} takes prompts only as text, and this one would become other tokens on the way: serve "
                "the guard with SGLang, vLLM or llama.cpp"
            )
        return text

    def _log_odds(self, choice: Choice, url: str, prefix: Sequence[int], pair: tuple[int, int]) -> float:
        listed = _likeliest(choice, url)
        keys: list[int | str] = list(pair)
        if not any(isinstance(key, int) for key in listed):  # texts must tell tokens apart
            before, *texts = (self._decoded(ids) for ids in (prefix[-1:], *([token] for token in pair)))
            if texts[0] == texts[1] or any(
                self._decoded([*prefix[-1:], token]) != before + text for token, text in zip(pair, texts, strict=True)
            ):
                raise JaxguardError(
                    f"{url} names tokens by texts, of which {texts} do not say which of {pair} they are"
                )
            keys = list(texts)
        least, known = min(listed.values()), [listed.get(key) for key in keys]
        missing = [key for key, value in zip(keys, known, strict=True) if value is None]
        if missing and len(listed) < (self.likeliest or 0):
            raise RetryableError(f"{url} sent log-probabilities of {len(listed)} tokens, not {self.likeliest}")
        positive, negative = (least if value is None else value for value in known)
        if missing and abs(positive - negative) < -math.log(CERTAIN):
            raise RefusedError(
                f"{url} gives log-probabilities of the {self.likeliest} likeliest tokens, and {missing} of the verdict are not "
                "among them: start vLLM with --max-logprobs 100, or see whether this guard knows the policy and mode"
            )
        return log_odds_of(positive, negative, pair, url)

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _likeliest(choice: Choice, url: str) -> dict[int | str, float]:
    """Id or text of the likeliest next tokens -> log-probability."""
    given = choice.logprobs or LogProbabilities()
    places: list[dict[int | str, float]] = [
        {likely.id: likely.logprob for likely in place.top_logprobs} for place in given.content or ()
    ] or [
        {int(key[9:]) if re.fullmatch(r"token_id:\d{1,9}", key) else key: value for key, value in place.items()}
        for place in given.top_logprobs or ()
    ]
    if len(places) != 1 or not places[0]:
        raise RetryableError(f"{url} sent log-probabilities of {len(places)} tokens, not 1")
    values = places[0].values()
    if not (max(values) < 1e-3 and sum(map(math.exp, values)) < 1 + 1e-3):  # NaN is not, either
        raise RetryableError(f"{url} sent {sorted(values)}, which are no log-probabilities")
    return places[0]


@asynccontextmanager
async def open_openai(
    url: str | Masked,
    model: str | None,
    settings: EvaluateConfig,
    tokenizer: PreTrainedTokenizerBase,
    api_key_env: str = API_KEY,
    deadline: float | None = None,
) -> AsyncIterator[OpenAIBackend]:
    """Connect to a server that runs, and try what it understands; `tokenizer` is the guard's.

    As `open_sglang`; without a `model`, the first one that it serves. JaxguardError: it does not answer, serves another model, or
    its answers are no OpenAI-compatible completions.
    """
    async with connect_server(url, settings.batch, api_key_env, deadline) as (client, server):
        model = await served_name(client, server, model)
        backend = await _tried(OpenAIBackend(settings, client, tokenizer, model), server)
        for other in client.endpoints[1:]:
            await _check(backend, other)
        if deadline is not None:
            client.canary = partial(_check, backend)
        yield backend


async def _check(backend: OpenAIBackend, server: Masked) -> None:
    """JaxguardError: a server does not answer, or not as the backend asks."""
    if await _tried(backend, server) != backend:
        raise JaxguardError(f"{server} does not understand the same requests as {backend.client.endpoints[0]}")


async def _tried(backend: OpenAIBackend, server: Masked) -> OpenAIBackend:
    """The backend that asks as a server understands it."""
    ids, refused = list(backend.tokenizer(PROBE).input_ids), None
    for as_text, likeliest in product((False, True), LIKELIEST):
        trial = replace(backend, as_text=as_text, likeliest=likeliest)

        def read(choice: Choice, url: str, trial: OpenAIBackend = trial) -> OpenAIBackend:
            given = choice.logprobs
            if trial.likeliest is None or given is None or not (given.content or given.top_logprobs):
                return replace(trial, likeliest=None)
            _likeliest(choice, url)
            return trial

        try:
            return await trial.next_token(ids, read, only=server)
        except RefusedError as error:
            refused = refused or error
    raise refused or AssertionError
