"""The teacher's prompts, from templates in configs/prompts that a user can replace.

A template is YAML with a `user` text in which these stand for values:

    $policy     the taxonomy, numbered, and the rules
    $prompt     what the user wrote
    $response   what the assistant answered, or None
    $labels     people's verdict
    $format     the verdict lines with the words to choose from
    $trace      a trace, to be shortened or judged
    $sentences  "1 sentence", "3 sentences", ...

Prompts, responses and traces are untrusted: what could act as part of the student's format, as a special token of some chat
template or as one of the marks around them gets a backslash.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from string import Template

from jaxguard.config.base import Schema, read_yaml, validate
from jaxguard.config.lookup import find_yaml, nearest
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import ABSENT, Answers, Dialogue, taxonomy, verdict_lines, written
from jaxguard.data.policies import Policy, Question
from jaxguard.utils.errors import JaxguardError

PROMPT_FOLDER = Path("configs/prompts")
PLACEHOLDERS = ("policy", "prompt", "response", "labels", "format", "trace", "sentences")

# Chat templates write special tokens as <|...|>, with an ordinary or a full-width bar, or in brackets as [INST].
_SPECIAL = re.compile(
    r"<[|\uff5c][^<>\n]{0,40}[|\uff5c]>|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS)\]|</?s>"
)
_MARK = re.compile(r"\[\s*(?:end\s+of\b|human\s+user\b|ai\s+assistant\b|reasoning\b)[^\]\n]{0,40}\]", re.IGNORECASE)


class PromptDefinition(Schema):
    """A prompt as written in YAML."""

    name: str
    description: str = ""
    """For people; the teacher does not read it."""
    user: str


@dataclass(frozen=True)
class TeacherPrompt:
    """A template, ready to fill in.

    Attributes:
        name: shown in reports.
        text: the user turn with its placeholders.
    """

    name: str
    text: str

    @property
    def digest(self) -> str:
        """Hash of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def placeholders(self) -> set[str]:
        """The values that it contains."""
        return set(Template(self.text).get_identifiers())

    def messages(
        self,
        example: Example,
        policy: Policy,
        labels: Answers,
        dialogue: Dialogue,
        trace: str = "",
        budget: int | None = None,
    ) -> list[dict[str, str]]:
        """The chat to send about an example.

        Args:
            example: the exchange.
            policy: of the example.
            labels: people's verdict; its questions are those to answer.
            dialogue: the student's format, which untrusted text must not forge.
            trace: for a template that contains one.
            budget: sentences to shorten it to.
        """
        questions: tuple[Question, ...] = tuple(question for question, _ in labels)
        values = {
            "policy": taxonomy(policy),
            "prompt": quoted(example.prompt, dialogue),
            "response": ABSENT if example.response is None else quoted(example.response, dialogue),
            "labels": written(labels),
            "format": verdict_lines(questions),
            "trace": quoted(trace, dialogue),
            "sentences": "" if budget is None else f"{budget} sentence{'s' if budget > 1 else ''}",
        }
        return [{"role": "user", "content": Template(self.text).substitute(values).strip()}]


def load_prompt(name_or_path: str, folder: Path = PROMPT_FOLDER) -> TeacherPrompt:
    """Read a template by name (a file in `folder`) or by path.

    Raises:
        JaxguardError: no such file, an unknown or missing field, or a `$` that stands for no value.
    """
    path = find_yaml(name_or_path, folder, "prompt")
    fields = validate(PromptDefinition, read_yaml(path), str(path))
    template = Template(fields.user)
    if not template.is_valid():
        raise JaxguardError(f"{path}: user: a $ must be followed by the name of a value; write $$ for a dollar sign")
    unknown = sorted(set(template.get_identifiers()) - set(PLACEHOLDERS))
    if unknown:
        raise JaxguardError(
            f"{path}: user: unknown value ${unknown[0]}; {nearest(unknown[0], PLACEHOLDERS)}known: {', '.join(PLACEHOLDERS)}"
        )
    return TeacherPrompt(fields.name, fields.user)


def quoted(text: str, dialogue: Dialogue) -> str:
    """Untrusted text in which nothing can act as the format of either model, or as a mark of the template."""
    text = dialogue.quote(text)
    for pattern in (_SPECIAL, _MARK):
        text = pattern.sub(lambda match: f"{match[0][:-1]}\\{match[0][-1]}", text)
    return text
