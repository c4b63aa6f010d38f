"""An SGLang server behind a service that is killed -9 under load: `make test-sglang`, with a real one."""

import asyncio
from contextlib import ExitStack

import httpx2
import pytest
from real_service import running

import sglang_server
from jaxguard.guards.backends.sglang import free_port

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.slow,
    pytest.mark.skipif(not sglang_server.PYTHON.is_file(), reason="no SGLang: run `make sglang-cpu`"),
]
TEXTS = [f"tell me about the {word} by the river" for word in ("lamp", "bread", "stone")]
ARGUMENTS = "--max-total-tokens=8192", "--mem-fraction-static=0.4"
AT_ONCE = 4
SECONDS = 300
"""In which a service must answer as it should; servers that are out get canaries every 5 s."""


async def check(client, text):
    """Status and probabilities of a check. An answer without a verdict has a Retry-After."""
    answer = await client.post("/v1/check", json={"prompt": text})
    if answer.status_code != 200:
        assert answer.status_code == 503, answer.text
        assert int(answer.headers["retry-after"]) > 0
        return 503, None
    assert answer.json()["verdict"]["prompt_harm"] in ("harmful", "unharmful")
    return 200, answer.json()["probabilities"]["prompt_harm"]


def test_a_server_that_is_killed(export, tmp_path, monkeypatch):
    """A 200 has the verdict of the model, all else is 503; when the server is started again all is as before."""
    monkeypatch.setattr(sglang_server, "READY_SECONDS", 2 * SECONDS)

    async def attack(url, kill, last):
        """What each text was answered after a server is killed, until all are answered with the status `last`."""
        answers = {text: list[tuple[int, float | None]]() for text in TEXTS}
        killed = False

        async def user(client, number):
            for i in range(10_000):
                text = TEXTS[(number + i) % len(TEXTS)]
                answers[text].append(await check(client, text))
                recent = [each for given in answers.values() for each in given[-3:]]
                if killed and len(recent) == 3 * len(TEXTS) and {status for status, _ in recent} == {last}:
                    return

        async with (
            httpx2.AsyncClient(base_url=url, timeout=SECONDS, trust_env=False) as client,
            asyncio.timeout(SECONDS),
        ):
            users = asyncio.gather(*(user(client, number) for number in range(AT_ONCE)))
            while min(map(len, answers.values())) < 2:
                await asyncio.sleep(0.05)
            kill()
            killed = True
            for given in answers.values():
                given.clear()
            await users
        return answers

    async def recovered(url):
        async with (
            httpx2.AsyncClient(base_url=url, timeout=SECONDS, trust_env=False) as client,
            asyncio.timeout(SECONDS),
        ):
            while (await check(client, TEXTS[0]))[0] != 200:
                await asyncio.sleep(0.5)
            return [(await check(client, text))[1] for text in TEXTS]

    with ExitStack() as stack:
        port = free_port()

        def start():
            server = sglang_server.serve(export, "guard", tmp_path / "sglang.log", port, ARGUMENTS, threads=1)
            return stack.enter_context(server)

        server = start()
        address = server.url.removesuffix("/v1")
        options = "--model", address, "--tokenizer", export, "--mode", "direct", "--timeout", SECONDS
        with running(tmp_path / "log", *options) as served:
            before = asyncio.run(recovered(served.url))
            assert len({round(p, 3) for p in before}) > 1
            answers = asyncio.run(attack(served.url, server.kill, 503))
            for text, p in zip(TEXTS, before, strict=True):
                given = [other for status, other in answers[text] if status == 200]
                assert given == pytest.approx([p] * len(given), abs=1e-3)
            start()
            assert asyncio.run(recovered(served.url)) == pytest.approx(before, abs=1e-3)
            metrics = httpx2.get(f"{served.url}/metrics", trust_env=False).text
            assert 'reason="internal"' not in metrics
        assert "Traceback" not in (tmp_path / "log").read_text(encoding="utf-8")
