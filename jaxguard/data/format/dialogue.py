r"""The student's format, which only this file and answer.py, its reader, know: example + policy + mode -> chat turns.

The user turn:

    {instruction}

    Safety policy:
    S1: {name}. {description}
    {rules}
    Allowed:
    - {what is fine all the same}

    Answer format:
    First reason between <think> and </think>, then give these lines:
    Prompt harm: harmful or unharmful
    Response harm: harmful, unharmful or None

    Human user:
    {prompt}

    AI assistant:
    {response, or None}

    /think

What does not change between examples comes first, so that it is computed once. The answer is a thought in think
tags, an empty line and the verdict lines; in direct mode the verdict lines alone. Where the chat template opens a thought
itself, that tag belongs to the prompt, and so does an empty thought's end in direct mode.

Prompts, responses, traces and policies are untrusted. Every string in them that could act as part of this format, or
as a special token of the tokenizer, gets a backslash before its last character: `<|eot_id|\>`, `Prompt harm\:`. The
patterns that do so are those that the parser reads with. Nothing depends on how the text is then tokenised: a server
that renders the chat template and tokenises the result as plain text sees the same ids as training did.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Final

from jaxguard.data.examples import Example
from jaxguard.data.policies import Policy, Question
from jaxguard.utils.errors import JaxguardError


class Mode(StrEnum):
    """How the guard answers."""

    REASONING = "reasoning"
    DIRECT = "direct"


Answers = tuple[tuple[Question, str], ...]
"""The verdict lines as written, in order."""

TITLES: Final[Mapping[Question, str]] = {
    "prompt_harm": "Prompt harm",
    "response_harm": "Response harm",
    "response_refusal": "Response refusal",
}
CHOICES: Final[Mapping[Question, tuple[str, str]]] = {
    "prompt_harm": ("harmful", "unharmful"),
    "response_harm": ("harmful", "unharmful"),
    "response_refusal": ("refusal", "compliance"),
}
"""The words of a verdict line: the positive class first."""
ABSENT: Final = "None"
"""Stands for a response that is not there, and answers the questions about it."""
CLOSED: Final[Mapping[Question, str]] = {
    "prompt_harm": "harmful",
    "response_harm": "harmful",
    "response_refusal": "compliance",
}
"""What an unreadable answer counts as: the finding that lets nothing pass, so no refusal is taken on trust."""

_HEADERS = {
    "policy": "Safety policy:",
    "prompt": "Human user:",
    "response": "AI assistant:",
    "format": "Answer format:",
}
_HOW = {
    Mode.REASONING: "First reason between <think> and </think>, then give these lines:",
    Mode.DIRECT: "Give only these lines:",
}

NO_THOUGHT: Final = "\n</think>\n\n"
"""Closes a thought that the chat template opened, with nothing in it: what direct mode begins with there."""

# U+2581 is how SentencePiece tokenizers such as Gemma's write a space: their ids do not tell the two apart.
_SPACE = r"[\s\u2581]{0,3}"
GAP = r"[\s\u2581*_`~-]{0,4}"
_THINK = rf"<{_SPACE}/?{_SPACE}think{_SPACE}>"


def loose(title: str) -> str:
    """Pattern of a title that ends in a colon, whatever its spacing and decoration."""
    return GAP.join([*map(re.escape, title.removesuffix(":").split()), ":"])


TAG = re.compile(_THINK, re.IGNORECASE)


def questions(example: Example, policy: Policy, labelled: bool = True) -> tuple[Question, ...]:
    """The verdict lines to ask for.

    With `labelled` those whose answer is known, for training and validation; else all that the policy asks.
    """
    if not labelled:
        return policy.asks
    return tuple(q for q in policy.asks if _answer(example, q) is not None)


def answers(example: Example, asks: Iterable[Question]) -> Answers:
    """The labels as verdict words.

    Raises:
        JaxguardError: a question whose answer nobody knows.
    """
    pairs = tuple((q, _answer(example, q)) for q in asks)
    unknown = [q for q, answer in pairs if answer is None]
    if unknown or not pairs:
        raise JaxguardError(
            f"example {example.id!r} has no label for {', '.join(unknown) or 'any question of its policy'}"
        )
    return tuple((q, answer) for q, answer in pairs if answer is not None)


def written(answers: Answers) -> str:
    """The verdict lines as the guard writes them."""
    return "\n".join(f"{TITLES[question]}: {word}" for question, word in answers)


def _answer(example: Example, question: Question) -> str | None:
    if question == "prompt_harm":
        return example.prompt_label
    if example.response is None:
        return ABSENT
    return example.response_label if question == "response_harm" else example.refusal_label


@dataclass(frozen=True)
class Dialogue:
    """Renders turns.

    Attributes:
        reasoning_marker, direct_marker: the last line of the user turn.
        special_tokens: the tokenizer's tokens that no untrusted text may spell.
    """

    reasoning_marker: str = "/think"
    direct_marker: str = "/no_think"
    special_tokens: tuple[str, ...] = ()

    def user_turn(
        self, prompt: str, response: str | None, policy: Policy, asks: tuple[Question, ...], mode: Mode
    ) -> str:
        """The user turn's text; it neither starts nor ends with white space, since templates trim."""
        blocks = (
            f"{self.head(policy, asks, mode)}{self.quote(prompt)}",
            f"{_HEADERS['response']}\n{ABSENT if response is None else self.quote(response)}",
            self.reasoning_marker if mode is Mode.REASONING else self.direct_marker,
        )
        return "\n\n".join(blocks).strip()

    def head(self, policy: Policy, asks: tuple[Question, ...], mode: Mode) -> str:
        """What every user turn of this policy, these questions and this mode begins with."""
        blocks = (
            self.quote(policy.instruction),
            f"{_HEADERS['policy']}\n{self.quote(taxonomy(policy))}",
            "\n".join([_HEADERS["format"], _HOW[mode], verdict_lines(asks)]),
            f"{_HEADERS['prompt']}\n",
        )
        return "\n\n".join(blocks).lstrip()

    def messages(
        self, example: Example, policy: Policy, mode: Mode, asks: tuple[Question, ...] | None = None
    ) -> list[dict[str, str]]:
        """Chat messages for an OpenAI-style server; `asks` defaults to all that the policy asks.

        Over-long text is not cut here: `Encoder.messages` does that.
        """
        asks = policy.asks if asks is None else asks
        turn = self.user_turn(example.prompt, example.response, policy, asks, mode)
        return [{"role": "user", "content": turn}]

    def completion(self, answers: Answers, trace: str | None, mode: Mode, opened: bool = False) -> str:
        """The answer's text without its end of turn; `trace` is for reasoning mode, `opened` if the prompt opened its thought.

        Raises:
            JaxguardError: reasoning mode without a trace.
        """
        verdict = written(answers)
        if mode is Mode.DIRECT:
            return verdict
        if not (trace or "").strip():
            raise JaxguardError("reasoning mode needs a trace; give the example one, or train it in direct mode")
        text = f"{self.quote(trace or '')}\n</think>\n\n{verdict}"
        return text if opened else f"<think>\n{text}"

    def quote(self, text: str) -> str:
        """Untrusted text with every reserved string broken, lone surrogates replaced, and outer white space gone."""
        # JSON can spell half a character, which no tokenizer takes.
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").strip()
        for _ in range(_MAX_PASSES):
            text, found = self._reserved.subn(_break, text)
            if not found:
                return text
        raise JaxguardError(
            f"a reserved string cannot be broken in {text[:80]!r}...: choose markers without backslashes"
        )

    @cached_property
    def _reserved(self) -> re.Pattern[str]:
        markers = (self.reasoning_marker, self.direct_marker)
        for text in (*markers, *self.special_tokens):
            if len(text.strip()) < 2:
                raise JaxguardError(
                    f"{text!r} is a marker or special token of one character: text cannot be told from it"
                )
        spaced = [_THINK, *map(loose, (*TITLES.values(), *_HEADERS.values())), *map(_spaced, markers)]
        exact = [_trie(self.special_tokens)] if self.special_tokens else []
        return re.compile("|".join([*exact, f"(?i:{'|'.join(spaced)})"]))


def taxonomy(policy: Policy) -> str:
    """The policy's categories, numbered, its rules, and what it allows all the same."""
    categories = [f"S{i}: {' '.join(f'{c.name}. {c.description}'.split())}" for i, c in enumerate(policy.categories, 1)]
    allowed = ["Allowed:", *(f"- {' '.join(text.split())}" for text in policy.allowed)] if policy.allowed else []
    return "\n".join([*categories, *filter(None, [policy.rules.strip()]), *allowed])


def verdict_lines(asks: Iterable[Question]) -> str:
    """The verdict as asked for: each line with the words to choose from."""
    return "\n".join(f"{TITLES[question]}: {_choices(question)}" for question in asks)


def _choices(question: Question) -> str:
    *others, last = verdict_words(question)
    return f"{', '.join(others)} or {last}"


def verdict_words(question: Question) -> tuple[str, ...]:
    """What a verdict line may say."""
    return CHOICES[question] if question == "prompt_harm" else (*CHOICES[question], ABSENT)


# A second pass finds a token inside a longer one that the first pass broke at its end; more are hardly ever needed.
_MAX_PASSES = 64


def _break(match: re.Match[str]) -> str:
    return f"{match[0][:-1]}\\{match[0][-1]}"


def _spaced(marker: str) -> str:
    """Pattern of a marker, whatever its spaces are."""
    return r"[\s\u2581]+".join(map(re.escape, marker.split()))


def _trie(words: Iterable[str]) -> str:
    """A pattern of any of the words that reads each character once; Gemma's 6,000 would otherwise be tried in turn."""
    tails: dict[str, list[str]] = {}
    for word in words:
        tails.setdefault(word[0], []).append(word[1:])
    branches = []
    for head, rest in sorted(tails.items()):
        longer = [tail for tail in rest if tail]
        more = _trie(longer) + ("?" if len(longer) < len(rest) else "") if longer else ""
        branches.append(re.escape(head) + more)
    return f"(?:{'|'.join(branches)})"
