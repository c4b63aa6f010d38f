"""Examples -> token sequences with targets and probes, through the checkpoint's own chat template."""

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import numpy as np
from transformers import PreTrainedTokenizerBase

from jaxguard.config.data import DataConfig
from jaxguard.data.cutting import CUT_MARK, LONGEST_TOKEN, MIN_KEPT, cut, share, shortened
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import (
    ABSENT,
    CHOICES,
    REASONING_END,
    Answers,
    Dialogue,
    Mode,
    answers,
    questions,
    written,
)
from jaxguard.data.format.template import Template, load_tokenizer, read_template, render, token_ids
from jaxguard.data.policies import QUESTIONS, Policy, Question, load_policy, policy_for
from jaxguard.utils.errors import JaxguardError

TOKENIZER_FILES: Final = ("*.json", "*.jinja", "tokenizer*")
"""What an encoder needs of a checkpoint on the hub."""


@dataclass(frozen=True)
class Probe:
    """Where the model chooses between the two words of a verdict line.

    Attributes:
        question: whose line.
        position: index into `tokens` of the word's first token that differs between the two answers; the tokens
            before it are the same for both.
        positive_id, negative_id: that token for harmful or refusal, and for unharmful or compliance.
    """

    question: Question
    position: int
    positive_id: int
    negative_id: int


@dataclass(frozen=True)
class EncodedExample:
    """One example as tokens.

    Attributes:
        example_id: whose it is.
        mode: with a trace or without.
        tokens: int32 [n]; prompt, then completion with its end-of-turn token.
        loss_mask: bool [n]; this token is trained on: exactly the completion.
        probes: one for each labelled verdict line, in order.
        answers: the verdict as rendered.
        cut: untrusted text was left out to fit the row.
        shared_prefix: bytes of its first tokens, those of the policy and the frame around it, which other examples begin with too;
            never all of the prompt.
    """

    example_id: str
    mode: Mode
    tokens: np.ndarray
    loss_mask: np.ndarray
    probes: tuple[Probe, ...]
    answers: Answers
    cut: bool
    shared_prefix: bytes = b""

    @property
    def shared_prefix_len(self) -> int:
        """Tokens of `head`."""
        return len(self.shared_prefix) // self.tokens.itemsize


class PromptTooLongError(JaxguardError):
    """The frame, the policy in it and the answer leave no room for any text."""


class Prompt(NamedTuple):
    """What generation starts from.

    Attributes:
        turn: the user turn's text.
        ids: its tokens within the chat template.
        cut: untrusted text was left out to fit.
    """

    turn: str
    ids: list[int]
    cut: bool


@dataclass(frozen=True)
class _Rendered:
    """A prompt and every completion that it could get, by the verdict lines."""

    prompt: list[int]
    completions: dict[Answers, list[int]]
    cut: bool
    shared_prefix: bytes


@dataclass(frozen=True)
class Encoder:
    """Renders and tokenises. A row's length, the policy and the markers are the run's.

    Attributes:
        tokenizer: a fast tokenizer with a chat template.
        template: what the chat template does.
        dialogue: the format.
        policy: for examples that bring none.
        max_seq_len: the longest sequence.
        share_prefixes: say which of a sequence's first tokens others begin with too, so that they are computed once.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template
    dialogue: Dialogue
    policy: Policy
    max_seq_len: int
    share_prefixes: bool = True
    _prefix_ids: dict[Any, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _shared_prefixes: dict[bytes, bytes] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def load(cls, folder: Path, data: DataConfig, policy: Policy | None = None) -> Self:
        """The encoder of a checkpoint; `policy` defaults to the one that the config names.

        Raises:
            JaxguardError: no such policy; no tokenizer or chat template, or one that cannot be trained with; a policy
                that leaves no room for text in `max_seq_len`.
        """
        tokenizer = load_tokenizer(folder)
        template = read_template(tokenizer, folder)
        dialogue = Dialogue(data.reasoning_marker, data.direct_marker, tuple(template.reserved.values()))
        policy = policy or load_policy(data.policy)
        encoder = cls(tokenizer, template, dialogue, policy, data.max_seq_len, data.share_prefixes)
        needed = encoder.min_tokens(policy)
        if needed > data.max_seq_len:
            raise JaxguardError(
                f"data.max_seq_len={data.max_seq_len} is too short: policy {policy.name!r}, the frame around it "
                f"and the verdict take {needed} tokens with the least of text; raise it to that, or shorten the policy"
            )
        return encoder

    @property
    def end_id(self) -> int:
        """The end-of-turn token that every sequence ends with, and generation stops at."""
        return self.template.end_id

    def encode(self, example: Example, mode: Mode) -> EncodedExample | None:
        """The example with its labels, for training.

        Returns:
            None if its trace leaves no room for the text to judge.

        Raises:
            JaxguardError: no label for any question, no trace in reasoning mode, or its own policy does not fit.
        """
        gold = answers(example, questions(example, self._policy(example)))
        rendered = self._render(example, mode, gold)
        return None if rendered is None else self._sequence(example, mode, rendered, gold)

    def branches(self, example: Example, mode: Mode) -> tuple[EncodedExample, ...]:
        """The example once for each answer to all labelled questions but the last, for validation without sampling.

        The model answers one question after another, so P(question positive) is the sum over earlier answers of
        P(earlier answers) P(positive | earlier answers), each factor read at a probe. The prompt's tokens are the same
        in all branches and the gold answers come first; a reasoning example's trace is given.

        Returns:
            Two to the power of labelled questions less one; () if the trace leaves no room for the text.

        Raises:
            JaxguardError: as `encode`.
        """
        gold = answers(example, questions(example, self._policy(example)))
        rendered = self._render(example, mode, gold)
        if rendered is None:
            return ()
        last = next((q for q, word in reversed(gold) if word != ABSENT), None)
        kept = [a for a in rendered.completions if last is None or dict(a)[last] == dict(gold)[last]]
        return tuple(self._sequence(example, mode, rendered, a) for a in kept)

    def prompt(
        self, example: Example, mode: Mode, answer_tokens: int = 0, asks: tuple[Question, ...] | None = None
    ) -> Prompt:
        """What generation starts from; labels are not looked at.

        Args:
            example: the conversation.
            mode: how to answer.
            answer_tokens: room to leave in the row; the text is cut for it.
            asks: the verdict lines to ask for; None asks for all of the policy's.

        Raises:
            PromptTooLongError: the policy does not fit.
            JaxguardError: the text spells a special token in a way that is not known here.
        """
        policy = self._policy(example)
        fitted = self._fit(example, policy, asks or policy.asks, mode, self.max_seq_len - answer_tokens)
        if fitted is None:
            raise PromptTooLongError(
                f"example {example.id!r}: its policy leaves no room for text in {self.max_seq_len} tokens"
                + (f" less {answer_tokens} for the answer" if answer_tokens else "")
            )
        self._check_prompt(example, fitted.ids, mode)
        return fitted

    def messages(self, example: Example, mode: Mode, answer_tokens: int = 0) -> list[dict[str, str]]:
        """Chat messages that a server turns into exactly the tokens of `prompt`.

        It has to be given `template.TEMPLATE_KWARGS` as `chat_template_kwargs`. Where the template opens a thought, direct
        mode's prompt has REASONING_END besides, which no chat message can say.
        """
        return [{"role": "user", "content": self.prompt(example, mode, answer_tokens).turn}]

    def decision_point(self, start: str, given: Answers, question: Question) -> tuple[list[int], int, int]:
        """Where an answer chooses between the two words of a verdict line.

        Args:
            start: the answer before its verdict.
            given: the lines before that one.
            question: whose line it is.

        Returns:
            the answer's tokens up to there, and the next token of the positive and of the negative word.
        """
        positive, negative = (
            self.ids(start + written((*given, (question, word))) + self.template.end) for word in CHOICES[question]
        )
        at = _first_difference(positive, negative)
        return positive[:at], positive[at], negative[at]

    def min_tokens(self, policy: Policy) -> int:
        """Length of the shortest row in which anything can be judged by a policy, with its verdict but no trace."""
        turn = self.dialogue.user_turn("", "", policy, policy.asks, Mode.REASONING)
        longest = max(
            len(self._completion(tuple(zip(policy.asks, words, strict=True)), None, Mode.DIRECT))
            for words in itertools.product(*(CHOICES[q] for q in policy.asks))
        )
        seams = 4  # tokens that split otherwise where texts meet
        texts = 2 * (MIN_KEPT + len(self.ids(CUT_MARK)) + seams)
        return len(self.ids(render(self.tokenizer, turn) + self._closing(Mode.DIRECT))) + texts + longest

    def _policy(self, example: Example) -> Policy:
        return policy_for(example, self.policy)

    def ids(self, text: str) -> list[int]:
        """Token ids of a part of an answer."""
        return token_ids(self.tokenizer, text)

    def _completion(self, answers: Answers, trace: str | None, mode: Mode) -> list[int]:
        text = self.dialogue.completion(answers, trace, mode, bool(self.template.reasoning_start))
        return self.ids(text + self.template.end)

    def _render(self, example: Example, mode: Mode, gold: Answers) -> _Rendered | None:
        """Tokens of the prompt and of all completions, the gold one first; the prompt leaves room for the longest."""
        if mode is Mode.REASONING and not (example.trace or "").strip():
            raise JaxguardError(
                f"example {example.id!r} has no trace: reasoning mode needs one; train it in direct mode"
            )
        words = [(word,) if word == ABSENT else (word, *(w for w in CHOICES[q] if w != word)) for q, word in gold]
        asks = tuple(q for q, _ in gold)
        completions = {}
        for choice in itertools.product(*words):
            given = tuple(zip(asks, choice, strict=True))
            completions[given] = self._completion(given, example.trace, mode)
        policy = self._policy(example)
        room = self.max_seq_len - max(map(len, completions.values()))
        fitted = self._fit(example, policy, asks, mode, room)
        if fitted is None:
            needed = self.min_tokens(policy)
            if mode is Mode.DIRECT or needed > self.max_seq_len:
                raise JaxguardError(
                    f"example {example.id!r}: policy {policy.name!r}, the frame around it and the verdict take "
                    f"{needed} tokens with the least of text, but data.max_seq_len={self.max_seq_len}; raise it to that, "
                    "or shorten the policy"
                )
            return None
        return _Rendered(fitted.ids, completions, fitted.cut, self._shared_prefix(policy, asks, mode, fitted.ids))

    def _sequence(self, example: Example, mode: Mode, rendered: _Rendered, given: Answers) -> EncodedExample:
        prompt, completion = rendered.prompt, rendered.completions[given]
        self._check_prompt(example, prompt, mode)
        self._check_completion(example, completion)
        probes = []
        for i, (question, word) in enumerate(given):
            if word == ABSENT:
                continue
            positive, negative = (
                rendered.completions[(*given[:i], (question, w), *given[i + 1 :])] for w in CHOICES[question]
            )
            at = _first_difference(positive, negative)
            probes.append(Probe(question, len(prompt) + at, positive[at], negative[at]))
        return EncodedExample(
            example_id=example.id,
            mode=mode,
            tokens=np.asarray(prompt + completion, np.int32),
            loss_mask=np.arange(len(prompt) + len(completion)) >= len(prompt),
            probes=tuple(probes),
            answers=given,
            cut=rendered.cut,
            shared_prefix=rendered.shared_prefix,
        )

    def _shared_prefix(self, policy: Policy, asks: tuple[Question, ...], mode: Mode, prompt: list[int]) -> bytes:
        """The prompt's first tokens, as far as they are those of any prompt of this policy; one object for all examples."""
        if not self.share_prefixes:
            return b""
        key = policy, asks, mode
        if key not in self._prefix_ids:
            self._prefix_ids[key] = self.ids(self.template.before + self.dialogue.shared_prefix(*key))
        # The last of them may be another where text follows.
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self._prefix_ids[key], prompt, strict=False))
        head = np.asarray([token for token, _ in same], np.int32).tobytes()
        return self._shared_prefixes.setdefault(head, head)

    def _check_prompt(self, example: Example, ids: list[int], mode: Mode) -> None:
        if self.template.reserved_in(ids) != self._frame[mode]:
            found = [self.template.reserved[i] for i in self.template.reserved_in(ids)]
            raise JaxguardError(
                f"example {example.id!r}: its text spells a special token of this tokenizer in a way that jaxguard "
                f"does not know; the prompt holds {found}. Leave the example out and report it"
            )

    def _check_completion(self, example: Example, ids: list[int]) -> None:
        # Think tags may be tokens of their own in some vocabularies; they are ours.
        reserved = [i for i in self.template.reserved_in(ids) if "think" not in self.template.reserved[i]]
        if reserved != [self.template.end_id] or ids[-1] != self.template.end_id:
            found = [self.template.reserved[i] for i in reserved]
            raise JaxguardError(
                f"example {example.id!r}: its answer should hold one special token, the end of turn, but holds {found}"
            )

    def _fit(
        self, example: Example, policy: Policy, asks: tuple[Question, ...], mode: Mode, room: int
    ) -> Prompt | None:
        """A prompt of at most `room` tokens; None if that cannot be.

        The longer of prompt and response is cut first, then both alike; each keeps its head and its tail. All work is
        linear in the text, and what is linear in a long text is done once.
        """
        most = self.max_seq_len * LONGEST_TOKEN
        texts = [shortened(t, most) for t in (example.prompt, example.response) if t is not None]

        def attempt(parts: Sequence[str]) -> tuple[str, list[int]]:
            turn = self.dialogue.user_turn(parts[0], parts[1] if len(parts) > 1 else None, policy, asks, mode)
            return turn, self.ids(self._prompt_text(turn, mode))

        turn, ids = attempt(texts)
        shorter = any(len(t or "") > most for t in (example.prompt, example.response))
        if len(ids) <= room:
            return Prompt(turn, ids, shorter)
        texts = [self.dialogue.quote(t) for t in texts]
        spans = [self.tokenizer.backend_tokenizer.encode(t, add_special_tokens=False).offsets for t in texts]
        counts = [len(s) for s in spans]
        keep = room - (len(ids) - sum(counts))
        least = sum(min(count, MIN_KEPT) for count in counts)
        while keep >= least:
            limit = share(counts, keep)
            turn, ids = attempt([cut(t, s, limit) for t, s in zip(texts, spans, strict=True)])
            if len(ids) <= room:
                return Prompt(turn, ids, cut=True)
            keep -= len(ids) - room
        return None

    @cached_property
    def _frame(self) -> dict[Mode, tuple[int, ...]]:
        """The reserved tokens of a prompt, in order, whatever it judges: the template's, and think tags of the format."""
        turns = {mode: self.dialogue.user_turn("", "", Policy("none"), QUESTIONS, mode) for mode in Mode}
        return {
            mode: self.template.reserved_in(self.ids(self._prompt_text(turn, mode))) for mode, turn in turns.items()
        }

    def _closing(self, mode: Mode) -> str:
        """What ends a thought that the template opened, in the mode that has none."""
        return REASONING_END if self.template.reasoning_start and mode is Mode.DIRECT else ""

    def _prompt_text(self, turn: str, mode: Mode) -> str:
        """The rendered prompt; the template must have left the turn as it is."""
        text = render(self.tokenizer, turn)
        if text != self.template.before + turn + self.template.after:
            raise JaxguardError(f"the chat template changes the user turn; it renders {text[:200]!r}...")
        return text + self._closing(mode)


def encode_many(encoder: Encoder, examples: Sequence[Example], modes: Sequence[Mode]) -> list[EncodedExample | None]:
    """`encode` of each example, in order, on all cores: the tokenizer works outside the interpreter's lock.

    Raises:
        JaxguardError: as `encode`, for the first example that it concerns.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(encoder.encode, examples, modes))


def _first_difference(a: list[int], b: list[int]) -> int:
    """Index of the first token in which two completions differ; neither starts with the other: they share their end."""
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
