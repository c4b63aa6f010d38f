"""A response that is judged while it grows."""

import asyncio
import hashlib
import json
from contextlib import asynccontextmanager

import pytest
from scipy.special import logit

from jaxguard.guards.guard import Guard
from jaxguard.serve import app as api
from jaxguard.serve import service as serving
from jaxguard.serve.app import create_app
from jaxguard.serve.keys import Keys
from jaxguard.serve.native import add_routes
from jaxguard.serve.policies import Policies
from jaxguard.serve.service import Service

run = asyncio.run
FIRST = {"prompt": "bread?"}


class Connection:
    """A client that sends lines and reads verdicts while the request is open."""

    def __init__(self, app, headers=()):
        self.incoming, self.status, self.lines = asyncio.Queue(), None, asyncio.Queue()
        scope = {"type": "http", "method": "POST", "path": "/v1/check/stream", "headers": headers, "query_string": b""}
        self.task = asyncio.create_task(app(scope, self.incoming.get, self._sent))

    async def _sent(self, message):
        if message["type"] == "http.response.start":
            self.status = message["status"]
        for line in message.get("body", b"").splitlines():
            self.lines.put_nowait(json.loads(line))

    def send(self, *values, more=True):
        body = b"".join((value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n" for value in values)
        self.incoming.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def leave(self):
        self.incoming.put_nowait({"type": "http.disconnect"})

    async def answer(self):
        return await asyncio.wait_for(self.lines.get(), 5)

    async def error(self):
        """The last line, after which the request has ended."""
        error = (await self.answer())["error"]["code"]
        await asyncio.wait_for(self.task, 5)
        assert self.lines.empty()
        return error


@pytest.fixture
def connected(served, guard):
    """`async with connected() as (s, connection)`; guard.responses are those that it judged."""
    judge, guard.responses = guard.acheck_many, []

    async def watched(examples, *rest):
        guard.responses += [example.response for example in examples]
        return await judge(examples, *rest)

    @asynccontextmanager
    async def connect(**options):
        async with served(**options) as s:
            guard.acheck_many = watched
            connection = Connection(s.app)
            yield s, connection
            connection.leave()
            await asyncio.wait_for(connection.task, 5)

    return connect


def test_a_verdict_a_line_while_the_request_is_open(connected, guard):
    async def test():
        async with connected() as (_, connection):
            connection.send(FIRST)
            assert (await connection.answer())["passes"] is True
            ids = set()
            for text in ("Mix ", "flour.", ""):
                connection.send({"append": text})
                ids.add((await connection.answer())["id"])
            assert (len(ids), connection.status) == (3, 200)
            assert guard.responses == [None, "Mix ", "Mix flour.", "Mix flour."]

    run(test())


def test_lines_may_come_together_or_in_pieces(connected, guard):
    async def test():
        async with connected() as (_, connection):
            connection.send({**FIRST, "response": "a"}, b"", {"append": "b"}, {"append": "c"})
            for byte in json.dumps({"append": "d"}).encode():
                connection.incoming.put_nowait({"type": "http.request", "body": bytes([byte]), "more_body": True})
            connection.send(more=False)  # the last line needs no end
            assert [(await connection.answer())["passes"] for _ in range(4)] == [True] * 4
            await connection.task
            assert guard.responses == ["a", "ab", "abc", "abcd"]

    run(test())


@pytest.mark.parametrize(
    ("lines", "status", "code"),
    [
        ([], 400, "invalid_json"),
        ([b"{"], 400, "invalid_json"),
        ([{"append": "a"}], 422, "invalid_request"),
        ([{**FIRST, "policy": "nosuch"}], 422, "unknown_policy"),
        ([FIRST, b"{"], 200, "invalid_json"),
        ([FIRST, {"append": 1}], 200, "invalid_request"),
        ([FIRST, {"response": "a"}], 200, "invalid_request"),
        ([FIRST, FIRST], 200, "invalid_request"),
        ([FIRST, {"append": "x" * 600}, {"append": "x" * 600}], 200, "too_long"),
        ([FIRST, {"append": "x" * 9000}], 413, "too_large"),
        ([FIRST, {"append": "fails"}], 200, "guard_failed"),
        ([FIRST, {"append": "breaks"}], 200, "internal"),
    ],
)
def test_an_error_ends_it(connected, guard, monkeypatch, lines, status, code):
    monkeypatch.setattr(api, "MOST_BYTES", 5000)
    monkeypatch.setattr("jaxguard.serve.service.MOST_CHARACTERS", 1000)

    async def test():
        async with connected() as (s, connection):
            judge, check = guard.acheck_many, s.service.check

            async def failing(examples, *rest):
                if examples[0].response == "fails":
                    raise RuntimeError
                return await judge(examples, *rest)

            async def breaking(requests, *rest):
                if requests[0].response == "breaks":
                    raise RuntimeError
                return await check(requests, *rest)

            guard.acheck_many, s.service.check = failing, breaking
            connection.send(*lines, more=False)
            if status == 200:
                for _ in lines[1:]:
                    assert (await connection.answer())["passes"] is True
            assert await connection.error() == code
            assert connection.status == status

    run(test())


def test_deadlines_and_silence_end_it(connected, guard, monkeypatch):
    monkeypatch.setattr(api, "LINE_SECONDS", 0.05)

    async def test():
        async with connected() as (_, connection):
            connection.send({**FIRST, "timeout_ms": 1000})
            await connection.answer()
            assert await connection.error() == "slow_body"
        async with connected() as (_, connection):
            connection.send({**FIRST, "timeout_ms": 30})
            await connection.answer()
            guard.gate = asyncio.Event()
            connection.send({"append": "a"})
            assert await connection.error() == "deadline"

    run(test())


def test_who_left_is_not_computed(connected, guard):
    async def test():
        async with connected() as (s, connection):
            guard.gate = asyncio.Event()
            waiting = asyncio.create_task(s.check("a"))
            await s.until(lambda: guard.batches)
            connection.send(FIRST, {"append": "a"}, more=False)
            await s.until(lambda: s.service.batcher.queued_tokens)
            connection.leave()
            await s.until(lambda: not s.service.batcher.queued_tokens)
            await connection.task
            guard.gate.set()
            assert (await waiting).status_code == 200
            assert guard.responses == [None]

    run(test())


def test_a_key_pays_for_each_verdict(connected, tmp_path):
    key = {"name": "one", "sha256": hashlib.sha256(b"key").hexdigest(), "checks_per_second": 0.001, "burst": 2}
    (tmp_path / "keys.yaml").write_text(json.dumps({"keys": [key]}), encoding="utf-8")

    async def test():
        async with connected(keys=tmp_path / "keys.yaml") as (s, connection):
            connection.send(FIRST)
            assert (await connection.error(), connection.status) == ("no_key", 401)
            known = Connection(s.app, [(b"x-api-key", b"key")])
            known.send(FIRST, {"append": "a"}, {"append": "b"})
            assert [(await known.answer())["passes"] for _ in range(2)] == [True] * 2
            assert await known.error() == "rate_limit"

    run(test())


@pytest.mark.slow
def test_what_was_computed_of_a_response_is_not_again(tiny_checkpoint, tmp_path, monkeypatch):
    """Counted in tokens, a stream costs at most 1.3 times a check of the whole response; each verdict is that of a whole check."""
    monkeypatch.setattr(serving, "WATCH_SECONDS", 3600.0)
    monkeypatch.setattr(Service, "_warm", lambda *_, **__: asyncio.sleep(0))
    monkeypatch.setattr(Guard, "awarm_up", lambda _: asyncio.sleep(0))
    (tmp_path / "law.yaml").write_text("name: law\nrules: Nobody may talk about lamps.\n", encoding="utf-8")
    words = ("bread near the river and the lamp " * 24).split()
    chunks = [" ".join(words[start : start + 42]) + " " for start in range(0, len(words), 42)]

    lines = [{**FIRST, "response": chunks[0]}, *({"append": chunk} for chunk in chunks[1:])]

    async def judged():
        with Guard.load(tiny_checkpoint, tmp_path / "law.yaml", "direct") as guard:
            await guard.acheck_many([(FIRST["prompt"], "a")])  # which computes the policy
            cache = guard._predict.keywords["backend"].prefix_cache
            async with Service(
                guard, Policies(guard.policy), Keys(), mode=guard.mode, model={}, timeout=600
            ) as service:
                computed, connection = cache.computed, Connection(create_app(service, add_routes))
                connection.send(*lines, more=False)
                answers = [await asyncio.wait_for(connection.lines.get(), 600) for _ in lines]
                connection.leave()
                await connection.task
                grown = cache.computed - computed
            cache._entries.pop()  # the text, so that it is computed again
            for end, answer in enumerate(answers, 1):
                computed = cache.computed
                [whole] = await guard.acheck_many([(FIRST["prompt"], "".join(chunks[:end]))])
                expected = {question: logit(p) for question, p in whole.probabilities.items()}
                assert {q: logit(p) for q, p in answer["probabilities"].items()} == pytest.approx(expected, abs=1e-3)
            assert grown <= 1.3 * (cache.computed - computed)

    run(judged())
