"""The teacher: one or several OpenAI-style servers, SGLang's in particular, of the same model.

SGLang takes unknown model names without complaint, so both the list of served models and the name in each response are checked.
"""

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from jaxguard.config.data import TeacherConfig
from jaxguard.utils.client import Client, Limiter, Models, RetryableError, connect
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import Fields

Tokens = Annotated[int, Field(ge=0, lt=2**31)]

_CLOSE = re.compile(r"<\s*/\s*think\s*>", re.IGNORECASE)
_OPEN = re.compile(r"^\s*<\s*think\s*>", re.IGNORECASE)


@dataclass(frozen=True)
class Message:
    """What a choice says; servers call its reasoning one or the other."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


@dataclass(frozen=True)
class Choice:
    """One of ChatResponse."""

    message: Message
    finish_reason: str | None


@dataclass(frozen=True)
class Usage:
    """Tokens of the prompt, and of all completions."""

    prompt_tokens: Tokens | None = None
    completion_tokens: Tokens | None = None


@dataclass(frozen=True)
class ChatResponse:
    """A response of /chat/completions, as far as it is used; `metadata` is SGLang's."""

    model: str
    choices: list[Choice]
    usage: Usage | None = None
    metadata: Fields | None = None


class Reply(NamedTuple):
    """One completion; of several to one request, the prompt's tokens count for the first.

    Attributes:
        reasoning, answer: without tags; the reasoning is empty where there is none.
        finish_reason: "stop", or why the text may lack its end.
    """

    reasoning: str
    answer: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Teacher:
    """A connected teacher; see open_teacher."""

    config: TeacherConfig
    client: Client

    async def complete(
        self, messages: Sequence[dict[str, str]], n: int = 1, extra: Mapping[str, Any] | None = None
    ) -> list[Reply]:
        """Sample `n` completions; `extra` are more of the request's fields, SGLang's own included, such as {"regex": "..."}."""
        sampling = self.config.model_dump(include={"model", "temperature", "top_p", "max_tokens"})
        body = {**sampling, "messages": list(messages), "n": n, **(extra or {})}
        return await self.client.request("/chat/completions", body, ChatResponse, partial(self._replies, n))

    async def check(self) -> None:
        """Raise a JaxguardError if an endpoint does not serve the model, or does not answer at all."""
        for endpoint in self.client.endpoints:
            served = await self.client.request("/models", None, Models, Models.names, endpoint)
            if self.config.model not in served:
                raise JaxguardError(
                    f"{endpoint} serves {', '.join(served) or 'nothing'}, not {self.config.model!r}; set the teacher's "
                    "model, or start the server with --served-model-name"
                )

    def _replies(self, n: int, body: ChatResponse, url: str) -> list[Reply]:
        """Return the completions in a response; another number of them is retried, another model's are an error."""
        choices = [(*_texts(choice.message), str(choice.finish_reason)) for choice in body.choices]
        version, usage = (body.metadata or {}).get("weight_version"), body.usage or Usage()
        if body.model != self.config.model:
            raise JaxguardError(f"{url} answered as {body.model!r}, not as {self.config.model!r}")
        if self.config.version is not None and version != self.config.version:
            raise JaxguardError(f"{url} answered with weights {version!r}, not {self.config.version!r}")
        if len(choices) != n:
            raise RetryableError(f"{url} sent {len(choices)} completions, not {n}")
        prompt, total = usage.prompt_tokens or 0, usage.completion_tokens or 0
        shares = [total // n + (i < total % n) for i in range(n)]
        return [
            Reply(*choice, prompt if i == 0 else 0, share)
            for i, (choice, share) in enumerate(zip(choices, shares, strict=True))
        ]


@asynccontextmanager
async def open_teacher(config: TeacherConfig) -> AsyncIterator[Teacher]:
    """Connect to the teacher; nothing is sent yet."""
    limiter = Limiter(start=8 * len(config.endpoints), most=config.concurrency)
    async with connect(config.endpoints, limiter, config.tries, config.timeout, config.api_key_env) as client:
        yield Teacher(config, client)


def split_reasoning(text: str) -> tuple[str, str]:
    """Return (reasoning, answer) of a text whose server did not separate them; without `</think>` all of it is answer.

    The opening tag may be missing: R1's chat template writes it, so that the server does not send it.
    """
    closing = list(_CLOSE.finditer(text))
    if not closing:
        return "", text.strip()
    return _OPEN.sub("", text[: closing[-1].start()]).strip(), text[closing[-1].end() :].strip()


def _texts(message: Message) -> tuple[str, str]:
    """Return (reasoning, answer)."""
    content, reasoning = message.content or "", message.reasoning_content or message.reasoning or ""
    return (reasoning.strip(), content.strip()) if reasoning else split_reasoning(content)
