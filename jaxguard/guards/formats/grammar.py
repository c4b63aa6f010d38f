"""The grammar of a guard's answer: its lines, how they are written, which verdicts they state, and where these are decided.

lines + layout -> one pattern of the whole answer -> a verdict of each question, or None for anything else
               -> the points at which a verdict's word is decided
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise, product
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from jaxguard.config.base import Schema, first_repeated
from jaxguard.data.policies import Question
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, UNPARSABLE, DecisionPoint


def _no_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("put the word in quotes: YAML reads yes and no as true and false")
    return value


OneLine = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, pattern=r"^[^\n]+$")]
Word = Annotated[OneLine, BeforeValidator(_no_boolean)]
Label = Annotated[str, StringConstraints(strip_whitespace=True, pattern=r"^[^\n:]*$")]


class CategoryLine(Schema):
    """What a harmful answer violates: names, or codes such as S2, with commas between them."""

    label: Label = ""
    """What the line begins with, before a colon."""
    names: tuple[Word, ...] = ()
    """Of the guard's own categories; those of a policy that it is shown are known. Without names, it gives codes."""
    none: str = ""
    """What it says where nothing is harmful; without, there is no such line then."""
    optional: bool = False
    """A harmful answer may name none."""


class VerdictLine(Schema):
    """The answer to one question."""

    question: Question
    label: Label = ""
    """What its line begins with, before a colon; without one the line is the word alone."""
    positive: tuple[Word, ...] = Field(min_length=1)
    """Words for harmful, or for a refusal. Case matters for the probability, not for parsing."""
    negative: tuple[Word, ...] = Field(min_length=1)
    """Words for unharmful, or for compliance; the probability holds the positive ones against the first."""
    absent: tuple[Word, ...] = ()
    """What the line says where no response is shown; without, there is no such line then."""
    categories: CategoryLine | None = None
    """The line that follows. Where the next verdict has the same, it follows that one, and belongs to both."""

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


Lines = tuple[tuple[VerdictLine, tuple[str, ...]], ...]
"""The verdict lines of an answer in order, each with the words that it may say in place of a verdict."""


class Layout(Schema):
    """How the lines of an answer are written."""

    start: str = ""
    """What stands before them, with the white space up to the first."""
    end: str = ""
    """What stands after them."""
    style: Literal["lines", "json"] = "lines"
    """Lines of `label: word`, or the members of a JSON object."""

    @property
    def opening(self) -> str:
        """An answer up to its first line."""
        return self.start + ("{" if self.style == "json" else "")

    @property
    def closing(self) -> str:
        """An answer after its last line."""
        return ("}" if self.style == "json" else "") + self.end

    @property
    def separator(self) -> str:
        """What stands between two lines."""
        return ", " if self.style == "json" else "\n"

    def around(self, label: str) -> tuple[str, str]:
        """What stands before and after the word of a line."""
        return (f'"{label}": "', '"') if self.style == "json" else (f"{label}: " if label else "", "")


PLAIN = Layout()


def categories_after(lines: Lines, i: int) -> CategoryLine | None:
    """The line of categories that follows line `i`."""
    own = lines[i][0].categories
    return None if i + 1 < len(lines) and lines[i + 1][0].categories == own else own


def _loose(text: str, space: str) -> str:
    """Match a text, in lower case, with any white space around its words and signs."""
    pieces = [map(re.escape, piece.split()) for piece in re.findall(r"\w+(?:\s+\w+)*|[^\w\s]", text.lower())]
    return f"{space}*+" + "".join(f"{f'{space}++'.join(words)}{space}*+" for words in pieces)


@lru_cache(maxsize=256)
def _answer_pattern(lines: Lines, layout: Layout, policy_names: tuple[str, ...]) -> re.Pattern[str]:
    """Match a whole answer in lower case: group `v0` is the word of line 0, `c0` the categories after it."""
    json = layout.style == "json"
    blank, space = (r"[ \t\r\n]", " ") if json else (r"\s", r"[^\S\n]")
    separator = rf"{blank}*+,{blank}*+" if json else rf"{space}*+\n\s*+"

    def written(label: str, group: str, words: str) -> str:
        if json:
            return rf'{blank}*+"{re.escape(label.lower())}"{blank}*+:{blank}*+"(?P<{group}>{words})"{blank}*+'
        before, after = layout.around(label)
        return f"{_loose(before, space)}(?P<{group}>{words}){_loose(after, space)}"

    pattern = _loose(layout.opening, blank)
    for i, (line, instead) in enumerate(lines):
        words = "|".join(re.escape(word.lower()) for word in (*line.positive, *line.negative, *instead))
        pattern += (separator if i else "") + written(line.label, f"v{i}", words)
        if (categories := categories_after(lines, i)) is not None:
            known = sorted({*categories.names, *policy_names}, key=len, reverse=True) if categories.names else ()
            one = "|".join(_loose(name, space) for name in known) or r"s[0-9]{1,3}"
            names = rf"(?:{one})(?:{space}*+,{space}*+(?:{one}))*+"
            if categories.none:
                pattern += separator + written(
                    categories.label, f"c{i}", f"{names}|{re.escape(categories.none.lower())}"
                )
            else:
                pattern += f"(?:{separator}{written(categories.label, f'c{i}', names)})?"
    return re.compile(pattern + _loose(layout.closing, blank))


def read_answer(
    text: str, lines: Lines, layout: Layout = PLAIN, policy_names: tuple[str, ...] = ()
) -> tuple[dict[Question, int], dict[int, int]] | None:
    """Of each question its verdict, and line -> where the categories after it end; None if this is not exactly an answer.

    Case and white space do not matter. Categories are named beside a harmful verdict only, and unless they are optional there.
    """
    match = _answer_pattern(lines, layout, policy_names).fullmatch(text.lower())
    if match is None:
        return None
    verdicts: dict[Question, int] = {}
    ends: dict[int, int] = {}
    harmful = False
    for i, (line, _) in enumerate(lines):
        positive, negative = (match[f"v{i}"] in map(str.lower, words) for words in (line.positive, line.negative))
        verdicts[line.question] = POSITIVE if positive else NEGATIVE if negative else UNPARSABLE
        harmful = line.categories is not None and (harmful or positive)
        if (categories := categories_after(lines, i)) is not None:
            named = match[f"c{i}"] not in (None, categories.none.lower())
            if (named and not harmful) or (harmful and not (named or categories.optional)):
                return None
            ends[i], harmful = match.end(f"c{i}"), False
    return verdicts, ends


def whole_answers(lines: Lines, layout: Layout = PLAIN) -> list[str]:
    """Write every answer that states a verdict in each line, by its first word for it, and no categories."""
    words = [instead[:1] or (line.positive[0], line.negative[0]) for line, instead in lines]
    labels = [layout.around(line.label) for line, _ in lines]
    written = [[word.join(around) for word in own] for own, around in zip(words, labels, strict=True)]
    return [f"{layout.opening}{layout.separator.join(each)}{layout.closing}" for each in product(*written)]


def decided_parts(
    start: str, verdict: str, lines: Lines, layout: Layout, policy_names: tuple[str, ...]
) -> Iterator[tuple[str, Lines]]:
    """An answer up to lines that are decided one after the other, and these lines.

    The first follow `start`. Categories cannot be foreseen: what comes after them is known only from the answer's own verdict.
    """
    bounds = sorted({0, len(lines), *(i + 1 for i in range(len(lines)) if categories_after(lines, i))})
    yield start + layout.opening, lines[: bounds[1]]
    answer = read_answer(verdict, lines, layout, policy_names) if len(bounds) > 2 else None
    if answer is not None and len(verdict) == len(verdict.lower()):
        for first, last in pairwise(bounds[1:]):
            yield start + verdict[: answer[1][first - 1]] + layout.separator, lines[first:last]


def decision_tree(
    prompt: Sequence[int],
    start: str,
    lines: Lines,
    questions: Iterable[Question],
    tokens: Callable[[str], Sequence[int]],
    end: str = "",
    layout: Layout = PLAIN,
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
        label, after = layout.around(line.label)
        label = (layout.separator if i else "") + label
        if instead:
            paths = [(f"{before}{label}{instead[0]}{after}", earlier) for before, earlier in paths]
            continue
        longer, decided = [], len(points)
        for before, earlier in paths:
            forks = set()
            negative = tokens(f"{before}{label}{line.negative[0]}{after}{end}")
            for word in line.positive:
                positive = tokens(f"{before}{label}{word}{after}{end}")
                differ = (j for j, pair in enumerate(zip(positive, negative, strict=False)) if pair[0] != pair[1])
                at = next(differ, None)
                if at is None:  # one is the beginning of the other
                    return points[:decided]
                point = DecisionPoint((*prompt, *positive[:at]), positive[at], negative[at], line.question, earlier)
                if point.key not in forks:  # as "Yes" and "Yes." share one
                    forks.add(point.key)
                    points.append(point)
                    longer.append((f"{before}{label}{word}{after}", (*earlier, (point, True))))
                    earlier = (*earlier, (point, False))
            longer.append((f"{before}{label}{line.negative[0]}{after}", earlier))
        paths = longer
    return points
