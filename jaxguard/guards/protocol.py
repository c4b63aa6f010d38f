"""From examples to answers: the protocol that every generating guard is measured by.

    prompt -> `generations` answers -> those whose thought ran out get a forced verdict -> read
           -> probability of the positive answer, at the place where the verdict is chosen

A PromptFormat knows how a guard is asked and read, an Backend computes. This module puts the two together.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Question
from jaxguard.utils.errors import JaxguardError

POSITIVE: Final = 1
NEGATIVE: Final = 0
UNPARSABLE: Final = -1
"""The three states of a verdict, in an array of int8. The positive class is harmful, or refusal."""


class UnsupportedError(JaxguardError):
    """A guard cannot be asked that at all: no such question or policy in its format."""


@dataclass(frozen=True)
class Request:
    """One example to judge: its labels are for nobody but the scorer."""

    example: Example
    question: Question
    mode: Mode


@dataclass(frozen=True)
class Prediction:
    """What a guard said of an example.

    Attributes:
        example_id: whose it is.
        verdicts: of each generation: POSITIVE, NEGATIVE or UNPARSABLE (evaluate/metrics.py).
        probability: of the positive answer; None where the guard gives none. In reasoning mode the mean over its thoughts.
        texts: what was generated, a forced verdict included; empty where nothing was sampled.
        forced: generations that ran out of tokens before their verdict, so that one was forced.
        prompt_tokens: of the prompt.
        completion_tokens: of all generations together.
        seconds: from asking to the answer; of a batch, its share.
        wall: since the answer before it, which summed over a benchmark is the time that it took.
        unscored: thoughts that are not in the probability, since they lead to no place where the verdict is chosen.
        cut: the text was too long for the model and was judged without its middle.
        scoring: seconds for the probability, of a batch its share; not part of `seconds`.
    """

    example_id: str
    verdicts: tuple[int, ...]
    probability: float | None
    texts: tuple[str, ...] = ()
    forced: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    wall: float = 0.0
    unscored: int = 0
    cut: bool = False
    scoring: float = 0.0


class Guard(Protocol):
    """A guard that is ready to be asked."""

    def __call__(self, asks: Sequence[Request], /) -> AsyncIterator[Prediction]:
        """Answers in any order, each as soon as it is there; stopping loses no more than what is under way."""
        ...


@dataclass(frozen=True)
class DecisionPoint:
    """A place where a verdict is chosen between two tokens.

    Attributes:
        prefix: token ids of everything before it, prompt included.
        positive_id, negative_id: the two tokens.
        earlier: the choices that lead here, as (index into the list of choices, whether its positive token was taken).
        final: this one answers the question; others are about lines before it.
    """

    prefix: tuple[int, ...]
    positive_id: int
    negative_id: int
    earlier: tuple[tuple[int, bool], ...] = ()
    final: bool = True


class Prompt(NamedTuple):
    """Token ids that generation starts from; `cut`: untrusted text was left out to fit the model."""

    ids: tuple[int, ...]
    cut: bool = False


class PromptFormat(Protocol):
    """How a guard is asked and how its answers are read."""

    def prompt(self, ask: Request, /) -> Prompt:
        """What generation starts from.

        Raises:
            UnsupportedError: no such question or policy in this format, or no room for the policy.
        """
        ...

    def text(self, ids: Sequence[int], /) -> str:
        """Generated tokens as text."""
        ...

    def read(self, ask: Request, text: str, /) -> int:
        """POSITIVE, NEGATIVE or UNPARSABLE."""
        ...

    def closed(self, ask: Request, text: str, /) -> str | None:
        """An answer that ran out of tokens, with its thought ended, ready for the verdict; None if it has one, or never thinks."""
        ...

    def tokens(self, text: str, /) -> Sequence[int]:
        """Token ids of an answer's beginning."""
        ...

    def choices(self, ask: Request, text: str, /) -> Sequence[DecisionPoint]:
        """Where the verdict is chosen after this answer's thought; () if the format cannot say."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        ...

    @property
    def thinks(self) -> frozenset[Mode]:
        """Modes in which an answer opens with a thought."""
        ...


@dataclass(frozen=True)
class Completion:
    """One continuation: its tokens without the stop token, and whether that came before the limit."""

    tokens: tuple[int, ...]
    stopped: bool


class Backend(Protocol):
    """Who computes."""

    async def sample(
        self, prompts: Sequence[Sequence[int]], n: int, max_tokens: int, stop_ids: tuple[int, ...], /
    ) -> list[list[Completion]]:
        """`n` continuations of each prompt, by the run's temperature, top-p and seed."""
        ...

    async def log_odds(self, prefixes: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]], /) -> list[float]:
        """After each prefix, the log-probability of the first token of its pair less that of the second, at temperature 1."""
        ...

    @property
    def group(self) -> int:
        """How many examples it likes to be given at a time."""
        ...

    @property
    def workers(self) -> int:
        """How many such groups it likes to have under way at once."""
        ...


async def judge(
    asks: Sequence[Request], form: PromptFormat, backend: Backend, settings: EvaluateConfig
) -> AsyncIterator[Prediction]:
    """Put a format and an backend to work, group by group; answers come as their group is done."""
    waiting = iter([asks[i : i + backend.group] for i in range(0, len(asks), backend.group)])
    done: asyncio.Queue[list[Prediction] | BaseException | None] = asyncio.Queue()

    async def work() -> None:
        try:
            for group in waiting:  # shared: each group is taken once
                await done.put(await _judge_group(group, form, backend, settings))
                # An backend in this thread never waits: let the answers be kept before it goes on.
                await asyncio.sleep(0)
            await done.put(None)
        except BaseException as error:
            await done.put(error)
            raise

    workers = [asyncio.ensure_future(work()) for _ in range(backend.workers)]
    try:
        left = len(workers)
        while left:
            found = await done.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                left -= 1
                continue
            for answer in found:
                yield answer
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def _judge_group(
    asks: Sequence[Request], form: PromptFormat, backend: Backend, settings: EvaluateConfig
) -> list[Prediction]:
    started = time.monotonic()
    prompts = [form.prompt(ask) for ask in asks]
    texts: list[list[str]] = [[] for _ in asks]
    used, forced = [0] * len(asks), [0] * len(asks)
    if settings.generations:
        for i, found in enumerate(await _sampled(asks, [one.ids for one in prompts], form, backend, settings)):
            texts[i], used[i], forced[i] = found
    sampled = time.monotonic()
    probabilities = await _probabilities(asks, texts, form, backend)
    scored = time.monotonic()
    # Without sampling the probability is the answer.
    seconds, scoring = (sampled - started, scored - sampled) if settings.generations else (scored - started, 0.0)
    return [
        Prediction(
            example_id=ask.example.id,
            verdicts=tuple(form.read(ask, text) for text in texts[i]) or (_likelier(probability),),
            probability=probability,
            unscored=unscored,
            texts=tuple(texts[i]),
            forced=forced[i],
            cut=prompts[i].cut,
            prompt_tokens=len(prompts[i].ids),
            completion_tokens=used[i],
            seconds=seconds / len(asks),
            scoring=scoring / len(asks),
        )
        for i, (ask, (probability, unscored)) in enumerate(zip(asks, probabilities, strict=True))
    ]


async def _sampled(
    asks: Sequence[Request],
    prompts: Sequence[tuple[int, ...]],
    form: PromptFormat,
    backend: Backend,
    settings: EvaluateConfig,
) -> list[tuple[list[str], int, int]]:
    """Of each ask: its answers, the tokens that they took, and how many verdicts were forced."""
    budget = settings.verdict_tokens + (settings.reasoning_tokens if asks[0].mode in form.thinks else 0)
    drawn = await backend.sample(prompts, settings.generations, budget, form.stop_ids)
    texts = [[form.text(one.tokens) for one in answers] for answers in drawn]
    used = [sum(len(one.tokens) for one in answers) for answers in drawn]
    open_thoughts = [
        (i, j, closed)
        for i, answers in enumerate(drawn)
        for j, one in enumerate(answers)
        if not one.stopped and (closed := form.closed(asks[i], texts[i][j])) is not None
    ]
    starts = [(*prompts[i], *form.tokens(closed)) for i, _, closed in open_thoughts]
    verdicts = await backend.sample(starts, 1, settings.verdict_tokens, form.stop_ids) if starts else []
    forced = [0] * len(asks)
    for (i, j, closed), [one] in zip(open_thoughts, verdicts, strict=True):
        texts[i][j] = closed + form.text(one.tokens)
        used[i] += len(one.tokens)
        forced[i] += 1
    return list(zip(texts, used, forced, strict=True))


async def _probabilities(
    asks: Sequence[Request], texts: Sequence[Sequence[str]], form: PromptFormat, backend: Backend
) -> list[tuple[float | None, int]]:
    """Of each ask, the mean over its thoughts, and how many are not in it since they lead to no place of choice."""
    trees = [
        [tuple(form.choices(ask, text)) for text in found or ("",)] for ask, found in zip(asks, texts, strict=True)
    ]
    distinct = list(dict.fromkeys(choice for tree in trees for choices in tree for choice in choices))
    odds = await backend.log_odds(
        [choice.prefix for choice in distinct], [(choice.positive_id, choice.negative_id) for choice in distinct]
    )
    positive = {choice: 1 / (1 + math.exp(-max(-700.0, o))) for choice, o in zip(distinct, odds, strict=True)}
    found = [[_final([positive[c] for c in choices], choices) for choices in tree if choices] for tree in trees]
    return [
        (sum(each) / len(each) if each else None, len(choices) - len(each))
        for each, choices in zip(found, trees, strict=True)
    ]


def _final(positive: Sequence[float], choices: Sequence[DecisionPoint]) -> float:
    """P(the question's positive answer): the sum over earlier answers of P(them) P(positive | them)."""

    def reached(choice: DecisionPoint) -> float:
        return math.prod(positive[i] if taken else 1 - positive[i] for i, taken in choice.earlier)

    return sum(reached(choice) * positive[i] for i, choice in enumerate(choices) if choice.final)


def _likelier(probability: float | None) -> int:
    if probability is None:
        return UNPARSABLE
    return POSITIVE if probability > 0.5 else NEGATIVE
