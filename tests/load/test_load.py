"""Arrivals, what is sent at their times, and what is made of the answers."""

import asyncio
import contextlib
import json

import numpy as np
import pytest

from jaxguard.data.examples import Example
from jaxguard.load.__main__ import main
from jaxguard.load.client import Client, Outcome, send
from jaxguard.load.page import page
from jaxguard.load.run import Plan, Simulation
from jaxguard.load.summary import knee, percentiles, summarize
from jaxguard.load.traffic import LONG_CHARACTERS, Mix, Planned, Source, arrivals
from jaxguard.report import page_html
from jaxguard.utils.errors import JaxguardError

EXAMPLES = [
    *(Example(f"p{i}", "s", f"bread {i}", prompt_label="unharmful") for i in range(50)),
    *(Example(f"e{i}", "s", f"lamp {i}", "A lamp.", "harmful", "harmful") for i in range(50)),
]


def random(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 3.0])
def test_arrivals(burstiness):
    times = arrivals(200, 200, burstiness, random())
    gaps = np.diff(times)
    assert (times >= 0).all()
    assert (times < 200).all()
    assert len(times) / 200 == pytest.approx(200, rel=0.06)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness, rel=0.1)
    assert (times == arrivals(200, 200, burstiness, random())).all()
    assert len(times) != len(arrivals(200, 200, burstiness, random(1)))
    with pytest.raises(JaxguardError, match="1000000"):
        arrivals(1e6, 10, burstiness, random())


def test_traffic_is_the_mix():
    mix = Mix(exchanges=0.4, harmful=0.1, repeats=0.2, long=0.05, policies={"a": 3, "b": 1})
    source = Source(EXAMPLES, mix, random())
    planned = source.plan(np.arange(2000) / 10)
    bodies = [json.loads(plan.body) for plan in planned]
    assert planned == Source(EXAMPLES, mix, random()).plan(np.arange(2000) / 10)
    assert sum(body["policy"] == "a" for body in bodies) / 2000 == pytest.approx(0.75, abs=0.04)
    drawn = source.assumptions()["drawn"]
    assert drawn["requests"] == 2000
    assert drawn["repeats"] / 2000 == pytest.approx(0.2, abs=0.04)
    assert drawn["long"] == sum(len(body["prompt"]) == LONG_CHARACTERS for body in bodies) > 50
    assert all("harmful" in plan.labels.values() for plan in planned if b"lamp" in plan.body and b"A lamp" in plan.body)
    assert all(set(plan.labels) == {"prompt_harm"} for plan in planned if plan.labels and b"A lamp" not in plan.body)
    assert not any(plan.labels for plan in planned if len(plan.body) > LONG_CHARACTERS)
    assert Source(EXAMPLES, Mix(long=0.0), random()).plan(np.zeros(50), long=1.0)[7].labels == {}


@pytest.mark.parametrize("wrong", [{"repeats": 1.5}, {"policies": {"a": -1.0, "b": 2.0}}])
def test_a_wrong_mix(wrong):
    with pytest.raises(JaxguardError, match=next(iter(wrong)).removesuffix("ies")):
        Mix(**wrong)
    with pytest.raises(JaxguardError):
        Source([], Mix(), random())


class Answering:
    """A client whose requests `handle(path, body)` answers, with an object or a status."""

    def __init__(self, handle):
        self.handle = handle

    async def request(self, _, path, body=b""):
        answer = await self.handle(path, body)
        if isinstance(answer, int):
            return answer, b""
        return 200, answer if isinstance(answer, bytes) else json.dumps(answer).encode()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass


def verdict(id, word="unharmful"):
    seconds, usage = {"queue": 0.001, "guard": 0.002}, {"prompt_tokens": 7, "completion_tokens": 2}
    return {"id": str(id), "verdict": {"prompt_harm": word}, "seconds": seconds, "usage": usage}


def test_latency_counts_from_the_scheduled_time():
    """A server that stalls and then is quick: a client that waits for each answer would see one slow request."""

    async def run():
        stalled = asyncio.get_running_loop().time() + 0.4

        async def handle(*_):
            await asyncio.sleep(max(0.0, stalled - asyncio.get_running_loop().time()))
            return verdict(1)

        return await send(Answering(handle), [Planned(i / 50, b"{}", {}) for i in range(30)], 5.0)

    outcomes = asyncio.run(run())
    assert len(outcomes) == 30
    for each in outcomes[:15]:
        assert each.latency >= 0.4 - each.at - 0.05
        assert each.sent - each.at < 0.25
    assert outcomes[-1].latency < outcomes[0].latency


def test_outcomes_of_a_bad_server():
    async def run():
        async def handle(_, body):
            kind = json.loads(body)["prompt"]
            if kind == "hangs":
                await asyncio.sleep(5)
            if kind == "breaks":
                raise ConnectionError
            return {"refuses": 503, "empty": b"", "no verdict": {"id": "a"}}.get(kind, verdict(1, kind))

        kinds = ("hangs", "breaks", "refuses", "empty", "no verdict", "harmful", "unharmful")
        planned = [Planned(0.0, json.dumps({"prompt": kind}).encode(), {"prompt_harm": "harmful"}) for kind in kinds]
        return await send(Answering(handle), planned, 0.1)

    outcomes = asyncio.run(run())
    assert [each.status for each in outcomes] == [0, 0, 503, 200, 200, 200, 200]
    assert outcomes[0].latency >= 0.1
    assert [each.right for each in outcomes] == [False] * 5 + [True, False]
    summary = summarize(outcomes, 1.0, 5.0)
    assert summary["malformed"] == 2
    assert summary["repeated_ids"] == 1
    assert summary["accuracy"] == 0.5
    assert summary["accuracy_within_slo"] == pytest.approx(1 / 7)
    assert summary["statuses"] == {"0": 2, "200": 4, "503": 1}


def test_the_client_reads_what_servers_send():
    """Bodies in parts, in chunks, and without a length; a connection that is kept, one that ends, and answers that are none."""
    answers = {
        b"/parts": [b"HTTP/1.1 200 OK\r\ncontent-le", b"ngth: 4\r\n\r\nab", b"cd"],
        b"/chunks": [b"HTTP/1.1 503 Busy\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n", b"2\r\ncd\r\n0\r\n\r\n"],
        b"/closes": [b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 4\r\n\r\nabcd", None],
        b"/ends": [b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabcd", None],
        b"/none": [b"no HTTP", None],
    }
    connections = []

    async def serve(reader, writer):
        connections.append(writer)
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                assert b"x-key: 7\r\n" in head
                assert await reader.readexactly(2) == b"{}"
                for part in answers[head.split(b" ")[1].removeprefix(b"/base")]:
                    if part is None:
                        return
                    writer.write(part)
                    await asyncio.sleep(0.01)

    async def run():
        async with (
            await asyncio.start_server(serve, "127.0.0.1", 0) as server,
            Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/base/", {"x-key": "7"}) as client,
        ):
            for path, expected in (("/parts", 200), ("/chunks", 503), ("/closes", 200), ("/parts", 200)):
                assert await client.request("POST", path, b"{}") == (expected, b"abcd")
            assert len(connections) == 2  # the third answer ended the first
            for path in ("/ends", "/none"):
                with pytest.raises(OSError, match="ended"):
                    await client.request("POST", path, b"{}")
            hanging = asyncio.create_task(client.request("POST", "/parts", b"{}"))
            await asyncio.sleep(0.005)
            hanging.cancel()  # its answer is nobody's
            assert await client.request("POST", "/chunks", b"{}") == (503, b"abcd")

    asyncio.run(run())


def test_percentiles():
    assert percentiles(range(1, 101)) == {"p50": 50, "p95": 95, "p99": 99, "p99.9": None}
    assert percentiles(range(1, 1001))["p99.9"] == 999
    assert percentiles([3.0]) == {"p50": 3.0, "p95": None, "p99": None, "p99.9": None}
    assert percentiles([])["p50"] is None


def outcomes(count, latency=0.01, status=200, late=0.0):
    answer = verdict if status == 200 else lambda _: {}
    return [Outcome(i / 100, i / 100 + late, i / 100 + latency, status, answer(i)) for i in range(count)]


def test_summary():
    refused = outcomes(50, 0.015, 503) + outcomes(10, 0.3, 503)
    summary = summarize([*outcomes(300), *outcomes(40, 0.9), *refused], 4.0, 0.5, price=3.6)
    assert summary["scheduled_per_second"] == 100
    assert summary["goodput_per_second"] == 75
    assert summary["goodput_share"] == 0.75
    assert summary["refused_share"] == 0.15
    assert summary["refused_quickly_share"] == pytest.approx(50 / 60)
    assert summary["latency"]["p99"] == pytest.approx(0.9)
    assert summary["cost_of_a_million"] == pytest.approx(0.001 * 4 / 300 * 1e6)
    assert summary["tokens_of_verdicts"] == {"prompt_tokens": 7, "completion_tokens": 2}
    assert summary["seconds_of_verdicts"]["guard"] == pytest.approx(0.002)
    assert summary["void"] == ""
    low, high = summary["latency_intervals"]["p50"]
    assert low <= summary["latency"]["p50"] <= high
    json.dumps(summary, allow_nan=False)
    assert summarize([], 1.0, 0.5)["goodput_share"] is None


def test_a_late_client_voids_the_measurement():
    assert "20 ms" in summarize(outcomes(500, 0.03, late=0.02), 5.0, 0.5)["void"]
    assert summarize(outcomes(500, 0.3, late=0.02), 5.0, 0.5)["void"] == ""  # less than a tenth of the latency
    assert "1 " in summarize([*outcomes(500), Outcome(5.0, None, 5.0, 0)], 5.0, 0.5)["void"]


def test_knee():
    assert knee([(1, 1.0), (2, 1.0), (4, 0.9)]) == (pytest.approx(3), True)
    assert knee([(4, 0.5), (2, 1.0), (1, 1.0)])[0] == pytest.approx(2.2)
    assert knee([(1, 1.0), (2, 0.95)]) == (2, False)
    assert knee([(1, 0.2)]) == (None, True)
    assert knee([]) == (None, False)


def simulated(plan, handle):
    """The results of a simulation against a handler."""
    simulation = Simulation(plan, EXAMPLES, Mix(), lambda *_: None)
    simulation.http = Answering(handle)
    return asyncio.run(simulation.run())


def test_a_simulation(monkeypatch):
    """A server that takes 5 ms for a request, one after the other, and refuses what would wait for longer than 50 ms."""
    monkeypatch.setattr("jaxguard.load.summary.MOST_LATE", 10.0)  # a busy machine is no reason to fail
    free, count, memory = 0.0, 0, 0

    async def handle(path, _):
        nonlocal free, count, memory
        if path == "/metrics":
            memory += 1000
            return f"process_resident_memory_bytes {memory}\nprocess_cpu_seconds_total 1.0\n".encode()
        now = asyncio.get_running_loop().time()
        if free - now > 0.05:
            return 503
        free = max(free, now) + 0.005
        count += 1
        id = count
        await asyncio.sleep(free - now)
        return verdict(id)

    plan = Plan("http://test", phases=("steady", "overload"), seconds=0.4, slo=0.5, price=1.0)
    results = simulated(plan, handle)
    assert results["ramp"]
    assert results["knee"]["per_second"] > 0
    steady, overload = results["phases"]["steady"], results["phases"]["overload"]
    assert overload["scheduled_per_second"] > 2 * steady["scheduled_per_second"]
    assert overload["refused_share"] > 0
    assert steady["memory_growth_bytes"] == 1000
    assert steady["malformed"] == steady["repeated_ids"] == 0
    assert results["assumptions"]["drawn"]["requests"] > 20
    html = page_html(page({"direct": json.loads(json.dumps(results, allow_nan=False))}, "Load"))
    assert "overload" in html
    assert "<svg" in html


def test_a_service_that_gives_no_verdict():
    plan = Plan("http://test", seconds=0.1)

    async def refuse(*_):
        return 422

    with pytest.raises(JaxguardError, match="422"):
        simulated(plan, refuse)


def test_the_command_asks_before_it_loads_another_machine(capsys, tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({"id": "a", "prompt": "bread", "prompt_label": "unharmful"}) + "\n", encoding="utf-8")
    for arguments, word in (
        (["--url", "http://guard.test"], "--confirm-host guard.test"),
        (["--url", "http://guard.test", "--confirm-host", "other.test"], "guard.test"),
        (["--url", "http://10.0.0.1:8080"], "10.0.0.1"),
        (["--url", "ftp://127.0.0.1"], "ftp"),
        (["--phase", "nosuch"], "nosuch"),
        (["--seconds", "0"], "--seconds"),
        (["harm=0.5"], "harm=0.5"),
        (["harmful=2"], "harmful"),
        (["--policy", "a"], "NAME"),
        (["--url", "http://127.0.0.1:1"], "127.0.0.1:1"),
    ):
        assert main(["--examples", str(path), *arguments]) == 2
        assert word in capsys.readouterr().err
