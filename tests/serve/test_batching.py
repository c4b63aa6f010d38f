"""Batches, their order, and who gets which result."""

import asyncio
import random
from dataclasses import replace

import pytest

from jaxguard.data.encoding import SpecialTokenError
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Policy
from jaxguard.guards.protocol import UnsupportedError
from jaxguard.serve.batching import BATCH_TOKENS, Cost
from jaxguard.utils.client import UnavailableError

run = asyncio.run


def prompts(guard):
    return [prompts for prompts, _, _ in guard.batches]


def test_an_idle_guard_begins_at_once_and_the_next_batch_is_what_came_meanwhile(served, guard):
    async def test():
        async with served() as s:
            guard.gate = asyncio.Event()
            tasks = [asyncio.create_task(s.check("a"))]
            await s.until(lambda: guard.batches)
            tasks += [asyncio.create_task(s.check(prompt)) for prompt in "bcd"]
            await s.until(lambda: s.service.batcher.queued_tokens == 3 * 32)
            guard.gate.set()
            assert [each.status_code for each in await asyncio.gather(*tasks)] == [200] * 4
            assert prompts(guard) == [["a"], ["b", "c", "d"]]
            assert s.service.batcher.queued_tokens == 0

    run(test())


def test_batches_are_bounded_in_tokens_and_of_one_policy_and_mode(served, guard, tmp_path):
    (tmp_path / "other.yaml").write_text("name: other\nrules: x\n", encoding="utf-8")
    guard.mode = Mode.REASONING
    long = "x" * 4 * (BATCH_TOKENS // 2)

    async def test():
        async with served(policies=tmp_path) as s:
            guard.gate = asyncio.Event()
            first = asyncio.create_task(s.check("first"))
            await s.until(lambda: guard.batches)
            asks = [("a", None), ("b", "other"), (long, None), (long, None), ("c", "other"), ("d", None)]
            tasks = [asyncio.create_task(s.check(prompt, policy=policy)) for prompt, policy in asks]
            tasks.append(asyncio.create_task(s.check("direct", mode="direct")))
            await s.until(lambda: s.service.batcher.queued_tokens > BATCH_TOKENS + 5 * 32)
            guard.gate.set()
            await asyncio.gather(first, *tasks)
            sizes = [[prompt[:6] for prompt in batch] for batch in prompts(guard)]
            assert sizes == [["first"], ["a", long[:6]], ["b", "c"], [long[:6], "d"], ["direct"]]
            assert [(mode, policy.name) for _, mode, policy in guard.batches[-2:]] == [
                (Mode.REASONING, "short"),
                (Mode.DIRECT, "short"),
            ]

    run(test())


def test_model_servers_are_asked_about_each_by_itself_so_many_at_a_time(served, guard):
    """They make their own batches. What fails there is asked once, and fails nothing else."""
    guard.fails = lambda prompt: UnavailableError("secret") if prompt == "b" else None

    async def test():
        async with served(concurrent=3) as s:
            guard.gate = asyncio.Event()
            tasks = [asyncio.create_task(s.check(prompt)) for prompt in "abcde"]
            await s.until(lambda: len(guard.batches) == 3)
            guard.gate.set()
            assert [each.status_code for each in await asyncio.gather(*tasks)] == [200, 503, 200, 200, 200]
            assert sorted(prompts(guard)) == [[prompt] for prompt in "abcde"]

    run(test())


def test_a_pass_that_nobody_waits_for_takes_its_place_until_it_ends(served, guard):
    """A pass of the model is not interrupted; what comes meanwhile waits, as admission predicts."""

    async def test():
        async with served() as s:
            guard.gate, guard.zombie = asyncio.Event(), asyncio.Event()
            left = asyncio.create_task(s.check("a"))
            await s.until(lambda: guard.batches)
            left.cancel()
            waiting = asyncio.create_task(s.check("b"))
            await s.until(lambda: s.service.batcher.queued_tokens == 32)
            await asyncio.sleep(0.05)
            assert prompts(guard) == [["a"]]
            guard.zombie.set()
            guard.gate.set()
            assert (await waiting).status_code == 200

    run(test())


@pytest.mark.parametrize("shuffle", [False, True])
def test_everybody_gets_the_own_answer(served, guard, shuffle):
    guard.shuffle, draw = shuffle, random.Random(0)

    async def test():
        async with served(concurrent=3) as s:
            guard.seconds = 0.001

            async def one(number):
                await asyncio.sleep(draw.random() / 50)
                prompt = f"{number} {'harm' if number % 3 == 0 else ''}"
                answer = (await s.check(prompt, reasoning=True)).json()
                assert answer["reasoning"] == f"short: {prompt}"
                assert answer["passes"] is (number % 3 != 0)
                return answer["id"]

            ids = await asyncio.gather(*map(one, range(60)))
            assert len(set(ids)) == 60

    run(test())


@pytest.mark.parametrize("change", [lambda r: r[:-1], lambda r: [*r, r[0]], lambda r: [replace(x, id="x") for x in r]])
def test_results_that_are_nobodys_are_no_verdict(served, guard, change):
    whole = guard.acheck_many

    async def test():
        async with served() as s:

            async def wrong(*call):
                return change(await whole(*call))

            guard.acheck_many = wrong
            answers = await s.client.post("/v1/checks", json={"checks": [{"prompt": "a"}, {"prompt": "b"}]})
            assert answers.status_code == 502

    run(test())


def test_a_guard_whose_servers_are_down_says_when_to_come_again(served, guard):
    guard.fails = lambda prompt: UnavailableError("secret") if prompt == "bad" else None

    async def test():
        async with served() as s:
            answer = await s.check("bad")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_server")
            assert int(answer.headers["retry-after"]) >= 1
            assert "secret" not in answer.text
            assert (await s.check("good")).status_code == 200

    run(test())


def test_one_text_does_not_fail_its_neighbours(served, guard):
    errors = {"bad": ValueError("secret"), "odd": UnsupportedError("secret"), "token": SpecialTokenError("secret")}
    guard.fails = errors.get

    async def test():
        async with served() as s:
            guard.seconds = 0.01
            tasks = [asyncio.create_task(s.check(prompt)) for prompt in ("a", "b", "bad", "c", "odd", "d", "token")]
            answers = await asyncio.gather(*tasks)
            assert [each.status_code for each in answers] == [200, 200, 502, 200, 422, 200, 422]
            assert not any("secret" in each.text for each in answers)

    run(test())


def test_who_left_is_not_computed(served, guard):
    async def test():
        async with served() as s:
            guard.gate = asyncio.Event()
            running = asyncio.create_task(s.check("a"))
            await s.until(lambda: guard.batches)
            waiting = [asyncio.create_task(s.check(prompt)) for prompt in "bc"]
            await s.until(lambda: s.service.batcher.queued_tokens == 64)
            waiting[0].cancel()
            await s.until(lambda: s.service.batcher.queued_tokens == 32)
            running.cancel()  # its batch ends, since nobody waits for it
            await s.until(lambda: len(guard.batches) == 2)
            guard.gate.set()
            assert (await waiting[1]).status_code == 200
            assert prompts(guard) == [["a"], ["c"]]

    run(test())


def test_cost_is_learned():
    cost = Cost()
    assert cost(100) == 0
    cost.add(100, 0.3)
    assert cost(1000) == pytest.approx(3)  # of one size: all of it may be for the tokens
    for _ in range(20):
        cost.add(100, 0.3)
        cost.add(1000, 1.2)
    assert cost(500) == pytest.approx(0.7)
    assert cost.batch == pytest.approx(800, abs=1)  # 0.8 s for tokens, and a fifth of a second besides
    assert cost(1000) == pytest.approx(1.4)
    falling = Cost()
    falling.add(100, 1)
    falling.add(1000, 0.5)
    assert falling(100) == pytest.approx(0.75, abs=0.02)


def test_policies_that_are_equal_share_batches(served, guard, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text("name: same\nrules: x\n", encoding="utf-8")

    async def test():
        async with served(policies=tmp_path) as s:
            answers = await asyncio.gather(s.check("a", policy="one"), s.check("b", policy="two"))
            assert [each.json()["policy"]["name"] for each in answers] == ["one", "two"]
            assert {policy for _, _, policy in guard.batches} == {Policy("same", rules="x")}

    run(test())
