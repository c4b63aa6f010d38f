"""Encode examples with the checkpoint's chat template: tokens, loss mask and probes."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import numpy as np
from transformers import PreTrainedTokenizerBase

from jaxguard.config.data import DataConfig
from jaxguard.data.examples import Example
from jaxguard.data.format.answer import parse, reasoning_of
from jaxguard.data.format.dialogue import (
    ABSENT,
    CHOICES,
    REASONING_END,
    Answers,
    Dialogue,
    Mode,
    all_answers,
    answers,
    questions,
    written,
)
from jaxguard.data.format.template import Template, load_tokenizer, read_template, render, token_ids
from jaxguard.data.policies import QUESTIONS, Policy, Question, load_policy, policy_for
from jaxguard.utils.errors import JaxguardError

TOKENIZER_FILES: Final = ("*.json", "*.jinja", "tokenizer*")
"""Files of a checkpoint that an encoder needs."""
MIN_KEPT: Final = 16
"""Least tokens of a prompt, and of a response, that truncation leaves."""
CUT_MARK: Final = "\n[... the middle is left out ...]\n"
BATCH: Final = 256
"""Examples that are tokenized at once."""
LONGEST_TOKEN: Final = 64
"""Characters of a token. Texts longer than this times max_seq_len are cut before tokenization, which bounds time and memory."""


@dataclass(frozen=True)
class Probe:
    """Where a sequence decides between the two words of a verdict line.

    `position` is the index into `tokens` of the first token that differs between the positive word (harmful, refusal) and the
    negative one; `positive_id` and `negative_id` are this token of each.
    """

    question: Question
    position: int
    positive_id: int
    negative_id: int


@dataclass(frozen=True)
class EncodedExample:
    """One example as tokens.

    Attributes:
        tokens: int32 [n]; prompt, then completion with its end-of-turn token.
        loss_mask: bool [n]; True for the tokens of the completion.
        probes: one for each labelled verdict line, in order.
        cut: untrusted text was truncated.
        shared: the first so many tokens are those of the policy, which other examples share; never all of the prompt.
        weight: of the example, or of its preference, in the loss.
        rejected: the same prompt with the answer to which this one is preferred.
        reference: log-probabilities of the completion's tokens by the model that a preference is relative to, or that sampled it.
    """

    example_id: str
    mode: Mode
    tokens: np.ndarray
    loss_mask: np.ndarray
    probes: tuple[Probe, ...]
    answers: Answers
    cut: bool
    shared: int = 0
    weight: float = 1.0
    rejected: Self | None = None
    reference: np.ndarray | None = None

    @property
    def sequences(self) -> tuple[Self, ...]:
        """What a batch has of the example: itself, and what it is preferred to."""
        return (self,) if self.rejected is None else (self, self.rejected)

    def answered(self, path: Sequence[int], ids: Sequence[int]) -> Self:
        """Return the example with the tokens `path`, continued by `ids`, which are trained on; without probes."""
        tokens, loss_mask = continued(path, ids)
        return replace(self, tokens=tokens, loss_mask=loss_mask, probes=())


class _Turn(NamedTuple):
    """A user turn before truncation, its untrusted texts, and the prompt that it makes in the chat template."""

    example: Example
    policy: Policy
    asks: tuple[Question, ...]
    mode: Mode
    texts: list[str]
    turn: str
    prompt: str


class SpecialTokenError(JaxguardError):
    """A text holds a special token that could not be escaped."""


class PromptTooLongError(JaxguardError):
    """The policy and the answer leave no space for any text."""


class Prompt(NamedTuple):
    """A prompt for generation: the user turn's text, its tokens in the chat template, whether text was truncated.

    The first `shared` tokens are those of the policy, which other prompts share.
    """

    turn: str
    ids: list[int]
    cut: bool
    shared: int = 0


@dataclass(frozen=True)
class Encoder:
    """Render and tokenize examples into sequences of at most `max_seq_len` tokens.

    `policy` is that of examples without their own.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template
    dialogue: Dialogue
    policy: Policy
    max_seq_len: int
    _prefix_ids: dict[Any, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def load(cls, folder: Path, data: DataConfig, policy: Policy | None = None) -> Self:
        """Load the encoder of a checkpoint; `policy` defaults to the config's, and has to leave space for text."""
        tokenizer = load_tokenizer(folder)
        template = read_template(tokenizer, folder)
        tokens, last = tuple(template.reserved.values()), data.answer_format == "last"
        dialogue = Dialogue(data.reasoning_marker, data.direct_marker, tokens, last)
        policy = policy or load_policy(data.policy)
        encoder = cls(tokenizer, template, dialogue, policy, data.max_seq_len)
        turn = dialogue.user_turn("", "", policy, policy.asks, Mode.REASONING)
        if (text := render(tokenizer, turn)) != encoder.prompt_text(turn, Mode.REASONING):
            raise JaxguardError(f"{folder}: its chat template changes the user turn; it renders {text[:200]!r}...")
        needed = encoder.min_tokens(policy)
        if needed > data.max_seq_len:
            raise JaxguardError(
                f"data.max_seq_len={data.max_seq_len} is too short: policy {policy.name!r} and the verdict take "
                f"{needed} tokens with the least of text; raise it to that, or shorten the policy"
            )
        return encoder

    def encode(self, example: Example, mode: Mode) -> EncodedExample | None:
        """Encode an example with its labels, for training: the first of `branches`, None if there is none."""
        return next(self.branches(example, mode), None)

    def branches(self, example: Example, mode: Mode) -> Iterator[EncodedExample]:
        """Encode an example with every combination of answers to all labelled questions but the last.

        For validation without sampling: P(question positive) is the sum over earlier answers of P(earlier answers)
        P(positive | earlier answers), each factor at a probe. All branches have the same prompt and trace.

        Yields:
            2 ** (labelled questions - 1) sequences, the true labels first; none if the answers leave no space for the text.

        Raises:
            JaxguardError: no label for any question, no trace in reasoning mode, or its own policy does not fit.
        """
        turn, gold, completions = self._draft(example, mode)
        yield from self._encode(turn, gold, completions, {})

    def encode_all(
        self, examples: Iterable[tuple[Example, Mode]], most: int | None = None
    ) -> Iterator[tuple[EncodedExample, ...]]:
        """Yield the branches of each example, or the first `most` of them; threads share the tokenization. Errors as there."""
        rest = iter(examples)
        while drafts := [self._draft(*each) for each in itertools.islice(rest, BATCH)]:
            texts = list(dict.fromkeys(text for turn, _, texts in drafts for text in (turn.prompt, *texts.values())))
            texts += [self._rejected(turn.example) for turn, _, _ in drafts if turn.example.rejected]
            encodings = self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            known = {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}
            for draft in drafts:
                yield tuple(itertools.islice(self._encode(*draft, known), most))

    def _draft(self, example: Example, mode: Mode) -> tuple[_Turn, Answers, dict[Answers, str]]:
        """Return all of an example that is tokenized: the turn, the labels, and a completion for every combination of answers."""
        policy = policy_for(example, self.policy)
        gold = answers(example, questions(example, policy))
        if mode is Mode.REASONING and not (example.trace or "").strip():
            raise JaxguardError(
                f"example {example.id!r} has no trace: reasoning mode needs one; train it in direct mode"
            )
        asks = tuple(q for q, _ in gold)
        reasoning = self._completion(gold, example.trace, mode).removesuffix(written(gold) + self.template.end)
        completions = {verdict: reasoning + written(verdict) + self.template.end for verdict in all_answers(gold)}
        return self._turn(example, policy, asks, mode), gold, completions

    def _encode(
        self, turn: _Turn, gold: Answers, texts: Mapping[Answers, str], known: Mapping[str, list[int]]
    ) -> Iterator[EncodedExample]:
        """Yield the branches of a draft; `known` are the tokens of texts."""
        example, policy, asks, mode, *_ = turn
        completions = {verdict: known.get(text) or self.ids(text) for verdict, text in texts.items()}
        preferred, rejected = self._sampled(example, gold, mode)
        if example.rejected and not rejected:
            rejected_text = self._rejected(example)
            rejected = known.get(rejected_text) or self.ids(rejected_text)
        # The prompt leaves space for the longest completion, and for both answers of a preference, which one row holds.
        pair = len(preferred or completions[gold]) + len(rejected) if rejected else 0
        limit = self.max_seq_len - max(pair, *map(len, completions.values()))
        prompt = self._fit(turn, known.get(turn.prompt) or self.ids(turn.prompt), limit)
        if prompt is None:
            needed = self.min_tokens(policy)
            if needed > self.max_seq_len or (mode is Mode.DIRECT and not rejected):
                raise JaxguardError(
                    f"example {example.id!r}: policy {policy.name!r} and the verdict take {needed} "
                    f"tokens with the least of text, but data.max_seq_len={self.max_seq_len}; raise it to that, "
                    "or shorten the policy"
                )
            return
        shared = self._shared(policy, asks, mode, prompt.ids)
        last = next((q for q, word in reversed(gold) if word != ABSENT), None)
        for verdict, completion in completions.items():
            if last is not None and dict(verdict)[last] != dict(gold)[last]:
                continue
            probes = []
            self._check_answer(example, completion)
            for i, (question, word) in enumerate(verdict):
                if word != ABSENT:
                    positive, negative = (
                        completions[(*verdict[:i], (question, w), *verdict[i + 1 :])] for w in CHOICES[question]
                    )
                    at = next(j for j, (p, n) in enumerate(zip(positive, negative, strict=False)) if p != n)
                    probes.append(Probe(question, len(prompt.ids) + at, positive[at], negative[at]))
            weight = 1.0 if example.weight is None else example.weight
            tokens, trained = continued(prompt.ids, completion)
            chosen = EncodedExample(
                example.id, mode, tokens, trained, tuple(probes), verdict, prompt.cut, shared, weight
            )
            if rejected and verdict == gold:
                self._check_answer(example, rejected)
                if preferred:
                    self._check_answer(example, preferred)
                    chosen = chosen.answered(prompt.ids, preferred)
                chosen = replace(chosen, rejected=replace(chosen.answered(prompt.ids, rejected), answers=()))
            yield chosen

    def prompt(
        self,
        example: Example,
        mode: Mode,
        answer_tokens: int = 0,
        asks: tuple[Question, ...] | None = None,
        default: Policy | None = None,
    ) -> Prompt:
        """Encode a prompt for generation, without labels.

        `answer_tokens` of max_seq_len are left for the answer. `asks` defaults to the policy's questions; `default` is the policy
        of an example without its own, if not the encoder's.

        Raises:
            PromptTooLongError: the policy does not fit.
            SpecialTokenError: the text contains a special token that could not be escaped.
        """
        policy = policy_for(example, default or self.policy)
        asks = asks or policy.asks
        turn = self._turn(example, policy, asks, mode)
        fitted = self._fit(turn, self.ids(turn.prompt), self.max_seq_len - answer_tokens)
        if fitted is None:
            raise PromptTooLongError(
                f"example {example.id!r}: its policy leaves no space for text in {self.max_seq_len} tokens"
                + (f" less {answer_tokens} for the answer" if answer_tokens else "")
            )
        shared = self._shared(policy, asks, mode, fitted.ids)
        # Without the token that the text may change, so that it is the same for all texts.
        return fitted._replace(shared=min(shared, len(self._prefix_ids[policy, asks, mode]) - 1))

    def unanswered(self, example: Example, mode: Mode, answer_tokens: int) -> EncodedExample:
        """Encode the prompt of an example for answers of so many tokens, followed by the right verdict without any reasoning.

        Any verdict fits behind such an answer. Raises: as `prompt`; JaxguardError: no label for any question.
        """
        gold = answers(example, questions(example, policy_for(example, self.policy)))
        answer, *others = self.verdicts(gold)
        room = answer_tokens + max(map(len, (answer, *others)))
        prompt = self.prompt(example, mode, room, tuple(q for q, _ in gold))
        return EncodedExample(example.id, mode, *continued(prompt.ids, answer), (), gold, prompt.cut, prompt.shared)

    def verdicts(self, gold: Answers) -> list[list[int]]:
        """Return the tokens of every verdict on the labelled questions, in the order of `all_answers`, with the end of turn."""
        return [self.ids(written(verdict) + self.template.end) for verdict in all_answers(gold)]

    def min_tokens(self, policy: Policy) -> int:
        """Return the length of the shortest useful sequence under a policy, with its verdict but no trace."""
        turn = self.dialogue.user_turn("", "", policy, policy.asks, Mode.REASONING)
        longest = max(
            len(self.ids(self._completion(tuple(zip(policy.asks, words, strict=True)), None, Mode.DIRECT)))
            for words in itertools.product(*(CHOICES[q] for q in policy.asks))
        )
        seams = 4  # tokens may split differently where texts meet
        texts = 2 * (MIN_KEPT + len(self.ids(CUT_MARK)) + seams)
        return len(self.ids(self.prompt_text(turn, Mode.DIRECT))) + texts + longest

    def ids(self, text: str) -> list[int]:
        """Tokenize a part of an answer."""
        return token_ids(self.tokenizer, text)

    def _check_answer(self, example: Example, completion: Sequence[int]) -> None:
        """Refuse an answer with another special token than the end of turn, its last one."""
        # In some vocabularies think tags are special tokens.
        reserved = [i for i in self.template.reserved_in(completion) if "think" not in self.template.reserved[i]]
        if reserved != [self.template.end_id] or completion[-1] != self.template.end_id:
            raise JaxguardError(
                f"example {example.id!r}: its answer should hold one special token, the end of turn, but holds "
                f"{[self.template.reserved[i] for i in reserved]}"
            )

    def _rejected(self, example: Example) -> str:
        return f"{example.rejected}{self.template.end}"

    def _sampled(self, example: Example, gold: Answers, mode: Mode) -> tuple[list[int], list[int]]:
        """Return the tokens of a preference's answers that a guard sampled; none of one that this tokenizer reads as another."""

        def text(ids: tuple[int, ...]) -> str:
            whole = ids[-1:] == (self.template.end_id,) and max(ids) < len(self.tokenizer)
            return str(self.tokenizer.decode(list(ids[:-1]), clean_up_tokenization_spaces=False)) if whole else ""

        if not example.rejected or not example.sampled:
            return [], []
        preferred, rejected = example.sampled
        labels = {question: word for question, word in gold if word != ABSENT}
        verdict = parse(text(preferred), labels, mode, example.response is not None)
        same = not verdict.problems and all(getattr(verdict, question) == word for question, word in labels.items())
        if mode is Mode.REASONING:
            same = same and reasoning_of(text(preferred)) == (example.trace or "").strip()
        return list(preferred) if same else [], list(rejected) if text(rejected).strip() == example.rejected else []

    def _completion(self, answers: Answers, trace: str | None, mode: Mode) -> str:
        return self.dialogue.completion(answers, trace, mode, bool(self.template.reasoning_start)) + self.template.end

    def _shared(self, policy: Policy, asks: tuple[Question, ...], mode: Mode, prompt: list[int]) -> int:
        """Return how many of the prompt's first tokens are those that all prompts of this policy begin with."""
        key = policy, asks, mode
        if key not in self._prefix_ids:
            ids = self.ids(self.template.before + self.dialogue.shared_prefix(*key))
            self._prefix_ids[key] = np.asarray(ids, np.int32)
        # The last one may differ when text follows.
        return common_length(self._prefix_ids[key], np.asarray(prompt, np.int32))

    def _turn(self, example: Example, policy: Policy, asks: tuple[Question, ...], mode: Mode) -> _Turn:
        most = self.max_seq_len * LONGEST_TOKEN
        whole = [text for text in (example.prompt, example.response) if text is not None]
        texts = [text if len(text) <= most else text[: most // 2] + CUT_MARK + text[-(most // 2) :] for text in whole]
        turn = self._user_turn(texts, policy, asks, mode)
        return _Turn(example, policy, asks, mode, texts, turn, self.prompt_text(turn, mode))

    def _user_turn(self, texts: Sequence[str], policy: Policy, asks: tuple[Question, ...], mode: Mode) -> str:
        return self.dialogue.user_turn(texts[0], texts[1] if len(texts) > 1 else None, policy, asks, mode)

    def _fit(self, first: _Turn, ids: list[int], limit: int) -> Prompt | None:
        """Fit a prompt, of which `ids` are the tokens as it is, into `limit` tokens; None if impossible.

        The middle of the longer text is cut first, then both alike. The work is linear in the text's length.
        """
        example, policy, asks, mode, texts, turn, _ = first
        cut = texts != [text for text in (example.prompt, example.response) if text is not None]
        if len(ids) > limit:
            quotes = (self.dialogue.quote_prompt, self.dialogue.quote)
            cut, texts = True, [quote(text) for quote, text in zip(quotes, texts, strict=False)]
            spans = [self.tokenizer.backend_tokenizer.encode(t, add_special_tokens=False).offsets for t in texts]
            counts = [len(each) for each in spans]
            keep = limit - (len(ids) - sum(counts))
            while len(ids) > limit:
                if keep < sum(min(count, MIN_KEPT) for count in counts):
                    return None
                # The largest limit with sum(min(count, limit)) <= keep: the longest text is cut first.
                most = keep if len(counts) == 1 else max(keep // 2, keep - min(counts))
                parts = [_cut(text, each, most) for text, each in zip(texts, spans, strict=True)]
                turn = self._user_turn(parts, policy, asks, mode)
                ids = self.ids(self.prompt_text(turn, mode))
                keep -= len(ids) - limit
        reserved = self.template.reserved_in(ids)
        if reserved != self._frame[mode]:
            raise SpecialTokenError(
                f"example {example.id!r}: its text contains a special token of this tokenizer that jaxguard could not escape; "
                f"the prompt holds {[self.template.reserved[i] for i in reserved]}. Leave the example out and report it"
            )
        return Prompt(turn, ids, cut)

    @cached_property
    def _frame(self) -> dict[Mode, tuple[int, ...]]:
        """The reserved tokens of any prompt, in order: the template's, and the think tags of the format."""
        turns = {mode: self.dialogue.user_turn("", "", Policy("none"), QUESTIONS, mode) for mode in Mode}
        prompts = {mode: self.ids(self.prompt_text(turn, mode)) for mode, turn in turns.items()}
        return {mode: self.template.reserved_in(ids) for mode, ids in prompts.items()}

    def prompt_text(self, turn: str, mode: Mode) -> str:
        """Return a user turn as the chat template renders it; direct mode closes a think block that the template opened."""
        text = self.template.before + turn + self.template.after
        return text + REASONING_END if self.template.reasoning_start and mode is Mode.DIRECT else text


def continued(path: Sequence[int], ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of `path` and `ids`, and which of them are trained on: those of `ids`."""
    tokens = np.asarray([*path, *ids], np.int32)
    return tokens, np.arange(len(tokens)) >= len(path)


def common_length(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """Return how many tokens both sequences begin with."""
    shorter = min(len(a), len(b))
    differ = np.flatnonzero(np.not_equal(a[:shorter], b[:shorter]))
    return int(differ[0]) if len(differ) else shorter


def _cut(text: str, spans: list[tuple[int, int]], limit: int) -> str:
    """Cut the middle out of a text, so that `limit` tokens are left; `spans` are its tokens' character spans."""
    if len(spans) <= limit:
        return text
    first, last = (limit + 1) // 2, limit // 2
    return text[: spans[first - 1][1]] + CUT_MARK + text[spans[-last][0] :]
