"""The numbers of an audit: the teacher's stored answers against people's labels, and against each other."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxguard.config.distill import DistillConfig
from jaxguard.data.format.answer import Verdict, parse
from jaxguard.data.format.dialogue import ABSENT, CHOICES, Mode
from jaxguard.data.policies import QUESTIONS, Question
from jaxguard.distill.filters import repeated_share, split_sentences, words
from jaxguard.distill.prompts import Task
from jaxguard.distill.store import Attempt, read_attempts
from jaxguard.evaluate.scores.metrics import Result, count_votes, measure
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, UNPARSABLE
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.statistics import Spread, spread

BINS = 24


@dataclass(frozen=True)
class Disagreement:
    """An example on which most samples differ from people; without its text."""

    id: str
    label_positive: bool
    differ: int
    unparsable: int


@dataclass(frozen=True)
class QuestionAudit:
    """One question, over the examples with a label for it.

    Attributes:
        positive, negative: its verdict words.
        result: scores, confusion and consistency.
        categories: those of the source, the largest first; None are the examples without one, last.
        disagreements: the clearest first.
    """

    positive: str
    negative: str
    result: Result
    categories: tuple[tuple[str | None, Result], ...]
    disagreements: tuple[Disagreement, ...]


@dataclass(frozen=True)
class Completions:
    """Counts over all completions.

    Attributes:
        total: how many there are.
        unparsable: those with a verdict line that is missing, malformed or contradictory.
        cut: those that the server stopped.
        without_reasoning: those without any reasoning.
        invented_responses: those that judge a response where there is none.
        failed_checks: the filter's check -> completions that fail it.
    """

    total: int
    unparsable: int
    cut: int
    without_reasoning: int
    invented_responses: int
    prompt_tokens: int
    completion_tokens: int
    failed_checks: dict[str, int]


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        about: the run, the teacher, the sampling.
        examples: how many were judged.
        questions: those that an example has a label for.
        lengths: "words", "sentences" and "repeated_share" of the reasoning.
    """

    about: dict[str, Any]
    examples: int
    completions: Completions
    questions: dict[Question, QuestionAudit]
    lengths: dict[str, Spread]


@dataclass(frozen=True)
class _Answer:
    """What the report needs of one attempt; no text."""

    attempt: Attempt
    verdict: Verdict
    words: int
    sentences: int
    repeated_share: float


_Answered = tuple[Task, tuple[_Answer, ...]]
"""A task with the answers of all its samples."""


def read_answers(folder: Path, tasks: Sequence[Task], settings: DistillConfig) -> list[_Answered]:
    """The sample with its answers, from the store; attempts beyond `samples`, or about other examples, are left out.

    Raises:
        JaxguardError: an answer is missing.
    """
    by_id, samples = {task.example.id: task for task in tasks}, settings.audit.samples
    answers: dict[tuple[str, int], _Answer] = {}
    for attempt in read_attempts(folder):
        if attempt.example_id in by_id and attempt.round == 0 and attempt.candidate < samples:
            answer = _answer(attempt, by_id[attempt.example_id], settings.filter.ngram)
            answers[attempt.example_id, attempt.candidate] = answer
    missing = len(tasks) * samples - len(answers)
    if missing:
        raise JaxguardError(f"{folder} lacks {missing} of {len(tasks) * samples} answers: run again to request them")
    return [(task, tuple(answers[task.example.id, i] for i in range(samples))) for task in tasks]


def _answer(attempt: Attempt, task: Task, ngram: int) -> _Answer:
    reasoning = words(attempt.trace)
    return _Answer(
        attempt=replace(attempt, trace="", answer=""),
        verdict=parse(attempt.answer, task.questions, Mode.DIRECT, has_response=task.example.response is not None),
        words=len(reasoning),
        sentences=len(split_sentences(attempt.trace)),
        repeated_share=repeated_share(reasoning, ngram),
    )


def score(answered: Sequence[_Answered], about: dict[str, Any], seed: int) -> Audit:
    """All numbers of the report."""
    answers = [answer for _, each in answered for answer in each]
    questions = {question: _question(question, answered, seed) for question in QUESTIONS}
    widths = {name: -(-(max(getattr(a, name) for a in answers) + 1) // BINS) for name in ("words", "sentences")}
    return Audit(
        about=about,
        examples=len(answered),
        completions=Completions(
            total=len(answers),
            unparsable=sum(bool(answer.verdict.problems) for answer in answers),
            cut=sum(answer.attempt.finish_reason != "stop" for answer in answers),
            without_reasoning=sum(answer.words == 0 for answer in answers),
            invented_responses=sum(_invents(task, answer) for task, each in answered for answer in each),
            prompt_tokens=sum(answer.attempt.prompt_tokens for answer in answers),
            completion_tokens=sum(answer.attempt.completion_tokens for answer in answers),
            failed_checks=dict(Counter(name for a in answers for name in a.attempt.failures).most_common()),
        ),
        questions={question: result for question, result in questions.items() if result is not None},
        lengths={
            name: spread([getattr(answer, name) for answer in answers], width)
            for name, width in {**widths, "repeated_share": 0.05}.items()
        },
    )


def _question(question: Question, answered: Sequence[_Answered], seed: int) -> QuestionAudit | None:
    """One question over the examples that have something to judge; None if there are none."""
    positive, negative = CHOICES[question]
    rows = [(task, each) for task, each in answered if dict(task.labels).get(question, ABSENT) != ABSENT]
    if not rows:
        return None
    labels = np.array([dict(task.labels)[question] == positive for task, _ in rows])
    verdicts = np.array([[_verdict(answer, question) for answer in each] for _, each in rows], np.int8)
    scored = count_votes(labels, verdicts, question)
    members: dict[str | None, list[int]] = {}
    for i, (task, _) in enumerate(rows):
        for name in dict.fromkeys(task.example.categories or (None,)):
            members.setdefault(name, []).append(i)
    by_size = sorted(members, key=lambda name: (name is None, -len(members[name]), name or ""))
    categories = tuple((name, measure(scored[np.array(members[name])], seed)) for name in by_size)
    wrong, unparsable = (~scored.right).sum(axis=1), (~scored.parsed).sum(axis=1)
    disagreements = [
        Disagreement(task.example.id, bool(labels[i]), int(wrong[i]), int(unparsable[i]))
        for i, (task, each) in enumerate(rows)
        if 2 * wrong[i] > len(each)
    ]
    return QuestionAudit(
        positive=positive,
        negative=negative,
        result=measure(scored, seed),
        categories=categories,
        disagreements=tuple(sorted(disagreements, key=lambda each: (each.unparsable, -each.differ, each.id))),
    )


def _verdict(answer: _Answer, question: Question) -> int:
    if question in {problem.partition(":")[0] for problem in answer.verdict.problems}:
        return UNPARSABLE
    return POSITIVE if getattr(answer.verdict, question) == CHOICES[question][0] else NEGATIVE


def _invents(task: Task, answer: _Answer) -> bool:
    """Whether it judges, in parsable words, a response that is not there."""
    if task.example.response is not None or answer.verdict.problems:
        return False
    return (answer.verdict.response_harm, answer.verdict.response_refusal) != (None, None)
