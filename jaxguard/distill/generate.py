"""Traces for many examples: request, filter, store, and request again what failed.

A round requests a number of candidates and stores every attempt, accepted or not. An example is done when a round brought an
accepted trace, or when its rounds are used up. Attempts that are in the store are not made again, so a run that was killed goes
on where it was, in the middle of a round too.
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
    """What became of the attempts of this process.

    Attributes:
        attempts: how many there are.
        accepted: examples that have a trace, those of earlier processes included.
        failed: failed check -> attempts that failed it; one attempt may fail several.
        unfinished: examples whose rounds are used up without a trace.
        prompt_tokens, completion_tokens: of all attempts.
        judge_tokens: completion tokens of the judge.
    """

    attempts: int = 0
    accepted: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    unfinished: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    judge_tokens: int = 0

    def add(self, attempt: Attempt) -> None:
        """Count an attempt, but not its example."""
        self.attempts += 1
        self.failed.update(attempt.failures.keys())
        self.prompt_tokens += attempt.prompt_tokens
        self.completion_tokens += attempt.completion_tokens
        self.judge_tokens += attempt.judge_tokens


@dataclass(frozen=True)
class Generation:
    """What all tasks of a run share.

    Attributes:
        teacher: an open teacher.
        prompt: the template of the requests.
        dialogue: the student's format.
        filters: what makes a trace unfit.
        store: where attempts go.
        rounds: how often an example is tried.
        candidates: completions in a round.
        judge: reads what passed the filters; None for no judge.
        exhaustive: request every candidate of every round, whatever was accepted.
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

    async def run(self, tasks: Iterable[Task], show: Callable[[Funnel], None]) -> Funnel:
        """Work on the tasks until each is done. Holds as many of them at a time as requests may be under way.

        Args:
            tasks: read lazily.
            show: called after every attempt and every example.

        Raises:
            JaxguardError: the teacher refuses or is gone, or the store cannot be written. What is stored is kept.
        """
        funnel = Funnel()
        waiting = iter(tasks)

        async def work() -> None:
            for task in waiting:  # shared: each task is taken once
                if await self._finish(task, funnel, show):
                    funnel.accepted += 1
                else:
                    funnel.unfinished.append(task.example.id)
                show(funnel)

        workers = [asyncio.ensure_future(work()) for _ in range(self.teacher.config.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return funnel

    async def _finish(self, task: Task, funnel: Funnel, show: Callable[[Funnel], None]) -> bool:
        """Try until there is a trace; False if the rounds do not suffice."""
        name = task.example.id
        for number in range(self.rounds):
            if name in self.store.accepted and not self.exhaustive:
                break
            missing = [c for c in range(self.candidates) if (name, number, c) not in self.store.done]
            for attempt in await self._attempt(task, number, missing) if missing else ():
                self.store.append(attempt)
                funnel.add(attempt)
                show(funnel)
        return name in self.store.accepted

    async def _attempt(self, task: Task, number: int, candidates: Sequence[int]) -> list[Attempt]:
        messages = self.prompt.messages(
            task.example, task.policy, task.labels, self.dialogue, task.example.trace or "", task.budget
        )
        extra = {"regex": answer_grammar(task.questions)} if self.teacher.config.grammar else {}
        started = time.monotonic()
        replies = await self.teacher.complete(messages, len(candidates), extra)
        seconds = time.monotonic() - started
        checked = (self._checked(task, number, *pair, seconds) for pair in zip(candidates, replies, strict=True))
        return list(await asyncio.gather(*checked))

    async def _checked(self, task: Task, number: int, candidate: int, reply: Reply, seconds: float) -> Attempt:
        trace, answer = task.split(reply)
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
