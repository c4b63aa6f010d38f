"""The command under load, attacked and killed: `make test-serve`, with real weights and over real connections."""

import asyncio
import hashlib
import json
import math
import os
import random
import signal

import httpx2
import pytest
import yaml
from real_service import running

from jaxguard import Guard
from jaxguard.guards.backends.sglang import free_port
from jaxguard.load.client import Client

pytestmark = pytest.mark.serve

WORDS = ["lamp", "river", "bread", "tell", "me", "about", "word", "stone", "read", "sing", "a", "the", "how", "what"]
SECRET = "canary7f3a"
ITEMS, MALFORMED = 1000, 10_000
AT_ONCE = 64


def texts(count, seed=0):
    """Texts of different lengths, all different, half of them with a response."""
    rng = random.Random(seed)
    made = [" ".join(rng.choices(WORDS, k=rng.randint(1, 40))) + f" {i}" for i in range(count)]
    return [
        (text, " ".join(rng.choices(WORDS, k=rng.randint(1, 30))) if i % 2 else None) for i, text in enumerate(made)
    ]


async def post(url, bodies, path="/v1/check", at_once=AT_ONCE, headers=()):
    """Status and body of the answer to each, or the error; so many under way at a time."""
    gate = asyncio.Semaphore(at_once)

    async def one(client, body):
        async with gate:
            try:
                return await asyncio.wait_for(client.request("POST", path, body), 60)
            except OSError as error:
                return 0, str(error).encode()

    async with Client(url, dict(headers)) as client:
        return await asyncio.gather(*(one(client, body) for body in bodies))


def body(prompt, response=None, **fields):
    return json.dumps({"prompt": prompt, "response": response, **fields}).encode()


def odds(probability):
    p = min(max(probability, 1e-6), 1 - 1e-6)  # answers hold six decimals
    return math.log(p / (1 - p))


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """A folder with one policy, which a test may swap."""
    folder = tmp_path_factory.mktemp("policies")
    tree = {
        "name": "house",
        "rules": "Nobody may talk about lamps.",
        "asks": ["prompt_harm", "response_harm", "response_refusal"],
    }
    (folder / "house.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def service(export, policies, tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    options = ["--policies", policies, "--timeout", 60, "--audit", folder / "audit.jsonl", "--mode", "direct"]
    with running(folder / "log", "--model", export, *options) as served:
        yield served, folder


def test_verdicts_under_load_are_those_of_check_many(service, export):
    """Of each item its own, whatever shared its batch; and no two answers have one id."""
    items = texts(ITEMS)
    answers = asyncio.run(post(service[0].url, [body(*item) for item in items]))
    assert {status for status, _ in answers} == {200}
    answers = [json.loads(content) for _, content in answers]
    assert len({answer["id"] for answer in answers}) == ITEMS
    with Guard.load(export, mode="direct") as guard:
        results = guard.check_many(items)
    seen = set()
    for answer, result in zip(answers, results, strict=True):
        own = {q: p for q, p in result.probabilities.items() if p is not None}
        assert answer["probabilities"].keys() == own.keys()
        for question, p in own.items():
            assert odds(answer["probabilities"][question]) == pytest.approx(odds(p), abs=1e-3 + 2e-6 / (p * (1 - p)))
            seen.add(round(p, 6))
        assert answer["verdict"]["prompt_harm"] == result.verdict.prompt_harm
    assert len(seen) > ITEMS / 2  # another item's answer would show


def malformed(rng):
    """What is no valid request: a valid one that is damaged, of other types, too deep, too long, or no JSON at all."""
    valid = body(" ".join(rng.choices(WORDS, k=5)) + SECRET, rng.choice([None, SECRET]))
    values = [None, True, 0, -1, 1e300, "", " \n", [], [[]], {}, {SECRET: SECRET}, SECRET * 1000]
    match rng.randrange(8):
        case 0:
            return valid[: rng.randrange(len(valid))]
        case 1:
            at = rng.randrange(len(valid))
            return valid[:at] + bytes([rng.choice([0, 0xFF, 0x80, 0xC0])]) + valid[at + 1 :]
        case 2:
            return json.dumps(
                {"prompt": rng.choice([v for v in values if not (isinstance(v, str) and v.strip())])}
            ).encode()
        case 3:
            return json.dumps({"prompt": SECRET, rng.choice(["mode", "policy", "timeout_ms", SECRET]): SECRET}).encode()
        case 4:
            return rng.choice([b"[", b'{"prompt":', b"{" * 7]) * rng.randrange(1, 20_000)
        case 5:
            return rng.randbytes(rng.randrange(200))
        case 6:
            return b'{"prompt": "%s", "prompt": 7}' % SECRET.encode()
        case _:
            return json.dumps({"prompt": "bread", "response": rng.choice([0, True, [SECRET], {SECRET: 1}])}).encode()


def test_malformed_bodies(service):
    served, folder = service
    rng = random.Random(0)
    bodies = [malformed(rng) for _ in range(MALFORMED)]
    paths = ["/v1/check", "/v1/checks", "/v1/moderations", "/v1/chat/completions", "/v1/decisions"]
    for path in paths:
        answers = asyncio.run(post(served.url, bodies[:: len(paths)], path))
        for sent, (status, content) in zip(bodies[:: len(paths)], answers, strict=True):
            assert status in (400, 413, 422), (path, status, sent[:100])
            assert SECRET.encode() not in content, (path, sent[:100])
            assert b"Traceback" not in content
    check_silent(served, folder)


def check_silent(served, folder):
    """No canary and no traceback in logs, metrics and the audit log."""
    metrics = httpx2.get(f"{served.url}/metrics", trust_env=False).text
    for text in (metrics, *((folder / name).read_text(encoding="utf-8") for name in ("log", "audit.jsonl"))):
        assert SECRET not in text
        assert "Traceback" not in text


def test_canaries(service):
    """Texts with a canary are judged, and are then nowhere but in the answer to whoever sent them."""
    served, folder = service
    sent = [body(f"{SECRET} {prompt}", response and f"{response} {SECRET}") for prompt, response in texts(ITEMS, 1)]
    answers = asyncio.run(post(served.url, sent))
    assert {status for status, _ in answers} == {200}
    audit = [json.loads(line) for line in (folder / "audit.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {json.loads(content)["id"] for _, content in answers} <= {row["id"] for row in audit}
    large = json.dumps({"prompt": SECRET * 500_000}).encode()  # 5 MB
    assert {status for status, _ in asyncio.run(post(served.url, [large] * 20))} <= {413, 0}
    check_silent(served, folder)
    assert asyncio.run(post(served.url, [body("bread")]))[0][0] == 200


def test_wrong_keys(export, tmp_path):
    digest = hashlib.sha256(b"right" * 8).hexdigest()
    keys = tmp_path / "keys.yaml"
    keys.write_text(yaml.safe_dump({"keys": [{"name": "app", "sha256": digest}]}), encoding="utf-8")
    with running(tmp_path / "log", "--model", export, "--mode", "direct", "--keys", keys) as served:
        for key, expected in ((b"right" * 8, 200), (b"wrong" * 8, 401), (b"", 401)):
            headers = {"authorization": f"Bearer {key.decode()}"}
            answers = asyncio.run(post(served.url, [body("bread")] * 20, headers=headers))
            assert {status for status, _ in answers} == {expected}
        assert {status for status, _ in asyncio.run(post(served.url, [body("bread")] * 20))} == {401}


def test_a_policy_that_is_swapped_under_load(service, policies):
    """No error; every answer names the version that it was judged by, and after the first one of the new, all are of that."""
    served, path = service[0], policies / "house.yaml"
    old = path.read_text(encoding="utf-8")

    async def swap():
        await asyncio.sleep(1)
        path.write_text(
            yaml.safe_dump({**yaml.safe_load(old), "rules": "Nobody may talk about rivers."}), encoding="utf-8"
        )
        os.kill(served.process.pid, signal.SIGHUP)

    async def traffic():
        swapping = asyncio.create_task(swap())
        items, answers = texts(400, 2), []
        while len({answer["policy"]["digest"] for answer in answers}) < 2 and len(answers) < 20_000:
            answers += await judged(items)
        answers += await judged(items)
        await swapping
        return answers

    async def judged(items):
        done = await post(served.url, [body(*item, policy="house") for item in items], at_once=8)
        assert {status for status, _ in done} == {200}
        return [json.loads(content) for _, content in done]

    digests = [answer["policy"]["digest"] for answer in asyncio.run(traffic())]
    path.write_text(old, encoding="utf-8")
    first = digests.index(digests[-1])
    assert first > 0
    assert len(set(digests)) == 2
    assert set(digests[first + 2 * 8 :]) == {digests[-1]}  # what was under way then ends with the old one


def test_a_service_that_is_killed(export, tmp_path):
    """Whoever has no verdict has no answer; when it is back, the same port answers as before."""
    port, items = free_port(), texts(300, 3)
    options = ["--model", export, "--mode", "direct", "--timeout", 60]

    async def attack(served):
        async def kill():
            await asyncio.sleep(0.5)
            os.killpg(served.process.pid, signal.SIGKILL)

        killing = asyncio.create_task(kill())
        done = await post(served.url, [body(*item) for item in items] * 20, at_once=16)
        await killing
        return done

    with running(tmp_path / "log", *options, port=port) as served:
        before = asyncio.run(post(served.url, [body(*items[0])]))
        answers = asyncio.run(attack(served))
    assert {status for status, _ in answers} == {0, 200}
    assert all(json.loads(content)["verdict"]["prompt_harm"] for status, content in answers if status == 200)
    with running(tmp_path / "log", *options, port=port) as served:
        after = asyncio.run(post(served.url, [body(*items[0])]))
    assert json.loads(after[0][1])["probabilities"] == json.loads(before[0][1])["probabilities"]
