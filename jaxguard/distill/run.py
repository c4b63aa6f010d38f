"""A distillation from start to end: examples in, traces filtered and stored, training files out."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxguard.config import Config
from jaxguard.config.distill import TeacherConfig
from jaxguard.data.encoding import TOKENIZER_FILES, Encoder
from jaxguard.data.policies import load_policy
from jaxguard.data.prepare import load_sources, subset
from jaxguard.distill.generate import Job, generate
from jaxguard.distill.prompts import Task, TeacherPrompt, load_prompt, tasks_for
from jaxguard.distill.store import summarize
from jaxguard.utils import hub
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically


@dataclass(frozen=True)
class TraceSet:
    """The training file, tasks whose examples have their traces, and the counts that traces.summary.json holds."""

    path: Path
    tasks: list[Task]
    summary: dict[str, Any]


@dataclass(frozen=True)
class Distillation:
    """The traces as the teacher wrote them, and sentence budget -> those that were shortened to it."""

    traces: TraceSet
    shortened: dict[int, TraceSet]


def distill(config: Config) -> Distillation:
    """Get a trace for each training example that has a label, and shorten it to each sentence budget.

    Examples that never got a trace are counted and named in the summary.

    Raises:
        JaxguardError: no distill section, no example with a label, a server that does not answer or serves another model,
            or a store that was begun with other settings.
    """
    job = load_job(config)
    prompt, shorten = load_prompt(job.settings.prompt), load_prompt(job.settings.shorten_prompt)

    def run(name: str, prompt: TeacherPrompt, tasks: Sequence[Task], settings: dict[str, Any]) -> TraceSet:
        store = config.folder / name
        asyncio.run(generate(job, prompt, tasks, store, settings))
        return write_traces(tasks, store)

    settings = provenance(job, prompt)
    result = Distillation(run("traces", prompt, job.tasks, settings), {})
    for budget in job.settings.budgets:
        tasks = [replace(task, budget=budget) for task in result.traces.tasks]
        short = {**provenance(job, shorten), "budget": budget, "shortens": settings}
        result.shortened[budget] = run(f"traces_{budget}", shorten, tasks, short)
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


def write_traces(tasks: Sequence[Task], store: Path) -> TraceSet:
    """Write the training file and the summary beside the store."""
    traces, summary = summarize(store, [task.example.id for task in tasks])
    traced = [task.with_trace(traces[task.example.id]) for task in tasks if task.example.id in traces]
    lines = (json.dumps(task.example.to_json(), ensure_ascii=False) + "\n" for task in traced)
    write_atomically(store.with_suffix(".jsonl"), "".join(lines))
    write_atomically(store.with_suffix(".summary.json"), json.dumps(summary, indent=2) + "\n")
    return TraceSet(store.with_suffix(".jsonl"), traced, summary)
