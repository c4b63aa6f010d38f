"""A guard without a model, and a service around it."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import httpx2
import pytest
from real_service import export

from jaxguard.data.format.answer import Verdict
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Policy
from jaxguard.guards.result import CheckResult
from jaxguard.serve import native
from jaxguard.serve.adapters import ADAPTERS
from jaxguard.serve.app import create_app
from jaxguard.serve.keys import Keys
from jaxguard.serve.policies import Policies
from jaxguard.serve.service import Service

__all__ = ["export"]


class NullGuard:
    """Calls a text harmful that has `harm` in it; keeps its batches; `gate` holds them up, `fails` says which prompts fail.

    A prompt with `cut` in it has a problem, one with `words` no probability. The reasoning is the prompt, so that a mixed-up
    answer shows.
    """

    def __init__(self):
        self.policy, self.mode = Policy("short", rules="No bread."), Mode.DIRECT
        self.batches, self.seconds, self.fails, self.gate = [], 0.0, lambda prompt: None, None
        self.shuffle, self.zombie = False, None

    async def awarm_up(self):
        """There is nothing to compile."""

    async def asettle(self):
        """There is nothing that would go on computing, but while `zombie` is not set."""
        if self.zombie is not None:
            await self.zombie.wait()

    async def acheck_many(self, examples, mode, policy, growing=()):
        self.batches.append(([example.prompt for example in examples], mode, policy))
        await asyncio.sleep(self.seconds)
        if self.gate is not None:
            await self.gate.wait()
        for example in examples:
            if error := self.fails(example.prompt):
                raise error
        decided_by = Mode.REASONING if mode is Mode.REASONING else Mode.DIRECT
        results = [replace(self.result(example, policy), decided_by=decided_by) for example in examples]
        return results[::-1] if self.shuffle else results

    def result(self, example, policy):
        texts = {"prompt_harm": example.prompt, "response_harm": example.response}
        texts = {question: text for question, text in texts.items() if text is not None}
        words = {question: "harmful" if "harm" in text else "unharmful" for question, text in texts.items()}
        known = "words" not in example.prompt
        return CheckResult(
            id=example.id,
            questions=tuple(words),
            verdict=Verdict(**words),
            probabilities={q: (0.9 if word == "harmful" else 0.1) if known else None for q, word in words.items()},
            reasoning=f"{policy.name}: {example.prompt}",
            problems=("too long",) if "cut" in example.prompt else (),
            text="",
            seconds=0.0,
            operating_point="words",
            thresholds=dict.fromkeys(words),
            prompt_tokens=7,
            completion_tokens=2,
            decided_by=Mode.DIRECT,
            direct_probabilities={},
        )


async def until(condition, step=lambda: None):
    """Wait until a condition holds, taking a step each time."""
    for _ in range(5000):
        if condition():
            return
        step()
        await asyncio.sleep(0.001)
    raise AssertionError("it did not happen")


@pytest.fixture
def guard():
    return NullGuard()


@pytest.fixture
def served(guard, tmp_path):
    """`async with served(**options) as s`: s.service, s.client and s.post(path, body, **options) over ASGI."""

    @asynccontextmanager
    async def serve(policies=None, keys=None, **options):
        options = {"mode": guard.mode, "model": {"name": "null", "digest": "0"}, **options}
        registered = Policies(guard.policy, None, policies)
        async with Service(guard, registered, Keys(keys), **options) as service:
            guard.batches.clear()
            app = create_app(service, native.add_routes, *ADAPTERS)
            transport = httpx2.ASGITransport(app, raise_app_exceptions=True)
            async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:

                async def check(prompt="bread?", path="/v1/check", headers=None, **fields):
                    return await client.post(path, json={"prompt": prompt, **fields}, headers=headers)

                yield SimpleNamespace(app=app, service=service, client=client, check=check, until=until)

    return serve
