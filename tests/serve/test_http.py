"""Whatever is sent: no verdict that is none, no traceback, and nothing of it in errors, logs, metrics and the audit log."""

import asyncio
import hashlib
import hmac
import itertools
import json
import logging

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxguard.serve import app as api
from jaxguard.serve.keys import Keys
from jaxguard.serve.policies import Policies
from jaxguard.serve.service import CheckRequest, Service
from jaxguard.serve.telemetry import AUDIT_KEY, Audit

run = asyncio.run
SECRET = "canary7f3a"


def send(served, *bodies, headers=None, path="/v1/check"):
    """The answers to bodies as bytes."""

    async def test():
        async with served() as s:
            return [await s.client.post(path, content=body, headers=headers) for body in bodies]

    return run(test())


MALFORMED = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"\xff\xfe",
    b'{"prompt": 1}',
    b'{"prompt": null}',
    b'{"prompt": ""}',
    b'{"prompt": " \\n"}',
    b'{"prompt": "a", "response": 1}',
    b'{"prompt": "a", "canary7f3a": "canary7f3a"}',
    b'{"canary7f3a": {"canary7f3a": 1}}',
    b'{"prompt": "a", "policy": "canary7f3a"}',
    b'{"prompt": "a", "mode": "canary7f3a"}',
    b'{"prompt": "a", "timeout_ms": "canary7f3a"}',
    b'{"prompt": "a", "timeout_ms": 0}',
    b'{"prompt": "a", "timeout_ms": 1e400}',
    b'{"prompt": "a", "timeout_ms": 1' + b"0" * 5000 + b"}",
    b"[" * 100_000,
    b'{"prompt": NaN}',
]


def test_malformed_bodies(served, guard):
    answers = send(served, *MALFORMED)
    for body, answer in zip(MALFORMED, answers, strict=True):
        assert answer.status_code in (400, 422), body[:80]
        assert set(answer.json()["error"]) == {"code", "message", "type", "param"}
        assert SECRET not in answer.text
    assert not guard.batches


def test_errors_name_fields(served):
    answers = send(served, b'{"prompt": "a", "timeout_ms": "x"}', b"{}")
    assert "timeout_ms" in answers[0].json()["error"]["message"]
    assert "prompt" in answers[1].json()["error"]["message"]
    [answer] = send(served, b'{"checks": [{"prompt": "a"}, {"propt": "a"}]}', path="/v1/checks")
    assert "checks.1" in answer.json()["error"]["message"]


VALUES = [None, True, 0, -1, 3, 1e300, "", " ", "a", "a\x00\ud800", SECRET, "direct", [], [[]], {}, {SECRET: SECRET}]
FIELDS = ["prompt", "response", "policy", "mode", "timeout_ms", "reasoning", "checks", SECRET]
TREES = st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(VALUES), max_size=3)
LISTS = TREES.map(lambda tree: {"checks": [{"prompt": "a"}, tree]})
BODIES = st.binary(max_size=20) | (TREES | LISTS).map(lambda tree: json.dumps(tree).encode())


def test_any_body_is_an_error_or_has_a_verdict(served):
    async def test():
        async with served() as s:

            @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            @given(BODIES)
            def draw(body):
                bodies.append(body)

            bodies = []
            draw()
            for path, body in itertools.product(("/v1/check", "/v1/checks"), bodies):
                answer = await s.client.post(path, content=body)
                assert answer.status_code in (200, 400, 422), body
                if answer.status_code == 200:
                    for row in [answer.json()] if path == "/v1/check" else answer.json()["results"]:
                        assert row["verdict"]["prompt_harm"] in ("harmful", "unharmful")
                else:
                    assert SECRET not in answer.text

    run(test())


@pytest.mark.parametrize("value", ["", "0", "-1", "x", "1.5", "\u0661", SECRET])
def test_a_malformed_deadline(served, value):
    [answer] = send(served, b'{"prompt": "a"}', headers={"x-timeout-ms": value.encode()})
    assert (answer.status_code, SECRET in answer.text) == (400, False)


def test_sizes(served, monkeypatch):
    monkeypatch.setattr(api, "MOST_BYTES", 1000)
    small, large = b'{"prompt": "%b"}' % (b"a" * 900), b'{"prompt": "%b"}' % (b"a" * 2000)

    async def chunks():
        for start in range(0, len(large), 100):
            yield large[start : start + 100]

    answers = send(served, small, large, chunks())
    assert [answer.status_code for answer in answers] == [200, 413, 413]
    [answer] = send(served, small, headers={"content-length": "9" * 30})
    assert answer.status_code == 413


def test_long_texts(served, monkeypatch):
    monkeypatch.setattr("jaxguard.serve.service.MOST_CHARACTERS", 10)
    [answer, other] = send(served, b'{"prompt": "aaaaa", "response": "aaaaaa"}', b'{"prompt": "aaaaa"}')
    assert (answer.status_code, other.status_code) == (413, 200)


def test_slow_bodies(served, monkeypatch):
    monkeypatch.setattr(api, "BODY_SECONDS", 0.02)
    scope = {"type": "http", "method": "POST", "path": "/v1/check", "headers": [], "query_string": b""}

    async def test():
        async with served() as s:
            sent = []

            async def send(message):
                sent.append(message)

            async def gone():
                return {"type": "http.disconnect"}

            await s.app({**scope}, asyncio.Event().wait, send)
            await s.app({**scope}, gone, send)
            statuses = [message["status"] for message in sent if message["type"] == "http.response.start"]
            assert statuses == [408, 499]

    run(test())


def test_paths_and_methods(served):
    async def test():
        async with served() as s:
            for method, path, status in (
                ("GET", f"/{SECRET}", 404),
                ("GET", "/v1/check", 405),
                ("POST", "/metrics", 405),
            ):
                answer = await s.client.request(method, path)
                assert (answer.status_code, SECRET in answer.text) == (status, False)
            schema = (await s.client.get("/openapi.json")).json()
            assert "requestBody" in schema["paths"]["/v1/check"]["post"]

    run(test())


def test_an_api_has_errors_of_its_own_shape(guard):
    def add_routes(routes):
        @routes.post("/own", CheckRequest, lambda error: {"reason": error.code})
        async def own(body, caller):
            """Check."""

    async def test():
        async with Service(guard, Policies(guard.policy), Keys(), mode=guard.mode, model={}) as service:
            transport = httpx2.ASGITransport(api.create_app(service, add_routes))
            async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.post("/own", content=b"{")

    answer = run(test())
    assert (answer.status_code, answer.json()) == (400, {"reason": "invalid_json"})


@pytest.mark.parametrize("texts", [False, True])
def test_texts_are_nowhere_but_where_asked_for(served, guard, tmp_path, caplog, monkeypatch, texts):
    monkeypatch.setenv(AUDIT_KEY, "k")
    guard.fails = lambda prompt: ValueError(prompt) if "fails" in prompt else None
    caplog.set_level(logging.DEBUG)

    async def test():
        async with served(audit=Audit(tmp_path / "audit.jsonl", texts)) as s:
            whole = s.service.check
            answers = [await s.check(f"{SECRET}{end}", response=SECRET) for end in ("", " harm", " fails")]
            headers = {"authorization": SECRET, "x-timeout-ms": SECRET}
            answers.append(await s.check(SECRET, headers=headers))

            async def broken(*_):
                raise RuntimeError(SECRET)

            s.service.check = broken
            answers.append(await s.check(SECRET))
            s.service.check = whole
            assert [each.status_code for each in answers] == [200, 200, 502, 400, 500]
            metrics = await s.client.get("/metrics")
            assert all(SECRET not in each.text for each in [*answers, metrics])
            for line in (
                'jaxguard_checks_total{mode="direct",policy="short",question="prompt_harm",verdict="harmful"} 1.0',
                'jaxguard_rejected_total{reason="guard_failed"} 1.0',
                'jaxguard_request_seconds_count{route="/v1/check",status="500"} 1.0',
                "jaxguard_ready 1.0",
            ):
                assert line in metrics.text

    run(test())
    audit = (tmp_path / "audit.jsonl").read_text()
    assert SECRET not in caplog.text
    assert (SECRET in audit) is texts
    assert "RuntimeError in" in caplog.text
    rows = list(map(json.loads, audit.splitlines()))
    first, second = (row["audit"] for row in rows) if texts else rows
    assert SECRET not in json.dumps([first, second])
    expected = hmac.new(b"k", json.dumps([SECRET, SECRET]).encode(), hashlib.sha256).hexdigest()
    assert (first["hmac"], first["prompt_characters"], first["passes"]) == (expected, len(SECRET), True)
    assert (second["probabilities"], second["policy"]["name"], second["route"]) == (
        {"prompt_harm": 0.9, "response_harm": 0.1},
        "short",
        "/v1/check",
    )


def test_a_full_disk_quotes_no_text(tmp_path, capsys, caplog, monkeypatch):
    from jaxguard.data.examples import Example

    def full(*_):
        raise OSError(28, SECRET)

    audit = Audit(tmp_path / "audit.jsonl", texts=True)
    monkeypatch.setattr(audit._handler.stream, "flush", full)
    audit.write(Example("1", "s", SECRET), {"n": 1})
    monkeypatch.undo()
    audit.close()
    assert "OSError in" in caplog.text
    assert SECRET not in caplog.text + "".join(capsys.readouterr())


def test_an_audit_log_that_was_moved_away_is_begun_anew(tmp_path):
    from jaxguard.data.examples import Example

    audit = Audit(tmp_path / "a.jsonl")
    audit.write(Example("1", "s", "a"), {"n": 1})
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    audit.write(Example("1", "s", "a"), {"n": 2})
    audit.close()
    assert [json.loads((tmp_path / f"{name}.jsonl").read_text())["n"] for name in "ba"] == [1, 2]


def test_spans_hold_nothing_that_a_client_writes(served, guard, monkeypatch):
    """OpenTelemetry gets route and status of requests, not what is behind an unknown path, a query or an exception."""
    pytest.importorskip("fastapi.telemetry", reason="this FastAPI has no telemetry of its own")
    trace, logs = pytest.importorskip("opentelemetry.trace"), pytest.importorskip("opentelemetry._logs")
    seen, guard.fails = [], lambda prompt: ValueError(prompt) if "fail" in prompt else None

    class Span(trace.NonRecordingSpan):
        def set_attribute(self, *what):
            seen.append(what)

        def set_attributes(self, attributes):
            seen.append(attributes)

        def update_name(self, name):
            seen.append(name)

        def record_exception(self, *what, **more):
            seen.append((what, more))

    class Tracer(trace.NoOpTracer):
        def start_span(self, *what, **more):
            seen.append((what, {name: value for name, value in more.items() if name != "context"}))
            return Span(trace.INVALID_SPAN_CONTEXT)

    class Traces(trace.TracerProvider):
        def get_tracer(self, *what, **more):
            return Tracer()

    class Log(logs.NoOpLogger):
        def emit(self, *what, **more):
            seen.append((what, more))

    class Logs(logs.LoggerProvider):
        def get_logger(self, name, *what, **more):
            return Log(name)

    monkeypatch.setattr(trace, "get_tracer_provider", Traces)
    monkeypatch.setattr(logs, "get_logger_provider", Logs)

    async def test():
        async with served() as s:
            statuses = [(await s.check(prompt)).status_code for prompt in ("canary", "canary fail")]
            statuses.append((await s.check("canary", path="/v1/check?canary=1")).status_code)
            statuses.append((await s.check(path="/v1/canary")).status_code)
            assert statuses == [200, 502, 200, 404]

    asyncio.run(test())
    assert "POST /v1/check" in str(seen)
    assert "canary" not in str(seen)
    assert str(seen).count("'http.response.status_code': ") == 2
