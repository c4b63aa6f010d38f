"""The command: what it says, and a real guard in a process of its own."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx2
import pytest

from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import load_policy
from jaxguard.guards.guard import Guard
from jaxguard.serve.__main__ import _bind, main


def test_mistakes_are_code_2(capsys, tmp_path):
    for arguments, word in (
        ([], "--model"),
        (["--model", str(tmp_path / "gone"), "--port", "0"], "gone"),
        (["--model", "m", "--mode", "careful"], "careful"),
        (["--model", "m", "--timeout", "0"], "--timeout"),
        (["--model", "m", "--port", "70000"], "70000"),
        (["--model", str(tmp_path / "gone"), "--port", "0", "--policy", "nosuch"], "nosuch"),
    ):
        assert main(arguments) == 2
        assert word in capsys.readouterr().err


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


async def stream(port, *values):
    """The verdict of each line, sent after that of the one before it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/check/stream HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
    answers = []
    for value in values:
        line = json.dumps(value).encode() + b"\n"
        writer.write(b"%x\r\n%b\r\n" % (len(line), line))
        while not (line := await asyncio.wait_for(reader.readline(), 300)).startswith(b"{"):
            assert line
        answers.append(json.loads(line))
    writer.close()
    return answers


@pytest.mark.slow
def test_a_real_guard_over_http(tiny_checkpoint, tmp_path):
    """Its verdicts are those of check_many, under load, by two policies; SIGTERM ends it in order."""
    (tmp_path / "law").mkdir()
    for name in ("lamps", "rivers"):
        text = f"name: {name}\nrules: Nobody may talk about {name}.\n"
        (tmp_path / "law" / f"{name}.yaml").write_text(text, encoding="utf-8")
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "jaxguard.serve",
        "--model",
        str(tiny_checkpoint),
        "--policies",
        str(tmp_path / "law"),
    ]
    command += ["--policy", "lamps", "--mode", "direct", "--port", str(port), "--timeout", "300"]
    command += ["--audit", str(tmp_path / "audit.jsonl")]
    bodies = [
        {"prompt": f"{i} bread", "response": "A lamp." if i % 2 else None, "policy": ("lamps", "rivers")[i % 3 == 0]}
        for i in range(24)
    ]

    async def ask():
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            answers = await asyncio.gather(*(client.post("/v1/check", json=body) for body in bodies))
            grown = await stream(port, {"prompt": "1 bread"}, {"append": "A "}, {"append": "lamp."})
            assert grown[-1]["probabilities"] == pytest.approx(answers[1].json()["probabilities"], abs=1e-4)
            assert len({answer["id"] for answer in grown}) == 3
            return [answer.json() for answer in answers], (await client.get("/readyz")).status_code

    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    try:
        for _ in range(2400):
            time.sleep(0.5)
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                httpx2.get(f"http://127.0.0.1:{port}/readyz", trust_env=False)
                break
            except httpx2.ConnectError:
                continue
        answers, ready = asyncio.run(ask())
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
    assert ready == 200
    assert (
        len({answer["id"] for answer in answers})
        == len(bodies)
        == len((tmp_path / "audit.jsonl").read_text().splitlines()) - 3
    )
    with Guard.load(tiny_checkpoint, tmp_path / "law" / "lamps.yaml", "direct") as guard:

        async def offline():
            return [
                (
                    await guard.acheck_many(
                        [Example("x", "s", body["prompt"], body["response"])],
                        Mode.DIRECT,
                        load_policy(body["policy"], tmp_path / "law"),
                    )
                )[0]
                for body in bodies
            ]

        for answer, expected in zip(answers, asyncio.run(offline()), strict=True):
            assert answer["probabilities"] == pytest.approx(expected.probabilities, abs=1e-4)
            assert answer["verdict"]["prompt_harm"] == expected.verdict.prompt_harm
            assert answer["passes"] == expected.passes
    assert json.loads((tmp_path / "audit.jsonl").read_text().splitlines()[0])["model"]["digest"]


def test_an_answer_does_not_wait_for_an_acknowledgement():
    """asyncio turns Nagle's algorithm off only where the listening socket names its protocol."""

    async def run():
        accepted = asyncio.get_running_loop().create_future()
        with _bind("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(lambda _, writer: accepted.set_result(writer), sock=listener):
                _, own = await asyncio.open_connection(*listener.getsockname())
                writer = await accepted
                assert writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                for each in (own, writer):
                    each.close()

    asyncio.run(run())
