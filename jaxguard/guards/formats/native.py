"""Our own guards as a PromptFormat: the dialogue that they were trained with, asked and read."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.data.encoding import Encoder, PromptTooLongError
from jaxguard.data.format.answer import close_reasoning, parse, verdict_prefix
from jaxguard.data.format.dialogue import ABSENT, CHOICES, Answers, Mode, questions
from jaxguard.data.policies import QUESTIONS, Question, policy_for
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, UNPARSABLE, DecisionPoint, Prompt, Request, UnsupportedError
from jaxguard.utils.errors import JaxguardError

MOST_TOKENS: Final = 8192
"""Text is judged whole up to here, where the model's context allows it, however short the rows of its training were."""


@dataclass(frozen=True)
class NativeFormat:
    """Asks and reads as the guard was trained; implements judging.PromptFormat.

    Attributes:
        encoder: of the guard's checkpoint, with the run's policy and markers.
        ask: all that a policy asks, or what is known of the example: the benchmark's question, and those about a response
            that is not there.
        reasoning_tokens, verdict_tokens: room that is left for an answer.
    """

    encoder: Encoder
    ask: Literal["policy", "benchmark"]
    reasoning_tokens: int
    verdict_tokens: int

    @classmethod
    def of(cls, encoder: Encoder, settings: EvaluateConfig) -> "NativeFormat":
        return cls(encoder, settings.ask, settings.reasoning_tokens, settings.verdict_tokens)

    def asks(self, ask: Request) -> tuple[Question, ...]:
        """The verdict lines that the guard is asked for."""
        policy = policy_for(ask.example, self.encoder.policy)
        asked = policy.asks if self.ask == "policy" else questions(ask.example, policy)
        return tuple(q for q in QUESTIONS if q in asked or q == ask.question)

    def prompt(self, ask: Request) -> Prompt:
        room = self.verdict_tokens + (self.reasoning_tokens + self.verdict_tokens if ask.mode in self.thinks else 0)
        try:
            found = self.encoder.prompt(ask.example, ask.mode, room, self.asks(ask))
        except PromptTooLongError as error:
            raise UnsupportedError(str(error)) from None
        return Prompt(tuple(found.ids), found.cut)

    def text(self, ids: Sequence[int]) -> str:
        return str(self.encoder.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def tokens(self, text: str) -> Sequence[int]:
        return self.encoder.ids(text)

    def read(self, ask: Request, text: str) -> int:
        verdict = parse(text, [ask.question], ask.mode, ask.example.response is not None)
        if verdict.problems:
            return UNPARSABLE
        return POSITIVE if getattr(verdict, ask.question) == CHOICES[ask.question][0] else NEGATIVE

    def closed(self, ask: Request, text: str) -> str | None:
        if ask.mode not in self.thinks:
            return None
        ended = verdict_prefix(text)
        if ended is None:
            return close_reasoning(text)
        return ended if self.read(ask, text) == UNPARSABLE else None

    def choices(self, ask: Request, text: str) -> Sequence[DecisionPoint]:
        """A choice for each line up to the question's, for every way there."""
        start = verdict_prefix(text) if ask.mode in self.thinks else ""
        if start is None:
            return ()
        prompt = self.prompt(ask).ids
        found: list[DecisionPoint] = []
        paths: list[tuple[Answers, tuple[tuple[int, bool], ...]]] = [((), ())]
        for question in self.asks(ask):
            if question != "prompt_harm" and ask.example.response is None:
                paths = [((*given, (question, ABSENT)), earlier) for given, earlier in paths]
                continue
            longer = []
            for given, earlier in paths:
                before, positive, negative = self.encoder.decision_point(start, given, question)
                place, final = len(found), question == ask.question
                found.append(DecisionPoint((*prompt, *before), positive, negative, earlier, final))
                longer += [
                    ((*given, (question, word)), (*earlier, (place, word == CHOICES[question][0])))
                    for word in CHOICES[question]
                ]
            if question == ask.question:
                break
            paths = longer
        return found

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.encoder.end_id,)

    @property
    def thinks(self) -> frozenset[Mode]:
        return frozenset({Mode.REASONING})


def context_tokens(folder: Path) -> int:
    """The context of the model in `folder`, at most MOST_TOKENS.

    Raises:
        JaxguardError: its config.json is not JSON.
    """
    path = folder / "config.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise JaxguardError(f"{path}: not JSON: {error}") from None
    context = tree.get("max_position_embeddings") or (tree.get("text_config") or {}).get("max_position_embeddings")
    return min(int(context or MOST_TOKENS), MOST_TOKENS)
