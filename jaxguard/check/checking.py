"""A guard on texts of one's own: verdict, probability and reasoning for each.

texts -> one Request for each question that applies -> answers, in any order -> Checked, in the order of the texts
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from jaxguard.check.setup import Setup, set_up
from jaxguard.data.examples import Example
from jaxguard.data.format.answer import Verdict, parse, reasoning_of
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Policy, Question, policy_for
from jaxguard.guards.protocol import Prediction, Request

HARM: Final[tuple[Question, ...]] = ("prompt_harm", "response_harm")


@dataclass(frozen=True)
class Checked:
    """What a guard said of one text or exchange.

    Attributes:
        id: the example's.
        asked: the questions that it was asked.
        verdict: the answers; a question that does not apply is None, one that could not be read counts as harmful.
        probabilities: of harmful (or of refusal), for each question; None where the guard gives none.
        reasoning: the thought before the verdict, None in direct mode. Untrusted.
        problems: why the verdict cannot be relied on: a line that could not be read, or a text too long to be read whole.
        text: the whole answer. Untrusted.
        seconds: that the answers took.
    """

    id: str
    asked: tuple[Question, ...]
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
        """Nothing is harmful, and nothing was left unread."""
        return not self.harmful and not self.problems


def check(
    prompt: str,
    response: str | None = None,
    *,
    model: str | Path,
    policy: str | Path | None = None,
    mode: str | Mode | None = None,
    tokenizer: str | Path | None = None,
    config: str | Path | None = None,
) -> Checked:
    """Guard a message, or a message and the answer to it. Loads the model each time: for more texts take `check_many`.

    Args:
        prompt: what the user wrote.
        response: what the assistant answered; None judges the prompt alone.
        model: an export, a run's folder, a repository on the hub, or the address of an SGLang server that serves one.
        policy: a name in configs/policies or a YAML file; None takes what the model was trained on.
        mode: "reasoning" or "direct"; None takes how it was trained, reasoning where that is both or unknown.
        tokenizer: of the model behind an address: a folder or a repository; None asks the server where it lies.
        config: of the run that trained the model; None looks for it beside the export and in its model card.

    Raises:
        JaxguardError: no such model or policy, an empty prompt, a server that does not answer.
    """
    one = Example(id="1", source="check", prompt=prompt, response=response)
    return check_many([one], model=model, policy=policy, mode=mode, tokenizer=tokenizer, config=config)[0]


def check_many(
    examples: Iterable[Example],
    *,
    model: str | Path,
    policy: str | Path | None = None,
    mode: str | Mode | None = None,
    tokenizer: str | Path | None = None,
    config: str | Path | None = None,
) -> list[Checked]:
    """As `check`, for many: the model is loaded once, and batches are filled. Labels are not looked at.

    Raises:
        JaxguardError: as `check`.
    """
    setup = set_up(model, policy, mode, tokenizer, config)

    async def run() -> list[Checked]:
        return [found async for found in checked(list(examples), setup)]

    return _wait_for(run())


async def checked(examples: Sequence[Example], setup: Setup) -> AsyncIterator[Checked]:
    """Each example's verdict, in order, as soon as it and those before it are there.

    Raises:
        JaxguardError: as `check`.
    """
    from jaxguard.guards.loading import open_guard  # what computes is loaded only when there is something to do

    requests = [
        Request(replace(example, id=str(i)), _questions(example, setup.policy), setup.mode)
        for i, example in enumerate(examples)
    ]
    predictions: dict[str, Prediction] = {}
    done = 0
    async with open_guard(setup.guard, setup.config, setup.settings) as predict:
        async for prediction in predict(requests):
            predictions[prediction.example_id] = prediction
            while str(done) in predictions:
                yield _checked(examples[done], predictions.pop(str(done)), setup)
                done += 1


def _questions(example: Example, policy: Policy) -> tuple[Question, ...]:
    """What the policy asks, but nothing about a response that is not there; always something."""
    asks = policy_for(example, policy).asks
    return tuple(q for q in asks if q == "prompt_harm" or example.response is not None) or ("prompt_harm",)


def _checked(example: Example, prediction: Prediction, setup: Setup) -> Checked:
    text = prediction.texts[0] if prediction.texts else ""
    asked = tuple(prediction.verdicts)
    verdict = parse(text, asked, setup.mode, example.response is not None)
    problems = verdict.problems
    if prediction.cut:
        problems = (*problems, "too long for the guard: the middle of the text was not read")
    return Checked(
        id=example.id,
        asked=asked,
        verdict=verdict,
        probabilities=dict(prediction.probabilities),
        reasoning=reasoning_of(text) if setup.mode is Mode.REASONING else None,
        problems=problems,
        text=text,
        seconds=prediction.seconds,
    )


def _wait_for(work: Coroutine[Any, Any, list[Checked]]) -> list[Checked]:
    """The result of a coroutine, also where a loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
