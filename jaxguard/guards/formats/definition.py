"""What defines a format: its verdict lines, where they are decided, and all else of an external guard, also as users write it.

A user's YAML file becomes an ExternalGuard; see docs/guards.md. No text that is judged may spell what the rendered prompt holds
besides the texts: sections, headings, labels, reasoning tags.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, Self

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from jaxguard.config.base import Schema, first_repeated
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Category, Policy, Question
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, UNPARSABLE, DecisionPoint, Request
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import read_yaml

Chat = tuple[list[dict[str, str]], dict[str, Any]]
"""Messages for a checkpoint's chat template, and options that it takes."""


def _no_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("put the word in quotes: YAML reads yes and no as true and false")
    return value


OneLine = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, pattern=r"^[^\n]+$")]
Word = Annotated[OneLine, BeforeValidator(_no_boolean)]


class VerdictLine(Schema):
    """The answer to one question."""

    question: Question
    label: Annotated[str, StringConstraints(strip_whitespace=True, pattern=r"^[^\n:]*$")] = ""
    """What its line begins with, before a colon; without one the line is the word alone."""
    positive: tuple[Word, ...] = Field(min_length=1)
    """Words for harmful, or for a refusal. Case matters for the probability, not for parsing."""
    negative: tuple[Word, ...] = Field(min_length=1)
    """Words for unharmful, or for compliance; the probability holds the positive ones against the first."""
    absent: tuple[Word, ...] = ()
    """What the line says where no response is shown; without, there is no such line then."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        words = [word.lower() for word in (*self.positive, *self.negative, *self.absent)]
        if (repeated := first_repeated(words)) is not None:
            raise ValueError(f"{self.question}: {repeated!r} is given twice (case does not tell words apart)")
        first = self.negative[0]
        if any(word.startswith(first) or first.startswith(word) for word in self.positive):
            raise ValueError(f"{self.question}: one of {first!r} and {self.positive} begins with the other")
        if self.absent and self.question == "prompt_harm":
            raise ValueError("absent is for questions about the response")
        return self


Lines = Sequence[tuple[VerdictLine, tuple[str, ...]]]
"""The lines of an answer in order, each with the words that it may say in place of a verdict."""


def decision_tree(
    prompt: Sequence[int],
    start: str,
    lines: Lines,
    questions: Iterable[Question],
    tokens: Callable[[str], Sequence[int]],
    end: str = "",
) -> list[DecisionPoint]:
    """Find where an answer decides its words, up to the last of `questions`, on every path through the lines before.

    The answer is `start`, its lines and `end`; a line that may say something else in place of a verdict does. Where several
    words are positive, each is compared with the negative one. What follows are then not quite exclusive decisions, so the
    probability is a little above that of the words together.
    """
    points: list[DecisionPoint] = []
    paths: list[tuple[str, tuple[tuple[DecisionPoint, bool], ...]]] = [(start, ())]
    last = max((i for i, (line, _) in enumerate(lines) if line.question in questions), default=-1)
    for i, (line, instead) in enumerate(lines[: last + 1]):
        label = ("\n" if i else "") + (f"{line.label}: " if line.label else "")
        if instead:
            paths = [(f"{before}{label}{instead[0]}", earlier) for before, earlier in paths]
            continue
        longer, decided = [], len(points)
        for before, earlier in paths:
            forks = set()
            negative = tokens(f"{before}{label}{line.negative[0]}{end}")
            for word in line.positive:
                positive = tokens(f"{before}{label}{word}{end}")
                differ = (j for j, pair in enumerate(zip(positive, negative, strict=False)) if pair[0] != pair[1])
                at = next(differ, None)
                if at is None:  # one is the beginning of the other
                    return points[:decided]
                point = DecisionPoint((*prompt, *positive[:at]), positive[at], negative[at], line.question, earlier)
                if point.key not in forks:  # as "Yes" and "Yes." share one
                    forks.add(point.key)
                    points.append(point)
                    longer.append((f"{before}{label}{word}", (*earlier, (point, True))))
                    earlier = (*earlier, (point, False))
            longer.append((f"{before}{label}{line.negative[0]}", earlier))
        paths = longer
    return points


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
        not open with its tag, and a cut verdict is not sampled again.
        """

        def opened(text: str) -> bool:
            return not strict or text.lstrip().startswith(opening)

        def end(text: str) -> tuple[str, str] | None:
            before, tag, verdict = text.partition(closing.strip())
            one = closing.strip() not in verdict and opening not in before.lstrip().removeprefix(opening)
            return (before + closing.lstrip(), verdict) if tag and one and opened(text) else None

        def close(text: str) -> str | None:
            closed = f"{text.rstrip()}\n{closing.lstrip()}"
            return closed if end(closed) else None

        return cls(end, close, retry=not strict)


@dataclass(frozen=True)
class ExternalGuard:
    """The format of an external guard. Functions of a request get one with a single question.

    Attributes:
        verdicts: the lines of an answer in order, if each has a label of its own; else an answer has the line of its question.
        turn: a request with quoted texts and a quoted policy -> the text to be tokenized, or the chat messages and options for
            the checkpoint's chat template. A response that is not to be shown is None.
        ends: tokens that end an answer, besides the tokenizer's own.
        tags: what no text may spell, whatever its case and spacing.
        headings: what no line of a text may open with, before a colon.
        takes_policy: it can be shown a policy; else it judges by categories of its own.
        categories: what stands around its own categories in the prompt, if a policy's can take their place.
        prompt_alone: a question about the prompt is asked without the response.
        modes, reasoning: in which it can be prompted; how it reasons in mode reasoning.
        opening: what an answer begins with where the prompt does not end a line.
        parse_verdict: for answers that are not just verdict lines: POSITIVE, NEGATIVE or UNPARSABLE.
        locate: the answer up to the verdict line, where that is known only from an answer; None if it is not there.
    """

    name: str
    verdicts: tuple[VerdictLine, ...]
    turn: Callable[[Request, Policy], str | Chat]
    ends: tuple[str, ...]
    tags: tuple[str, ...]
    headings: tuple[str, ...]
    takes_policy: bool = True
    categories: tuple[str, str] | None = None
    prompt_alone: bool = False
    modes: tuple[Mode, ...] = (Mode.DIRECT,)
    reasoning: Reasoning | None = None
    opening: str = ""
    parse_verdict: Callable[[Request, str], int] | None = None
    locate: Callable[[Request, str], str | None] | None = None

    @property
    def together(self) -> bool:
        """Whether an answer has all lines."""
        return len({line.label.lower() for line in self.verdicts}) == len(self.verdicts) > 1

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
        if not self.together:
            return [(line, ()) for line in self.verdicts if line.question == request.question]
        if self.shows_response(request):
            return [(line, ()) for line in self.verdicts]
        return [(line, line.absent) for line in self.verdicts if line.absent or line.question == "prompt_harm"]

    def reasoning_in(self, mode: Mode) -> Reasoning | None:
        """How an answer reasons in a mode; a guard that always reasons does so in any."""
        return self.reasoning if mode is Mode.REASONING or Mode.DIRECT not in self.modes else None

    def split(self, request: Request, text: str) -> tuple[str, str] | None:
        """(an answer up to its verdict, the verdict); None if it does not get there."""
        reasoning = self.reasoning_in(request.mode)
        return ("", text) if reasoning is None else reasoning.end(text)

    def parse(self, request: Request, text: str) -> int:
        """POSITIVE, NEGATIVE or UNPARSABLE: whatever is not exactly an answer of the format."""
        parts = self.split(request, text)
        if parts is None:
            return UNPARSABLE
        if self.parse_verdict is not None:
            return self.parse_verdict(request, parts[1])
        lines, written, verdict = self.lines(request), filled_lines(parts[1]), UNPARSABLE
        if len(written) != len(lines):
            return UNPARSABLE
        for (line, instead), content in zip(lines, written, strict=True):
            label, colon, word = content.partition(":") if line.label else ("", ":", content)
            states = dict.fromkeys(map(str.lower, instead), UNPARSABLE)
            states |= dict.fromkeys(map(str.lower, line.negative), NEGATIVE)
            states |= dict.fromkeys(map(str.lower, line.positive), POSITIVE)
            state = states.get(word.strip().lower())
            if not colon or " ".join(label.split()).lower() != line.label.lower() or state is None:
                return UNPARSABLE
            verdict = state if line.question == request.question else verdict
        return verdict

    def close_reasoning(self, request: Request, text: str) -> str | None:
        """An answer that ran out of tokens, ready for the verdict; None if it has one, or cannot be closed."""
        reasoning = self.reasoning_in(request.mode)
        if reasoning is None:
            return None
        parts = reasoning.end(text)
        if parts is None:
            return reasoning.close(text)
        return parts[0] if reasoning.retry and self.parse(request, text) == UNPARSABLE else None


def filled_lines(text: str) -> list[str]:
    """The lines that are not blank, without outer white space."""
    return [line for raw in text.split("\n") if (line := raw.strip())]


def numbered(policy: Policy) -> str:
    """A policy as a numbered list, whose last item are its rules, if any; then what it allows."""
    items = [(c.name.rstrip("."), c.description) for c in policy.categories]
    if policy.rules.strip():
        items.append(("Against further rules" if items else "Against the rules", policy.rules.strip()))
    lines = [f"S{i}: {name}.{f' {text}' if text else ''}" for i, (name, text) in enumerate(items, 1)]
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
_HEADING = re.compile(r"[\W_]*([^\W_][^:]{0,80}?)\s*:")


class ReasoningTagsDefinition(Schema):
    """The tags around the reasoning."""

    open: OneLine
    close: Annotated[str, StringConstraints(pattern=r"\S")]
    """With the white space up to the verdict. What follows it is parsed; an answer that holds it twice is unparsable."""


class GuardFormatDefinition(Schema):
    """A guard's format as written in YAML."""

    name: OneLine
    description: str = ""
    """For people."""
    chat: str | None = None
    """Jinja template of the user message, which the checkpoint's chat template then renders; or"""
    text: str | None = None
    """of the whole text that the answer follows, special tokens included."""
    verdicts: tuple[VerdictLine, ...] = Field(min_length=1)
    """The questions it answers. Where labels differ, an answer has all these lines in this order; where they are the same or left
    out, it has only that of the question."""
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
        tags = {form.reasoning.open.strip(), form.reasoning.close.strip()}
    headings = {line.label for line in form.verdicts if line.label}
    for _, text in trials:
        lines = text.split("\n")
        # Sections, and lines such as `# Policy` and `---`.
        marks = {mark.strip() for mark in (*_SECTION.findall(text), *lines) if _MARK not in mark}
        tags |= {mark for mark in marks if len(mark) > 2 and not mark[0].isalnum() and mark[-1] != ":"}
        headings |= {opens[1] for line in lines if (opens := _HEADING.match(line)) and _MARK not in opens[1]}
    clash = next((tag for tag in sorted(tags) if "\\" in tag or len(tag) < 2), None)
    if clash is not None:
        raise JaxguardError(
            f"{path}: texts cannot be distinguished from {clash!r}: use a longer mark without a backslash"
        )
    return ExternalGuard(
        name=form.name,
        verdicts=form.verdicts,
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
    try:
        text = _JINJA.from_string(form.chat or form.text or "").render(
            prompt=request.example.prompt,
            response=request.example.response,
            question=request.question,
            mode=str(request.mode),
            policy=numbered(policy),
            categories=[{"name": category.name, "description": category.description} for category in policy.categories],
            rules=policy.rules,
            allowed=list(policy.allowed),
        )
    except Exception as error:  # jinja's errors, and whatever the template's expressions raise
        raise JaxguardError(f"{where}: does not render: {error}") from None
    return text if form.chat is None else ([{"role": "user", "content": text.strip()}], {})


def _trials(form: GuardFormatDefinition, where: str) -> Iterator[tuple[Question, str]]:
    """Question and prompt, in every way in which it can be prompted, with marks in place of the texts."""
    for question in (line.question for line in form.verdicts):
        alone = (None,) if form.prompt_alone else (None, _RESPONSE)
        responses = alone if question == "prompt_harm" else (_RESPONSE,)
        for response, mode in product(responses, form.modes):
            request = Request(Example("a trial", "trial", _PROMPT, response), (question,), mode)
            turn = _turn(form, where, request, _POLICY)
            text = turn if isinstance(turn, str) else turn[0][0]["content"]
            for name, mark in (("prompt", _PROMPT), ("response", response)):
                if mark is not None and mark not in text:
                    raise JaxguardError(f"{where}: does not show {{{{ {name} }}}} as is where question is {question}")
            yield question, text
