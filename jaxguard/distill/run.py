"""A distillation from start to end: examples in, traces requested, filtered and stored, training files out.

An example is done when a round brought an accepted trace, or when its rounds are used up. Attempts that are in the store are not
made again, so a run that was killed resumes where it was, in the middle of a round too.
"""

import asyncio
import datetime
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from jaxguard.config import Config
from jaxguard.config.data import DistillConfig, TeacherConfig
from jaxguard.data.encoding import TOKENIZER_FILES, Encoder
from jaxguard.data.format.answer import answer_grammar, split_verdict
from jaxguard.data.format.dialogue import Dialogue
from jaxguard.data.policies import Policy, load_policy
from jaxguard.data.prepare import load_sources, subset
from jaxguard.distill.filters import Candidate, Filters
from jaxguard.distill.prompts import Task, TeacherPrompt, load_prompt, tasks_for
from jaxguard.distill.store import Attempt, open_traces, summarize
from jaxguard.distill.teacher import Reply, Teacher, open_teacher
from jaxguard.utils import hub
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically
from jaxguard.utils.progress import Progress

_FIT = re.compile(r"[\s*_#-]*fit[\s*_]*:[\s*_]*(yes|no)[\s*_.]*", re.IGNORECASE | re.ASCII)
_REASON = re.compile(r"[\s*_#-]*reason[\s*_]*:(.*)", re.IGNORECASE | re.ASCII)
_JUDGE_GRAMMAR = r"Reason: [^\n]+\nFit: (yes|no)"


@dataclass(frozen=True)
class Job:
    """What the teacher works on: the config's distill section, the student's format, the run's policy, a task an example."""

    settings: DistillConfig
    dialogue: Dialogue
    policy: Policy
    tasks: list[Task]


class TraceSet(NamedTuple):
    """The training file, tasks whose examples have their traces, and the counts that traces.summary.json holds."""

    path: Path
    tasks: list[Task]
    summary: dict[str, Any]


class Distillation(NamedTuple):
    """The traces as the teacher wrote them, and sentence budget -> those that were shortened to it."""

    traces: TraceSet
    shortened: dict[int, TraceSet]


def distill(config: Config) -> Distillation:
    """Get a trace for each training example that has a label, and shorten it to each sentence budget.

    Examples that never got a trace are counted and named in the summary. It is an error if no example has a label, if a server
    does not answer or serves another model, or if a store was begun with other settings.
    """
    job = load_job(config)
    prompt, shorten = load_prompt(job.settings.prompt), load_prompt(job.settings.shorten_prompt)

    def run(name: str, prompt: TeacherPrompt, tasks: Sequence[Task], settings: dict[str, Any]) -> TraceSet:
        store, path = config.folder / name, config.folder / f"{name}.jsonl"
        asyncio.run(generate(job, prompt, tasks, store, settings))
        traces, summary = summarize(store, digests(tasks))
        traced = [task.with_trace(traces[task.example.id]) for task in tasks if task.example.id in traces]
        lines = (json.dumps(task.example.to_json(), ensure_ascii=False) + "\n" for task in traced)
        write_atomically(path, "".join(lines))
        write_atomically(path.with_suffix(".summary.json"), json.dumps(summary, indent=2) + "\n")
        return TraceSet(path, traced, summary)

    settings = provenance(job, prompt)
    result = Distillation(run("traces", prompt, job.tasks, settings), {})
    for budget in job.settings.budgets:
        tasks = [replace(task, budget=budget) for task in result.traces.tasks]
        short = {**provenance(job, shorten), "budget": budget, "shortens": settings}
        result.shortened[budget] = run(f"traces_{budget}", shorten, tasks, short)
    return result


def digests(tasks: Iterable[Task]) -> dict[str, str]:
    """Return example id -> digest of its task."""
    return {task.example.id: task.digest for task in tasks}


def load_job(config: Config) -> Job:
    """Load everything that requests to the teacher are made of; it is an error if no example has a label."""
    if config.distill is None:
        raise JaxguardError("the config has no distill section: it needs at least distill.teacher.model")
    policy = load_policy(config.data.policy)
    tokenizer = hub.fetch(config.model.checkpoint, config.model.revision, TOKENIZER_FILES)
    dialogue = Encoder.load(tokenizer, config.data).dialogue
    examples, _ = load_sources(config.data.train, "train")
    if config.data.subset is not None:
        examples = subset(examples, config.data.subset, config.data.subset_seed, config.data.subset_balance)
    tasks = list(tasks_for(examples, policy))
    if not tasks:
        raise JaxguardError(
            f"none of the {len(examples)} examples has a label for a question of policy {policy.name!r}"
        )
    return Job(config.distill, dialogue, policy, tasks)


def provenance(job: Job, prompt: TeacherPrompt) -> dict[str, Any]:
    """Return the settings that decide the text of an attempt and whether it is accepted; a store holds attempts of one kind."""

    def model(config: TeacherConfig) -> dict[str, Any]:
        sampling = config.model_dump(include={"temperature", "top_p", "max_tokens", "grammar"})
        return {"teacher": config.model, "version": config.version, "sampling": sampling}

    judge, settings = job.settings.judge, job.settings
    return {
        **model(settings.teacher),
        "prompt": prompt.digest,
        "policy": job.policy.digest,
        "filter": settings.filter.model_dump(mode="json"),
        "judge": judge and {**model(judge), "prompt": load_prompt(settings.judge_prompt).digest},
    }


async def generate(
    job: Job,
    prompt: TeacherPrompt,
    tasks: Sequence[Task],
    folder: Path,
    settings: Mapping[str, Any],
    exhaustive: bool = False,
) -> None:
    """Work on the tasks until each is done, and show how far it is.

    The attempts in the store `folder` have the `settings` in common, as from `provenance`. With `exhaustive`, every candidate of
    every round is requested, whatever was accepted. What is stored is kept when a server or the disk fails.
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
        store = stack.enter_context(open_traces(folder, settings, digests(tasks)))
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
        lines = [line.strip() for line in reply.answer.split("\n") if line.strip()]
        verdicts = [match[1].lower() for line in lines if (match := _FIT.fullmatch(line))]
        reasons = [match[1].strip(" *_") for line in lines if (match := _REASON.fullmatch(line))]
        if reply.finish_reason == "stop" and set(verdicts) == {"yes"} and len(verdicts) + len(reasons) == len(lines):
            return None, reply.completion_tokens
        if set(verdicts) == {"no"}:
            return (reasons[0] if reasons else "") or "gives no reason", reply.completion_tokens
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
            task=task.digest,
        )


def split_reply(task: Task, reply: Reply) -> tuple[str, str]:
    """Return (trace, answer) of a reply: its reasoning, or what a teacher writes before the verdict.

    A teacher that shortens a trace does the latter; its own reasoning is about the shortening.
    """
    if task.budget is None and reply.reasoning:
        return reply.reasoning, reply.answer
    return split_verdict(reply.answer)
