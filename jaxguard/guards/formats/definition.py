"""What defines the format of an external guard: its prompt, its verdict lines, and where its reasoning ends."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Policy, Question
from jaxguard.guards.formats.schema import VerdictDefinition
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, UNPARSABLE, Request

Chat = tuple[list[dict[str, str]], dict[str, Any]]
"""Messages for a checkpoint's chat template, and options that it takes."""

ALLOWED = "Allowed, even where the above seems to forbid it:"
"""Opens the list of what a policy allows."""


@dataclass(frozen=True)
class Quoted:
    """The texts of a request, with every string broken that could act as part of the format.

    Attributes:
        prompt: what the user wrote.
        response: the answer to it, if there is one and the format shows it for this question.
        policy: by which to judge; a guard with categories of its own may be prompted with those instead.
    """

    prompt: str
    response: str | None
    policy: Policy


class Step(NamedTuple):
    """A point at which an answer continues with one of two words: `lead` precedes them, `also` are further positive ones."""

    lead: str
    positive: str
    negative: str
    also: tuple[str, ...]
    question: Question


@dataclass(frozen=True)
class Reasoning:
    """How an answer reasons before its verdict.

    Attributes:
        modes: in which it does.
        end: an answer -> (itself up to the verdict, the verdict); None while it reasons, or if it is malformed.
        close: an unfinished answer -> itself with its reasoning closed; None if it cannot be.
        retry: sample a verdict that was cut, or is malformed, once more.
    """

    modes: frozenset[Mode]
    end: Callable[[str], tuple[str, str] | None]
    close: Callable[[str], str | None]
    retry: bool = False


def reasoning_tags(opening: str, closing: str, *, strict: bool) -> Reasoning:
    """Reasoning between two tags; the white space up to the verdict belongs to `closing`.

    Args:
        opening: the tag before it.
        closing: the tag after it.
        strict: an answer that does not open with its tag is malformed, and a cut verdict is not sampled again.
    """

    def opened(text: str) -> bool:
        return not strict or text.lstrip().startswith(opening)

    def end(text: str) -> tuple[str, str] | None:
        before, tag, verdict = text.rpartition(closing.strip())
        return (before + closing.lstrip(), verdict) if tag and opened(text) else None

    def close(text: str) -> str | None:
        return f"{text.rstrip()}\n{closing.lstrip()}" if opened(text) else None

    return Reasoning(frozenset({Mode.REASONING}), end, close, retry=not strict)


@dataclass(frozen=True)
class ExternalGuard:
    """The format of an external guard.

    Attributes:
        name: of the models that use it.
        verdicts: the questions that it answers, with label and words of each verdict line, in the order of an answer.
        turn: the text to be tokenized, or the chat messages and options for the checkpoint's chat template.
        ends: tokens that end an answer, besides the tokenizer's own.
        tags: what no text may spell, whatever its case and spacing.
        headings: what no line of a text may open with, before a colon.
        together: an answer has all verdict lines; else only that of the question.
        takes_policy: it can be shown a policy.
        own_categories: it was trained on categories of its own.
        prompt_alone: a question about the prompt is asked without the response.
        modes: in which it can be prompted.
        reasoning: None if it never reasons.
        opening: what an answer begins with where the prompt does not end a line.
        parse_verdict: for answers that are not just verdict lines: POSITIVE, NEGATIVE or UNPARSABLE.
        locate: the answer up to the verdict line, where that is known only from an answer; None if it is not there.
    """

    name: str
    verdicts: tuple[VerdictDefinition, ...]
    turn: Callable[[Quoted, Request], str | Chat]
    ends: tuple[str, ...]
    tags: tuple[str, ...]
    headings: tuple[str, ...]
    together: bool = False
    takes_policy: bool = True
    own_categories: bool = False
    prompt_alone: bool = False
    modes: tuple[Mode, ...] = (Mode.DIRECT,)
    reasoning: Reasoning | None = None
    opening: str = ""
    parse_verdict: Callable[[Request, str], int] | None = None
    locate: Callable[[Request, str], str | None] | None = None

    @property
    def questions(self) -> tuple[Question, ...]:
        """What it answers."""
        return tuple(line.question for line in self.verdicts)

    def shows_response(self, request: Request) -> bool:
        """Whether the prompt of a request with one question holds the response."""
        return request.example.response is not None and not (
            self.prompt_alone and request.questions == ("prompt_harm",)
        )

    def parse(self, request: Request, text: str) -> int:
        """POSITIVE, NEGATIVE or UNPARSABLE, for a request with one question."""
        ended = self._end(request, text)
        if ended is None:
            return UNPARSABLE
        if self.parse_verdict is not None:
            return self.parse_verdict(request, ended[1])
        lines = self._lines(request)
        allowed = [{word.lower() for word in (*line.positive, *line.negative, *absent)} for line, absent in lines]
        words = parse_lines(ended[1], [line.label for line, _ in lines], allowed)
        for (line, _), word in zip(lines, words or (), strict=False):
            if (line.question,) == request.questions:
                return verdict_of(word, line.positive, line.negative)
        return UNPARSABLE

    def close_reasoning(self, request: Request, text: str) -> str | None:
        """An answer that ran out of tokens, ready for the verdict; None if it has one, or cannot be closed."""
        if self.reasoning is None or request.mode not in self.reasoning.modes:
            return None
        ended = self.reasoning.end(text)
        if ended is None:
            return self.reasoning.close(text)
        return ended[0] if self.reasoning.retry and self.parse(request, text) == UNPARSABLE else None

    def start(self, request: Request, text: str) -> str | None:
        """The answer up to where the verdict begins; None if it does not get there."""
        if self.locate is not None:
            return self.locate(request, text)
        ended = self._end(request, text)
        return None if ended is None else ended[0]

    def steps(self, request: Request) -> tuple[Step, ...]:
        """From the start to the verdict of the request's question, one word after another."""
        steps, lead = [], ""
        for i, (line, absent) in enumerate(self._lines(request)):
            lead += ("\n" if i else "") + (f"{line.label}: " if line.label else "")
            if absent:
                lead += absent[0]
                continue
            steps.append(Step(lead, line.positive[0], line.negative[0], line.positive[1:], line.question))
            lead = ""
            if (line.question,) == request.questions:
                break
        return tuple(steps)

    def _end(self, request: Request, text: str) -> tuple[str, str] | None:
        if self.reasoning is None or request.mode not in self.reasoning.modes:
            return "", text
        return self.reasoning.end(text)

    def _lines(self, request: Request) -> list[tuple[VerdictDefinition, tuple[str, ...]]]:
        """The lines of an answer, each with the words that it may hold instead where no response is shown."""
        if not self.together:
            return [(line, ()) for line in self.verdicts if (line.question,) == request.questions]
        if self.shows_response(request):
            return [(line, ()) for line in self.verdicts]
        return [(line, line.absent) for line in self.verdicts if line.absent or line.question == "prompt_harm"]


def numbered(policy: Policy) -> str:
    """A policy as a numbered list, whose last item are its rules, if any; then what it allows."""
    items = [(c.name.rstrip("."), c.description) for c in policy.categories]
    if policy.rules.strip():
        items.append(("Against the rules" if not items else "Against further rules", policy.rules.strip()))
    lines = [f"S{i}: {name}.{f' {text}' if text else ''}" for i, (name, text) in enumerate(items, 1)]
    # Without a number: it is no category.
    allowed = [ALLOWED, *(f"- {text}" for text in policy.allowed)] if policy.allowed else []
    return "\n".join([*lines, *allowed])


def parse_lines(text: str, titles: Sequence[str], allowed: Sequence[Collection[str]]) -> list[str] | None:
    """The words of an answer of exactly these lines, `title: word`, in lower case; None for any other answer.

    Without a title the line is the word.
    """
    lines = filled_lines(text)
    if len(lines) != len(titles):
        return None
    parsed = []
    for line, title, words in zip(lines, titles, allowed, strict=True):
        head, colon, word = line.partition(":") if title else ("", ":", line)
        if not colon or " ".join(head.split()).lower() != title.lower() or word.strip().lower() not in words:
            return None
        parsed.append(word.strip().lower())
    return parsed


def filled_lines(text: str) -> list[str]:
    """The lines that are not blank, without outer white space."""
    return [line for raw in text.split("\n") if (line := raw.strip())]


def verdict_of(word: str, positive: Collection[str], negative: Collection[str]) -> int:
    """Whether a word is one of the positive or the negative words, whatever its case."""
    folded = word.lower()
    if folded in {each.lower() for each in positive}:
        return POSITIVE
    return NEGATIVE if folded in {each.lower() for each in negative} else UNPARSABLE
