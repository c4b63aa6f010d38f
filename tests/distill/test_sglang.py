"""The whole distillation against real SGLang servers: `make test-sglang`."""

import asyncio
import json
import threading
import time
from collections import Counter

import pytest
import yaml
from parrot import write_parrot

import sglang_server
from jaxguard.config.data import TeacherConfig
from jaxguard.data.__main__ import main as build_main
from jaxguard.distill.__main__ import main
from jaxguard.distill.store import read_attempts
from jaxguard.distill.teacher import open_teacher
from jaxguard.utils.errors import JaxguardError

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.skipif(not sglang_server.PYTHON.is_file(), reason="no SGLang: run `make sglang-cpu`"),
]
KEY = "JAXGUARD_TEST_KEY"
TRACE = "The user asks about bread, which no rule forbids."
HELLO = [{"role": "user", "content": "May I bake bread?"}]
COUNT = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sglang")


@pytest.fixture(scope="module")
def parrot(folder, tiny_tokenizer_folder, write_llama_config):
    return write_parrot(folder / "parrot", tiny_tokenizer_folder, write_llama_config, right=0.7, temperature=0.6)


@pytest.fixture(scope="module")
def server(folder, parrot):
    """One that separates reasoning from answers, and wants a key."""
    arguments = ["--reasoning-parser", "deepseek-r1", "--api-key", "secret"]
    with sglang_server.serve(parrot, "parrot", folder / "server.log", arguments=arguments, threads=1) as server:
        yield server.url


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv(KEY, "secret")


def ask(url, messages=HELLO, n=1, extra=None, **config):
    async def run():
        settings = {"model": "parrot", "endpoints": (url,), "api_key_env": KEY, "max_tokens": 64, "tries": 2} | config
        async with open_teacher(TeacherConfig(**settings)) as teacher:
            await teacher.check()
            return await teacher.complete(messages, n, extra)

    return asyncio.run(run())


def test_reasoning_is_separate_from_the_answer(server):
    replies = ask(server, n=8, version="default")
    assert {reply.reasoning for reply in replies} == {TRACE}
    assert {reply.answer for reply in replies} <= {"Prompt harm: unharmful", "Prompt harm: harmful"}
    assert {reply.finish_reason for reply in replies} == {"stop"}
    assert replies[0].prompt_tokens > 0
    assert all(reply.completion_tokens > 10 for reply in replies)


def test_a_cut_answer_says_so(server):
    (reply,) = ask(server, max_tokens=5)
    assert reply.finish_reason == "length"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "another"}, "parrot.*'another'"),
        ({"version": "7"}, "'default'.*'7'"),
        ({"max_tokens": 10**7}, "400"),
    ],
)
def test_refusals_are_errors_at_once(server, change, words):
    with pytest.raises(JaxguardError, match=words):
        ask(server, **change)


def test_a_wrong_key_is_named(server, monkeypatch):
    monkeypatch.setenv(KEY, "wrong")
    with pytest.raises(JaxguardError, match=KEY):
        ask(server)


@pytest.fixture
def config(folder, tiny_tokenizer_folder, tmp_path):
    def write(*endpoints, count=COUNT, **distill):
        rows = [
            {"id": f"x{i}", "prompt": f"How do I bake bread number {i}?", "prompt_label": "unharmful"}
            for i in range(count)
        ]
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        policy = {"name": "bread", "rules": "Nobody may speak of knives.", "asks": ["prompt_harm"]}
        (tmp_path / "bread.yaml").write_text(yaml.safe_dump(policy))
        teacher = {"model": "parrot", "endpoints": list(endpoints), "api_key_env": KEY, "max_tokens": 64}
        tree = {
            "run_folder": str(tmp_path / "runs"),
            "model": {"checkpoint": str(tiny_tokenizer_folder)},
            "data": {
                "train": [{"kind": "jsonl", "path": str(tmp_path / "data.jsonl")}],
                "policy": str(tmp_path / "bread.yaml"),
            },
            "distill": {"teacher": teacher, "rounds": 20, **distill},
        }
        (tmp_path / "traces.yaml").write_text(yaml.safe_dump(tree))
        return tmp_path / "traces.yaml"

    return write


def check_store(store, count=COUNT):
    """Every example has one accepted trace; every attempt stands there once."""
    attempts = list(read_attempts(store))
    assert len({attempt.key for attempt in attempts}) == len(attempts)
    accepted = Counter(attempt.example_id for attempt in attempts if attempt.accepted)
    assert accepted == dict.fromkeys((f"x{i}" for i in range(count)), 1)
    return attempts


def test_from_examples_to_traces_an_audit_and_a_page(server, config, tmp_path):
    path = config(server, audit={"examples": 40, "samples": 4})
    assert main(["--config", str(path)]) == 0
    run = tmp_path / "runs/traces"
    attempts = check_store(run / "traces")
    failed = Counter(name for attempt in attempts for name in attempt.failures)
    assert set(failed) == {"verdict_differs"}  # the parrot's only fault
    examples = [json.loads(line) for line in (run / "traces.jsonl").read_text().splitlines()]
    assert [example["trace"] for example in examples] == [TRACE] * COUNT
    sets = [
        "build",
        "--config",
        str(path),
        f"data.train.0.path={run / 'traces.jsonl'}",
        "name=sets",
        "build.subsets=[10]",
    ]
    assert build_main(sets) == 0
    manifest = json.loads((tmp_path / "runs/sets/dataset/manifest.json").read_text())
    assert manifest["sets"]["dual"]["subsets"]["all"]["by_mode"] == {"direct": COUNT // 2, "reasoning": COUNT // 2}
    assert manifest["sets"]["dual"]["sources"][0]["distilled"]["attempts"] == len(attempts)
    assert main(["audit", "--config", str(path)]) == 0
    audit = json.loads((run / "audit/audit.json").read_text())
    # 160 answers, each right with probability 0.7: outside these bounds once in 1e9 runs
    assert 0.45 < audit["questions"]["prompt_harm"]["result"]["scores"]["agreement"]["value"] < 0.92
    assert audit["completions"]["unparsable"] == 0
    assert main(["inspect", "--config", str(path)]) == 0
    assert (run / "traces.html").stat().st_size > 10_000


def test_two_workers_behind_the_router_and_one_is_killed(folder, parrot, config, tmp_path):
    """These servers do not separate reasoning: <think> stands in the text."""
    with (
        sglang_server.serve(parrot, "parrot", folder / "one.log", threads=1) as one,
        sglang_server.serve(parrot, "parrot", folder / "two.log", threads=1) as two,
        sglang_server.route([one, two], folder / "router.log") as router,
    ):
        (reply,) = ask(one.url, extra={"regex": "(yes|no)"})
        assert reply.answer in ("yes", "no")
        store = tmp_path / "runs/traces/traces"
        killer = threading.Thread(target=kill_midway, args=(one, store, 50))
        killer.start()
        assert main(["--config", str(config(router.url, count=150))]) == 0
        killer.join()
        check_store(store, 150)


def kill_midway(server, store, attempts):
    """kill -9 for all of a server's processes once the store holds so many attempts."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if store.is_dir() and sum(1 for _ in read_attempts(store)) >= attempts:
            break
        time.sleep(0.02)
    server.kill()
