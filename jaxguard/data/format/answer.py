"""Reads a guard's answer: text -> Verdict, failing closed."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from jaxguard.data.format.dialogue import ABSENT, CLOSED, TAG, TITLES, Mode, loose, verdict_words
from jaxguard.data.policies import Question

_LINES = {
    question: re.compile(rf"^[\s>*_#`~.)\d•-]{{0,8}}{loose(title)}(?P<value>[^\n]*)", re.IGNORECASE | re.MULTILINE)
    for question, title in TITLES.items()
}
_ANYWHERE = {
    question: re.compile(rf"{loose(title)}(?P<value>[^\n]*)", re.IGNORECASE) for question, title in TITLES.items()
}
_VALUE = re.compile(r"[\s*_\"'`(\[]{0,8}(?P<word>[a-z]+)[\s*_\"'`)\]]{0,8}(?P<rest>.*)", re.DOTALL)
_AFTER_WORD = ".,;:(<-\u2013\u2014"
_TAKEN_BACK = re.compile(
    r"-\w|[\W_]*(?:no\s*(?:[^\w\s]|$)|(?:not|nope|never|false|wrong|but|or|wait|except|unless|if|rather|however|actually)\b)"
)
"""What makes a word before it no answer: "unharmful-ish", "unharmful, but". An explanation further on is not weighed."""


@dataclass(frozen=True)
class Verdict:
    """What the guard said.

    Attributes:
        prompt_harm, response_harm, response_refusal: the answer; None where it was not asked, or is `None`.
        problems: what was missing, contradictory or unreadable; such a line counts as CLOSED says.
    """

    prompt_harm: str | None = None
    response_harm: str | None = None
    response_refusal: str | None = None
    problems: tuple[str, ...] = ()


def parse(text: str, asks: Iterable[Question], mode: Mode, has_response: bool | None = None) -> Verdict:
    """Read the guard's answer, failing closed.

    Only what follows the last `</think>` is read: a thought may quote anything. Without one, or with a thought that is
    opened again and not closed, reasoning mode reads nothing. Case, spacing, list marks and asterisks do not matter; a
    line that is missing, unreadable, given twice with different answers, or followed by prose that holds the word of
    CLOSED, counts as CLOSED says.

    Args:
        text: the generated text, thought included. Linear time, whatever it holds.
        asks: the lines that were asked for.
        mode: how the guard was asked to answer.
        has_response: whether there was a response to judge; if so, `None` is no answer. None accepts `None`.
    """
    verdict = _after_thought(text, mode)
    found: dict[str, str | None] = {}
    problems = []
    for question in asks:
        answer, problem = _read_line(verdict, question)
        if answer == ABSENT and has_response:
            answer, problem = None, f"{question}: answered {ABSENT}, but there is a response"
        if problem:
            problems.append(problem)
        found[question] = None if answer == ABSENT else (answer or CLOSED[question])
    return Verdict(**found, problems=tuple(problems))


def ended_thought(text: str) -> str | None:
    """An answer up to the end of its thought, ready for the verdict lines; None while the thought is open."""
    tags = list(TAG.finditer(text))
    return f"{text[: tags[-1].end()]}\n\n" if tags and "/" in tags[-1][0] else None


def end_thought(text: str) -> str:
    """An answer whose thought was cut, with the thought ended."""
    return f"{text.rstrip()}\n</think>\n\n"


def split_verdict(text: str) -> tuple[str, str]:
    """(what stands before the first verdict line, the rest), without outer white space."""
    found = (match for pattern in _LINES.values() if (match := pattern.search(text)))
    start = min((match.start() for match in found), default=len(text))
    return text[:start].strip(), text[start:].strip()


def thought(text: str) -> str | None:
    """What an answer says before its verdict, without think tags, even where they were not closed; None if nothing."""
    tags = list(TAG.finditer(text))
    if not tags:
        return None
    end = tags[-1].start() if "/" in tags[-1][0] else len(text)
    return TAG.sub("", text[:end]).strip() or None


def answer_grammar(asks: Iterable[Question]) -> str:
    """A regular expression of a thought in plain words, an empty line, and the verdict lines."""
    lines = (f"{TITLES[question]}: ({'|'.join(verdict_words(question))})" for question in asks)
    return r"([^\n]+\n)+\n" + r"\n".join(lines)


def _after_thought(text: str, mode: Mode) -> str:
    end, closed = 0, mode is Mode.DIRECT
    for tag in TAG.finditer(text):
        closed = "/" in tag[0]
        end = tag.end()
    return text[end:] if closed else ""


def _read_line(verdict: str, question: Question) -> tuple[str | None, str]:
    """(answer, problem): exactly one of them says something."""
    readings = {_read_value(line["value"], question) for line in _LINES[question].finditer(verdict)}
    if not readings:
        return None, f"{question}: no such line"
    # A title within a line is no answer, but what it says may contradict one: "            Prompt harm: harmful".
    readings |= {_read_value(line["value"], question) for line in _ANYWHERE[question].finditer(verdict)}
    if len(readings) > 1:
        return None, f"{question}: contradictory lines"
    [answer] = readings
    if answer != CLOSED[question] and CLOSED[question] in _words_after(verdict, question):
        return None, f"{question}: taken back after the verdict"
    return (answer, "") if answer else (None, f"{question}: unreadable answer")


def _words_after(verdict: str, question: Question) -> set[str]:
    """Words below the question's last line, in lower case, other verdict lines left out."""
    end = max(line.end() for line in _LINES[question].finditer(verdict))
    rest = verdict[end:]
    for pattern in _ANYWHERE.values():
        rest = pattern.sub("", rest)
    return set(re.findall(r"[a-z]+", rest.lower()))


def _read_value(value: str, question: Question) -> str | None:
    """The verdict word of a line, or None: "**Harmful** (S1)" is read; "not unharmful", "unharmful, not" are not."""
    allowed = {word.lower(): word for word in verdict_words(question)}
    match = _VALUE.match(value.lower())
    if match is None or match["word"] not in allowed or (match["rest"] and match["rest"][0] not in _AFTER_WORD):
        return None
    if allowed[match["word"]] != CLOSED[question] and _TAKEN_BACK.match(match["rest"]):
        return None
    others = allowed.keys() - {match["word"]}
    return None if others & set(re.findall(r"[a-z]+", match["rest"])) else allowed[match["word"]]
