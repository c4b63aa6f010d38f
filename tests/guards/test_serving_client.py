"""A service's client of model servers: one try, the less busy of two endpoints, ejection and canaries."""

import asyncio
import math

import pytest
from faulty_openai import FaultyOpenAI
from faulty_sglang import FaultySglang, serve

from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.data.format.template import load_tokenizer
from jaxguard.guards.backends.openai import open_openai
from jaxguard.guards.backends.sglang import open_sglang
from jaxguard.utils import client
from jaxguard.utils.errors import JaxguardError

SETTINGS = EvaluateConfig(temperature=0, batch=8)
LIES = '{"meta_info": {}}'


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    """Canaries follow each other closely."""
    monkeypatch.setattr(client, "REST_SECONDS", 0.02)
    monkeypatch.delenv(client.API_KEY, raising=False)


@pytest.fixture(params=[FaultySglang, FaultyOpenAI])
def kind(request):
    return request.param


@pytest.fixture
def two(kind, tiny_tokenizer_folder):
    """two(use): `use` gets a backend with two endpoints, and what is wrong with each of them, which it may change."""
    tokenizer = load_tokenizer(tiny_tokenizer_folder)

    def run(use, deadline=1.0):
        async def work():
            wrong = ["", ""]
            async with serve(lambda _: wrong[0], kind) as one, serve(lambda _: wrong[1], kind) as other:
                urls = f"{one.url},{other.url}/v1"
                opened = (
                    open_sglang(urls, "guard", SETTINGS, deadline=deadline)
                    if kind is FaultySglang
                    else open_openai(urls, "guard", SETTINGS, tokenizer, deadline=deadline)
                )
                async with opened as backend:
                    one.requests.clear()
                    other.requests.clear()
                    await use(backend, wrong, (one, other))

        asyncio.run(work())

    return run


async def ask(backend):
    """Whether a request was answered."""
    try:
        await backend.sample([(5, 6)], 1, 8, (4,))
    except JaxguardError:
        return False
    return True


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("fault", ["503", "500", "reset", "html", LIES])
def test_a_request_is_tried_once(two, fault):
    async def use(backend, wrong, servers):
        wrong[:] = [fault] * 2
        assert not await ask(backend)
        sent = [body.get("prompt", body.get("input_ids")) for server in servers for body in server.requests]
        assert sent.count([5, 6]) == 1

    two(use)


@pytest.mark.parametrize("fault", ["500", "reset", "html", LIES])
def test_an_endpoint_that_fails_is_out_until_a_canary_is_right(two, fault):
    async def use(backend, wrong, servers):
        wrong[0] = fault
        answered = [True]
        while all(answered):  # two are drawn: the first one comes
            answered.append(await ask(backend))
        [out] = [url for url, end in backend.client.resting_until.items() if end == math.inf]
        assert out == backend.client.endpoints[0]
        count = len(servers[1].requests)
        assert all([await ask(backend) for _ in range(5)])
        assert len(servers[1].requests) == count + 5
        wrong[0] = ""
        await until(lambda: not backend.client.resting_until)
        assert all([await ask(backend) for _ in range(5)])

    two(use)


def test_too_much_to_do_is_no_failure(two):
    async def use(backend, wrong, _):
        wrong[:] = ["503", "429"]
        assert not any([await ask(backend) for _ in range(6)])
        assert not backend.client.resting_until

    two(use)


def test_without_an_endpoint_there_is_an_error_at_once(two):
    async def use(backend, wrong, servers):
        wrong[:] = ["500", "500"]
        assert not any([await ask(backend) for _ in range(2)])
        with pytest.raises(client.UnavailableError, match="no endpoint is up"):
            await backend.sample([(5, 6)], 1, 8, (4,))

    two(use)


def test_an_endpoint_that_hangs_is_noticed_though_the_caller_gives_up_first(two):
    async def use(backend, wrong, _):
        wrong[:] = ["slow", "slow"]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(backend.sample([(5, 6)], 1, 8, (4,)), 0.3)
        [suspect] = backend.client.canaries
        assert not backend.client.resting_until  # nothing is proved
        await until(lambda: backend.client.resting_until)
        assert set(backend.client.resting_until) == {suspect}

    two(use, deadline=0.5)


def test_a_busy_server_is_not_put_out_by_its_canary(two):
    """Late checks are what overload looks like, too."""

    async def use(backend, wrong, _):
        wrong[:] = ["slow", "slow"]
        late = asyncio.create_task(backend.sample([(5, 6)], 1, 8, (4,)))
        await asyncio.sleep(0.3)
        wrong[:] = ["503", "503"]
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)
        assert backend.client.canaries
        await until(lambda: not backend.client.canaries)
        assert not backend.client.resting_until

    two(use, deadline=0.5)


def test_an_answer_that_had_no_room_says_nothing_about_its_server(two, kind):
    """A long text with long reasoning may fill a server's memory for one request; others fit."""

    async def use(backend, _, servers):
        for server in servers:
            if kind is FaultySglang:
                finish = {"finish_reason": {"type": "length", "length": 2}, "weight_version": "default"}
                server.good = lambda _, finish=finish: {"output_ids": [1, 2], "meta_info": finish}
            else:
                server.reason = "length"
        with pytest.raises(client.RefusedError, match="no room for more"):
            await backend.sample([(5, 6)], 1, 8, (4,))
        assert not backend.client.resting_until

    two(use)


def test_of_two_the_one_with_fewer_tokens_under_way(two):
    async def use(backend, *_):
        one, other = backend.client.endpoints
        backend.client.active[one] = 100
        assert {backend.client._choose() for _ in range(20)} == {other}
        backend.client.active[other] = 200
        assert {backend.client._choose() for _ in range(20)} == {one}

    two(use)
