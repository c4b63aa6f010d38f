"""A distillation from start to end: examples in, traces filtered and stored, training files out."""

import asyncio
import json
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console

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
from jaxguard.distill.summary import summarise, summary_table
from jaxguard.distill.tasks import Task, shortening, tasks_for
from jaxguard.distill.teacher import open_teacher
from jaxguard.utils import hub
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically
from jaxguard.utils.progress import Progress


@dataclass(frozen=True)
class Job:
    """What a run's stages share.

    Attributes:
        settings: the config's distill section.
        dialogue: the student's format.
        policy: the run's policy.
        tasks: a trace to get for each example that has a label.
        console: where progress is shown.
    """

    settings: DistillConfig
    dialogue: Dialogue
    policy: Policy
    tasks: list[Task]
    console: Console


def distill(config: Config) -> int:
    """Get a trace for each training example that has a label, and shorten it to each sentence budget.

    Returns:
        0; examples that never got one are counted and named.

    Raises:
        JaxguardError: anything that the user can mend.
    """
    job = load_job(config)
    settings, folder = job.settings, config.folder
    prompt, shorten = load_prompt(settings.prompt), load_prompt(settings.shorten_prompt)
    store = folder / "traces"
    generate(job, prompt, job.tasks, store, common(job, prompt))
    traces = best_traces(store)
    finish(job, job.tasks, store, traces)
    for budget in settings.budgets:
        tasks, short = list(shortening(job.tasks, traces, budget)), folder / f"traces_{budget}"
        generate(job, shorten, tasks, short, common(job, shorten, budget=budget, shortens=common(job, prompt)))
        finish(job, tasks, short, best_traces(short))
    return 0


def load_job(config: Config) -> Job:
    """Everything that a teacher is to be asked about.

    Raises:
        JaxguardError: no distill section, a source that cannot be read, no example with a label.
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
        raise JaxguardError(f"none of the {len(examples)} examples has a label for what policy {policy.name!r} asks")
    return Job(config.distill, dialogue, policy, tasks, Console())


def common(job: Job, prompt: TeacherPrompt, **more: object) -> dict[str, object]:
    """What all attempts of one store must have in common: whatever decides their text, and whether it is accepted."""

    def who(model: TeacherConfig) -> dict[str, object]:
        sampling = model.model_dump(include={"temperature", "top_p", "max_tokens", "grammar"})
        return {"teacher": model.model, "version": model.version, "sampling": sampling}

    judge, settings = job.settings.judge, job.settings
    return {
        **who(settings.teacher),
        "prompt": prompt.digest,
        "policy": job.policy.digest,
        "filter": settings.filter.model_dump(mode="json"),
        "judge": judge and {**who(judge), "prompt": load_prompt(settings.judge_prompt).digest},
        **more,
    }


def generate(
    job: Job,
    prompt: TeacherPrompt,
    tasks: list[Task],
    folder: Path,
    settings: dict[str, object],
    exhaustive: bool = False,
) -> None:
    """Work on the tasks until each is done, with a progress bar; what the store holds is not asked for again.

    Args:
        job: who is asked, and what is accepted.
        prompt: what the teacher is asked with.
        tasks: about what.
        folder: the store.
        settings: what the store's attempts have in common.
        exhaustive: ask for every candidate of every round, whatever was accepted.

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
            progress = stack.enter_context(Progress(folder.name, len(tasks), console=job.console))

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
    found: dict[str, tuple[int, int, str]] = {}
    for attempt in read_attempts(store):
        if attempt.accepted:
            mine = (attempt.round, attempt.candidate, attempt.trace)
            found[attempt.example_id] = min(found.get(attempt.example_id, mine), mine)
    return {name: trace for name, (_, _, trace) in found.items()}


def finish(job: Job, tasks: list[Task], store: Path, traces: dict[str, str]) -> None:
    """Write the training file and the summary beside the store, and show what became of the tasks."""
    traced = (replace(t.example, trace=traces[t.example.id]) for t in tasks if t.example.id in traces)
    lines = [json.dumps(example.to_json(), ensure_ascii=False) + "\n" for example in traced]
    output = store.with_suffix(".jsonl")
    write_atomically(output, "".join(lines))
    summary = summarise(store, [task.example.id for task in tasks])
    write_atomically(store.with_suffix(".summary.json"), json.dumps(asdict(summary), indent=2) + "\n")
    job.console.print(summary_table(summary, store.name))
    job.console.print(f"{len(lines)} examples with traces: {output}", highlight=False)
