"""A guard's format as a user writes it in YAML (foreign_fields.py), made into a Guard record.

    quoted texts -> the template -> the user message of the checkpoint's chat template, or the whole text
    verdict words -> the grammar of an answer, and the places where its verdict is chosen

What the rendered prompt holds besides the texts (sections, headings, labels, thought tags) no text under judgement may spell.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxguard.config.base import read_yaml, validate
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Category, Policy, Question
from jaxguard.guards.formats.records import Chat, Guard, Quoted, Step, chosen_words, numbered
from jaxguard.guards.formats.schema import GuardFormatDefinition, VerdictDefinition
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, UNPARSABLE, Request
from jaxguard.utils.errors import JaxguardError

# As in transformers; a name that the template makes up is an error.
_JINJA: Final = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
)
# Stand for the texts when a template is tried.
_MARK: Final = "jaxguard"
_PROMPT, _RESPONSE = f"{_MARK}prompt", f"{_MARK}response"
_PARTS: Final = tuple(f"{_MARK}{part}" for part in ("category", "description", "rules", "allowed"))
_POLICY: Final = Policy("trial", (Category(_PARTS[0], _PARTS[1]),), _PARTS[2], allowed=_PARTS[3:])


@dataclass(frozen=True)
class Written:
    """The functions of a Guard record, by what is written.

    Attributes:
        fields: the file's.
        where: names file and template in errors.
    """

    fields: GuardFormatDefinition
    where: str

    def turn(self, texts: Quoted, ask: Request) -> str | Chat:
        """See Guard.

        Raises:
            JaxguardError: the template does not render.
        """
        policy = texts.policy
        try:
            text = _JINJA.from_string(self.fields.chat or self.fields.text or "").render(
                prompt=texts.prompt,
                response=texts.response,
                question=ask.question,
                mode=str(ask.mode),
                policy=numbered(policy),
                categories=[{"name": one.name, "description": one.description} for one in policy.categories],
                rules=policy.rules,
                allowed=list(policy.allowed),
            )
        except Exception as error:  # jinja's errors, and whatever the template's expressions raise
            raise JaxguardError(f"{self.where}: does not render: {error}") from None
        return text if self.fields.chat is None else ([{"role": "user", "content": text.strip()}], {})

    def _shows_response(self, ask: Request) -> bool:
        return ask.example.response is not None and not (self.fields.prompt_alone and ask.question == "prompt_harm")

    def _lines(self, ask: Request) -> list[tuple[VerdictDefinition, tuple[str, ...]]]:
        """The lines of an answer, each with what it says instead where no response is shown."""
        if not self.fields.together:
            return [(one, ()) for one in self.fields.verdicts if one.question == ask.question]
        if self._shows_response(ask):
            return [(one, ()) for one in self.fields.verdicts]
        return [(one, one.absent) for one in self.fields.verdicts if one.absent or one.question == "prompt_harm"]

    def _ended(self, ask: Request, text: str) -> tuple[str, str] | None:
        """(an answer up to its verdict, the verdict); None while it thinks."""
        if ask.mode is Mode.DIRECT or self.fields.thought is None:
            return "", text
        before, end, verdict = text.rpartition(self.fields.thought.close.strip())
        return (before + self.fields.thought.close.lstrip(), verdict) if end else None

    def start(self, ask: Request, text: str) -> str | None:
        """See Guard."""
        ended = self._ended(ask, text)
        return None if ended is None else ended[0]

    def read(self, ask: Request, text: str) -> int:
        """See Guard: exactly the expected lines, each with one of its words."""
        ended, lines = self._ended(ask, text), self._lines(ask)
        allowed = [{word.lower() for word in (*one.positive, *one.negative, *absent)} for one, absent in lines]
        words = None if ended is None else chosen_words(ended[1], [one.label for one, _ in lines], allowed)
        for (one, _), word in zip(lines, words or (), strict=False):
            if one.question == ask.question:
                return POSITIVE if word in {positive.lower() for positive in one.positive} else NEGATIVE
        return UNPARSABLE

    def steps(self, ask: Request) -> tuple[Step, ...]:
        """See Guard."""
        found, lead = [], ""
        for i, (one, absent) in enumerate(self._lines(ask)):
            lead += ("\n" if i else "") + (f"{one.label}: " if one.label else "")
            if absent:
                lead += absent[0]
                continue
            found.append(Step(lead, one.positive[0], one.negative[0], one.positive[1:]))
            lead = ""
            if one.question == ask.question:
                break
        return tuple(found)

    def closed(self, ask: Request, text: str) -> str | None:
        """See Guard: a verdict that was cut is asked for again."""
        if ask.mode is Mode.DIRECT or self.fields.thought is None:
            return None
        start = self.start(ask, text)
        if start is None:
            return f"{text.rstrip()}\n{self.fields.thought.close.lstrip()}"
        return start if self.read(ask, text) == UNPARSABLE else None


def read_guard(path: Path) -> Guard:
    """The format that a file describes, tried in every way in which it can be asked.

    Raises:
        JaxguardError: unknown, missing or ill-typed field; a template that does not render, or leaves a text out.
    """
    fields = validate(GuardFormatDefinition, read_yaml(path), str(path))
    written = Written(fields, f"{path}: {'chat' if fields.text is None else 'text'}")
    trials = list(_trials(written))
    shown = {tuple(mark in text for mark in _PARTS) for question, text in trials if question != "response_refusal"}
    if not any(shown <= {(whole,) * len(_PARTS)} for whole in (True, False)):
        raise JaxguardError(
            f"{written.where}: must show, for every question about harm, either all of a policy (categories with their "
            "descriptions, rules, allowed; {{ policy }} holds them all), or nothing of it"
        )
    thought = () if fields.thought is None else (fields.thought.open.strip(), fields.thought.close.strip())
    tags = tuple(sorted({*thought, *(tag for _, text in trials for tag in _tags(text))}))
    headings = {
        *(one.label for one in fields.verdicts if one.label),
        *(h for _, text in trials for h in _headings(text)),
    }
    takes_policy = all(map(all, shown))
    clash = next((tag for tag in tags if "\\" in tag or len(tag) < 2), None)
    if clash is not None:
        raise JaxguardError(f"{path}: texts cannot be told from {clash!r}: use a longer mark without a backslash")
    return Guard(
        name=fields.name,
        asks=tuple(one.question for one in fields.verdicts),
        turn=written.turn,
        read=written.read,
        steps=written.steps,
        own_categories=not takes_policy,
        takes_policy=takes_policy,
        ends=fields.ends,
        tags=tags,
        headings=tuple(sorted(headings)),
        start=written.start,
        modes=tuple(Mode(mode) for mode in fields.modes),
        thinks=frozenset() if fields.thought is None else frozenset({Mode.REASONING}),
        closed=written.closed,
        judges_prompt_alone=fields.prompt_alone,
    )


def _trials(written: Written) -> Iterator[tuple[Question, str]]:
    """Question and prompt, in every way in which it can be asked, with marks in place of the texts."""
    fields = written.fields
    for question in (one.question for one in fields.verdicts):
        alone = (None,) if fields.prompt_alone else (None, _RESPONSE)
        for response in alone if question == "prompt_harm" else (_RESPONSE,):
            for mode in fields.modes:
                ask = Request(Example("a trial", "trial", _PROMPT, response), question, Mode(mode))
                turn = written.turn(Quoted(_PROMPT, response, _POLICY), ask)
                text = turn if isinstance(turn, str) else turn[0][0]["content"]
                for name, mark in (("prompt", _PROMPT), ("response", response)):
                    if mark is not None and mark not in text:
                        raise JaxguardError(
                            f"{written.where}: does not show {{{{ {name} }}}} as it is where question is {question}"
                        )
                yield question, text


_SECTION = re.compile(r"<[^<>\n]{1,80}>|\[[^\[\]\n]{1,80}\]")
_HEADING = re.compile(r"[\W_]*([^\W_][^:]{0,80}?)\s*:")


def _tags(text: str) -> Iterator[str]:
    """Marks such as <END> and [/INST], and lines that open like a mark: `# Policy`, `---`."""
    found: Iterable[str] = chain(_SECTION.findall(text), text.split("\n"))
    for one in (mark.strip() for mark in found):
        if len(one) > 2 and not one[0].isalnum() and one[-1] != ":" and _MARK not in one:
            yield one


def _headings(text: str) -> Iterator[str]:
    """What lines open with, before a colon."""
    for line in text.split("\n"):
        found = _HEADING.match(line)
        if found and _MARK not in found[1]:
            yield found[1]
