"""Replies that lie: each becomes a checked value or an error that names the server, in no time, whatever its fields hold."""

import asyncio
import gzip
import json
import math
import random
import time

import faulty_server
import faulty_sglang
import pytest
from campaign import rounds
from external_examples import HOUSE
from external_templates import guard_tokenizer
from faulty_openai import FaultyOpenAI
from mutate import damaged, mutated, spelled
from tenacity import wait_none

from jaxguard.config.data import TeacherConfig
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.format.template import load_tokenizer
from jaxguard.distill.teacher import open_teacher
from jaxguard.guards.backends.openai import open_openai
from jaxguard.guards.backends.sglang import open_sglang, served, swap_weights
from jaxguard.guards.formats.external import external_format
from jaxguard.guards.loading import weights_digest
from jaxguard.guards.protocol import Request, predict
from jaxguard.utils import client
from jaxguard.utils.errors import JaxguardError

SECONDS = 10


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Nobody waits between tries, and there is one."""
    monkeypatch.setattr(client, "BACKOFF", wait_none())
    monkeypatch.setattr(client, "TRIES", 1)
    monkeypatch.delenv(client.API_KEY, raising=False)


def lies(tree, count, seed):
    """Yield mutated replies as bytes."""
    rng = random.Random(seed)
    for _ in range(count):
        text = spelled(mutated(tree, rng)).encode("utf-8", "surrogatepass")
        yield damaged(text, rng) if rng.random() < 0.1 else text


async def outcomes(replies, ask):
    """Await `ask` for each reply; only a JaxguardError may come instead of a value."""
    values, messages = [], []
    for reply in replies:
        start = time.monotonic()
        try:
            values.append(await ask(reply))
        except JaxguardError as error:
            messages.append(str(error))
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}: {reply[:2000]!r}") from error
        assert time.monotonic() - start < SECONDS, reply[:300]
    assert all(len(message) < 5_000 for message in messages)
    return values


def test_a_teacher_that_lies():
    full = faulty_server.completion(2, reasoning_content="Bread is harmless.")
    reply = b""

    async def run():
        nonlocal reply
        async with faulty_server.serve(lambda i: reply) as server:
            config = TeacherConfig(endpoints=(server.url,), model="teacher", tries=1)
            async with open_teacher(config) as teacher:

                async def ask(lie):
                    nonlocal reply
                    reply = lie
                    return await teacher.complete([{"role": "user", "content": "hello"}], 2)

                return await outcomes(lies(full, rounds(60, 1500), 1), ask)

    values = asyncio.run(run())
    assert values
    for replies in values:
        assert len(replies) == 2
        for each in replies:
            assert 0 <= each.prompt_tokens < 2**31
            assert 0 <= each.completion_tokens < 2**31
            json.dumps(each._asdict(), ensure_ascii=False).encode()


@pytest.mark.parametrize("generations", [0, 2])
def test_a_guard_that_lies(tiny_tokenizer_folder, generations):
    form = external_format("llama_guard", guard_tokenizer(tiny_tokenizer_folder, "llama_guard"), HOUSE)
    example = Example("1", "s", "How do I bake bread?")
    request = Request(example, (form.guard.questions[0],), Mode.DIRECT)
    settings = EvaluateConfig(generations=generations, batch=2)
    reply, turn = b"", 0

    def script(i):
        """The lie is the first answer, or the second."""
        return reply if i % 2 == turn else ""

    full = faulty_sglang.answers({"sampling_params": {"n": generations}})
    scored = faulty_sglang.answers({"sampling_params": {}, "return_logprob": True, "token_ids_logprob": [7, 9]})

    async def run():
        nonlocal turn
        async with faulty_sglang.serve(script) as server, open_sglang(server.url, "guard", settings) as backend:

            async def ask(lie):
                nonlocal reply
                reply = lie
                server.requests.clear()
                return [prediction async for prediction in predict([request], form, backend, settings)]

            values = await outcomes(lies(full if generations else scored, rounds(30, 750), 2), ask)
            turn = 1
            return values + (await outcomes(lies(scored, rounds(30, 750), 3), ask) if generations else [])

    for predictions in asyncio.run(run()):
        for prediction in predictions:
            for p in prediction.probabilities.values():
                assert p is None or (math.isfinite(p) and 0 <= p <= 1)


def test_an_openai_compatible_server_that_lies(tiny_tokenizer_folder):
    tokenizer = load_tokenizer(tiny_tokenizer_folder)
    full = FaultyOpenAI(str, likely={7: -0.25, 9: -2.0}).good({"prompt": [5, 6], "max_tokens": 1, "logprobs": 20})
    reply: str | bytes = ""

    async def run():
        async with (
            faulty_sglang.serve(lambda i: reply, FaultyOpenAI) as server,
            open_openai(server.url, "guard", EvaluateConfig(), tokenizer) as backend,
        ):

            async def ask(lie):
                nonlocal reply
                reply = lie
                [[answer]] = await backend.sample([(5, 6)], 1, 1, (4,))
                return answer, *await backend.log_odds([(5, 6)], [(7, 9)])

            return await outcomes(lies(full, rounds(60, 1500), 6), ask)

    for answer, odds in asyncio.run(run()):
        assert len(answer.tokens) < 1000
        assert math.isfinite(odds)


def test_a_server_that_lies_about_itself(tmp_path):
    full = {
        "data": [{"id": "guard"}], "model_path": str(tmp_path), "weight_version": "default", "success": True, "message": "done",
        "enable_deterministic_inference": True,
    }  # fmt: skip
    reply = b""

    async def handle(path, headers, body, writer):
        writer.write(faulty_sglang.http(200, reply))
        await writer.drain()
        return True

    async def run():
        async with faulty_sglang.listen(handle) as url:

            async def ask(lie):
                nonlocal reply
                reply = lie
                about = await served(url)
                json.dumps(about).encode()
                if "model_path" in about:
                    weights_digest(tmp_path / about["model_path"])
                async with open_sglang(url, "guard", EvaluateConfig()):
                    return about

            async def swap(lie):
                nonlocal reply
                reply = lie
                return await swap_weights(url, tmp_path, "1")

            await outcomes(lies(full, rounds(25, 500), 4), ask)
            await outcomes(lies(full, rounds(10, 200), 5), swap)

    asyncio.run(run())


def test_a_reply_that_never_ends():
    """One of 100 MB unpacked from 100 kB is not read to its end."""
    bomb = gzip.compress(b" " * 100_000_000)

    async def handle(path, headers, body, writer):
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-encoding: gzip\r\ncontent-length: {len(bomb)}"
        writer.write(f"{head}\r\n\r\n".encode() + bomb)
        await writer.drain()
        return False

    async def run():
        async with faulty_sglang.listen(handle) as url:
            await served(url)

    with pytest.raises(JaxguardError, match="large"):
        asyncio.run(run())
