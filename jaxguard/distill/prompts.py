"""What the teacher is asked: tasks, and the templates in configs/prompts, which a user can replace.

A template is YAML with a `user` text in which these stand for values:

    $policy     the taxonomy, numbered, and the rules
    $prompt     what the user wrote
    $response   what the assistant answered, or None
    $labels     people's verdict
    $format     the verdict lines with the words to choose from
    $trace      a trace, to be shortened or judged
    $sentences  "1 sentence", "3 sentences", ...

Prompts, responses, traces and policies are untrusted: what could act as part of the student's format, as a special token of a
chat model, as one of the marks around them or as a heading of the template gets a backslash.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from string import Template

from pydantic import field_validator

from jaxguard.config.base import Schema, find_yaml
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import ABSENT, Answers, Dialogue, answers, questions, verdict_lines, written
from jaxguard.data.format.quoting import GAP, compiled, opening, spaced
from jaxguard.data.policies import Policy, Question, policy_for
from jaxguard.utils.parse import nearest, read_yaml

PROMPT_FOLDER = Path("configs/prompts")
PLACEHOLDERS = ("policy", "prompt", "response", "labels", "format", "trace", "sentences")

_HEADING = re.compile(r"^#+[ \t]*(\S.*)$", re.MULTILINE)
_BRACKETS = re.compile(r"^\[[^\[\]\n]+\](?=[ \t]*$)", re.MULTILINE)
_MARK = rf"\[{GAP}*+(?:end{GAP}++of|human{GAP}++user|ai{GAP}++assistant|reasoning)(?![^\W_])[^\[\]\\]*+\]"


@dataclass(frozen=True)
class Task:
    """One example to get a trace for.

    Attributes:
        example, policy: the exchange, with its trace where that is to be shortened or judged, and its policy.
        labels: the verdict that the trace has to lead to.
        budget: most sentences that its trace is shortened to; None requests a trace of its own.
    """

    example: Example
    policy: Policy
    labels: Answers
    budget: int | None = None

    @property
    def questions(self) -> tuple[Question, ...]:
        return tuple(question for question, _ in self.labels)

    @property
    def digest(self) -> str:
        """Hash what the trace is about: exchange, verdict and policy, and the trace that is to be shortened."""
        example = self.example
        facts = example.prompt, example.response, self.labels, self.policy.digest, self.budget and example.trace
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def with_trace(self, trace: str) -> "Task":
        return replace(self, example=replace(self.example, trace=trace))


def tasks_for(examples: Iterable[Example], policy: Policy) -> Iterator[Task]:
    """Yield a task for each example that has a label for a question of its policy; that there is no response is none."""
    for example in examples:
        own = policy_for(example, policy)
        labels = answers(example, asked) if (asked := questions(example, own)) else ()
        if any(word != ABSENT for _, word in labels):
            yield Task(example, own, labels)


class TeacherPrompt(Schema):
    """A template as written in YAML."""

    name: str
    """Shown in reports."""
    description: str = ""
    """For people; the teacher does not read it."""
    user: str
    """The user turn with its placeholders."""

    @field_validator("user")
    @classmethod
    def _check(cls, text: str) -> str:
        if not Template(text).is_valid():
            raise ValueError("a $ must be followed by the name of a value; write $$ for a dollar sign")
        for name in Template(text).get_identifiers():
            if name not in PLACEHOLDERS:
                raise ValueError(
                    f"unknown value ${name}; {nearest(name, PLACEHOLDERS)}known: {', '.join(PLACEHOLDERS)}"
                )
        return text

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.user.encode()).hexdigest()

    @property
    def placeholders(self) -> set[str]:
        return set(Template(self.user).get_identifiers())

    @cached_property
    def marks(self) -> re.Pattern[str]:
        """What no text may spell: the marks around texts, and the template's lines that begin with # or are in brackets."""
        headings = (rf"{opening(title)} *$" for title in _HEADING.findall(self.user))
        return compiled([_MARK, *headings, *map(spaced, _BRACKETS.findall(self.user))])

    def messages(self, task: Task, dialogue: Dialogue) -> list[dict[str, str]]:
        """Return the chat to send about a task; `dialogue` is the student's format, which untrusted text must not forge."""
        example, budget = task.example, task.budget
        values = {
            "policy": dialogue.quote(task.policy.taxonomy, self.marks),
            "prompt": dialogue.quote_prompt(example.prompt, self.marks),
            "response": ABSENT if example.response is None else dialogue.quote(example.response, self.marks),
            "labels": written(task.labels),
            "format": verdict_lines(task.questions),
            "trace": dialogue.quote(example.trace or "", self.marks),
            "sentences": "" if budget is None else f"{budget} sentence{'s' if budget > 1 else ''}",
        }
        return [{"role": "user", "content": Template(self.user).substitute(values).strip()}]


def load_prompt(name_or_path: str, folder: Path = PROMPT_FOLDER) -> TeacherPrompt:
    """Read a template by name (a file in `folder`) or by path."""
    path = find_yaml(name_or_path, folder, "prompt")
    return read_yaml(path, TeacherPrompt)
