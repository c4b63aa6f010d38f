"""Traffic drawn beforehand from a seed: when requests are sent, and what they hold."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

import numpy as np

from jaxguard.data.examples import Example
from jaxguard.utils.errors import JaxguardError

MOST_REQUESTS: Final = 200_000
"""Of a phase."""
LONG_CHARACTERS: Final = 16_000
"""Of a long text, about 4,000 tokens."""
_RECENT: Final = 1000
"""Requests that a repeat is taken from."""
_COUNTS: Final = ("requests", "exchanges", "labelled", "harmful", "repeats", "long", "characters")


@dataclass(frozen=True)
class Mix:
    """Shares of requests. They are assumptions about traffic; of harmful texts, ToxicChat's users wrote 7 %.

    Attributes:
        exchanges: with a response; the others are prompts.
        harmful: labelled harmful, where the examples have any; the others are not.
        repeats: that are equal to a recent one.
        long: of LONG_CHARACTERS, made of several examples and without a label.
        policies: weight of each name; without any, requests name none.
    """

    exchanges: float = 0.3
    harmful: float = 0.05
    repeats: float = 0.1
    long: float = 0.01
    policies: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for share in fields(self):
            value = getattr(self, share.name)
            if share.name != "policies" and not 0 <= value <= 1:
                raise JaxguardError(f"{share.name}={value}: expected a share from 0 to 1")
        if self.policies and not (min(self.policies.values()) >= 0 < sum(self.policies.values())):
            raise JaxguardError("--policy: weights must not be negative, nor all 0")


@dataclass(frozen=True)
class Planned:
    """A request: seconds after the start of its phase, its body, and the words that its labelled questions should get."""

    at: float
    body: bytes
    labels: Mapping[str, str]


def arrivals(rate: float, seconds: float, burstiness: float, random: np.random.Generator) -> np.ndarray:
    """Times float[N] from 0 to `seconds` with gaps from a gamma distribution: a Poisson process if `burstiness` is 1.

    `rate` is of requests a second; `burstiness` is the coefficient of variation of the gaps. JaxguardError: too many.
    """
    if rate * seconds > MOST_REQUESTS:
        raise JaxguardError(f"{rate:.0f} requests a second for {seconds:g} s: at most {MOST_REQUESTS:,} are sent")
    shape = burstiness**-2
    times = np.zeros(0)
    while not len(times) or times[-1] < seconds:
        gaps = random.gamma(shape, 1 / (rate * shape), max(16, int(rate * seconds)))
        times = np.concatenate([times, gaps.cumsum() + (times[-1] if len(times) else 0.0)])
    return times[times < seconds]


class Source:
    """Requests drawn from examples by a mix; JaxguardError if there is no example."""

    def __init__(self, examples: Sequence[Example], mix: Mix, random: np.random.Generator) -> None:
        if not examples:
            raise JaxguardError("there is no example to send")
        self.mix, self._random = mix, random
        self._pools: dict[tuple[bool, bool], list[Example]] = {}
        for example in examples:
            for exchange in {False, example.response is not None}:
                harmful = "harmful" in _labels(example, exchange).values()
                self._pools.setdefault((exchange, harmful), []).append(example)
        self._recent: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.drawn = np.zeros(len(_COUNTS), int)

    def plan(self, times: np.ndarray, long: float | None = None) -> list[Planned]:
        """A request for each time; `long` replaces the mix's share of long texts."""
        return [self._one(float(at), self.mix.long if long is None else long) for at in times]

    def assumptions(self) -> dict[str, Any]:
        """The mix, and what was drawn by it so far."""
        return {
            **asdict(self.mix),
            "long_characters": LONG_CHARACTERS,
            "drawn": dict(zip(_COUNTS, self.drawn.tolist(), strict=True)),
        }

    def _one(self, at: float, long: float) -> Planned:
        mix = self.mix
        draws = self._random.random(4) < (mix.repeats, mix.exchanges, mix.harmful, long)
        repeated = bool(draws[0] and self._recent)
        if repeated:
            body, labels = self._recent[self._random.integers(len(self._recent))]
        else:
            body, labels = self._fresh(*map(bool, draws[1:]))
            self._recent = [*self._recent[1 - _RECENT :], (body, labels)]
        length = len(body["prompt"]) + len(body.get("response", ""))
        harmful, exchange = "harmful" in labels.values(), "response" in body
        self.drawn += np.array([1, exchange, bool(labels), harmful, repeated, length >= LONG_CHARACTERS, length])
        return Planned(at, json.dumps(body).encode(), labels)

    def _fresh(self, exchange: bool, harmful: bool, long: bool) -> tuple[dict[str, Any], dict[str, str]]:
        order = [(exchange, harmful), (exchange, not harmful), (not exchange, harmful), (not exchange, not harmful)]
        key = next(each for each in order if each in self._pools)
        example = self._pick(key)
        body: dict[str, Any] = {"prompt": example.prompt}
        labels = _labels(example, key[0])
        if key[0]:
            body["response"] = example.response
        if long:
            text = example.prompt
            while len(text) < LONG_CHARACTERS:
                text += f"\n\n{self._pick(key).prompt}"
            body, labels = {"prompt": text[:LONG_CHARACTERS]}, {}
        if self.mix.policies:
            weights = np.fromiter(self.mix.policies.values(), float)
            body["policy"] = str(self._random.choice(list(self.mix.policies), p=weights / weights.sum()))
        return body, labels

    def _pick(self, key: tuple[bool, bool]) -> Example:
        return self._pools[key][self._random.integers(len(self._pools[key]))]


def _labels(example: Example, exchange: bool) -> dict[str, str]:
    """The labels of an example, or of its prompt alone, by question."""
    labels = {"prompt_harm": example.prompt_label, "response_harm": example.response_label if exchange else None}
    return {question: label for question, label in labels.items() if label}
