"""Traces for many examples: ask, filter, store, and ask again for what failed.

A round asks for a number of candidates and keeps every attempt, good or bad. An example is done when a round brought an
accepted trace, or when its rounds are used up. What is in the store is not asked for again, so a run that was killed goes on
where it was, in the middle of a round too.
"""

import asyncio
import datetime
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from jaxguard.data.format.answer import answer_grammar
from jaxguard.data.format.dialogue import Dialogue
from jaxguard.distill.filters import Candidate, Filters
from jaxguard.distill.judge import Judge
from jaxguard.distill.prompts import TeacherPrompt
from jaxguard.distill.store import Attempt, TraceStore
from jaxguard.distill.tasks import Task
from jaxguard.distill.teacher import Reply, Teacher


@dataclass
class Funnel:
    """What became of the attempts.

    Attributes:
        attempts: how many there are.
        accepted: examples that have a trace.
        failed: failed check -> attempts that failed it; one attempt may fail several.
        unfinished: examples whose rounds are used up without a trace.
        prompt_tokens, completion_tokens: of all attempts.
        judge_tokens: what the judge wrote about them.
    """

    attempts: int = 0
    accepted: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    unfinished: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    judge_tokens: int = 0

    def add(self, attempt: Attempt) -> None:
        """Count an attempt; examples are counted by whoever knows when they are done."""
        self.attempts += 1
        self.failed.update(attempt.failures.keys())
        self.prompt_tokens += attempt.prompt_tokens
        self.completion_tokens += attempt.completion_tokens
        self.judge_tokens += attempt.judge_tokens


@dataclass(frozen=True)
class Generation:
    """What all tasks of a run share.

    Attributes:
        teacher: who answers.
        prompt: what it is asked with.
        dialogue: the student's format.
        filters: what makes a trace unfit.
        store: where attempts go.
        rounds: how often an example is tried.
        candidates: answers a round.
        judge: who reads what passed the filters; None for nobody.
        exhaustive: an accepted trace makes no further candidate needless.
    """

    teacher: Teacher
    prompt: TeacherPrompt
    dialogue: Dialogue
    filters: Filters
    store: TraceStore
    rounds: int
    candidates: int
    judge: Judge | None = None
    exhaustive: bool = False

    async def run(self, tasks: Iterable[Task], told: Callable[[Funnel], None]) -> Funnel:
        """Work on the tasks until each is done. Holds as many of them at a time as requests may be under way.

        Args:
            tasks: read lazily.
            told: called after every attempt and every example.

        Returns:
            what this run did; what the store held before is not in it, but for the accepted examples.

        Raises:
            JaxguardError: the teacher refuses or is gone, or the store cannot be written. What is stored is kept.
        """
        funnel = Funnel()
        waiting = iter(tasks)

        async def work() -> None:
            for task in waiting:  # shared: each task is taken once
                if await self._finish(task, funnel, told):
                    funnel.accepted += 1
                else:
                    funnel.unfinished.append(task.example.id)
                told(funnel)

        workers = [asyncio.ensure_future(work()) for _ in range(self.teacher.config.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return funnel

    async def _finish(self, task: Task, funnel: Funnel, told: Callable[[Funnel], None]) -> bool:
        """Try until there is a trace; False if the rounds do not suffice."""
        name = task.example.id
        for number in range(self.rounds):
            if name in self.store.accepted and not self.exhaustive:
                break
            missing = [c for c in range(self.candidates) if (name, number, c) not in self.store.done]
            for attempt in await self._attempt(task, number, missing) if missing else ():
                self.store.append(attempt)
                funnel.add(attempt)
                told(funnel)
        return name in self.store.accepted

    async def _attempt(self, task: Task, number: int, candidates: Sequence[int]) -> list[Attempt]:
        messages = self.prompt.messages(
            task.example, task.policy, task.labels, self.dialogue, task.example.trace or "", task.budget
        )
        asks = [question for question, _ in task.labels]
        extra = {"regex": answer_grammar(asks)} if self.teacher.config.grammar else {}
        started = time.monotonic()
        replies = await self.teacher.complete(messages, len(candidates), extra)
        seconds = time.monotonic() - started
        judged = (self._judged(task, number, *pair, seconds) for pair in zip(candidates, replies, strict=True))
        return list(await asyncio.gather(*judged))

    async def _judged(self, task: Task, number: int, candidate: int, reply: Reply, seconds: float) -> Attempt:
        trace, answer = task.read(reply)
        failures = self.filters.failures(Candidate(trace, answer, reply.finish_reason, task.labels, task.budget))
        judge_tokens = 0
        if self.judge is not None and not failures:
            objection, judge_tokens = await self.judge.objection(task, trace)
            failures = {} if objection is None else {"judge": objection}
        return Attempt(
            example_id=task.example.id,
            round=number,
            candidate=candidate,
            trace=trace,
            answer=answer,
            finish_reason=reply.finish_reason,
            failures=failures,
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
            judge_tokens=judge_tokens,
            seconds=round(seconds, 3),
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
