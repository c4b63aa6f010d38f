"""Our own guards as a Format: the dialogue that they were trained with, asked and read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxguard.data.dialogue import (
    ABSENT,
    CHOICES,
    Answers,
    Mode,
    end_thought,
    ended_thought,
    parse,
    questions,
)
from jaxguard.data.encode import Encoder
from jaxguard.data.policies import QUESTIONS, Question, policy_for
from jaxguard.evaluate.judging import Ask, Choice
from jaxguard.evaluate.metrics import NEGATIVE, POSITIVE, UNPARSEABLE
from jaxguard.evaluate_sections import EvaluateConfig


@dataclass(frozen=True)
class OurFormat:
    """Asks and reads as the guard was trained; implements judging.Format.

    Attributes:
        encoder: of the guard's checkpoint, with the run's policy and markers.
        ask: all that a policy asks, or what is known of the example: the benchmark's question, and those about a response
            that is not there.
        thought_tokens, verdict_tokens: room that is left for an answer.
    """

    encoder: Encoder
    ask: Literal["policy", "benchmark"]
    thought_tokens: int
    verdict_tokens: int

    @classmethod
    def of(cls, encoder: Encoder, settings: EvaluateConfig) -> "OurFormat":
        return cls(encoder, settings.ask, settings.thought_tokens, settings.verdict_tokens)

    def asks(self, ask: Ask) -> tuple[Question, ...]:
        """The verdict lines that the guard is asked for."""
        policy = policy_for(ask.example, self.encoder.policy)
        asked = policy.asks if self.ask == "policy" else questions(ask.example, policy)
        return tuple(q for q in QUESTIONS if q in asked or q == ask.question)

    def prompt(self, ask: Ask) -> Sequence[int]:
        room = self.verdict_tokens + (self.thought_tokens + self.verdict_tokens if ask.mode in self.thinks else 0)
        ids: list[int] = self.encoder.prompt(ask.example, ask.mode, room, self.asks(ask)).tolist()
        return ids

    def text(self, ids: Sequence[int]) -> str:
        return str(self.encoder.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def tokens(self, text: str) -> Sequence[int]:
        return self.encoder.ids(text)

    def read(self, ask: Ask, text: str) -> int:
        verdict = parse(text, [ask.question], ask.mode, ask.example.response is not None)
        if verdict.problems:
            return UNPARSEABLE
        return POSITIVE if getattr(verdict, ask.question) == CHOICES[ask.question][0] else NEGATIVE

    def closed(self, ask: Ask, text: str) -> str | None:
        return end_thought(text) if ask.mode in self.thinks and ended_thought(text) is None else None

    def choices(self, ask: Ask, text: str) -> Sequence[Choice]:
        """A choice for each line up to the question's, for every way there."""
        start = ended_thought(text) if ask.mode in self.thinks else ""
        if start is None:
            return ()
        prompt = tuple(self.prompt(ask))
        found: list[Choice] = []
        paths: list[tuple[Answers, tuple[tuple[int, bool], ...]]] = [((), ())]
        for question in self.asks(ask):
            if question != "prompt_harm" and ask.example.response is None:
                paths = [((*given, (question, ABSENT)), earlier) for given, earlier in paths]
                continue
            longer = []
            for given, earlier in paths:
                before, positive, negative = self.encoder.forks(start, given, question)
                place, final = len(found), question == ask.question
                found.append(Choice((*prompt, *before), positive, negative, earlier, final))
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
