"""The public class `Guard`: a guard model, loaded once, that checks prompts and responses against a policy."""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, Self, TypeAlias, TypeVar

from jaxguard.data.examples import Example
from jaxguard.data.format.answer import Verdict, parse, reasoning_of
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Policy, Question, policy_for
from jaxguard.guards import loading
from jaxguard.guards.protocol import Prediction, Predictor, Request
from jaxguard.guards.setup import Setup, set_up
from jaxguard.utils.errors import JaxguardError

HARM: Final[tuple[Question, ...]] = ("prompt_harm", "response_harm")
Exchange: TypeAlias = Example | tuple[str, str | None] | str
"""An example, a (prompt, response) pair, or a prompt."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class CheckResult:
    """What a guard answers about one prompt or exchange.

    Attributes:
        id: the example's, else its number.
        questions: those of the policy that apply.
        verdict: an answer to each; None where a question does not apply, harmful where the answer is unparsable.
        probabilities: of harmful (or of a refusal), for each question; None where the guard gives none.
        reasoning: what precedes the verdict, None in direct mode. Untrusted.
        problems: why the verdict cannot be relied on: an unparsable line, or a text too long to be read whole.
        text: the whole answer. Untrusted.
        seconds: that the answer took; of a batch, its share.
    """

    id: str
    questions: tuple[Question, ...]
    verdict: Verdict
    probabilities: dict[Question, float | None]
    reasoning: str | None
    problems: tuple[str, ...]
    text: str
    seconds: float

    @property
    def harmful(self) -> bool:
        """Prompt or response is harmful."""
        return any(getattr(self.verdict, question) == "harmful" for question in HARM)

    @property
    def passes(self) -> bool:
        """Nothing is harmful, and everything was read."""
        return not self.harmful and not self.problems


class Guard:
    """A loaded guard. Close it, or use it in a `with` block, to free what it holds.

    It computes in a thread of its own, so it works in a script and inside a running event loop, such as a notebook's, and may
    be used from several threads; they take turns.
    """

    def __init__(self, setup: Setup) -> None:
        """Load the guard that `setup` describes; see `load`."""
        self.setup = setup
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="jaxguard", daemon=True)
        self._thread.start()
        self._stop = asyncio.Event()
        opened: Future[Predictor] = Future()
        self._held = asyncio.run_coroutine_threadsafe(self._hold(opened), self._loop)
        try:
            self._predict = opened.result()
        except BaseException:
            self.close()
            raise

    @classmethod
    def load(
        cls,
        model: str | Path,
        policy: str | Path | None = None,
        mode: str | Mode | None = None,
        tokenizer: str | Path | None = None,
        config: str | Path | None = None,
    ) -> Self:
        """Load a guard in jaxguard's format, or connect to a server that has one.

        Args:
            model: an export, a run's folder, a repository on the hub, or the address of an SGLang server that serves one.
            policy: a name in configs/policies or a YAML file; None takes what the model was trained on.
            mode: "reasoning" or "direct"; None takes how it was trained, reasoning where that is both or unknown.
            tokenizer: a folder or repository with the tokenizer, for a server whose model does not lie on this machine.
            config: a config of the run that trained it, for a model that is no export of jaxguard.

        Raises:
            JaxguardError: no such model, policy or mode, or a server that does not answer.
        """
        return cls(set_up(model, policy, mode, tokenizer, config))

    @property
    def policy(self) -> Policy:
        """What it judges by, unless an example brings its own policy."""
        return self.setup.policy

    def check(self, prompt: str, response: str | None = None, mode: str | Mode | None = None) -> CheckResult:
        """Check a prompt, or an exchange.

        Args:
            prompt: what the user wrote.
            response: what the assistant answered; None judges the prompt alone.
            mode: "reasoning" or "direct"; None takes the guard's own.

        Raises:
            JaxguardError: no such mode, a policy that leaves no room for the text, or a server that fails.
        """
        [result] = self.check_many([(prompt, response)], mode)
        return result

    def check_many(self, exchanges: Iterable[Exchange], mode: str | Mode | None = None) -> list[CheckResult]:
        """Check many exchanges in batches; results in the order of the exchanges. Labels of examples are not looked at."""
        return list(self.stream(exchanges, mode))

    async def acheck(self, prompt: str, response: str | None = None, mode: str | Mode | None = None) -> CheckResult:
        """As `check`, without blocking the event loop."""
        checked = self._checked(_examples([(prompt, response)]), self.setup.resolve_mode(mode))
        return await asyncio.wrap_future(self._submit(_first(checked)))

    def stream(self, exchanges: Iterable[Exchange], mode: str | Mode | None = None) -> Iterator[CheckResult]:
        """As `check_many`, each result as soon as it and those before it are there."""
        checked = self._checked(_examples(exchanges), self.setup.resolve_mode(mode))
        results: SimpleQueue[CheckResult | None] = SimpleQueue()

        async def produce() -> None:
            try:
                async for result in checked:
                    results.put(result)
            finally:
                results.put(None)

        produced = self._submit(produce())
        try:
            while (result := results.get()) is not None:
                yield result
            produced.result()
        finally:
            produced.cancel()

    def close(self) -> None:
        """Free the model, or the connection; closing twice does no harm."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._stop.set)
        try:
            self._held.exception()  # what is raised at the end was raised to a caller before
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _hold(self, opened: "Future[Predictor]") -> None:
        """Keep the guard open until it is closed."""
        try:
            async with loading.open_guard(self.setup.guard, self.setup.config, self.setup.settings) as predict:
                opened.set_result(predict)
                await self._stop.wait()
        except BaseException as error:
            if opened.done():
                raise
            opened.set_exception(error)

    def _submit(self, work: Coroutine[Any, Any, Result]) -> "Future[Result]":
        if self._loop.is_closed():
            work.close()
            raise JaxguardError("this guard is closed: load it again")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _checked(self, examples: list[Example], mode: Mode) -> AsyncIterator[CheckResult]:
        """The result of each example, in order, as soon as it and those before it are there."""
        requests = [
            Request(replace(example, id=str(i)), applicable(example, self.setup.policy), mode)
            for i, example in enumerate(examples)
        ]
        predictions: dict[str, Prediction] = {}
        done = 0
        async for prediction in self._predict(requests):
            predictions[prediction.example_id] = prediction
            while str(done) in predictions:
                yield _result(examples[done], predictions.pop(str(done)), mode)
                done += 1


def applicable(example: Example, policy: Policy) -> tuple[Question, ...]:
    """What the policy asks, but nothing about a response that is not there; always something."""
    asks = policy_for(example, policy).asks
    return tuple(q for q in asks if q == "prompt_harm" or example.response is not None) or ("prompt_harm",)


def _result(example: Example, prediction: Prediction, mode: Mode) -> CheckResult:
    text = prediction.texts[0] if prediction.texts else ""
    questions = tuple(prediction.verdicts)
    verdict = parse(text, questions, mode, example.response is not None)
    cut = ("too long for the guard: the middle of the text was not read",) if prediction.cut else ()
    return CheckResult(
        id=example.id,
        questions=questions,
        verdict=verdict,
        probabilities=dict(prediction.probabilities),
        reasoning=reasoning_of(text) if mode is Mode.REASONING else None,
        problems=(*verdict.problems, *cut),
        text=text,
        seconds=prediction.seconds,
    )


def _examples(exchanges: Iterable[Exchange]) -> list[Example]:
    examples = []
    for i, exchange in enumerate(exchanges, 1):
        if isinstance(exchange, Example):
            examples.append(exchange)
            continue
        prompt, response = (exchange, None) if isinstance(exchange, str) else exchange
        examples.append(Example(str(i), "check", prompt, response))
    return examples


async def _first(results: AsyncIterator[CheckResult]) -> CheckResult:
    [result] = [result async for result in results]
    return result
