"""What defines the format of an external guard, also as users write it.

A user's YAML file becomes an ExternalGuard; see docs/guards.md. No text that is judged may spell what the rendered prompt holds
besides the texts: sections, headings, labels, reasoning tags.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, Self

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import Field, StringConstraints, model_validator

from jaxguard.config.base import Schema, first_repeated
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Category, Policy, Question
from jaxguard.guards.formats.grammar import PLAIN, Layout, Lines, OneLine, VerdictLine, decided_parts, read_answer
from jaxguard.guards.protocol import UNPARSABLE, Request
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import read_yaml

GENERAL: Final = ("wildguard", "wildguard_names", "aegis2", "aegis2_names", "demo")
"""Policies of harm in general, by name."""
Chat = tuple[list[dict[str, str]], dict[str, Any]]
"""Messages for a checkpoint's chat template, and options that it takes: texts that it shows, and switches, which are one word."""


class Reasoning(NamedTuple):
    """How an answer reasons before its verdict, in reasoning mode.

    Attributes:
        end: an answer -> (itself up to the verdict, the verdict); None while it reasons, or if it is malformed.
        close: an unfinished answer -> itself with its reasoning closed; None if it cannot be.
        retry: sample a verdict that was cut, or is malformed, once more.
    """

    end: Callable[[str], tuple[str, str] | None]
    close: Callable[[str], str | None]
    retry: bool = False

    @classmethod
    def tags(cls, opening: str, closing: str, *, strict: bool) -> Self:
        """Reasoning between two tags; the white space up to the verdict belongs to `closing`.

        It is one block: an answer with two closings, or with text before the opening, is malformed. If strict, so is one that does
        not open with its tag, and a cut verdict is not sampled again. Without an opening it begins with the answer.
        """

        def opened(text: str) -> bool:
            return not strict or text.lstrip().startswith(opening)

        def end(text: str) -> tuple[str, str] | None:
            before, tag, verdict = text.partition(closing.strip())
            again = opening and opening in before.lstrip().removeprefix(opening)
            one = closing.strip() not in verdict and not again
            return (before + closing.lstrip(), verdict) if tag and one and opened(text) else None

        def close(text: str) -> str | None:
            closed = f"{text.rstrip()}\n{closing.lstrip()}"
            return closed if end(closed) else None

        return cls(end, close, retry=not strict)


@dataclass(frozen=True)
class ExternalGuard:
    """The format of an external guard. Functions of a request get one with a single question.

    Attributes:
        verdicts: the lines of an answer in order, if each has a label of its own; else an answer has those about what is asked, the
            prompt or the response, if each of these has; else that of its question.
        layout: how the lines are written.
        turn: a request with quoted texts and a quoted policy -> the text to be tokenized, or the chat messages and options for
            the checkpoint's chat template. A response that is not to be shown is None.
        ends: tokens that end an answer, besides the tokenizer's own.
        tags: what no text may spell, whatever its case and spacing.
        headings: what no line of a text may open with, before a colon.
        takes_policy: it can be shown a policy; else it judges by categories of its own.
        categories: what stands around its own categories in the prompt, if a policy's can take their place.
        prompt_alone: a question about the prompt is asked without the response.
        explains: it would explain its verdict after it: no more is sampled than the verdict.
        modes, reasoning: in which it can be prompted; how it reasons in mode reasoning.
        opening: what an answer begins with where the prompt does not end a line.
    """

    name: str
    verdicts: tuple[VerdictLine, ...]
    turn: Callable[[Request, Policy], str | Chat]
    ends: tuple[str, ...]
    tags: tuple[str, ...]
    headings: tuple[str, ...]
    layout: Layout = PLAIN
    takes_policy: bool = True
    categories: tuple[str, str] | None = None
    prompt_alone: bool = False
    explains: bool = False
    modes: tuple[Mode, ...] = (Mode.DIRECT,)
    reasoning: Reasoning | None = None
    opening: str = ""

    @property
    def together(self) -> bool:
        """Whether an answer has all lines."""
        return len(self.verdicts) > 1 and _told_apart(self.verdicts)

    @property
    def questions(self) -> tuple[Question, ...]:
        """What it answers."""
        return tuple(line.question for line in self.verdicts)

    def shows_response(self, request: Request) -> bool:
        """Whether the prompt holds the response."""
        alone = self.prompt_alone and request.questions == ("prompt_harm",)
        return request.example.response is not None and not alone

    def lines(self, request: Request) -> Lines:
        """The lines of an answer."""
        if self.together:
            if self.shows_response(request):
                return tuple((line, ()) for line in self.verdicts)
            return tuple((line, line.absent) for line in self.verdicts if line.absent or line.question == "prompt_harm")
        about_prompt = request.question == "prompt_harm"
        part = tuple(line for line in self.verdicts if (line.question == "prompt_harm") is about_prompt)
        return tuple((line, ()) for line in part if _told_apart(part) or line.question == request.question)

    def reasoning_in(self, mode: Mode) -> Reasoning | None:
        """How an answer reasons in a mode; a guard that always reasons does so in any."""
        return self.reasoning if mode is Mode.REASONING or Mode.DIRECT not in self.modes else None

    def split(self, request: Request, text: str) -> tuple[str, str] | None:
        """(an answer up to its verdict, the verdict); None if it does not get there."""
        reasoning = self.reasoning_in(request.mode)
        return ("", text) if reasoning is None else reasoning.end(text)

    def parse(self, request: Request, text: str, policy_names: tuple[str, ...] = ()) -> int:
        """POSITIVE, NEGATIVE or UNPARSABLE: whatever is not exactly an answer of the format.

        Of a policy that was shown, it may name the categories.
        """
        parts = self.split(request, text)
        answer = None if parts is None else read_answer(parts[1], self.lines(request), self.layout, policy_names)
        return UNPARSABLE if answer is None else answer[0].get(request.question, UNPARSABLE)

    def decided(self, request: Request, text: str, policy_names: tuple[str, ...]) -> Iterator[tuple[str, Lines]]:
        """See decided_parts; nothing if the answer does not get to its verdict."""
        if (parts := self.split(request, text)) is not None:
            yield from decided_parts(*parts, self.lines(request), self.layout, policy_names)

    def close_reasoning(self, request: Request, text: str, policy_names: tuple[str, ...] = ()) -> str | None:
        """An answer that ran out of tokens, ready for the verdict; None if it has one, or cannot be closed."""
        reasoning = self.reasoning_in(request.mode)
        if reasoning is None:
            return None
        parts = reasoning.end(text)
        if parts is None:
            return reasoning.close(text)
        return parts[0] if reasoning.retry and self.parse(request, text, policy_names) == UNPARSABLE else None


def _told_apart(lines: tuple[VerdictLine, ...]) -> bool:
    """Whether each line has a label of its own."""
    return len({line.label.lower() for line in lines}) == len(lines)


def policy_items(policy: Policy) -> list[tuple[str, str]]:
    """(name, text) of each category of a policy, whose last one are its rules, if any."""
    items = [(c.name.rstrip("."), c.description) for c in policy.categories]
    if policy.rules.strip():
        items.append(("Against further rules" if items else "Against the rules", policy.rules.strip()))
    return items


def numbered(policy: Policy) -> str:
    """A policy as a numbered list; then what it allows."""
    lines = [f"S{i}: {name}.{f' {text}' if text else ''}" for i, (name, text) in enumerate(policy_items(policy), 1)]
    if policy.allowed:  # without a number: it is no category
        lines += ["Allowed, even where the above seems to forbid it:", *(f"- {text}" for text in policy.allowed)]
    return "\n".join(lines)


# As in transformers; a name that the template makes up is an error.
_JINJA: Final = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
)
# Stand for the texts when a template is tried.
_MARK: Final = "jaxguard"
_PROMPT, _RESPONSE = f"{_MARK}prompt", f"{_MARK}response"
_PARTS: Final = tuple(f"{_MARK}{part}" for part in ("category", "description", "rules", "allowed"))
_POLICY: Final = Policy("trial", (Category(_PARTS[0], _PARTS[1]),), _PARTS[2], allowed=_PARTS[3:])
# Marks such as <END> and [/INST], and what a line opens with before a colon.
_SECTION = re.compile(r"<[^<>\n]{1,80}>|\[[^\[\]\n]{1,80}\]")
_HEADING = re.compile(r"[\W_]*?(['\"]?[^\W_][^:]{0,80}?)\s*:")


class ReasoningTagsDefinition(Schema):
    """The tags around the reasoning."""

    open: Annotated[str, StringConstraints(strip_whitespace=True, pattern=r"^[^\n]*$")] = ""
    """Without one, reasoning begins with the answer."""
    close: Annotated[str, StringConstraints(pattern=r"\S")]
    """With the white space up to the verdict. What follows it is parsed; an answer that holds it twice is unparsable."""


class GuardFormatDefinition(Schema):
    """A guard's format as written in YAML."""

    name: OneLine
    description: str = ""
    """For people."""
    chat: str | None = None
    """Jinja template of the user message, which the checkpoint's chat template then renders, without outer white space unless it is
    written without a last newline (`|-`); or"""
    text: str | None = None
    """of the whole text that the answer follows, special tokens included."""
    system: str | None = None
    """Template of a system message before that of the user, with `chat`."""
    verdicts: tuple[VerdictLine, ...] = Field(min_length=1)
    """The questions it answers. Where labels differ, an answer has all these lines in this order; where they are the same or left
    out, it has only that of the question."""
    layout: Layout = PLAIN
    """How they are written: what stands around them, and whether they are lines or JSON."""
    explains: bool = False
    """It would explain its verdict after it: no more is sampled than the verdict."""
    prompt_alone: bool = True
    """A question about the prompt is asked without the response."""
    modes: tuple[Mode, ...] = Field((Mode.DIRECT,), min_length=1)
    reasoning: ReasoningTagsDefinition | None = None
    ends: tuple[OneLine, ...] = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "</s>")
    """Tokens that end an answer, besides the tokenizer's own; those that it does not have do not count."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.chat is None) == (self.text is None):
            raise ValueError("give either chat or text")
        if self.system is not None and self.chat is None:
            raise ValueError("system goes with chat; text holds all of a prompt")
        if (Mode.REASONING in self.modes) != (self.reasoning is not None):
            raise ValueError("mode reasoning and the tags in reasoning go together: give both or none")
        questions = [line.question for line in self.verdicts]
        if (repeated := first_repeated(questions)) is not None:
            raise ValueError(f"verdicts: question {repeated!r} is given twice")
        labels = {line.label.lower() for line in self.verdicts}
        if len(labels) not in (1, len(questions)) or (len(labels) > 1 and "" in labels):
            raise ValueError("verdicts: give every question a label of its own, or all the same, or none")
        return self


def read_guard(path: Path) -> ExternalGuard:
    """The format that a file describes, tried in every way in which it can be prompted.

    JaxguardError: unknown, missing or ill-typed field; a template that does not render, or leaves a text out.
    """
    form = read_yaml(path, GuardFormatDefinition)
    where = f"{path}: {'chat' if form.text is None else 'text'}"
    trials = list(_trials(form, where))
    policies = {tuple(mark in text for mark in _PARTS) for question, text in trials if question != "response_refusal"}
    takes_policy = all(map(all, policies))
    if not takes_policy and any(map(any, policies)):
        raise JaxguardError(
            f"{where}: must show, for every question about harm, either all of a policy (categories with their "
            "descriptions, rules, allowed; {{ policy }} holds them all), or nothing of it"
        )
    reasoning, tags = None, set[str]()
    if form.reasoning is not None:
        reasoning = Reasoning.tags(form.reasoning.open, form.reasoning.close, strict=False)
        tags = {form.reasoning.open, form.reasoning.close.strip()} - {""}
    written = [line for verdict in form.verdicts for line in (verdict, verdict.categories) if line is not None]
    headings = {line.label for line in written} - {""}
    for _, text in trials:
        lines = text.split("\n")
        # Sections, and lines such as `# Policy` and `---`.
        marks = {mark.strip() for mark in (*_SECTION.findall(text), *lines) if _MARK not in mark}
        tags |= {mark for mark in marks if len(mark) > 2 and not mark[0].isalnum() and mark[-1] != ":"}
        opened = {opens[1] for line in lines if (opens := _HEADING.match(line)) and _MARK not in opens[1]}
        headings |= opened | {heading.strip("'\"") for heading in opened}
    clash = next((tag for tag in sorted(tags) if "\\" in tag or len(tag) < 2), None)
    if clash is not None:
        raise JaxguardError(
            f"{path}: texts cannot be distinguished from {clash!r}: use a longer mark without a backslash"
        )
    return ExternalGuard(
        name=form.name,
        verdicts=form.verdicts,
        layout=form.layout,
        explains=form.explains,
        turn=partial(_turn, form, where),
        takes_policy=takes_policy,
        ends=form.ends,
        tags=tuple(sorted(tags)),
        headings=tuple(sorted(headings)),
        modes=form.modes,
        reasoning=reasoning,
        prompt_alone=form.prompt_alone,
    )


def _turn(form: GuardFormatDefinition, where: str, request: Request, policy: Policy) -> str | Chat:
    """The text or messages of a request with one question; JaxguardError: the template does not render."""
    own = tuple(dict.fromkeys(name for line in form.verdicts if line.categories for name in line.categories.names))
    if own and policy.name in GENERAL:
        policy = Policy(policy.name, tuple(map(Category, own)))
    try:
        system, text = (
            _JINJA.from_string(template).render(
                prompt=request.example.prompt,
                response=request.example.response,
                question=request.question,
                mode=str(request.mode),
                policy=numbered(policy),
                categories=[
                    {"name": category.name, "description": category.description} for category in policy.categories
                ],
                rules=policy.rules,
                allowed=list(policy.allowed),
            )
            for template in (form.system or "", form.chat or form.text or "")
        )
    except Exception as error:  # jinja's errors, and whatever the template's expressions raise
        raise JaxguardError(f"{where}: does not render: {error}") from None
    if form.chat is None:
        return text
    text = text.strip() if form.chat.endswith("\n") else text
    messages = [{"role": "system", "content": system.strip()}, {"role": "user", "content": text}]
    return messages[form.system is None :], {}


def _trials(form: GuardFormatDefinition, where: str) -> Iterator[tuple[Question, str]]:
    """Question and prompt, in every way in which it can be prompted, with marks in place of the texts."""
    for question in (line.question for line in form.verdicts):
        alone = (None,) if form.prompt_alone else (None, _RESPONSE)
        responses = alone if question == "prompt_harm" else (_RESPONSE,)
        for response, mode in product(responses, form.modes):
            request = Request(Example("a trial", "trial", _PROMPT, response), (question,), mode)
            turn = _turn(form, where, request, _POLICY)
            text = turn if isinstance(turn, str) else "\n".join(message["content"] for message in turn[0])
            for name, mark in (("prompt", _PROMPT), ("response", response)):
                if mark is not None and mark not in text:
                    raise JaxguardError(f"{where}: does not show {{{{ {name} }}}} as is where question is {question}")
            yield question, text
