"""Traces for many examples: request, filter, store, and request again what failed.

An example is done when a round brought an accepted trace, or when its rounds are used up. Attempts that are in the store are not
made again, so a run that was killed resumes where it was, in the middle of a round too.
"""

import asyncio
import datetime
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxguard.config.distill import DistillConfig
from jaxguard.data.format.answer import answer_grammar, split_verdict
from jaxguard.data.format.dialogue import Dialogue
from jaxguard.data.policies import Policy
from jaxguard.distill.filters import Candidate, Filters
from jaxguard.distill.prompts import Task, TeacherPrompt, load_prompt
from jaxguard.distill.store import Attempt, open_traces
from jaxguard.distill.teacher import Reply, Teacher, open_teacher
from jaxguard.utils.progress import Progress

_FIT = re.compile(r"^[\s*_#>-]*fit[\s*_]*:[\s*_]*(yes|no)\b", re.IGNORECASE | re.MULTILINE)
_REASON = re.compile(r"^[\s*_#>-]*reason[\s*_]*:(?P<reason>[^\n]*)", re.IGNORECASE | re.MULTILINE)
_JUDGE_GRAMMAR = r"Reason: [^\n]+\nFit: (yes|no)"


@dataclass(frozen=True)
class Job:
    """What the teacher works on: the config's distill section, the student's format, the run's policy, a task an example."""

    settings: DistillConfig
    dialogue: Dialogue
    policy: Policy
    tasks: list[Task]


async def generate(
    job: Job,
    prompt: TeacherPrompt,
    tasks: Sequence[Task],
    folder: Path,
    settings: Mapping[str, Any],
    exhaustive: bool = False,
) -> None:
    """Work on the tasks until each is done, and show how far it is.

    Args:
        job: the teacher, and what is accepted.
        prompt: the template of the requests.
        tasks: one for each example.
        folder: the store, whose attempts have `settings` in common.
        settings: as of `provenance`.
        exhaustive: request every candidate of every round, whatever was accepted.

    Raises:
        JaxguardError: a server refuses, does not answer or serves another model, or the store was begun with other settings
            or cannot be written. What is stored is kept.
    """
    config, waiting = job.settings, iter(tasks)
    failed, done, attempts, tokens = Counter[str](), 0, 0, 0
    async with AsyncExitStack() as stack:
        teacher = await stack.enter_async_context(open_teacher(config.teacher))
        await teacher.check()
        judge = None
        if config.judge is not None:
            judge = Judge(await stack.enter_async_context(open_teacher(config.judge)), load_prompt(config.judge_prompt))
            await judge.model.check()
        requests = _Requests(job.dialogue, teacher, prompt, Filters(config.filter, job.dialogue), judge)
        store = stack.enter_context(open_traces(folder, settings))
        progress = stack.enter_context(Progress(folder.name, len(tasks)))

        def show() -> None:
            reasons = "  ".join(f"{name} {count}" for name, count in failed.most_common(3))
            progress.update(done, f"failed: {reasons or 'none'}", attempts=attempts, tokens=tokens)

        async def work() -> None:
            nonlocal done, attempts, tokens
            for task in waiting:  # shared: each task is taken once
                name = task.example.id
                for number in range(config.rounds):
                    if name in store.accepted and not exhaustive:
                        break
                    missing = [c for c in range(config.candidates) if (name, number, c) not in store.done]
                    for attempt in await requests.attempt(task, number, missing) if missing else ():
                        store.append(attempt)
                        failed.update(attempt.failures.keys())
                        attempts, tokens = attempts + 1, tokens + attempt.completion_tokens
                        show()
                done += 1
                show()

        workers = [asyncio.ensure_future(work()) for _ in range(config.teacher.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


@dataclass(frozen=True)
class Judge:
    """A second model that checks a trace before it is accepted, and the template of its requests."""

    model: Teacher
    prompt: TeacherPrompt

    async def objection(self, task: Task, dialogue: Dialogue) -> tuple[str | None, int]:
        """Return (why the trace is unfit, or None; completion tokens). Fails closed: a malformed answer is an objection."""
        extra = {"regex": _JUDGE_GRAMMAR} if self.model.config.grammar else {}
        (reply,) = await self.model.complete(self.prompt.messages(task, dialogue), extra=extra)
        verdicts = {match[1].lower() for match in _FIT.finditer(reply.answer)}
        reason = _REASON.search(reply.answer)
        if reply.finish_reason == "stop" and verdicts == {"yes"}:
            return None, reply.completion_tokens
        if verdicts == {"no"}:
            return (reason["reason"].strip() if reason else "") or "gives no reason", reply.completion_tokens
        return "its answer is malformed", reply.completion_tokens


@dataclass(frozen=True)
class _Requests:
    """What the requests of a run share."""

    dialogue: Dialogue
    teacher: Teacher
    prompt: TeacherPrompt
    filters: Filters
    judge: Judge | None

    async def attempt(self, task: Task, number: int, candidates: Sequence[int]) -> list[Attempt]:
        """Request some candidates of a round, and check them."""
        extra = {"regex": answer_grammar(task.questions)} if self.teacher.config.grammar else {}
        started = time.monotonic()
        replies = await self.teacher.complete(self.prompt.messages(task, self.dialogue), len(candidates), extra)
        seconds = round(time.monotonic() - started, 3)
        checked = (self._check(task, number, *pair, seconds) for pair in zip(candidates, replies, strict=True))
        return list(await asyncio.gather(*checked))

    async def _check(self, task: Task, number: int, candidate: int, reply: Reply, seconds: float) -> Attempt:
        trace, answer = split_reply(task, reply)
        failures = self.filters.failures(Candidate(trace, answer, reply.finish_reason, task.labels, task.budget))
        judge_tokens = 0
        if self.judge is not None and not failures:
            objection, judge_tokens = await self.judge.objection(task.with_trace(trace), self.dialogue)
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
            seconds=seconds,
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )


def split_reply(task: Task, reply: Reply) -> tuple[str, str]:
    """Return (trace, answer) of a reply.

    The reasoning is the trace. A teacher that does not separate its reasoning writes it before the verdict; so does one that
    shortens a trace, whose own reasoning is about the shortening.
    """
    if task.budget is None and reply.reasoning:
        return reply.reasoning, reply.answer
    return split_verdict(reply.answer)
