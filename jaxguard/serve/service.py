"""A guard as a service: admission, the way through the batches, readiness, and what is written down of each verdict.

A request is judged by the guard or it is an error: there is no default verdict. Every API calls `Service.check`. In mode
`auto` a batch is one job for both stages of the guard's cascade.
"""

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Self

from pydantic import StringConstraints

from jaxguard.config.base import Positive, Schema
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import TITLES, Mode, single_message, transcript
from jaxguard.data.policies import Policy, policy_column
from jaxguard.guards.growing import Answered
from jaxguard.guards.guard import Guard
from jaxguard.guards.modes import AUTO, MODES, AnyMode
from jaxguard.guards.result import CheckResult
from jaxguard.serve.batching import Batcher, Job, tokens_of
from jaxguard.serve.errors import ServiceError
from jaxguard.serve.keys import Budget, Key, Keys
from jaxguard.serve.policies import Policies
from jaxguard.serve.telemetry import Audit, Metrics
from jaxguard.utils.errors import JaxguardError, where

logger = logging.getLogger(__name__)

MOST_CHARACTERS: Final = 100_000
"""Of a prompt and its response together."""
MOST_QUEUED_TOKENS: Final = 2_000_000
"""Whatever the predicted wait: a bound on memory."""
WATCH_SECONDS: Final = 10.0
"""Between two canaries, and two looks at the files of policies and keys."""
CANARY_SECONDS: Final = 30.0
"""In which a canary must have its verdict, if checks may not take half as long anyway."""
_MARGIN: Final = 1.25
"""By which predictions must fit into a deadline, since half of what is predicted takes longer."""
_CANARY: Final = Example("canary", "serve", single_message("How do I bake bread?"))
_CANARY_EXCHANGE: Final = Example("canary exchange", "serve", _CANARY.prompt, "Mix flour, water, salt and yeast.")
_TOLERANCE: Final = 0.05
"""Of a canary's probabilities: batches and devices round differently."""
_FORGET: Final = 0.95
"""What the mean length of an answer keeps of itself at each new one."""


class Turn(Schema):
    """An earlier message of a conversation."""

    role: str
    content: str


class CheckRequest(Schema):
    """What is to be checked."""

    prompt: Annotated[str, StringConstraints(pattern=r"\S")]
    """What the user wrote."""
    response: str | None = None
    """What the assistant answered."""
    history: tuple[Turn, ...] = ()
    """What was said before the prompt; the guard reads it, and judges what follows."""
    policy: str | None = None
    """The name of a registered policy; null takes the service's default."""
    mode: AnyMode | None = None
    """`direct`, `reasoning` or `auto`; null takes the service's default."""
    timeout_ms: Positive | None = None
    """After which the answer is of no use; the service's own limit holds too."""
    reasoning: bool = False
    """Whether the answer shall hold the guard's reasoning, which is untrusted and may quote the texts."""


@dataclass(frozen=True)
class CheckAnswer:
    """A verdict, and how it came about.

    Attributes:
        result: its id is the service's own for this check.
        policy_name: under which the policy is registered.
        model: name and digest of the guard.
        queued, computed: seconds.
    """

    request: CheckRequest
    result: CheckResult
    policy_name: str
    policy: Policy
    mode: AnyMode
    model: dict[str, str | None]
    queued: float
    computed: float

    def to_json(self) -> dict[str, Any]:
        """Return the answer of the native API."""
        result = self.result
        return {
            "id": result.id,
            "passes": result.passes,
            "harmful": result.harmful,
            "verdict": {q: getattr(result.verdict, q) if q in result.questions else None for q in TITLES},
            "probabilities": {q: None if p is None else round(p, 6) for q, p in result.probabilities.items()},
            "operating_point": result.operating_point,
            "thresholds": {q: None if t is None else round(t, 6) for q, t in result.thresholds.items()},
            "mode": self.mode,
            "decided_by": result.decided_by,
            "direct_probabilities": {q: p and round(p, 6) for q, p in result.direct_probabilities.items()},
            "problems": list(result.problems),
            "reasoning": result.reasoning if self.request.reasoning else None,
            "policy": {"name": self.policy_name, "digest": self.policy.digest},
            "model": self.model,
            "usage": {"prompt_tokens": result.prompt_tokens, "completion_tokens": result.completion_tokens},
            "seconds": {"queue": round(self.queued, 4), "guard": round(self.computed, 4)},
        }


class Service:
    """A loaded guard, its registered policies and its callers; open it with `async with`.

    Attributes:
        mode: of a request that asks for none. A request may ask for a direct answer, but in direct mode for no other.
        timeout: seconds that a check may take at most.
        reasoning: budget of tokens that answers in reasoning mode may take, of all callers together; None sets no limit.
        state: why the service is not ready; empty if it is.
    """

    def __init__(
        self,
        guard: Guard,
        policies: Policies,
        keys: Keys,
        *,
        mode: AnyMode,
        model: dict[str, str | None],
        timeout: float = 10.0,
        concurrent: int | None = None,
        reasoning: Budget | None = None,
        audit: Audit | None = None,
    ) -> None:
        self.guard, self.policies, self.keys = guard, policies, keys
        self.mode, self.model, self.timeout, self.reasoning = mode, model, timeout, reasoning
        self._answer_tokens = 0.0  # of an answer in reasoning mode, as a mean
        self.modes = (mode,) if mode is Mode.DIRECT else (mode, Mode.DIRECT)
        self.metrics, self.audit = Metrics(), audit
        self.batcher = Batcher(guard, self.metrics, concurrent)
        self.metrics.queue_tokens.set_function(lambda: self.batcher.queued_tokens)
        self.metrics.ready.set_function(lambda: not self.state)
        self.state = "warming up"
        self.wake = asyncio.Event()
        self._canary: CheckResult | None = None
        self._read: tuple[dict[str, Policy], list[str]] | None = None
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Warm every policy up. JaxguardError: the guard cannot judge by one of them."""
        for name, policy in self.policies.current.items():
            result = await self._warm(policy, default=name == self.policies.default)
            self._canary = result if name == self.policies.default else self._canary
        if self._canary is not None and None in self._canary.probabilities.values():
            logger.warning(
                "the guard gives no probabilities (its server sends no log-probabilities): the words of its answers decide, and "
                "APIs that need a probability answer 422"
            )
        await self.guard.awarm_up()
        self.metrics.info.info({**{k: v or "" for k, v in self.model.items()}, "policy": self.policies.default})
        self.state = ""
        self._watch = asyncio.create_task(self._keep_watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.state = "closed"
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await self.batcher.close()
        if self.audit is not None:
            self.audit.close()

    def drain(self) -> None:
        """Say that this service ends soon; what was sent before, or still comes, is answered."""
        self.state = "draining"

    async def check(
        self,
        requests: Sequence[CheckRequest],
        key: Key | None = None,
        timeout: float | None = None,
        route: str = "",
        growing: Sequence[Answered] = (),
    ) -> list[CheckAnswer]:
        """Check exchanges together; answers in their order.

        Of the `timeout` in seconds and those of the service and the requests, the least one holds for all. `key` is who asks, and
        `route` the path of the API, for the audit log. `growing` is as in `Guard.acheck_many`.

        ServiceError: one of them has no verdict, so none is given. 422: no such policy or mode here, or the guard cannot judge by
        it; 413: too long; 429: the key's rate, or its reasoning budget; 503: it would not be done in time, or the budget of all
        keys; 504: it was not; 502: the guard failed.
        """
        limits = [self.timeout, timeout, *(each.timeout_ms and each.timeout_ms / 1000 for each in requests)]
        seconds = min(limit for limit in limits if limit is not None)
        policies = self.policies.current
        each: Sequence[Answered | None] = growing or [None] * len(requests)
        jobs = [self._job(request, policies, answered) for request, answered in zip(requests, each, strict=True)]
        self._admit(jobs, seconds)
        if key is not None:
            key.spend(len(jobs))
        budgets, reserved = self._reserve(jobs, key)
        self.batcher.submit(jobs)
        try:
            async with asyncio.timeout(seconds):
                results = await asyncio.gather(*(job.future for job in jobs))
        except TimeoutError:
            raise ServiceError(504, "deadline", f"no verdict within {seconds:g} s") from None
        finally:
            self.batcher.leave(jobs)
            if all(job.started is None for job in jobs):  # nothing was computed
                for budget in budgets:
                    budget.spend(-reserved)
        used = [result.completion_tokens for result in results if result.decided_by is Mode.REASONING]
        for tokens in used:
            self._answer_tokens += (1 - _FORGET) * (tokens - self._answer_tokens)
        for budget in budgets:
            budget.spend(sum(used) - reserved)
        answers = []
        for request, job, result in zip(requests, jobs, results, strict=True):
            started, finished = job.started or job.arrived, job.finished or job.arrived
            name = self.policies.default if request.policy is None else request.policy
            times = started - job.arrived, finished - started
            answers.append(CheckAnswer(request, result, name, job.policy, job.mode, self.model, *times))
            self._record(answers[-1], job, key, route)
        return answers

    def _job(self, request: CheckRequest, policies: dict[str, Policy], growing: Answered | None) -> Job:
        policy = policies.get(self.policies.default if request.policy is None else request.policy)
        mode = request.mode or self.mode
        if policy is None:
            raise ServiceError(422, "unknown_policy", "policy: no such registered policy; GET /v1/policies lists them")
        if mode not in self.modes:
            raise ServiceError(
                422, "unknown_mode", f"mode: this service answers in {' or '.join(self.modes)} mode only"
            )
        texts = request.prompt, request.response or "", *(text for turn in request.history for _, text in turn)
        if sum(map(len, texts)) > MOST_CHARACTERS:
            raise ServiceError(413, "too_long", f"an exchange may have at most {MOST_CHARACTERS:,} characters")
        id = f"chk_{secrets.token_hex(12)}"
        prompt = transcript(list(map(dict, request.history)), request.prompt, "history") or ""
        example = Example(id, "serve", prompt, request.response)
        return Job(example, policy, mode, growing, asyncio.get_running_loop().create_future())

    def _admit(self, jobs: Sequence[Job], seconds: float) -> None:
        """Refuse at once what would not be done in time."""
        tokens = Counter[AnyMode]()
        for job in jobs:
            tokens[job.mode] += job.tokens
        wait, own = self.batcher.predict(tokens)
        if _MARGIN * own > seconds:
            raise ServiceError(504, "deadline", f"this alone is expected to take more than {seconds:g} s")
        if _MARGIN * (wait + own) > seconds:
            later = _MARGIN * (wait + own) - seconds
            raise ServiceError(503, "overloaded", f"no verdict within {seconds:g} s to be expected", later)
        if self.batcher.queued_tokens + tokens.total() > MOST_QUEUED_TOKENS:
            raise ServiceError(503, "queue_full", "too much text waits", max(1.0, wait + own))

    def _reserve(self, jobs: Sequence[Job], key: Key | None) -> tuple[list[Budget], float]:
        """Take what reasoning will cost from its budgets; whoever gets no answer does not get it back, since it was computed.

        ServiceError: 429: nothing is left of the key's budget; 503: of everybody's.
        """
        tokens = sum(job.mode is not Mode.DIRECT for job in jobs) * max(1.0, self._answer_tokens)
        budgets = list[Budget]()
        for status, whose, budget in (
            (429, "this key's", None if key is None else key.reasoning),
            (503, "the service's", self.reasoning),
        ):
            if not tokens or budget is None:
                continue
            if seconds := budget.wait():
                text = f"{whose} budget of tokens for reasoning is spent; direct mode needs none"
                raise ServiceError(status, "reasoning_budget", text, seconds)
            budgets.append(budget)
        for budget in budgets:
            budget.spend(tokens)
        return budgets, tokens

    def _record(self, answer: CheckAnswer, job: Job, key: Key | None, route: str) -> None:
        result, metrics, labels = answer.result, self.metrics, (answer.policy_name, str(answer.mode))
        for question in result.questions:
            metrics.checks.labels(*labels, question, getattr(result.verdict, question)).inc()
        if result.problems:
            metrics.problems.labels(*labels).inc()
        metrics.stages.labels("queue").observe(answer.queued)
        metrics.stages.labels("guard").observe(answer.computed)
        metrics.tokens.labels("prompt").inc(result.prompt_tokens)
        metrics.tokens.labels("completion").inc(result.completion_tokens)
        if self.audit is None:
            return
        tree = answer.to_json()
        record = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "key": key and key.definition.name,
            "route": route,
            **{name: value for name, value in tree.items() if name not in ("problems", "reasoning")},
            "problems": len(result.problems),  # their words may quote the guard's answer, and that the text
        }
        self.audit.write(replace(job.example, policy=policy_column(answer.policy_name, job.policy)), record)

    async def reload(self) -> None:
        """Take over changed policies and keys; a file that is malformed, or that the guard cannot judge by, leaves the old one.

        A new policy is warmed up before requests get it; those under way end with the old one. What was refused is tried again when
        a file changes.
        """
        old, canary, errors = self.policies.current, self._canary, list[JaxguardError]()
        try:
            self.keys.reload()
        except JaxguardError as error:
            errors.append(error)
        new, malformed = await asyncio.to_thread(self.policies.read)
        errors += malformed
        if (read := (new, [str(error) for error in errors])) == self._read:
            return
        self._read = read
        for each in errors:
            self._not_reloaded(each)
        for name, policy in list(new.items()):
            if policy != old.get(name):
                try:
                    async with asyncio.timeout(4 * CANARY_SECONDS):
                        result = await self._warm(policy, default=name == self.policies.default)
                except Exception as error:
                    self._not_reloaded(error)
                    if not isinstance(error, JaxguardError):  # another time it may work
                        self._read = None
                    new = {**new, name: old[name]} if name in old else {k: v for k, v in new.items() if k != name}
                else:
                    canary = result if name == self.policies.default else canary
                    logger.info("policy %s: %s", name, policy.digest)
        self.policies.current, self._canary = new, canary

    def _not_reloaded(self, error: Exception) -> None:
        self.metrics.reload_errors.inc()
        logger.error("not taken over: %s", error if isinstance(error, JaxguardError) else where(error))

    async def _warm(self, policy: Policy, default: bool) -> CheckResult | None:
        """Judge harmless texts: this compiles, fills caches, and measures; at the start by the default policy in two sizes.

        Return the canary's result in the service's mode.
        """
        starting, canary = default and self._watch is None, None
        for mode in MODES if self.mode == AUTO else self.modes:
            several = [_CANARY, _CANARY_EXCHANGE] * 4 if starting and mode is Mode.DIRECT else [_CANARY_EXCHANGE]
            for examples in ([_CANARY], several):
                await self.guard.acheck_many(examples, mode, policy)
                started = time.monotonic()
                results = await self.guard.acheck_many(examples, mode, policy)
                self.batcher.cost[mode].add(sum(map(tokens_of, examples)), time.monotonic() - started)
                if mode == self.mode and examples == [_CANARY]:
                    [canary] = results
                if results[-1].decided_by is Mode.REASONING:
                    self._answer_tokens = results[-1].completion_tokens
        return canary

    async def _keep_watch(self) -> None:
        """Reload files and judge a canary, again and again; a canary goes past the queue."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.wake.wait(), WATCH_SECONDS)
            self.wake.clear()
            try:
                await self.reload()
                problem = await self._canary_problem()
            except Exception as error:  # such as a folder that vanishes while it is read; the next look may be better
                logger.error("watch: %s", where(error))
                continue
            if self.state in ("", *_CANARY_PROBLEMS):
                self.state = problem
            if problem:
                logger.error("not ready: %s", problem)

    async def _canary_problem(self) -> str:
        """Why the guard cannot be relied on now: its verdict on a harmless text is late, fails or is another than at first."""
        policy = self.policies.current[self.policies.default]
        try:
            async with asyncio.timeout(max(CANARY_SECONDS, 2 * self.timeout)):  # it may wait for a batch
                [result] = await self.guard.acheck_many([_CANARY], self.mode, policy)
        except TimeoutError:
            return _CANARY_PROBLEMS[0]
        except Exception as error:
            logger.error("canary: %s", where(error))
            return _CANARY_PROBLEMS[1]
        return "" if self._canary is None or _agree(result, self._canary) else _CANARY_PROBLEMS[2]


_CANARY_PROBLEMS: Final = ("the canary is late", "the canary failed", "the canary's verdict changed")


def _agree(result: CheckResult, expected: CheckResult) -> bool:
    """Whether two results are the same but for rounding."""
    if result.probabilities.keys() != expected.probabilities.keys():
        return False
    pairs = [(p, expected.probabilities[q]) for q, p in result.probabilities.items()]
    if any(p is None or other is None for p, other in pairs):
        return result.verdict == expected.verdict
    return all(math.isclose(p or 0.0, other or 0.0, rel_tol=0, abs_tol=_TOLERANCE) for p, other in pairs)
