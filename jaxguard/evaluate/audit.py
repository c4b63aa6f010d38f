"""How far the teacher agrees with people when it is not told their labels, and with itself.

A seeded sample of the training examples is judged without the labels, several times each; what comes back is read by the
parser that reads the guard's own answers, so what it cannot read fails closed. Every answer is kept in a store, so an audit
that was killed goes on; the report is made from the store alone.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxguard.config import Config
from jaxguard.config.distill import DistillConfig
from jaxguard.data.format.answer import Verdict, parse
from jaxguard.data.format.dialogue import ABSENT, CHOICES, Mode
from jaxguard.data.policies import QUESTIONS, Question
from jaxguard.data.prepare import subset
from jaxguard.distill.audit_page import shown_table, write_report
from jaxguard.distill.filters import repeated_share, words
from jaxguard.distill.prompts import TeacherPrompt, load_prompt
from jaxguard.distill.run import Job, common, generate, load_job
from jaxguard.distill.sentences import split_sentences
from jaxguard.distill.store import Attempt, read_attempts
from jaxguard.distill.tasks import Task
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.statistics import confusion, consistency, right_counts, scores, spread

BINS = 24
BLIND = {"labels", "trace"}
"""Values that would give the verdict away."""


@dataclass(frozen=True)
class Answer:
    """What the report needs of one attempt; no text.

    Attributes:
        cut: the server stopped it.
        verdict: what the teacher said, read as strictly as a guard's answer.
        failures: the filter's checks that it failed.
        words, sentences, repeated_share: of the thought.
    """

    cut: bool
    verdict: Verdict
    failures: tuple[str, ...]
    words: int
    sentences: int
    repeated_share: float
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Audited:
    """An example with all its answers."""

    task: Task
    answers: tuple[Answer, ...]


def audit(config: Config) -> int:
    """Ask the teacher for blind verdicts on a sample of data.train, and write audit.md, audit.html and audit.json.

    Returns:
        0, however far it agrees.

    Raises:
        JaxguardError: anything that the user can mend.
    """
    job = load_job(config)
    settings = job.settings.model_copy(update={"rounds": 1, "candidates": job.settings.audit.samples, "judge": None})
    job = replace(job, settings=settings)
    prompt, folder = blind_prompt(settings.audit.prompt), config.folder / "audit"
    tasks, available = sample(job)
    generate(job, prompt, tasks, folder / "attempts", common(job, prompt), exhaustive=True)
    audited = read_answers(folder / "attempts", tasks, settings)
    about = {
        "run": config.name,
        **common(job, prompt),
        "prompt_name": prompt.name,
        "policy_name": job.policy.name,
        "seed": settings.audit.seed,
        "samples": settings.audit.samples,
        "available": available,
    }
    report = {"about": about, **summary(audited, settings)}
    write_report(folder, report)
    job.console.print(shown_table(report))
    for name in ("audit.html", "audit.md", "audit.json"):
        job.console.print(str(folder / name), markup=False, highlight=False, soft_wrap=True)
    return 0


def blind_prompt(name: str) -> TeacherPrompt:
    """The audit's template.

    Raises:
        JaxguardError: it shows the labels, or cannot be read.
    """
    prompt = load_prompt(name)
    told = sorted(prompt.places & BLIND)
    if told:
        raise JaxguardError(
            f"distill.audit.prompt={name}: its template holds ${told[0]}, which gives the verdict away; an audit asks "
            "without the labels: take `audit`, or leave that value out"
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


def read_answers(folder: Path, tasks: Sequence[Task], settings: DistillConfig) -> list[Audited]:
    """The sample with its answers, from the store; answers beyond `samples`, or about other examples, are passed over.

    Raises:
        JaxguardError: an answer is missing.
    """
    by_id, samples = {task.example.id: task for task in tasks}, settings.audit.samples
    found: dict[tuple[str, int], Answer] = {}
    for attempt in read_attempts(folder):
        if attempt.example_id in by_id and attempt.round == 0 and attempt.candidate < samples:
            answer = _answer(attempt, by_id[attempt.example_id], settings.filter.ngram)
            found[attempt.example_id, attempt.candidate] = answer
    missing = len(tasks) * samples - len(found)
    if missing:
        raise JaxguardError(f"{folder} lacks {missing} of {len(tasks) * samples} answers: run again to ask for them")
    return [Audited(task, tuple(found[task.example.id, i] for i in range(samples))) for task in tasks]


def _answer(attempt: Attempt, task: Task, ngram: int) -> Answer:
    asks = [question for question, _ in task.labels]
    thought = words(attempt.trace)
    return Answer(
        cut=attempt.finish_reason != "stop",
        verdict=parse(attempt.answer, asks, Mode.DIRECT, has_response=task.example.response is not None),
        failures=tuple(attempt.failures),
        words=len(thought),
        sentences=len(split_sentences(attempt.trace)),
        repeated_share=repeated_share(thought, ngram),
        prompt_tokens=attempt.prompt_tokens,
        completion_tokens=attempt.completion_tokens,
    )


def summary(audited: Sequence[Audited], settings: DistillConfig) -> dict[str, Any]:
    """All numbers of the report, as a plain tree."""
    answers = [answer for one in audited for answer in one.answers]
    failed = Counter(name for answer in answers for name in answer.failures)
    questions = {q: _question(q, audited, settings.audit.seed) for q in QUESTIONS}
    longest = max(answer.words for answer in answers), max(answer.sentences for answer in answers)
    return {
        "examples": len(audited),
        "answers": {
            "total": len(answers),
            "unreadable": sum(bool(answer.verdict.problems) for answer in answers),
            "cut": sum(answer.cut for answer in answers),
            "without_thought": sum(answer.words == 0 for answer in answers),
            "invented_responses": sum(_invents(one, answer) for one in audited for answer in one.answers),
            "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
            "completion_tokens": sum(answer.completion_tokens for answer in answers),
            "failed_checks": dict(failed.most_common()),
        },
        "questions": {name: found for name, found in questions.items() if found},
        "traces": {
            "words": asdict(spread([answer.words for answer in answers], -(-(longest[0] + 1) // BINS))),
            "sentences": asdict(spread([answer.sentences for answer in answers], -(-(longest[1] + 1) // BINS))),
            "repeated_share": asdict(spread([answer.repeated_share for answer in answers], 0.05)),
        },
    }


def _question(question: Question, audited: Iterable[Audited], seed: int) -> dict[str, Any] | None:
    """One question over the examples that have something to judge; None if there are none."""
    positive, negative = CHOICES[question]
    rows = [one for one in audited if dict(one.task.labels).get(question, ABSENT) != ABSENT]
    if not rows:
        return None
    labels = np.array([dict(one.task.labels)[question] == positive for one in rows])
    votes = _matrix(rows, lambda answer: getattr(answer.verdict, question) == positive)
    readable = _matrix(rows, lambda answer: question not in {p.partition(":")[0] for p in answer.verdict.problems})
    members: dict[str | None, list[int]] = {}
    for i, one in enumerate(rows):
        for name in dict.fromkeys(one.task.example.categories or (None,)):
            members.setdefault(name, []).append(i)
    by_size = sorted(members.items(), key=lambda item: (item[0] is None, -len(item[1]), item[0] or ""))
    return {
        "positive": positive,
        "negative": negative,
        "scores": asdict(scores(labels, votes, seed)),
        "categories": [{"name": name, **asdict(scores(labels[i], votes[i], seed))} for name, i in by_size],
        "consistency": asdict(consistency(votes)),
        "right_samples": right_counts(labels, votes),
        "confusion": confusion(labels, votes, readable),
        "unreadable": int((~readable).sum()),
        "disagreements": _disagreements(rows, labels, votes, readable),
    }


def _matrix(rows: Sequence[Audited], holds: Callable[[Answer], bool]) -> np.ndarray:
    return np.array([[holds(answer) for answer in one.answers] for one in rows])


def _disagreements(
    rows: Sequence[Audited], labels: np.ndarray, votes: np.ndarray, readable: np.ndarray
) -> list[dict[str, Any]]:
    """Examples on which most samples differ from people, the clearest first; by id, without any text."""
    wrong = (votes != labels[:, None]).sum(axis=1)
    found = [
        {
            "id": one.task.example.id,
            "label_positive": bool(labels[i]),
            "differ": int(wrong[i]),
            "unreadable": int((~readable[i]).sum()),
        }
        for i, one in enumerate(rows)
        if 2 * wrong[i] > votes.shape[1]
    ]
    return sorted(found, key=lambda entry: (entry["unreadable"], -entry["differ"], entry["id"]))


def _invents(one: Audited, answer: Answer) -> bool:
    """Does it legibly judge a response that is not there?"""
    if one.task.example.response is not None or answer.verdict.problems:
        return False
    return (answer.verdict.response_harm, answer.verdict.response_refusal) != (None, None)
