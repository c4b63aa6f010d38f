"""The format of our own guards: prompted and parsed as they were trained."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.data.encoding import Encoder, PromptTooLongError
from jaxguard.data.format.answer import parse, verdict_prefix
from jaxguard.data.format.dialogue import ABSENT, CHOICES, REASONING_END, TITLES, Mode, questions
from jaxguard.data.policies import QUESTIONS, Question, policy_for
from jaxguard.data.questions import RARE, QuestionSet, ask, unasked
from jaxguard.guards.formats.grammar import Lines, VerdictLine, decision_tree, whole_answers
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, UNPARSABLE, DecisionPoint, Prompt, Request, UnsupportedError
from jaxguard.utils.hub import ConfigFile
from jaxguard.utils.parse import read_json

MOST_TOKENS: Final = 8192
"""Text is judged whole up to here, where the model's context allows it, however short the rows of its training were."""
_LINES: Final = {
    question: VerdictLine(question=question, label=TITLES[question], positive=(positive,), negative=(negative,))
    for question, (positive, negative) in CHOICES.items()
}


def split_request(
    request: Request, lines: tuple[Question, ...], trained: Sequence[QuestionSet], rare: float = RARE
) -> list[tuple[Request, tuple[Question, ...]]]:
    """Split a request into parts that were trained, each with its verdict lines; questions that were not are left out."""
    example = request.example
    alone = replace(example, response=None, response_label=None, refusal_label=None)
    return [
        (replace(request, example=example if each.response else alone, questions=each.questions), each.lines)
        for each in ask(request.questions, lines, example.response is not None, request.mode, trained, rare)
    ]


@dataclass(frozen=True)
class NativeFormat:
    """Renders and parses as the guard was trained. Implements protocol.PromptFormat.

    One prompt answers all questions that were trained together.

    Attributes:
        encoder: of the guard's checkpoint, with the run's policy and markers.
        settings: how much room is left for an answer, and which verdict lines a prompt asks for besides the request's: all of the
            policy, or those that are known of the example (its labels, and those about a response that is not there).
        trained: the sets of questions that it was trained on: of them, a prompt asks the one nearest to those lines. Empty: not
            known, all lines are asked.
    """

    encoder: Encoder
    settings: EvaluateConfig
    trained: tuple[QuestionSet, ...] = ()

    def _parts(self, request: Request) -> list[tuple[Request, tuple[Question, ...]]]:
        policy = policy_for(request.example, request.policy or self.encoder.policy)
        others = policy.asks if self.settings.ask == "policy" else questions(request.example, policy)
        lines = tuple(q for q in QUESTIONS if q in others or q in request.questions)
        missing = unasked(request.questions, request.example.response is not None, request.mode, self.trained)
        if missing:
            raise UnsupportedError(
                f"example {request.example.id!r}: in {request.mode} mode this guard was not trained on {', '.join(missing)}"
            )
        # Mining asks about a training example what its own prompt asked, however few were labelled so.
        return split_request(request, lines, self.trained, RARE if self.settings.ask == "policy" else 0.0)

    def lines(self, request: Request) -> tuple[Question, ...]:
        """The verdict lines that the prompt of one part of a request asks for."""
        return self._parts(request)[0][1]

    def split(self, request: Request, /) -> Sequence[Request]:
        return [part for part, _ in self._parts(request)]

    def prompt(self, request: Request, /) -> Prompt:
        room = self.settings.verdict_tokens
        if request.mode is Mode.REASONING:
            room += self.settings.reasoning_tokens + self.settings.verdict_tokens
        try:
            prompt = self.encoder.prompt(request.example, request.mode, room, self.lines(request), request.policy)
        except PromptTooLongError as error:
            raise UnsupportedError(str(error)) from None
        return Prompt(tuple(prompt.ids), prompt.cut, prompt.shared)

    def text(self, ids: Sequence[int], /) -> str:
        return str(self.encoder.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def tokens(self, text: str, /) -> Sequence[int]:
        return self.encoder.ids(text)

    def parse(self, request: Request, text: str, /) -> dict[Question, int]:
        has_response = request.example.response is not None
        verdicts: dict[Question, int] = {}
        for question in request.questions:
            verdict = parse(text, [question], request.mode, has_response)
            positive = getattr(verdict, question) == CHOICES[question][0]
            verdicts[question] = UNPARSABLE if verdict.problems else POSITIVE if positive else NEGATIVE
        return verdicts

    def close_reasoning(self, request: Request, text: str, /) -> str | None:
        if request.mode is Mode.DIRECT:
            return None
        prefix = verdict_prefix(text)
        if prefix is None:
            closed = text.rstrip() + REASONING_END
            return closed if verdict_prefix(closed) else None
        return prefix if UNPARSABLE in self.parse(request, text).values() else None

    def decision_points(self, request: Request, text: str, /) -> Sequence[DecisionPoint]:
        start = verdict_prefix(text) if request.mode is Mode.REASONING else ""
        if start is None:
            return ()
        prompt, end = self.prompt(request).ids, self.encoder.template.end
        return decision_tree(prompt, start, self._verdict_lines(request), request.questions, self.tokens, end)

    def answers(self, request: Request, /) -> Sequence[str]:
        return whole_answers(self._verdict_lines(request)) if request.mode is Mode.DIRECT else ()

    def _verdict_lines(self, request: Request) -> Lines:
        absent = (ABSENT,) if request.example.response is None else ()
        return tuple((_LINES[q], () if q == "prompt_harm" else absent) for q in self.lines(request))

    @property
    def verdict_tokens(self) -> int | None:
        return None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.encoder.template.end_id,)


def context_tokens(folder: Path) -> int:
    """The context of the model in `folder`, at most MOST_TOKENS; JaxguardError: its config.json says no number."""
    path = folder / "config.json"
    config = read_json(path, ConfigFile) if path.is_file() else ConfigFile()
    context = config.max_position_embeddings or (config.text_config or config).max_position_embeddings
    return min(context or MOST_TOKENS, MOST_TOKENS)
