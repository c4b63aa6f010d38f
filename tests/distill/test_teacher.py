"""The teacher's client against servers that break, lie and refuse."""

import asyncio
import json
import time

import pytest
from faulty_server import VERDICT, completion, serve
from tenacity import wait_none

from jaxguard.config.data import TeacherConfig
from jaxguard.distill.teacher import open_teacher, split_reasoning
from jaxguard.utils import client
from jaxguard.utils.client import Limiter
from jaxguard.utils.errors import JaxguardError

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Nobody waits between tries."""
    monkeypatch.setattr(client, "BACKOFF", wait_none())


def configured(*servers, **config):
    return TeacherConfig(endpoints=tuple(server.url for server in servers), model="teacher", **config)


def ask(script, times=1, n=1, model="teacher", extra=(), **config):
    """What came of asking `times` at once: (replies or errors, server, teacher)."""

    async def run():
        async with serve(script, model) as server, open_teacher(configured(server, **config)) as teacher:
            asked = [teacher.complete(HELLO, n, dict(extra)) for _ in range(times)]
            return await asyncio.gather(*asked, return_exceptions=True), server, teacher

    return asyncio.run(run())


def good(i):
    return ""


def test_a_good_answer():
    ((replies,), server, _) = ask(good, n=3, extra={"regex": "a+"})
    assert [(r.answer, r.finish_reason, r.prompt_tokens, r.completion_tokens) for r in replies] == [
        (VERDICT, "stop", 10, 20),
        (VERDICT, "stop", 0, 20),
        (VERDICT, "stop", 0, 20),
    ]
    assert replies[0].reasoning.startswith("The user asks")
    (request,) = server.requests
    assert {k: request[k] for k in ("model", "n", "temperature", "top_p", "max_tokens", "regex")} == {
        "model": "teacher", "n": 3, "temperature": 0.6, "top_p": 0.95, "max_tokens": 4096, "regex": "a+",
    }  # fmt: skip


@pytest.mark.parametrize(
    "fault", ["429", "500", "502", "503", "408", "reset", "cut", "html", "garbage", "empty", "null", "list"]
)
def test_transient_failures_are_retried(fault):
    ((replies,), server, _) = ask(lambda i: fault if i < 2 else "")
    assert replies[0].answer == VERDICT
    assert len(server.requests) == 3


def test_a_timeout_is_tried_again():
    ((replies,), server, _) = ask(lambda i: "slow" if i < 1 else "", timeout=0.2)
    assert replies[0].answer == VERDICT
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [("400", "status 400"), ("404", "/v1"), ("422", "status 422"), ("401", "MY_KEY"), ("403", "MY_KEY")],
)
def test_refusals_are_errors_at_once(fault, words):
    ((error,), server, _) = ask(lambda i: fault, api_key_env="MY_KEY")
    assert isinstance(error, JaxguardError)
    assert words in str(error)
    assert len(server.requests) == 1


@pytest.mark.parametrize("fault", ["500", "reset", "garbage", "empty"])
def test_retries_end(fault):
    ((error,), server, _) = ask(lambda i: fault, tries=3)
    assert isinstance(error, JaxguardError)
    assert "no answer in 3 tries" in str(error)
    assert len(server.requests) == 3


def test_an_answer_of_another_model_or_version_is_refused():
    ((error,), server, _) = ask(lambda i: "other model")
    assert all(name in str(error) for name in ("'another'", "'teacher'"))
    assert len(server.requests) == 1
    ((error,), _, _) = ask(good, version="7")
    assert all(version in str(error) for version in ("'default'", "'7'"))
    ((replies,), _, _) = ask(good, version="default")
    assert replies[0].answer == VERDICT


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    _, server, _ = ask(good, api_key_env="MY_KEY")
    assert server.authorizations == ["Bearer secret"]


@pytest.mark.parametrize(
    ("message", "trace", "answer"),
    [
        ({"content": VERDICT, "reasoning_content": " why \n"}, "why", VERDICT),
        ({"content": VERDICT, "reasoning": "why"}, "why", VERDICT),
        ({"content": None, "reasoning_content": "cut off"}, "cut off", ""),
        ({"content": f"why</think>{VERDICT}"}, "why", VERDICT),
        ({"content": VERDICT}, "", VERDICT),
        ({"content": None}, "", ""),
    ],
)
def test_reasoning_is_read_from_any_field(message, trace, answer):
    ((replies,), _, _) = ask(lambda i: json.dumps(completion(1, **message)))
    assert (replies[0].reasoning, replies[0].answer) == (trace, answer)


def test_split_reasoning():
    assert split_reasoning("<think>a</think>b") == ("a", "b")
    assert split_reasoning("< THINK >a< / Think >\n b ") == ("a", "b")
    assert split_reasoning("a </think> b </think> c") == ("a </think> b", "c")
    assert split_reasoning("<think>never ends") == ("", "<think>never ends")


def test_check_names_what_is_served():
    async def run(model):
        async with serve(good, model) as server, open_teacher(configured(server)) as teacher:
            await teacher.check()

    asyncio.run(run("teacher"))
    with pytest.raises(JaxguardError, match=r"other.*'teacher'"):
        asyncio.run(run("other"))


def test_check_waits_for_a_server_that_is_starting():
    async def run():
        async with serve(good) as server:
            server.starting = 2
            async with open_teacher(configured(server)) as teacher:
                await teacher.check()
            return server.starting

    assert asyncio.run(run()) == -1


def test_check_of_nobody():
    async def run():
        async with open_teacher(TeacherConfig(endpoints=("http://127.0.0.1:9/v1",), model="teacher")) as teacher:
            await teacher.check()

    with pytest.raises(JaxguardError, match=r"127\.0\.0\.1:9/v1"):
        asyncio.run(run())


def test_a_dead_endpoint_costs_one_try_not_the_run():
    async def run():
        async with serve(good) as alive, serve(lambda i: "reset") as dead:
            async with open_teacher(configured(dead, alive, tries=3)) as teacher:
                for _ in range(10):
                    await teacher.complete(HELLO)
            return len(dead.requests), len(alive.requests)

    assert asyncio.run(run()) == (1, 10)


def test_concurrency_adapts_to_the_server():
    found, server, teacher = ask(good, times=300, concurrency=32)
    assert all(isinstance(replies, list) for replies in found)
    assert 8 < server.busiest <= 32
    found, server, teacher = ask(lambda i: "429" if i % 3 else "", times=60, concurrency=32, tries=60)
    assert all(isinstance(replies, list) for replies in found)
    assert teacher.client.limiter.limit < 8
    assert teacher.client.limiter.active == 0


def test_one_burst_of_refusals_is_one_sign():
    async def run():
        limiter = Limiter(start=16, most=64)

        async def refused():
            async with limiter.slot() as overload:
                await asyncio.sleep(0)
                overload()

        await asyncio.gather(*(refused() for _ in range(16)))
        halved = limiter.limit
        await refused()
        return halved, limiter.limit

    assert asyncio.run(run()) == (8, 4)


def test_the_limit_never_falls_below_one_and_grows_by_one_a_round():
    async def run():
        limiter = Limiter(start=1, most=3)
        async with limiter.slot() as overload:
            overload()
        lowest = limiter.limit
        for _ in range(20):
            async with limiter.slot():
                pass
        return lowest, limiter.limit

    assert asyncio.run(run()) == (1, 3)


def test_a_pause_is_no_shorter_than_the_server_asks():
    started = time.monotonic()
    ((replies,), server, _) = ask(lambda i: "wait 0.3" if i < 1 else "")
    assert time.monotonic() - started >= 0.3
    assert (replies[0].answer, len(server.requests)) == (VERDICT, 2)
