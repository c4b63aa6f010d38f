"""Parse a guard's answer into a Verdict, failing closed."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from jaxguard.data.format.dialogue import ABSENT, FAIL_CLOSED, TAG, TITLES, Mode, loose, verdict_words
from jaxguard.data.policies import Question

_VALUES = {question: rf"{loose(title)}(?P<value>[^\n]*)" for question, title in TITLES.items()}
_LINES = {
    question: re.compile(rf"^[\s>*_#`~.)\d•-]{{0,8}}{value}", re.IGNORECASE | re.MULTILINE)
    for question, value in _VALUES.items()
}
_ANYWHERE = {question: re.compile(value, re.IGNORECASE) for question, value in _VALUES.items()}
_VALUE = re.compile(r"[\s*_\"'`(\[]{0,8}(?P<word>[a-z]+)[\s*_\"'`)\]]{0,8}(?P<rest>.*)", re.DOTALL)
_AFTER_WORD = ".,;:(<-\u2013\u2014"
_RETRACTED = re.compile(
    r"-\w|[\W_]*(?:no\s*(?:[^\w\s]|$)|(?:not|nope|never|false|wrong|but|or|wait|except|unless|if|rather|however|actually)\b)"
)
"""Invalidates the verdict word before it: "unharmful-ish", "unharmful, but". Later explanations are ignored."""


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

    Only text after the last `</think>` counts, since reasoning may quote anything; in reasoning mode an answer without a
    closed think block has no verdict. Case, spacing, list marks and asterisks are ignored. A line that is missing,
    malformed, contradictory, or followed by prose with the fail-closed word, counts as FAIL_CLOSED.

    If `has_response`, `None` is not a valid answer about it; None accepts `None`. Parsing takes linear time.
    """
    tags = list(TAG.finditer(text))
    closed = "/" in tags[-1][0] if tags else mode is Mode.DIRECT
    verdict = text[tags[-1].end() if tags else 0 :] if closed else ""
    words: dict[str, str | None] = {}
    problems = []
    for question in asks:
        answer, problem = _read_line(verdict, question)
        if answer == ABSENT and has_response:
            answer, problem = None, f"{question}: answered {ABSENT}, but there is a response"
        if problem:
            problems.append(problem)
        words[question] = None if answer == ABSENT else (answer or FAIL_CLOSED[question])
    return Verdict(**words, problems=tuple(problems))


def verdict_prefix(text: str) -> str | None:
    """Return an answer up to the start of its verdict lines; None if its reasoning is not closed."""
    tags = list(TAG.finditer(text))
    return f"{text[: tags[-1].end()]}\n\n" if tags and "/" in tags[-1][0] else None


def split_verdict(text: str) -> tuple[str, str]:
    """Split an answer at its first verdict line; both parts are stripped."""
    matches = (match for pattern in _LINES.values() if (match := pattern.search(text)))
    start = min((match.start() for match in matches), default=len(text))
    return text[:start].strip(), text[start:].strip()


def reasoning_of(text: str) -> str | None:
    """Return an answer's reasoning without think tags, closed or not; None if there is none."""
    tags = list(TAG.finditer(text))
    if not tags:
        return None
    end = tags[-1].start() if "/" in tags[-1][0] else len(text)
    return TAG.sub("", text[:end]).strip() or None


def answer_grammar(asks: Iterable[Question]) -> str:
    """Return a regular expression for reasoning without tags, an empty line, and the verdict lines."""
    lines = (f"{TITLES[question]}: ({'|'.join(verdict_words(question))})" for question in asks)
    return r"([^\n]+\n)+\n" + r"\n".join(lines)


def _read_line(verdict: str, question: Question) -> tuple[str | None, str]:
    """Return (verdict word, problem); exactly one of them is set."""
    readings = {_read_value(line["value"], question) for line in _LINES[question].finditer(verdict)}
    if not readings:
        return None, f"{question}: no such line"
    # A title within a line is not an answer, but it may contradict one: "            Prompt harm: harmful".
    readings |= {_read_value(line["value"], question) for line in _ANYWHERE[question].finditer(verdict)}
    if len(readings) > 1:
        return None, f"{question}: contradictory lines"
    [answer] = readings
    rest = verdict[max(line.end() for line in _LINES[question].finditer(verdict)) :]
    for pattern in _ANYWHERE.values():
        rest = pattern.sub("", rest)
    if answer != FAIL_CLOSED[question] and FAIL_CLOSED[question] in re.findall(r"[a-z]+", rest.lower()):
        return None, f"{question}: retracted after the verdict"
    return (answer, "") if answer else (None, f"{question}: malformed answer")


def _read_value(value: str, question: Question) -> str | None:
    """Parse the verdict word of a line: "**Harmful** (S1)" is valid; "not unharmful" and "unharmful, not" are None."""
    allowed = {word.lower(): word for word in verdict_words(question)}
    match = _VALUE.match(value.lower())
    if match is None or match["word"] not in allowed or (match["rest"] and match["rest"][0] not in _AFTER_WORD):
        return None
    if allowed[match["word"]] != FAIL_CLOSED[question] and _RETRACTED.match(match["rest"]):
        return None
    others = allowed.keys() - {match["word"]}
    return None if others & set(re.findall(r"[a-z]+", match["rest"])) else allowed[match["word"]]
