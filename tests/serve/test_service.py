"""Deadlines, shedding, keys, policies that change, readiness and the end of a service."""

import asyncio
import hashlib
import json
from dataclasses import replace

import pytest

from jaxguard.data.format.dialogue import Mode
from jaxguard.serve import batching
from jaxguard.serve import service as serving
from jaxguard.serve.keys import Budget, Keys
from jaxguard.serve.policies import Policies
from jaxguard.utils.errors import JaxguardError

run = asyncio.run


def test_an_answer(served, guard):
    async def test():
        async with served() as s:
            answer = (await s.check("harm", reasoning=True)).json()
            assert answer.pop("id").startswith("chk_")
            assert answer.pop("seconds").keys() == {"queue", "guard"}
            assert answer == {
                "passes": False,
                "harmful": True,
                "verdict": {"prompt_harm": "harmful", "response_harm": None, "response_refusal": None},
                "probabilities": {"prompt_harm": 0.9},
                "operating_point": "words",
                "thresholds": {"prompt_harm": None},
                "mode": "direct",
                "decided_by": "direct",
                "direct_probabilities": {},
                "problems": [],
                "reasoning": "short: harm",
                "policy": {"name": "short", "digest": guard.policy.digest},
                "model": {"name": "null", "digest": "0"},
                "usage": {"prompt_tokens": 7, "completion_tokens": 2},
            }
            assert (await s.check("bread?")).json()["reasoning"] is None

    run(test())


def test_a_list_is_answered_in_order_or_not_at_all(served, guard):
    async def test():
        async with served() as s:
            body = {"checks": [{"prompt": "a"}, {"prompt": "harm"}, {"prompt": "b"}]}
            rows = (await s.client.post("/v1/checks", json=body)).json()["results"]
            assert [row["harmful"] for row in rows] == [False, True, False]
            guard.fails = lambda prompt: ValueError() if prompt == "b" else None
            assert (await s.client.post("/v1/checks", json=body)).status_code == 502

    run(test())


@pytest.mark.parametrize("how", ["field", "header", "service"])
def test_a_deadline_ends_a_check(served, guard, how):
    fields, headers = {"field": ({"timeout_ms": 20}, {}), "header": ({}, {"x-timeout-ms": "20"}), "service": ({}, {})}[
        how
    ]

    async def test():
        async with served(timeout=0.02 if how == "service" else 10) as s:
            guard.gate = asyncio.Event()
            answer = await s.check(headers=headers, **fields)
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")
            assert s.service.batcher.queued_tokens == 0
            guard.gate.set()
            assert (await s.check(timeout_ms=10_000)).status_code == 200

    run(test())


def test_what_would_not_be_done_in_time_is_refused_at_once(served, guard):
    """20 checks of 0.1 s each fit into two seconds, in batches of any size."""

    async def test():
        async with served(timeout=2) as s:
            guard.seconds = 10
            s.service.batcher.cost[guard.mode].__init__()
            for _ in range(3):
                s.service.batcher.cost[guard.mode].add(32, 0.1)
            tasks = [asyncio.create_task(s.check("a")) for _ in range(40)]
            await s.until(lambda: sum(task.done() for task in tasks) + s.service.batcher.queued_tokens // 32 == 39)
            waiting = [task for task in tasks if not task.done()]
            refused = [task.result() for task in tasks if task.done()]
            assert {each.status_code for each in refused} == {503}
            assert {each.json()["error"]["code"] for each in refused} == {"overloaded"}
            assert {each.headers["retry-after"] for each in refused} == {"1"}
            assert 12 <= len(waiting) <= 20
            assert (await s.check("a", timeout_ms=100_000)).status_code == 503  # the service's limit holds
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    run(test())


def test_an_idle_guard_refuses_what_is_too_long_for_the_deadline(served, guard):
    """A long text would keep all others waiting, for nothing; a short one is tried, whatever the guard took before."""

    async def test():
        async with served(timeout=10) as s:
            cost, long = s.service.batcher.cost[guard.mode], "a" * 4 * 900
            for tokens in (100, 200):
                cost.add(tokens, tokens / 100)
            assert (await s.check(long)).status_code == 200
            cost.__init__()
            for tokens in (100, 200):
                cost.add(tokens, tokens / 10)
            answer = await s.check(long)
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")
            assert "retry-after" not in answer.headers  # it would not help
            assert (await s.check("a")).status_code == 200
            assert cost(32) < 3.2 / 1.1  # what it took now counts

    run(test())


def test_what_was_predicted_wrong_is_tried_again(served, guard, monkeypatch):
    """Else a guard that was slow once would refuse all long texts for ever, if nobody sent short ones."""
    monkeypatch.setattr(batching, "TRY_SECONDS", 0.05)

    async def test():
        async with served(timeout=10) as s:
            cost, long = s.service.batcher.cost[guard.mode], "a" * 4 * 900
            assert (await s.check("a")).status_code == 200
            cost.__init__()
            for tokens in (100, 200):
                cost.add(tokens, tokens / 10)
            assert (await s.check(long)).status_code == 504
            for _ in range(40):
                await asyncio.sleep(0.06)
                assert (await s.check(long)).status_code == 200
                if cost(932) < 10 / 1.25:
                    break
            assert (await s.check(long)).status_code == 200  # at once, by the prediction

    run(test())


def test_retry_after_is_the_time_that_lacks(served, guard):
    async def test():
        async with served(timeout=10) as s:
            s.service.batcher.cost[guard.mode].__init__()
            s.service.batcher.cost[guard.mode].add(32, 6)
            guard.gate = asyncio.Event()
            running = asyncio.create_task(s.check("a"))  # an idle guard tries, whatever is predicted
            await s.until(lambda: guard.batches)
            answer = await s.check("a")
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")  # 1.25 × 2 × 6 s less 10 s
            guard.gate.set()
            assert (await running).status_code == 200

    run(test())


def test_memory_is_bounded_whatever_is_predicted(served, guard, monkeypatch):
    monkeypatch.setattr(serving, "MOST_QUEUED_TOKENS", 100)

    async def test():
        async with served() as s:
            guard.gate = asyncio.Event()
            s.service.batcher.predict = lambda tokens: (0.0, 0.0)
            tasks = [asyncio.create_task(s.check("a")) for _ in range(6)]
            await s.until(lambda: sum(task.done() for task in tasks) == 2)
            guard.gate.set()
            assert [each.status_code for each in await asyncio.gather(*tasks)] == [200] * 4 + [503] * 2

    run(test())


def key_file(path, **fields):
    key = {"name": "one", "sha256": hashlib.sha256(b"key 1").hexdigest(), **fields}
    path.write_text(json.dumps({"keys": [key]}), encoding="utf-8")
    return path


def test_keys(served, guard, tmp_path):
    keys = key_file(tmp_path / "keys.yaml", checks_per_second=0.001, burst=3)

    async def test():
        async with served(keys=keys, audit=serving.Audit(tmp_path / "audit.jsonl")) as s:
            for headers in ({}, {"x-api-key": "key 2"}, {"authorization": "Basic key 1"}, {"authorization": "Bearer"}):
                assert (await s.check(headers=headers)).status_code == 401
                assert (await s.client.get("/v1/policies", headers=headers)).status_code == 401
            assert not guard.batches
            assert (await s.client.get("/readyz")).status_code == 200
            for headers in ({"x-api-key": "key 1"}, {"authorization": "bearer key 1"}):
                assert (await s.check(headers=headers)).status_code == 200
            two = {"checks": [{"prompt": "a"}] * 2}  # more than is left is paid off later
            assert (await s.client.post("/v1/checks", json=two, headers={"x-api-key": "key 1"})).status_code == 200
            answer = await s.check(headers={"x-api-key": "key 1"})
            assert (answer.status_code, 1900 < int(answer.headers["retry-after"]) <= 2000) == (429, True)
            key_file(keys, sha256=hashlib.sha256(b"key 3").hexdigest())
            await s.service.reload()
            assert (await s.check(headers={"x-api-key": "key 1"})).status_code == 401
            assert (await s.check(headers={"x-api-key": "key 3"})).status_code == 200
            keys.write_text("keys: 3", encoding="utf-8")
            await s.service.reload()
            assert (await s.check(headers={"x-api-key": "key 3"})).status_code == 200

    run(test())
    rows = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == ["one"] * 6


@pytest.mark.parametrize("whose", ["key", "service"])
def test_reasoning_has_a_budget(served, guard, tmp_path, whose):
    """An answer takes 2 tokens; what is 2 or less below 1 is not refilled within the test."""
    guard.mode = Mode.REASONING
    keys = key_file(tmp_path / "keys.yaml", **({"reasoning_tokens_per_minute": 5} if whose == "key" else {}))
    status, total = (429, None) if whose == "key" else (503, Budget.per_minute(5))

    async def test():
        async with served(keys=keys, reasoning=total) as s:
            headers = {"x-api-key": "key 1"}
            assert (await s.check("a", headers=headers)).status_code == 200
            guard.gate = asyncio.Event()
            assert (await s.check("a", timeout_ms=20, headers=headers)).status_code == 504  # paid for, since computed
            guard.gate.set()
            assert (await s.check("a", headers=headers)).status_code == 200
            answer = await s.check("a", headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, "reasoning_budget")
            assert 20 <= int(answer.headers["retry-after"]) <= 24
            assert (await s.check("a", mode="direct", headers=headers)).status_code == 200

    run(test())


def test_a_budget():
    budget = Budget(2.0, 10.0)
    budget.spend(9.5)
    assert budget.wait() == pytest.approx(0.25, abs=0.05)
    budget.spend(-20)
    assert (budget.wait(), budget.left) == (0, 10)


@pytest.mark.parametrize("text", ["keys: []", "keys: [{name: a, sha256: ABC}]", "nothing: 1"])
def test_a_malformed_key_file_is_an_error(tmp_path, text):
    (tmp_path / "keys.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(JaxguardError, match="keys"):
        Keys(tmp_path / "keys.yaml")


def write_policy(folder, name, rules):
    (folder / f"{name}.yaml").write_text(f"name: {name}\nrules: {rules}\n", encoding="utf-8")


def test_only_registered_policies_and_modes_of_the_service(served, tmp_path):
    write_policy(tmp_path, "other", "x")

    async def test():
        async with served(policies=tmp_path) as s:
            assert (await s.check(policy="other")).json()["policy"]["name"] == "other"
            for policy in ("aegis2", "No bread.", "../other", str(tmp_path / "other.yaml"), ""):
                assert (await s.check(policy=policy)).json()["error"]["code"] == "unknown_policy", policy
            assert (await s.check(mode="reasoning")).json()["error"]["code"] == "unknown_mode"
            listed = (await s.client.get("/v1/policies")).json()
            assert (listed["default"], [each["name"] for each in listed["policies"]]) == ("short", ["short", "other"])
            assert (await s.client.get("/v1/models")).json()["data"][0]["modes"] == ["direct"]

    run(test())


def test_a_policy_is_swapped_under_load(served, guard, tmp_path):
    write_policy(tmp_path, "law", "version 0")

    async def test():
        async with served(policies=tmp_path) as s:
            guard.seconds, stop, digests = 0.001, False, []

            async def load():
                while not stop:
                    answer = await s.check(policy="law", reasoning=True)
                    assert answer.status_code == 200
                    digests.append(answer.json()["policy"]["digest"])

            tasks = [asyncio.create_task(load()) for _ in range(4)]
            versions = [s.service.policies.current["law"]]
            for number in (1, 2):
                await asyncio.sleep(0.05)
                write_policy(tmp_path, "law", f"version {number}")
                await s.service.reload()
                versions.append(s.service.policies.current["law"])
            await asyncio.sleep(0.05)
            stop = True
            await asyncio.gather(*tasks)
            expected = [policy.digest for policy in versions]
            assert len({*expected}) == 3
            # No answer of an old version after one of a newer one, but for what was under way.
            assert list(dict.fromkeys(digests)) == expected
            # No batch mixes them: each is of one policy, and the texts' answers were made by it.
            assert {policy.rules for _, _, policy in guard.batches} >= {f"version {n}" for n in range(3)}

    run(test())


def test_a_policy_that_does_not_work_leaves_the_old_one(served, guard, tmp_path):
    write_policy(tmp_path, "law", "version 0")
    judge, tried = guard.acheck_many, []

    async def cannot(examples, mode, policy, growing=()):
        tried.append(policy)
        if "too long" in policy.rules:
            raise JaxguardError("no room")
        return await judge(examples, mode, policy)

    async def test():
        async with served(policies=tmp_path) as s:
            guard.acheck_many, old = cannot, s.service.policies.current["law"]
            for text in ("name: law\nrules: too long\n", "name: [", ""):
                (tmp_path / "law.yaml").write_text(text, encoding="utf-8")
                write_policy(tmp_path, "new", "too long")
                await s.service.reload()
                assert s.service.policies.current["law"] is old
                assert "new" not in s.service.policies.current
                count = len(tried)
                await s.service.reload()  # nothing changed, so nothing is tried
                assert len(tried) == count > 0
            (tmp_path / "law.yaml").unlink()
            (tmp_path / "new.yaml").unlink()
            await s.service.reload()
            assert list(s.service.policies.current) == ["short"]

    run(test())


def test_where_policies_come_from(guard, tmp_path):
    write_policy(tmp_path, "other", "x")
    registered = Policies(guard.policy, "novel/book_spoilers", tmp_path)
    assert (registered.default, list(registered.current)) == ("novel/book_spoilers", ["other", "novel/book_spoilers"])
    assert Policies(guard.policy, str(tmp_path / "other.yaml")).default == "other"
    with pytest.raises(JaxguardError, match="nosuch"):
        Policies(guard.policy, "nosuch")
    with pytest.raises(JaxguardError, match="gone"):
        Policies(guard.policy, None, tmp_path / "gone")
    (tmp_path / "bad.yaml").write_text("name: bad\n", encoding="utf-8")
    with pytest.raises(JaxguardError, match=r"bad\.yaml"):
        Policies(guard.policy, None, tmp_path)


def test_readiness_is_a_verdict_in_time(served, guard, monkeypatch):
    monkeypatch.setattr(serving, "CANARY_SECONDS", 0.05)

    async def test():
        async with served(timeout=0.02) as s:

            async def becomes(status):
                await s.until(lambda: bool(s.service.state) is (status == 503), s.service.wake.set)
                assert (await s.client.get("/readyz")).status_code == status

            result, never = guard.result, asyncio.Event()
            for fault in (
                {"gate": never},
                {"fails": lambda prompt: RuntimeError(prompt)},
                {"result": lambda example, policy: with_other_probability(result(example, policy))},
            ):
                vars(guard).update(fault)
                await becomes(503)
                vars(guard).update(gate=None, fails=lambda prompt: None, result=result)
                await becomes(200)
            assert (await s.client.get("/healthz")).status_code == 200

    run(test())


def with_other_probability(result):
    """The same result with another probability."""
    result.probabilities["prompt_harm"] += 0.2
    return result


def test_a_guard_without_probabilities_is_said_at_the_start(served, guard, caplog):
    result = guard.result

    async def test():
        async with served():
            assert "no probabilities" not in caplog.text
        guard.result = lambda example, policy: replace(result(example, policy), probabilities={"prompt_harm": None})
        async with served():
            assert "the words of its answers decide" in caplog.text

    run(test())


def test_the_watch_goes_on_whatever_happens(served, guard):
    """A folder of policies may vanish while it is read."""

    async def test():
        async with served() as s:
            read = s.service.policies.read

            def vanished():
                s.service.policies.read = read
                raise FileNotFoundError("policies")

            s.service.policies.read = vanished
            await s.until(lambda: s.service.policies.read is read, s.service.wake.set)
            guard.fails = RuntimeError
            await s.until(lambda: s.service.state == "the canary failed", s.service.wake.set)

    run(test())


def test_what_was_sent_before_the_end_is_answered(served, guard):
    async def test():
        async with served() as s:
            guard.gate = asyncio.Event()
            tasks = [asyncio.create_task(s.check(prompt)) for prompt in "abc"]
            await asyncio.sleep(0.05)
            s.service.drain()
            assert (await s.client.get("/readyz")).json() == {"status": "draining"}
            assert (await s.client.get("/healthz")).status_code == 200
            guard.gate.set()
            assert [each.status_code for each in await asyncio.gather(*tasks)] == [200] * 3

    run(test())


def test_a_policy_that_the_guard_cannot_judge_by_ends_the_start(served, guard):
    guard.fails = lambda prompt: JaxguardError("no room for text")

    async def test():
        async with served():
            pass

    with pytest.raises(JaxguardError, match="no room"):
        run(test())
