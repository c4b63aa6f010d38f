"""What defines a format: its verdict lines, where they are decided, and, of an external guard, all else that it needs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from jaxguard.config.base import Schema, first_repeated
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Policy, Question
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, UNPARSABLE, DecisionPoint, Request

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
    """What it answers."""
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
                pairs = enumerate(zip(positive, negative, strict=False))
                at = next((j for j, (a, b) in pairs if a != b), None)
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


def reasoning_tags(opening: str, closing: str, *, strict: bool) -> Reasoning:
    """Reasoning between two tags; the white space up to the verdict belongs to `closing`.

    If strict, an answer that does not open with its tag is malformed, and a cut verdict is not sampled again.
    """

    def opened(text: str) -> bool:
        return not strict or text.lstrip().startswith(opening)

    def end(text: str) -> tuple[str, str] | None:
        before, tag, verdict = text.rpartition(closing.strip())
        return (before + closing.lstrip(), verdict) if tag and opened(text) else None

    def close(text: str) -> str | None:
        return f"{text.rstrip()}\n{closing.lstrip()}" if opened(text) else None

    return Reasoning(end, close, retry=not strict)


@dataclass(frozen=True)
class ExternalGuard:
    """The format of an external guard. Functions of a request get one with a single question.

    Attributes:
        name: of the models that use it.
        verdicts: the lines of an answer, in order.
        turn: a request with quoted texts and a quoted policy -> the text to be tokenized, or the chat messages and options for
            the checkpoint's chat template. A response that is not to be shown is None.
        ends: tokens that end an answer, besides the tokenizer's own.
        tags: what no text may spell, whatever its case and spacing.
        headings: what no line of a text may open with, before a colon.
        together: an answer has all verdict lines; else only that of the question.
        takes_policy: it can be shown a policy; else it judges by categories of its own.
        categories: what stands around its own categories in the prompt, if a policy's can take their place.
        prompt_alone: a question about the prompt is asked without the response.
        modes: in which it can be prompted.
        reasoning: goes with mode reasoning.
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
    together: bool = False
    takes_policy: bool = True
    categories: tuple[str, str] | None = None
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

    def split(self, request: Request, text: str) -> tuple[str, str] | None:
        """(an answer up to its verdict, the verdict); None if it does not get there."""
        return ("", text) if self.reasoning is None or request.mode is Mode.DIRECT else self.reasoning.end(text)

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
        if self.reasoning is None or request.mode is Mode.DIRECT:
            return None
        parts = self.reasoning.end(text)
        if parts is None:
            return self.reasoning.close(text)
        return parts[0] if self.reasoning.retry and self.parse(request, text) == UNPARSABLE else None


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
