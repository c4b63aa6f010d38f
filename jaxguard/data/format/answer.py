"""Parse a guard's answer into a Verdict, failing closed."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from jaxguard.data.format.dialogue import ABSENT, FAIL_CLOSED, TITLES, Mode, verdict_words
from jaxguard.data.policies import QUESTIONS, Question

# The only decoration are list marks and emphasis. Quotation marks around a line, a quoted line and a code fence may hold somebody
# else's verdict, and what is struck out is taken back.
_BLANK = r"[ \t\u2581]*+"
_OPEN = r"(?:[-\u2022]|\d{1,2}[.)]|#{1,6})?[ \t\u2581*_]*+"
_GAP = r"[\s\u2581*_`-]*+"
_TITLES: Final = {q: rf"{_OPEN}{_GAP.join([*title.split(), ':'])}" for q, title in TITLES.items()}
_AROUND = r"[\s\u2581*_`\"']*+"
_FLAGS = re.IGNORECASE | re.ASCII
_LINES: Final = {
    q: re.compile(rf"{_TITLES[q]}{_AROUND}({'|'.join(verdict_words(q))}){_AROUND}\.?{_AROUND}", _FLAGS)
    for q in QUESTIONS
}
_FIRST_LINE: Final = re.compile(rf"^{_BLANK}(?:{'|'.join(_TITLES.values())})", _FLAGS | re.MULTILINE)
_TAG: Final = re.compile(rf"<{_BLANK}(?:/{_BLANK})?think{_BLANK}>", _FLAGS)


@dataclass(frozen=True)
class Verdict:
    """A parsed answer.

    Attributes:
        prompt_harm, response_harm, response_refusal: the verdict word; None if not asked, or answered `None`.
        problems: lines that were missing, contradictory or malformed; they count as FAIL_CLOSED.
    """

    prompt_harm: str | None = None
    response_harm: str | None = None
    response_refusal: str | None = None
    problems: tuple[str, ...] = ()


def parse(text: str, asks: Iterable[Question], mode: Mode, has_response: bool | None = None) -> Verdict:
    """Parse the guard's answer, failing closed.

    An answer is reasoning in one closed think block and verdict lines; in direct mode the block may be absent. Case, blank lines,
    spacing, list marks and emphasis are ignored. Anything else after the reasoning or before its opening tag makes the whole
    answer unparsable, since it may take a verdict back, as do lines that contradict each other; the reasoning may quote anything.
    A line that is missing, or all of them if the answer is unparsable, counts as FAIL_CLOSED.

    If `has_response`, `None` is not a valid answer about it; None accepts `None`. Parsing takes linear time.
    """
    parts = _split(text, mode)
    words: dict[Question, set[str]] = {question: set() for question in QUESTIONS}
    unparsable = "its reasoning is not one closed block" if parts is None else ""
    for line in filter(None, map(str.strip, parts[1].split("\n") if parts else ())):
        read = {q: match[1].lower() for q, pattern in _LINES.items() if (match := pattern.fullmatch(line))}
        if not read:
            unparsable = f"{line[:60]!r} is no verdict line"
            break
        for question, word in read.items():
            words[question].add(word)
    if contradicted := [question for question, said in words.items() if len(said) > 1]:
        unparsable = f"contradictory lines about {contradicted[0]}"
    verdict: dict[Question, str | None] = {}
    problems = []
    for question in asks:
        problem = unparsable or ("" if words[question] else "no such line")
        if words[question] == {ABSENT.lower()} and has_response and not problem:
            problem = f"answered {ABSENT}, but there is a response"
        if problem:
            problems.append(f"{question}: {problem}")
            verdict[question] = FAIL_CLOSED[question]
        else:
            [word] = words[question]
            verdict[question] = None if word == ABSENT.lower() else word
    return Verdict(**verdict, problems=tuple(problems))


def _split(text: str, mode: Mode) -> tuple[str, str] | None:
    """Split an answer into its think block and what follows; None unless it is one closed block.

    In direct mode there may be none; in reasoning mode the prompt may hold the opening tag.
    """
    tags = list(_TAG.finditer(text))
    if not tags:
        return ("", text) if mode is Mode.DIRECT else None
    *opening, closing = tags
    closed = ["/" in tag[0] for tag in tags] in ([True], [False, True])
    before = text[: tags[0].start()].strip() if opening or mode is Mode.DIRECT else ""
    return (text[: closing.end()], text[closing.end() :]) if closed and not before else None


def verdict_prefix(text: str) -> str | None:
    """Return an answer up to the start of its verdict lines; None if its reasoning is not one closed block."""
    parts = _split(text, Mode.REASONING)
    return None if parts is None else f"{parts[0]}\n\n"


def split_verdict(text: str) -> tuple[str, str]:
    """Split an answer at its first verdict line; both parts are stripped."""
    line = _FIRST_LINE.search(text)
    start = line.start() if line else len(text)
    return text[:start].strip(), text[start:].strip()


def reasoning_of(text: str) -> str | None:
    """Return an answer's reasoning without think tags, closed or not; None if there is none."""
    tags = list(_TAG.finditer(text))
    if not tags:
        return None
    end = tags[-1].start() if "/" in tags[-1][0] else len(text)
    return _TAG.sub("", text[:end]).strip() or None


def answer_grammar(asks: Iterable[Question]) -> str:
    """Return a regular expression for reasoning without tags, an empty line, and the verdict lines."""
    lines = (f"{TITLES[question]}: ({'|'.join(verdict_words(question))})" for question in asks)
    return r"([^\n]+\n)+\n" + r"\n".join(lines)
