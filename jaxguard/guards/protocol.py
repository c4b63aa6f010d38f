"""From examples to predictions: the protocol by which every generating guard is measured.

    prompt -> `generations` completions -> those whose reasoning ran out get a forced verdict -> parsed
           -> probability of each positive verdict, at the tokens where it is decided

A PromptFormat renders and parses, a Backend computes. One generation answers all questions that the format puts into one prompt.
"""

import asyncio
import hashlib
import itertools
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple, Protocol, runtime_checkable

from pydantic import StrictFloat

from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Policy, Question
from jaxguard.models.devices import explain_memory, guard_remedy
from jaxguard.utils.errors import JaxguardError

POSITIVE: Final = 1
NEGATIVE: Final = 0
UNPARSABLE: Final = -1
"""The three states of a verdict, in an array of int8. The positive class is harmful, or refusal."""
AHEAD: Final = 4
"""Batches that a LocalBackend gets at once where it reasons: the next prompts take the places of answers that end."""


class UnsupportedError(JaxguardError):
    """A guard's format has no such question, or cannot show such a policy."""


@dataclass(frozen=True)
class Request:
    """One example, and the questions about it; the example's labels are for the scorer only.

    An example without a policy of its own is judged by `policy`, where that is None by the format's. `growing`: a later request has
    more of the same text, as of a response that is being written, so what is computed of it is cached.
    """

    example: Example
    questions: tuple[Question, ...]
    mode: Mode
    policy: Policy | None = None
    growing: bool = False

    def only(self, question: Question) -> "Request":
        """The same request with a single question."""
        return replace(self, questions=(question,))

    @property
    def question(self) -> Question:
        """The question of a request with a single one."""
        [question] = self.questions
        return question


@dataclass(frozen=True)
class Prediction:
    """What a guard answers to a request.

    Attributes:
        verdicts: question -> of each generation POSITIVE, NEGATIVE or UNPARSABLE.
        probabilities: question -> probability of the positive verdict, in reasoning mode the mean over the generations; None
            where the guard gives none.
        texts: each generation, a forced verdict included; empty where nothing was sampled. A format with a prompt for each
            question joins its answers by an empty line.
        forced: generations that ran out of tokens before their verdict, so that one was forced.
        prompt_tokens, completion_tokens: of all prompts, and of all generations.
        seconds: from the request to the verdicts; of a batch, its share.
        wall: seconds since the prediction before it; their sum is the time that a benchmark took.
        unscored: question -> generations that are not in its probability, since their verdict cannot be located.
        cut: the text was too long for the model and was judged without its middle.
        scoring: seconds for the probabilities, of a batch its share; not part of `seconds`.
        wait: seconds until the request had its verdicts, which all of a batch wait for; 0 if unknown.
        completions: what was sampled of each generation; None where a verdict was forced, or the backend does not say which token
            ended it. () where nothing was sampled, or from several prompts.

    Raises:
        JaxguardError: a probability is not a number from 0 to 1.
    """

    example_id: str
    verdicts: Mapping[Question, tuple[int, ...]]
    probabilities: Mapping[Question, StrictFloat | None]
    texts: tuple[str, ...] = ()
    forced: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    wall: float = 0.0
    unscored: Mapping[Question, int] = field(default_factory=dict)
    cut: bool = False
    scoring: float = 0.0
    wait: float = 0.0
    completions: tuple["Completion | None", ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for question, p in self.probabilities.items():
            if p is not None and not (isinstance(p, float) and 0 <= p <= 1):  # NaN is not, either
                raise JaxguardError(
                    f"example {self.example_id!r}: the guard gives {question} the probability {p!r}, which is none: its weights "
                    "or activations are not finite; use another checkpoint, or model.compute_dtype=float32"
                )


Predictor = Callable[[Sequence[Request]], AsyncIterator[Prediction]]
"""An open guard. Predictions come in any order, each as soon as it is there; requests have one mode and distinct example ids."""


@dataclass(frozen=True)
class DecisionPoint:
    """Where an answer to a question continues with one of two tokens.

    `prefix` holds the token ids before it, prompt included; `earlier` the decisions that lead here, each with whether its positive
    token was taken.
    """

    prefix: tuple[int, ...]
    positive_id: int
    negative_id: int
    question: Question
    earlier: tuple[tuple["DecisionPoint", bool], ...] = ()

    @property
    def key(self) -> tuple[tuple[int, ...], int, int]:
        """What its probability depends on: points of several questions may share one."""
        return self.prefix, self.positive_id, self.negative_id


class Prompt(NamedTuple):
    """Token ids that generation starts from; `cut`: untrusted text was left out to fit the model.

    The first `shared` ids come before any text, so that other prompts share them.
    """

    ids: tuple[int, ...]
    cut: bool = False
    shared: int = 0


class PromptFormat(Protocol):
    """How a guard is prompted and how its answers are parsed."""

    def split(self, request: Request, /) -> Sequence[Request]:
        """The request as parts whose questions one prompt answers."""

    def prompt(self, request: Request, /) -> Prompt:
        """What generation starts from; UnsupportedError: no such question or policy here, or the policy is too long."""

    def text(self, ids: Sequence[int], /) -> str:
        """Generated tokens as text."""

    def parse(self, request: Request, text: str, /) -> dict[Question, int]:
        """Of each question POSITIVE, NEGATIVE or UNPARSABLE."""

    def close_reasoning(self, request: Request, text: str, /) -> str | None:
        """An answer that ran out of tokens, ready for the verdict; None if it has one, or never reasons."""

    def tokens(self, text: str, /) -> Sequence[int]:
        """Token ids of an answer's beginning."""

    def decision_points(self, request: Request, text: str, /) -> Sequence[DecisionPoint]:
        """Where the verdicts are decided after this answer's reasoning; () if that cannot be said."""

    def answers(self, request: Request, /) -> Sequence[str]:
        """Likely answers, word for word; () if they cannot be foreseen. Decision points then do not depend on the text."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""

    @property
    def verdict_tokens(self) -> int | None:
        """Most tokens of a verdict after which the guard would explain it; None if it would not."""


@dataclass(frozen=True)
class Completion:
    """One continuation: its tokens without the stop token, and whether that came before the limit. These two are compared.

    Attributes:
        stop_id: the stop token, if the backend says which it was: its `ids` are then all that was sampled.
        logprobs: of each token and then of the stop token, log-probability at temperature 1 over the whole vocabulary, whatever
            it was sampled by; () if the backend gives none.
        entropies: of the distributions of which these are values, in nats; () if the backend gives none.
    """

    tokens: tuple[int, ...]
    stopped: bool
    stop_id: int | None = field(default=None, compare=False)
    logprobs: tuple[float, ...] = field(default=(), compare=False, repr=False)
    entropies: tuple[float, ...] = field(default=(), compare=False, repr=False)

    @property
    def ids(self) -> tuple[int, ...]:
        """All that was generated: the tokens, and the stop token if it is known."""
        return self.tokens if self.stop_id is None else (*self.tokens, self.stop_id)


class Backend(Protocol):
    """Computes completions and log-odds."""

    async def sample(
        self, prompts: Sequence[Sequence[int]], n: int, max_tokens: int, stop_ids: tuple[int, ...], /
    ) -> list[list[Completion]]:
        """`n` continuations of each prompt, by the run's temperature, top-p and seed."""

    async def log_odds(self, prefixes: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]], /) -> list[float]:
        """After each prefix, the log-probability of the first token of its pair less that of the second, at temperature 1.

        What is not finite makes no prediction.
        """

    async def declare(self, beginnings: Sequence[Sequence[int]], /) -> None:
        """Say with what prompts to come begin, which may be computed apart and kept: for speed only."""

    @property
    def group(self) -> int:
        """Requests in a batch."""

    @property
    def workers(self) -> int:
        """Batches under way at once."""


class Draft(NamedTuple):
    """A prompt, and a likely answer with the token that ends it: as token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@runtime_checkable
class LocalBackend(Backend, Protocol):
    """One that computes in this process, and can do so at once what is foreseen."""

    async def score(
        self,
        prefixes: Sequence[Sequence[int]],
        pairs: Sequence[tuple[int, int]],
        drafts: Sequence[Draft] = (),
        growing: Sequence[Sequence[int]] = (),
        /,
    ) -> tuple[list[float], list[bool]]:
        """As `log_odds`, and whether each draft is the answer that would be sampled at temperature 0.

        `growing` are beginnings of the prefixes that those of later calls have more of: what is computed of them is kept.
        """

    def warm_up(self) -> None:
        """Compile what scores few prompts at a time, after the beginnings that were declared."""


def applicable(example: Example, policy: Policy) -> tuple[Question, ...]:
    """The questions of a policy that apply to an example: without a response, those about the prompt."""
    return tuple(q for q in policy.asks if q == "prompt_harm" or example.response is not None)


def sample_digest(seed: int, prompt: Sequence[int], sample: int) -> bytes:
    """Hash all that a sample may depend on: the run's seed, the prompt's tokens and its number."""
    return hashlib.sha256(f"{seed} {sample} {' '.join(map(str, prompt))}".encode()).digest()


async def predict(
    requests: Sequence[Request], form: PromptFormat, backend: Backend, settings: EvaluateConfig, score: bool = True
) -> AsyncIterator[Prediction]:
    """Predict batch by batch, as a Predictor; without `score`, verdicts have no probability unless they come from it."""
    size = backend.group
    if isinstance(backend, LocalBackend) and any(request.mode is Mode.REASONING for request in requests):
        size *= AHEAD
    batches = iter([requests[i : i + size] for i in range(0, len(requests), size)])
    tasks: set[asyncio.Task[list[Prediction]]] = set()
    try:
        while True:
            for batch in itertools.islice(batches, backend.workers - len(tasks)):
                tasks.add(asyncio.create_task(_predict_batch(batch, form, backend, settings, score)))
            if not tasks:
                return
            # No batch begins before the caller has stored these: a backend in this thread never waits.
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                with explain_memory(guard_remedy(settings)):
                    predictions = task.result()
                for prediction in predictions:
                    yield prediction
            tasks -= done
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class _Part:
    """The questions of a request that one prompt answers; what was generated; question -> (probability, unscored)."""

    request: Request
    prompt: Prompt
    drafts: list[Draft] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    completions: list[Completion | None] = field(default_factory=list)
    tokens: int = 0
    forced: int = 0
    scores: dict[Question, tuple[float | None, int]] = field(default_factory=dict)


async def _predict_batch(
    requests: Sequence[Request], form: PromptFormat, backend: Backend, settings: EvaluateConfig, score: bool
) -> list[Prediction]:
    started = time.monotonic()
    groups = [[_Part(part, form.prompt(part)) for part in form.split(request)] for request in requests]
    parts = [part for group in groups for part in group]
    await backend.declare([part.prompt.ids[: part.prompt.shared] for part in parts])
    if score and settings.generations == 1 and settings.temperature == 0 and isinstance(backend, LocalBackend):
        for part in parts:  # one pass over all likely answers is cheaper than an answer token by token
            answers = ((*form.tokens(text), form.stop_ids[0]) for text in form.answers(part.request))
            part.drafts = [Draft(part.prompt.ids, ids) for ids in answers if len(ids) <= settings.verdict_tokens]
        await _score([part for part in parts if part.drafts], form, backend)
    if settings.generations:
        await _generate([part for part in parts if not part.texts], form, backend, settings)
    sampled = time.monotonic()
    if score or not settings.generations:
        await _score([part for part in parts if not part.scores], form, backend)
    scored = time.monotonic()
    # Without sampling the probability is the answer.
    seconds, scoring = (sampled - started, scored - sampled) if settings.generations else (scored - started, 0.0)
    predictions = []
    for request, group in zip(requests, groups, strict=True):
        scores: dict[Question, tuple[float | None, int]] = dict.fromkeys(request.questions, (None, 0))
        verdicts: dict[Question, tuple[int, ...]] = {}
        for part in group:
            scores |= part.scores
            parsed = [form.parse(part.request, text) for text in part.texts]
            for q in part.request.questions:
                probability = scores[q][0]
                likelier = UNPARSABLE if probability is None else POSITIVE if probability > 0.5 else NEGATIVE
                verdicts[q] = tuple(verdict[q] for verdict in parsed) or (likelier,)
        predictions.append(
            Prediction(
                example_id=request.example.id,
                verdicts={q: verdicts[q] for q in request.questions},
                probabilities={q: scores[q][0] for q in request.questions},
                unscored={q: scores[q][1] for q in request.questions},
                texts=tuple("\n\n".join(texts) for texts in zip(*(part.texts for part in group), strict=True)),
                forced=sum(part.forced for part in group),
                cut=any(part.prompt.cut for part in group),
                prompt_tokens=sum(len(part.prompt.ids) for part in group),
                completion_tokens=sum(part.tokens for part in group),
                seconds=seconds / len(requests),
                scoring=scoring / len(requests),
                wait=seconds,
                completions=tuple(group[0].completions) if len(group) == 1 else (),
            )
        )
    return predictions


async def _generate(parts: Sequence[_Part], form: PromptFormat, backend: Backend, settings: EvaluateConfig) -> None:
    """Sample the answers to each part's prompt, and force a verdict where the reasoning ran out of tokens."""
    if not parts:
        return
    reasoning = settings.reasoning_tokens if parts[0].request.mode is Mode.REASONING else 0
    limit = min(settings.verdict_tokens, form.verdict_tokens or settings.verdict_tokens)
    prompts = [part.prompt.ids for part in parts]
    sampled = await backend.sample(prompts, settings.generations, limit + reasoning, form.stop_ids)
    unfinished: list[tuple[_Part, int, str]] = []
    for part, completions in zip(parts, sampled, strict=True):
        for i, completion in enumerate(completions):
            text = form.text(completion.tokens)
            part.texts.append(text)
            part.completions.append(None if completion.stop_id is None else replace(completion, entropies=()))
            part.tokens += len(completion.tokens)
            closed = None if completion.stopped else form.close_reasoning(part.request, text)
            if closed is not None:
                unfinished.append((part, i, closed))
    if not unfinished:
        return
    prefixes = [(*part.prompt.ids, *form.tokens(closed)) for part, _, closed in unfinished]
    verdicts = await backend.sample(prefixes, 1, limit, form.stop_ids)
    for (part, i, closed), [completion] in zip(unfinished, verdicts, strict=True):
        part.texts[i], part.completions[i] = closed + form.text(completion.tokens), None
        part.tokens += len(completion.tokens)
        part.forced += 1


async def _score(parts: Sequence[_Part], form: PromptFormat, backend: Backend) -> None:
    """Score the verdicts of each part: the mean over its generations, each point computed once. A draft may be its answer."""
    if not parts:
        return
    trees = [[form.decision_points(part.request, text) for text in part.texts or ("",)] for part in parts]
    keys = list(dict.fromkeys(point.key for texts in trees for tree in texts for point in tree))
    drafts = [(part, draft) for part in parts for draft in part.drafts]
    growing = [part.prompt.ids for part in parts if part.request.growing]
    asked = [prefix for prefix, _, _ in keys], [(positive, other) for _, positive, other in keys]
    if isinstance(backend, LocalBackend):
        odds, greedy = await backend.score(*asked, [draft for _, draft in drafts], growing)
        for part, draft in itertools.compress(drafts, greedy):
            part.texts, part.tokens = [form.text(draft.answer[:-1])], len(draft.answer) - 1
    else:
        odds = await backend.log_odds(*asked)
    # What is not finite becomes NaN, which no Prediction takes.
    positive = {
        key: 1 / (1 + math.exp(-max(-700.0, o))) if math.isfinite(o) else math.nan
        for key, o in zip(keys, odds, strict=True)
    }

    def probability(point: DecisionPoint) -> float:
        """P(the earlier decisions) P(positive | them)."""
        earlier = (positive[p.key] if taken else 1 - positive[p.key] for p, taken in point.earlier)
        return math.prod(earlier) * positive[point.key]

    for part, texts in zip(parts, trees, strict=True):
        for question in part.request.questions:
            points = [[point for point in tree if point.question == question] for tree in texts]
            sums = [sum(map(probability, own)) for own in points if own]
            part.scores[question] = (sum(sums) / len(sums) if sums else None, len(texts) - len(sums))
