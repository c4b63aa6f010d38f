"""Batches without a fixed delay: what arrived while the last batch ran is the next one, as far as waiting together pays."""

import asyncio
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from jaxguard.data.encoding import SpecialTokenError
from jaxguard.data.examples import Example
from jaxguard.data.policies import Policy
from jaxguard.guards.growing import Answered
from jaxguard.guards.guard import Guard
from jaxguard.guards.modes import MODES, AnyMode
from jaxguard.guards.protocol import UnsupportedError
from jaxguard.guards.result import CheckResult
from jaxguard.serve.errors import ServiceError
from jaxguard.serve.telemetry import Metrics
from jaxguard.utils.client import REST_SECONDS, UnavailableError
from jaxguard.utils.errors import where

logger = logging.getLogger(__name__)

BATCH_TOKENS: Final = 8192
"""Most of a batch's texts, policies not counted; a single text may have more."""
BATCH_SECONDS: Final = 0.1
FIXED_SHARE: Final = 0.2
"""A batch is no longer than BATCH_SECONDS, or than makes what does not grow with its tokens this share of its time."""
TRIED_TOKENS: Final = 512
"""Of jobs that an idle guard tries whatever is predicted."""
TRY_SECONDS: Final = 10.0
"""Without a measurement, after which an idle guard tries any job: what is always refused is never measured again."""
_CHARACTERS_PER_TOKEN: Final = 4
_TOKENS_PER_EXCHANGE: Final = 32
"""What an exchange takes besides its texts."""
_FORGET: Final = 0.95
"""What a measurement counts less for each one after it."""


def tokens_of(example: Example) -> int:
    """Estimate the tokens of an exchange from its characters; the same for admission and measurement, so that errors cancel."""
    characters = len(example.prompt) + len(example.response or "")
    return _TOKENS_PER_EXCHANGE + characters // _CHARACTERS_PER_TOKEN


@dataclass(eq=False)
class Job:
    """One exchange on its way; `future` gets its result or a ServiceError. Its example's id is unique among all jobs.

    `growing`, of one with more of whose text a later job comes, is what was answered so far.
    """

    example: Example
    policy: Policy
    mode: AnyMode
    growing: Answered | None
    future: asyncio.Future[CheckResult]
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    finished: float | None = None

    @property
    def tokens(self) -> int:
        return tokens_of(self.example)

    @property
    def kind(self) -> tuple[Policy, AnyMode, bool]:
        """What those of a batch have in common."""
        return self.policy, self.mode, self.growing is not None


class Cost:
    """Seconds of a batch as a + b × tokens: least squares over the batches so far, older ones counting less."""

    def __init__(self) -> None:
        self._sums: tuple[float, ...] = (0.0,) * 5  # 1, x, y, x², xy

    def add(self, tokens: int, seconds: float) -> None:
        new = (1.0, tokens, seconds, tokens * tokens, tokens * seconds)
        self._sums = tuple(_FORGET * old + x for old, x in zip(self._sums, new, strict=True))

    def __call__(self, tokens: int, batches: int | None = None) -> float:
        """Seconds of so many tokens, in as many batches as they make if it is not said; 0 before the first measurement."""
        fixed, slope = self._line()
        return (math.ceil(tokens / self.batch) if batches is None else batches) * fixed + slope * tokens

    @property
    def batch(self) -> int:
        """Tokens up to which a batch is filled."""
        fixed, slope = self._line()
        seconds = max(BATCH_SECONDS, fixed / FIXED_SHARE)
        return BATCH_TOKENS if slope * BATCH_TOKENS <= seconds else max(1, int((seconds - fixed) / slope))

    def _line(self) -> tuple[float, float]:
        """Seconds of a batch, and of each token."""
        n, x, y, xx, xy = self._sums
        if not n:
            return 0.0, 0.0
        variance = xx / n - (x / n) ** 2
        slope = (xy / n - x * y / n**2) / variance if variance > 1e-3 * xx / n else math.inf
        if slope < 0:
            return y / n, 0.0
        fixed = (y - slope * x) / n
        # Where all batches were of one size, too, all of the time may be for the tokens.
        return (fixed, slope) if fixed >= 0 else (0.0, y / x)


@dataclass
class _Queue:
    """What waits for a batch of one policy and mode, the oldest first."""

    jobs: dict[str, Job] = field(default_factory=dict)
    tokens: int = 0


class _Running(NamedTuple):
    jobs: Sequence[Job]
    tokens: int
    started: float


class Batcher:
    """Runs jobs, the oldest first: in batches of one policy and mode, one after the other.

    Where a model server computes, each job goes by itself and `concurrent` at a time, since the server makes its own batches.
    """

    def __init__(self, guard: Guard, metrics: Metrics, concurrent: int | None = None) -> None:
        self.guard, self.metrics = guard, metrics
        self._alone, self._concurrent = concurrent is not None, concurrent or 1
        self._measured, self._closed = -math.inf, False
        self.cost: dict[AnyMode, Cost] = {mode: Cost() for mode in MODES}
        self._waiting: dict[tuple[Policy, AnyMode, bool], _Queue] = {}
        self._running: dict[asyncio.Task[None], _Running] = {}

    @property
    def queued_tokens(self) -> int:
        return sum(queue.tokens for queue in self._waiting.values())

    def submit(self, jobs: Iterable[Job]) -> None:
        """Queue jobs together; `leave` must follow, whatever becomes of them."""
        for job in jobs:
            queue = self._waiting.setdefault(job.kind, _Queue())
            queue.jobs[job.example.id] = job
            queue.tokens += job.tokens
        self._dispatch()

    def leave(self, jobs: Iterable[Job]) -> None:
        """Take jobs that nobody waits for out of the queue, and end a batch that has no others."""
        for job in jobs:
            job.future.cancel()
            self._remove(job)
        for task, running in self._running.items():
            if all(job.future.done() for job in running.jobs):
                task.cancel()

    def predict(self, tokens: Mapping[AnyMode, int]) -> tuple[float, float]:
        """Predict for how long jobs with so many tokens, submitted now, would wait, and then take, from what was measured so far.

        Zeros for what a guard that can begin at once tries, so that the cost is measured again: short jobs, and after TRY_SECONDS
        without a measurement any. A batch that takes longer than predicted is taken to need as much again as it is late. Later
        jobs may fill the batch of these, which counts as waiting.
        """
        now, idle = time.monotonic(), len(self._running) < self._concurrent
        if idle and (sum(tokens.values()) <= TRIED_TOKENS or now - self._measured > TRY_SECONDS):
            return 0.0, 0.0
        costs = [(self.cost[mode], count) for mode, count in tokens.items()]
        own = sum(cost(count, 1 if self._alone else None) for cost, count in costs)
        if idle:
            return 0.0, own
        predicted = ((self.cost[r.jobs[0].mode](r.tokens), now - r.started) for r in self._running.values())
        running = sum(abs(seconds - elapsed) for seconds, elapsed in predicted)
        waiting = [(self.cost[mode], queue) for (_, mode, _), queue in self._waiting.items()]
        if self._alone:
            queued = sum(cost(queue.tokens, len(queue.jobs)) for cost, queue in waiting)
        else:
            queued = sum(cost(queue.tokens) for cost, queue in waiting)
            queued += sum(cost(max(count, cost.batch)) - cost(count) for cost, count in costs)
        return (running + queued) / self._concurrent, own

    async def close(self) -> None:
        """End what runs; what waits gets no result."""
        self._closed = True
        self._waiting.clear()
        for task in (tasks := list(self._running)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _remove(self, job: Job) -> None:
        queue = self._waiting.get(job.kind, _Queue())
        if queue.jobs.pop(job.example.id, None) is not None:
            queue.tokens -= job.tokens
            if not queue.jobs:
                del self._waiting[job.kind]

    def _dispatch(self) -> None:
        while self._waiting and len(self._running) < self._concurrent:
            queue = min(self._waiting.values(), key=lambda queue: next(iter(queue.jobs.values())).arrived)
            jobs, tokens = list[Job](), 0
            for job in list(queue.jobs.values()):
                if jobs and (self._alone or tokens + job.tokens > self.cost[job.mode].batch):
                    break
                jobs.append(job)
                tokens += job.tokens
                job.started = time.monotonic()
                self._remove(job)
            task = asyncio.create_task(self._run(jobs))
            self._running[task] = _Running(jobs, tokens, time.monotonic())
            self.metrics.batch_tokens.observe(tokens)
            task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._dispatch()

    async def _run(self, jobs: Sequence[Job]) -> None:
        """Give each job its own result. Where a batch fails, its halves are tried: one text must not fail its neighbours."""
        jobs = [job for job in jobs if not job.future.done()]
        if not jobs:
            return
        started = time.monotonic()
        try:
            examples, alike = [job.example for job in jobs], jobs[0]
            growing = [job.growing for job in jobs if job.growing is not None]
            results = await self.guard.acheck_many(examples, alike.mode, alike.policy, growing)
            # By the id that a result carries, whatever its place.
            owners = {job.example.id: job for job in jobs}
            answers = [(owners.pop(result.id), result) for result in results]
            if owners:
                raise RuntimeError("the guard left out some results")
        except asyncio.CancelledError:  # nobody waits for it, but until it ends nothing else is computed
            if not self._closed:
                await self.guard.asettle()
            raise
        except Exception as error:  # whatever it is, there is no verdict
            if len(jobs) > 1:
                await self._run(jobs[: len(jobs) // 2])
                await self._run(jobs[len(jobs) // 2 :])
                return
            logger.error("no verdict: %s", where(error))
            failure = ServiceError(502, "guard_failed", "the guard gave no verdict")
            if isinstance(error, UnavailableError):
                failure = ServiceError(503, "no_server", "no model server answers now", REST_SECONDS)
            elif isinstance(error, UnsupportedError):
                failure = ServiceError(422, "unsupported", "the guard cannot judge this exchange by this policy")
            elif isinstance(error, SpecialTokenError):
                text = "the texts hold special tokens of the guard that cannot be escaped"
                failure = ServiceError(422, "unsupported", text)
            if not jobs[0].future.done():
                jobs[0].future.set_exception(failure)
            return
        self._measured = finished = time.monotonic()
        self.cost[jobs[0].mode].add(sum(job.tokens for job in jobs), finished - started)
        for job, result in answers:
            job.finished = finished
            if not job.future.done():
                job.future.set_result(result)
