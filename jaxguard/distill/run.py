"""A distillation from start to end: examples in, traces filtered and stored, training files out."""

import asyncio
import json
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jaxguard.config import Config
from jaxguard.config.distill import DistillConfig, TeacherConfig
from jaxguard.data.encoding import TOKENIZER_FILES, Encoder
from jaxguard.data.format.dialogue import Dialogue
from jaxguard.data.policies import Policy, load_policy
from jaxguard.data.prepare import load_sources, subset
from jaxguard.distill.filters import Filters
from jaxguard.distill.generate import Funnel, Generation
from jaxguard.distill.judge import Judge
from jaxguard.distill.prompts import TeacherPrompt, load_prompt
from jaxguard.distill.store import open_traces, read_attempts
from jaxguard.distill.summary import Summary, summarize
from jaxguard.distill.tasks import Task, shortening, tasks_for
from jaxguard.distill.teacher import open_teacher
from jaxguard.utils import hub
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically
from jaxguard.utils.progress import Progress


@dataclass(frozen=True)
class TraceSet:
    """Examples with their traces.

    Attributes:
        path: the training file, JSON lines.
        examples: how many it holds.
        summary: what became of the attempts.
    """

    path: Path
    examples: int
    summary: Summary


@dataclass(frozen=True)
class Distillation:
    """What a distillation made.

    Attributes:
        traces: the traces as the teacher wrote them.
        shortened: sentence budget -> the traces that were shortened to it.
    """

    traces: TraceSet
    shortened: dict[int, TraceSet]


@dataclass(frozen=True)
class Job:
    """What the teacher works on.

    Attributes:
        settings: the config's distill section.
        dialogue: the student's format.
        policy: the run's policy.
        tasks: a trace to get for each example that has a label.
    """

    settings: DistillConfig
    dialogue: Dialogue
    policy: Policy
    tasks: list[Task]


def distill(config: Config) -> Distillation:
    """Get a trace for each training example that has a label, and shorten it to each sentence budget.

    Examples that never got a trace are counted and named in the summary.

    Raises:
        JaxguardError: no distill section, no example with a label, a server that does not answer or serves another model,
            or a store that was begun with other settings.
    """
    job = load_job(config)
    settings, store = job.settings, config.folder / "traces"
    prompt, shorten = load_prompt(settings.prompt), load_prompt(settings.shorten_prompt)
    generate(job, prompt, job.tasks, store, provenance(job, prompt))
    traces = best_traces(store)
    result = Distillation(write_traces(job.tasks, store, traces), {})
    for budget in settings.budgets:
        tasks, short = list(shortening(job.tasks, traces, budget)), config.folder / f"traces_{budget}"
        shared = {**provenance(job, shorten), "budget": budget, "shortens": provenance(job, prompt)}
        generate(job, shorten, tasks, short, shared)
        result.shortened[budget] = write_traces(tasks, short, best_traces(short))
    return result


def load_job(config: Config) -> Job:
    """Load everything that requests to the teacher are made of.

    Raises:
        JaxguardError: no distill section, a source that is absent or malformed, no example with a label.
    """
    if config.distill is None:
        raise JaxguardError("the config has no distill section: it needs at least distill.teacher.model")
    policy = load_policy(config.data.policy)
    tokenizer = hub.fetch(config.model.checkpoint, config.model.revision, TOKENIZER_FILES)
    dialogue = Encoder.load(tokenizer, config.data).dialogue
    examples, _ = load_sources(config.data.train, "train")
    if config.data.subset is not None:
        examples = subset(examples, config.data.subset, config.data.subset_seed)
    tasks = list(tasks_for(examples, policy))
    if not tasks:
        raise JaxguardError(
            f"none of the {len(examples)} examples has a label for a question of policy {policy.name!r}"
        )
    return Job(config.distill, dialogue, policy, tasks)


def provenance(job: Job, prompt: TeacherPrompt) -> dict[str, object]:
    """The settings that decide the text of an attempt and whether it is accepted; a store holds attempts of one kind."""

    def model(config: TeacherConfig) -> dict[str, object]:
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


def generate(
    job: Job,
    prompt: TeacherPrompt,
    tasks: Sequence[Task],
    folder: Path,
    settings: dict[str, object],
    exhaustive: bool = False,
) -> None:
    """Work on the tasks until each is done, and show how far it is; attempts that are in the store are not made again.

    Args:
        job: the teacher, and what is accepted.
        prompt: the template of the requests.
        tasks: one for each example.
        folder: the store.
        settings: what the store's attempts have in common.
        exhaustive: request every candidate of every round, whatever was accepted.

    Raises:
        JaxguardError: a server does not answer or serves another model, or the store was begun with other settings.
    """

    async def run() -> None:
        async with AsyncExitStack() as stack:
            teacher = await stack.enter_async_context(open_teacher(job.settings.teacher))
            await teacher.check()
            judge = None
            if job.settings.judge is not None:
                model = await stack.enter_async_context(open_teacher(job.settings.judge))
                await model.check()
                judge = Judge(model, load_prompt(job.settings.judge_prompt), job.dialogue)
            generation = Generation(
                teacher=teacher,
                prompt=prompt,
                dialogue=job.dialogue,
                filters=Filters(job.settings.filter, job.dialogue),
                store=stack.enter_context(open_traces(folder, settings)),
                rounds=job.settings.rounds,
                candidates=job.settings.candidates,
                judge=judge,
                exhaustive=exhaustive,
            )
            progress = stack.enter_context(Progress(folder.name, len(tasks)))

            def show(funnel: Funnel) -> None:
                failed = "  ".join(f"{name} {count}" for name, count in funnel.failed.most_common(3))
                done = funnel.accepted + len(funnel.unfinished)
                progress.update(
                    done, f"failed: {failed or 'none'}", attempts=funnel.attempts, tokens=funnel.completion_tokens
                )

            await generation.run(tasks, show)

    asyncio.run(run())


def best_traces(store: Path) -> dict[str, str]:
    """Example id -> its first accepted trace."""
    best: dict[str, tuple[int, int, str]] = {}
    for attempt in read_attempts(store):
        if attempt.accepted:
            candidate = (attempt.round, attempt.candidate, attempt.trace)
            best[attempt.example_id] = min(best.get(attempt.example_id, candidate), candidate)
    return {name: trace for name, (_, _, trace) in best.items()}


def write_traces(tasks: Sequence[Task], store: Path, traces: dict[str, str]) -> TraceSet:
    """Write the training file and the summary beside the store."""
    traced = [replace(t.example, trace=traces[t.example.id]) for t in tasks if t.example.id in traces]
    path, summary = store.with_suffix(".jsonl"), summarize(store, [task.example.id for task in tasks])
    write_atomically(path, "".join(json.dumps(each.to_json(), ensure_ascii=False) + "\n" for each in traced))
    write_atomically(store.with_suffix(".summary.json"), json.dumps(asdict(summary), indent=2) + "\n")
    return TraceSet(path, len(traced), summary)
