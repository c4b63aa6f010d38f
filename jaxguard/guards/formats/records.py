"""What there is to know of another guard's format, as one record, and how the lines of an answer are read."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Policy, Question
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, UNPARSABLE, Request

Chat = tuple[list[dict[str, str]], dict[str, Any]]
"""Messages for a checkpoint's chat template, and options that it takes."""

ALLOWED = "Allowed, even where the above seems to forbid it:"
"""Opens the list of what a policy allows."""


@dataclass(frozen=True)
class Quoted:
    """The texts of an ask with whatever could act as part of the format broken.

    Attributes:
        prompt: what the user wrote.
        response: the answer to it, if it is there and the format shows it for this question.
        policy: by which to judge; a guard with categories of its own may be asked by those instead.
    """

    prompt: str
    response: str | None
    policy: Policy


@dataclass(frozen=True)
class Step:
    """A place where an answer goes on with one of two words: `lead` precedes them, `also` are further positive ones."""

    lead: str
    positive: str
    negative: str
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Guard:
    """A format's facts.

    Attributes:
        name: of the models that use it.
        asks: the questions that it answers.
        own_categories: it was trained on categories of its own.
        takes_policy: it can be given others.
        turn: the text to be tokenised, or the chat messages and options for the checkpoint's chat template.
        read: POSITIVE, NEGATIVE or UNPARSABLE.
        start: the answer up to where the verdict begins; None if it does not get there.
        steps: from there to the asked verdict, one word after another.
        ends: tokens that end an answer, besides the tokenizer's own.
        tags: what no text may spell, whatever its case and spacing.
        headings: what no line of a text may open with, before a colon.
        thinks: modes in which an answer opens with a thought.
        closed: an open thought, ended; None if there is none.
        judges_prompt_alone: a question about the prompt is asked without the response.
        modes: in which it can be asked.
    """

    name: str
    asks: tuple[Question, ...]
    turn: Callable[[Quoted, Request], str | Chat]
    read: Callable[[Request, str], int]
    steps: Callable[[Request], tuple[Step, ...]]
    own_categories: bool
    takes_policy: bool
    ends: tuple[str, ...]
    tags: tuple[str, ...]
    headings: tuple[str, ...]
    start: Callable[[Request, str], str | None] = lambda _ask, _text: ""
    thinks: frozenset[Mode] = frozenset()
    closed: Callable[[Request, str], str | None] = lambda _ask, _text: None
    judges_prompt_alone: bool = False
    modes: tuple[Mode, ...] = (Mode.DIRECT,)


def numbered(policy: Policy) -> str:
    """A policy as a numbered list, whose last item are its rules, if any; then what it allows all the same."""
    items = [(c.name.rstrip("."), c.description) for c in policy.categories]
    if policy.rules.strip():
        items.append(("Against the rules" if not items else "Against further rules", policy.rules.strip()))
    lines = [f"S{i}: {name}.{f' {text}' if text else ''}" for i, (name, text) in enumerate(items, 1)]
    # Without a number: it is no category.
    allowed = [ALLOWED, *(f"- {text}" for text in policy.allowed)] if policy.allowed else []
    return "\n".join([*lines, *allowed])


def chosen_words(text: str, titles: Sequence[str], allowed: Sequence[Collection[str]]) -> list[str] | None:
    """The words of an answer of exactly these lines, `title: word`, in lower case; None for any other answer.

    Without a title the line is the word.
    """
    lines = filled_lines(text)
    if len(lines) != len(titles):
        return None
    found = []
    for line, title, words in zip(lines, titles, allowed, strict=True):
        head, colon, word = line.partition(":") if title else ("", ":", line)
        if not colon or " ".join(head.split()).lower() != title.lower() or word.strip().lower() not in words:
            return None
        found.append(word.strip().lower())
    return found


def filled_lines(text: str) -> list[str]:
    return [line for one in text.split("\n") if (line := one.strip())]


def verdict_of(word: str | None, positive: str, negative: str) -> int:
    return {positive: POSITIVE, negative: NEGATIVE}.get(word or "", UNPARSABLE)
