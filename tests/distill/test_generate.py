"""Generation through faults and kills: nothing lost, nothing twice."""

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from faulty_server import REASONING, VERDICT, completion, serve
from tenacity import wait_none

from jaxguard.config.data import DistillConfig, TeacherConfig
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Dialogue
from jaxguard.data.policies import Policy
from jaxguard.distill import run as run_module
from jaxguard.distill.prompts import load_prompt, tasks_for
from jaxguard.distill.store import read_attempts, summarize
from jaxguard.utils import client as client_module
from jaxguard.utils.errors import JaxguardError

POLICY = Policy("bread", rules="Nobody may speak of knives.", asks=("prompt_harm",))
FAULTS = ("429", "500", "503", "reset", "slow", "cut", "html", "garbage", "empty", "null")
WRONG = json.dumps(completion(1, content=REASONING + "Prompt harm: harmful"))
LEAK = json.dumps(completion(1, content=f"<think>The ground truth says so, hence the prompt is fine.</think>{VERDICT}"))


def examples(count):
    return (Example(f"x{i}", "t", f"May I bake bread number {i}?", prompt_label="unharmful") for i in range(count))


async def generate(folder, urls, count, rounds=3, candidates=1, edit=lambda example: example, **teacher):
    teacher = TeacherConfig(endpoints=urls, model="teacher", **teacher)
    settings = DistillConfig(teacher=teacher, rounds=rounds, candidates=candidates)
    job = run_module.Job(settings, Dialogue(), POLICY, list(tasks_for(map(edit, examples(count)), POLICY)))
    await run_module.generate(job, load_prompt("trace"), job.tasks, folder, {"teacher": "teacher"})
    return summarize(folder, run_module.digests(job.tasks))[1]


def run(folder, script, count, **options):
    async def serve_and_generate():
        async with serve(script) as server:
            return await generate(folder, (server.url,), count, **options), server

    return asyncio.run(serve_and_generate())


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(client_module, "BACKOFF", wait_none())


def test_each_example_gets_its_trace(tmp_path):
    summary, server = run(tmp_path, lambda i: "", 20)
    assert (summary["attempts"], summary["traced"], summary["never_passed"]) == (20, 20, {})
    assert (summary["prompt_tokens"], summary["completion_tokens"]) == (200, 400)
    assert {a.example_id for a in read_attempts(tmp_path)} == {f"x{i}" for i in range(20)}
    prompts = [request["messages"][0]["content"] for request in server.requests]
    assert sum("bread number 7?" in prompt for prompt in prompts) == 1


def test_a_corrected_example_is_asked_about_anew(tmp_path):
    """Its old trace argues for what it was; the others keep theirs."""
    run(tmp_path, lambda i: "", 3)
    _, server = run(tmp_path, lambda i: "", 3)
    assert not server.requests
    other = json.dumps(completion(1, content=REASONING + "Prompt harm: harmful"))

    def corrected(example):
        return replace(example, prompt_label="harmful") if example.id == "x1" else example

    summary, server = run(tmp_path, lambda i: other, 3, edit=corrected)
    assert len(server.requests) == 1
    assert (summary["examples"], summary["traced"], summary["attempts"]) == (3, 3, 4)
    summary, _ = run(tmp_path, lambda i: "", 3, edit=lambda example: replace(example, prompt=f"{example.prompt} Now?"))
    assert (summary["traced"], summary["attempts"]) == (3, 7)


def test_what_fails_is_asked_again_and_what_never_passes_is_named(tmp_path):
    summary, _ = run(tmp_path, lambda i: (WRONG, LEAK, "")[i], 1, concurrency=1)
    assert (summary["attempts"], summary["traced"]) == (3, 1)
    assert summary["failed"] == {"verdict_differs": 1, "labels_leaked": 1}
    assert [(a.round, a.accepted) for a in read_attempts(tmp_path)] == [(0, False), (1, False), (2, True)]
    summary, _ = run(tmp_path / "never", lambda i: WRONG, 2)
    assert (summary["attempts"], summary["traced"], list(summary["never_passed"])) == (6, 0, ["x0", "x1"])


def test_candidates_are_asked_for_together_and_all_kept(tmp_path):
    summary, server = run(tmp_path, lambda i: "", 3, candidates=4)
    assert [request["n"] for request in server.requests] == [4, 4, 4]
    assert (summary["attempts"], summary["traced"]) == (12, 3)


def test_a_second_run_asks_for_nothing_and_more_rounds_go_on(tmp_path):
    run(tmp_path, lambda i: WRONG if i % 2 else "", 10, rounds=1, concurrency=1)
    summary, server = run(tmp_path, lambda i: "", 10, rounds=1)
    assert (len(server.requests), summary["traced"], len(summary["never_passed"])) == (0, 5, 5)
    summary, server = run(tmp_path, lambda i: "", 10, rounds=2)
    assert (len(server.requests), summary["traced"]) == (5, 10)


def test_a_refusal_stops_the_run_and_keeps_what_is_there(tmp_path):
    with pytest.raises(JaxguardError, match="status 400"):
        run(tmp_path, lambda i: "400" if i >= 5 else "", 50, concurrency=2)
    kept = [a.example_id for a in read_attempts(tmp_path)]
    assert len(kept) == len(set(kept)) >= 4
    assert run(tmp_path, lambda i: "", 50)[0]["traced"] == 50


def test_examples_without_a_label_are_left_out():
    some = [Example("a", "t", "p"), Example("b", "t", "p", prompt_label="harmful")]
    assert [task.example.id for task in tasks_for(some, POLICY)] == ["b"]


CLIENT = """
import asyncio, resource, sys
sys.path[:] = {paths!r}
from pathlib import Path
from tenacity import wait_none
import test_generate
test_generate.client_module.BACKOFF = wait_none()
options = dict(rounds=20, tries=40, concurrency=8, timeout=0.5)
asyncio.run(test_generate.generate(Path({folder!r}), ({url!r},), {count}, **options))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def client(folder, url, count):
    return CLIENT.format(paths=sys.path, folder=str(folder), url=url, count=count)


async def killed_again_and_again(folder: Path, count: int, kills: int) -> None:
    """Generate in processes of their own under 30 % faults, kill each after a share of the work, let the last one finish."""
    fate = random.Random(0)
    script = [
        fate.choice(FAULTS) if fate.random() < 0.3 else fate.choice((WRONG, "", "", "")) for _ in range(20 * count)
    ]
    async with serve(lambda i: script[i], keep=False) as server:
        code = client(folder, server.url, count)
        for kill in range(kills + 1):
            process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
            goal, started = count * (kill + 1) // (kills + 2), time.monotonic()
            while kill < kills and process.returncode is None and time.monotonic() < started + 120:
                await asyncio.sleep(0.02)
                if len(list(read_attempts(folder))) >= goal:
                    os.kill(process.pid, signal.SIGKILL)
                    break
            code_of = await process.wait()
            assert code_of == (-signal.SIGKILL if kill < kills else 0)


@pytest.mark.parametrize(("count", "kills"), [(40, 2), pytest.param(2000, 5, marks=pytest.mark.slow)])
def test_faults_and_kills_lose_nothing_and_repeat_nothing(tmp_path, count, kills):
    asyncio.run(killed_again_and_again(tmp_path, count, kills))
    found = list(read_attempts(tmp_path))
    keys = {attempt.key for attempt in found}
    assert len(keys) == len(found)
    for attempt in found:  # a round is begun only when all before it failed
        assert all((attempt.example_id, r, 0) in keys for r in range(attempt.round))
    accepted = Counter(attempt.example_id for attempt in found if attempt.accepted)
    assert accepted == dict.fromkeys((f"x{i}" for i in range(count)), 1)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_examples(tmp_path):
    async def peak_kilobytes(count: int) -> int:
        async with serve(lambda i: "", keep=False) as server:
            code = client(tmp_path / str(count), server.url, count)
            process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
            output, _ = await process.communicate()
        return int(output.split()[-1])

    few, many = asyncio.run(peak_kilobytes(200)), asyncio.run(peak_kilobytes(4000))
    # What a store keeps of an attempt is its key and its example's id: some 300 bytes.
    assert many - few < 4000, f"{few} kB with 200 examples, {many} kB with 4,000"
