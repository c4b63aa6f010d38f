"""Mode auto: an answer is direct where guard.json certifies that, and reasoned elsewhere."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import CHOICES, Mode
from jaxguard.data.policies import Question
from jaxguard.guards.operating_points import AutoThresholds

if TYPE_CHECKING:
    from jaxguard.guards.result import CheckResult

Autos = Mapping[Question, AutoThresholds | None]
"""The thresholds of auto for each question about an example; None where there are none."""

_COSTS: Final = ("seconds", "prompt_tokens", "completion_tokens")


async def cascade(
    examples: Sequence[Example],
    autos: Sequence[Autos],
    answer: Callable[[Sequence[Example], Mode], AsyncIterator["CheckResult"]],
) -> AsyncIterator["CheckResult"]:
    """Yield the result of each example in order: the direct answer where all of it is trusted, else the reasoned one.

    Examples with a question on which no direct answer can be trusted are reasoned about at once.
    """
    certified = [i for i, own in enumerate(autos) if all(auto and auto.direct for auto in own.values())]
    answers = [result async for result in answer([examples[i] for i in certified], Mode.DIRECT)]
    direct = dict(zip(certified, answers, strict=True))
    trusted = {i for i, result in direct.items() if _trusted(result, autos[i])}
    reasoned = answer([example for i, example in enumerate(examples) if i not in trusted], Mode.REASONING)
    for i in range(len(examples)):
        result = direct[i] if i in trusted else await anext(reasoned)
        if i in direct and i not in trusted:
            costs = {name: getattr(direct[i], name) + getattr(result, name) for name in _COSTS}
            result = replace(result, **costs, direct_probabilities=direct[i].probabilities)
        yield result


def _trusted(result: "CheckResult", autos: Autos) -> bool:
    """Whether a direct answer has no problem, and each verdict's probability is beyond its threshold."""
    if result.problems:
        return False
    verdicts = {q: getattr(result.verdict, q) == CHOICES[q][0] for q in autos}
    return bool(autos) and all(auto and auto.trusts(result.probabilities[q], verdicts[q]) for q, auto in autos.items())
