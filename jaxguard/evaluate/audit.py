"""Audit the teacher: evaluate it as a guard on a sample of data.train, without telling it the labels.

It judges each example several times. Its answers are parsed as strictly as a guard's and scored by the same functions. Every
completion is stored as an attempt, so an audit that was killed resumes; the report is made from the store alone.
"""

import asyncio
from dataclasses import replace

from jaxguard.config import Config
from jaxguard.data.format.dialogue import ABSENT
from jaxguard.data.prepare import subset
from jaxguard.distill.generate import Job, generate
from jaxguard.distill.prompts import Task, TeacherPrompt, load_prompt
from jaxguard.distill.run import load_job, provenance
from jaxguard.evaluate.report.audit import write_audit
from jaxguard.evaluate.scores.audit import Audit, read_answers, score
from jaxguard.utils.errors import JaxguardError

BLIND = {"labels", "trace"}
"""Values of a template that give the verdict away."""


def audit(config: Config) -> Audit:
    """Request blind verdicts on a sample of data.train from the teacher, score them and write the report.

    Raises:
        JaxguardError: as `distill`; or a template that shows the labels, or no example with a label to judge.
    """
    job = load_job(config)
    wanted = job.settings.audit
    settings = job.settings.model_copy(update={"rounds": 1, "candidates": wanted.samples, "judge": None})
    job = replace(job, settings=settings)
    prompt, folder = blind_prompt(wanted.prompt), config.folder / "audit" / "attempts"
    tasks, available = sample(job)
    asyncio.run(generate(job, prompt, tasks, folder, provenance(job, prompt), exhaustive=True))
    about = {
        "run": config.name,
        **provenance(job, prompt),
        "prompt_name": prompt.name,
        "policy_name": job.policy.name,
        "seed": wanted.seed,
        "samples": wanted.samples,
        "available": available,
    }
    result = score(read_answers(folder, tasks, settings), about, wanted.seed)
    write_audit(result, config.folder / "audit")
    return result


def blind_prompt(name: str) -> TeacherPrompt:
    """The audit's template.

    Raises:
        JaxguardError: it shows the labels, or cannot be read.
    """
    prompt = load_prompt(name)
    revealing = sorted(prompt.placeholders & BLIND)
    if revealing:
        raise JaxguardError(
            f"distill.audit.prompt={name}: its template contains ${revealing[0]}, which gives the verdict away; an audit hides "
            "the labels: take `audit`, or leave that value out"
        )
    return prompt


def sample(job: Job) -> tuple[list[Task], int]:
    """A seeded sample of the examples whose verdict people gave, and how many there are of these.

    An example whose only answer is that it has no response is left out: there is nothing to agree on.

    Raises:
        JaxguardError: there are none.
    """
    tasks = {task.example.id: task for task in job.tasks if any(word != ABSENT for _, word in task.labels)}
    if not tasks:
        raise JaxguardError(f"none of the {len(job.tasks)} examples has a prompt's or a response's label")
    wanted = job.settings.audit
    chosen = subset([task.example for task in tasks.values()], min(wanted.examples, len(tasks)), wanted.seed)
    return [tasks[example.id] for example in chosen], len(tasks)
