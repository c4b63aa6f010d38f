"""Operating points: a guard's calibration and thresholds, which guard.json holds beside its weights.

They are chosen on validation examples (jaxguard.evaluate.scores.scoring.choose_points), and apply where the same weights are
asked alike: by the same policy, in the same mode, and where reasoning is sampled, as often and at the same temperature.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, Self, TypeAlias

import numpy as np
from jaxtyping import Float
from pydantic import ConfigDict, Field, model_validator
from scipy.special import expit, logit

import jaxguard
from jaxguard.config.base import NonNegative, Schema
from jaxguard.config.evaluate import AutoConfig, EvaluateConfig
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Policy, Question
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically
from jaxguard.utils.parse import read_yaml

POINTS: Final = "guard.json"
FORMAT: Final = 1
F1, WORDS = "f1", "words"
"""The operating point with the best F1; and the one that leaves verdicts to the words of the guard's answer."""
_AGAIN = "evaluate with evaluate.validation, which writes it"

Probability = Annotated[float, Field(ge=0, le=1)]


def log_odds(probabilities: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """Log-odds of probabilities, which are cut to [1e-6, 1 - 1e-6]."""
    return np.asarray(logit(np.clip(probabilities, 1e-6, 1 - 1e-6)))


@dataclass(frozen=True)
class Platt:
    """Calibrated log-odds = slope × log-odds + intercept."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    slope: float
    intercept: float

    def __call__(self, probabilities: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        """Calibrate probabilities; missing ones stay so."""
        return np.asarray(expit(self.slope * log_odds(probabilities) + self.intercept))


class Share(Schema):
    """A share of validation examples; its exact 95 % interval where the threshold does not depend on them, else null."""

    value: Probability
    low: Probability | None = None
    high: Probability | None = None


class OperatingPoint(Schema):
    """A threshold on calibrated probabilities, and what it does to the validation examples; null where they are too few."""

    threshold: Probability | None = None
    false_positive_rate: Share | None = None
    recall: Share | None = None


Worth: TypeAlias = Literal["dominates", "inside the noise", "worse"]
"""What can be said of mode `auto` beyond the noise."""
WORTH: Final[Mapping[Worth, str]] = {
    "dominates": "is better than direct answers and than random choice, and as good as reasoning",
    "inside the noise": "is not better beyond the noise",
    "worse": "is worse than direct answers, reasoning or random choice",
}


class AutoThresholds(Schema):
    """Where mode `auto` trusts a direct answer, by its calibrated probability; null: nowhere on that side.

    Chosen by jaxguard.evaluate.scores.cascade.certify; each of the two rates holds at 95 % confidence.
    """

    passes: Probability | None
    """A text passes up to this probability."""
    blocks: Probability | None
    """A text is harmful from this probability on."""
    miss_rate: Probability
    """No more of the harmful texts pass; without a threshold, the lowest rate that the examples can certify."""
    alarm_rate: Probability
    """No more of the unharmful texts are blocked, likewise."""
    escalated: Probability
    """Share of traffic that is reasoned about, reweighted to limits.prevalence: as measured, not certified."""
    limits: AutoConfig
    worth: Worth | None = None
    """F1 of `auto` beside that of direct answers, of reasoning and of random choice, on the examples that it was chosen on."""

    @property
    def direct(self) -> bool:
        """Whether any direct answer stands."""
        return self.passes is not None or self.blocks is not None

    def trusts(self, probability: float | None, positive: bool) -> bool:
        """Whether a direct verdict with this calibrated probability stands."""
        edge = self.blocks if positive else self.passes
        return (
            probability is not None and edge is not None and (probability >= edge if positive else probability <= edge)
        )

    def __str__(self) -> str:
        limits, rates = self.limits, f"{self.miss_rate:.2%} missed and {self.alarm_rate:.2%} false alarms"
        if not self.direct:
            wanted = f"{limits.miss_rate:.2%} and {limits.alarm_rate:.2%}"
            return f"auto always reasons: no direct answer can be certified ({rates} at best; {wanted} are wanted)"
        edges = {"passes up to": self.passes, "blocks from": self.blocks}
        direct = " and ".join(f"{verb} {edge:.4g}" for verb, edge in edges.items() if edge is not None)
        above = "" if self.escalated <= limits.budget else f", more than its budget of {limits.budget:.1%}"
        share = f"{self.escalated:.1%} at {limits.prevalence:.1%} harmful{above}"
        worth = "" if self.worth is None else f"; on the examples that chose this it {WORTH[self.worth]}"
        return f"auto {direct} directly (at most {rates}), and reasons about {share}{worth}"


class Asked(Schema):
    """How a guard was asked; points apply where it is asked alike."""

    policy: str
    policy_digest: str
    question: Question
    mode: Mode
    ask: Literal["policy", "benchmark"]
    generations: NonNegative | None
    """Of reasoning, like `temperature`: in direct mode probabilities do not depend on what is sampled, and both are null."""
    temperature: float | None

    @classmethod
    def of(cls, policy: Policy, question: Question, mode: Mode, settings: EvaluateConfig) -> Self:
        """How a question about an example is asked by these settings."""
        reasoning = mode is Mode.REASONING
        return cls(
            policy=policy.name,
            policy_digest=policy.digest,
            question=question,
            mode=mode,
            ask=settings.ask,
            generations=settings.generations if reasoning else None,
            temperature=settings.temperature if reasoning else None,
        )


class OperatingPoints(Schema):
    """Calibration and thresholds of the answers to a question, and on what they were chosen."""

    asked: Asked
    precision: str
    """The type that JAX computed the probabilities in, or what else computed them; at another one the thresholds may not fit."""
    positives: NonNegative
    """Validation examples with the label harmful (or refusal); `negatives`: the others."""
    negatives: NonNegative
    examples_sha256: str
    platt: Platt | None
    """Null where the validation examples lack one of the labels: probabilities stay as the guard gives them."""
    points: dict[str, OperatingPoint]
    """`f1` has the best F1; a false-positive rate such as `0.01` the best recall without a higher one."""

    auto: AutoThresholds | None = None
    """Of direct mode, where reasoning mode was evaluated too."""

    def threshold(self, name: str) -> float | None:
        """The threshold of an operating point; None where it has none."""
        return self.points[name].threshold if name in self.points else None

    def calibrated(self, probability: float) -> float:
        """Calibrate a probability."""
        return probability if self.platt is None else float(self.platt(np.array([probability]))[0])

    def __str__(self) -> str:
        asked = self.asked
        sampled = "" if asked.generations is None else f" ({asked.generations} × at temperature {asked.temperature})"
        names = [name for name in self.points if self.threshold(name) is not None]
        lacking = [name for name in self.points if name not in names]
        few = f" (too few of {self.positives:,} + {self.negatives:,} examples: {', '.join(lacking)})" if lacking else ""
        return f"{asked.question} by {asked.policy} in {asked.mode} mode{sampled}: {', '.join(names) or 'none'}{few}"


class PointsFile(Schema):
    """guard.json."""

    format: Annotated[int, Field(ge=1, le=FORMAT)]
    """Version of the file; a newer one is refused."""
    version: str
    """Of jaxguard, when it was written."""
    weights: str
    """Digest of the weights that were evaluated."""
    sets: tuple[OperatingPoints, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len({each.asked for each in self.sets}) < len(self.sets):
            raise ValueError("sets: two of them are asked alike")
        return self


Points = Mapping[Asked, OperatingPoints]


def read_points(folder: Path, weights: str | None) -> tuple[Points, str]:
    """The operating points in a guard's folder, and why there are none.

    `weights`: the digest of what answers; None if unknown. JaxguardError: guard.json is malformed.
    """
    path = folder / POINTS
    if not path.is_file():
        return {}, f"{folder} has no {POINTS}: {_AGAIN}"
    try:
        file = read_yaml(path, PointsFile)  # JSON is YAML
    except JaxguardError as error:
        raise JaxguardError(f"{error}; delete {path}, or copy it again") from None
    if file.weights != weights:
        known = "other weights" if weights else "weights that cannot be compared with those that answer"
        return {}, f"{path} is ignored, since it was made for {known}: {_AGAIN}"
    return {each.asked: each for each in file.sets}, ""


def write_points(folder: Path, weights: str, sets: Iterable[OperatingPoints]) -> None:
    """Write guard.json; of one for the same weights, points that were chosen otherwise stay."""
    before, _ = read_points(folder, weights)
    merged = {**before, **{each.asked: each for each in sets}}
    file = PointsFile(format=FORMAT, version=jaxguard.__version__, weights=weights, sets=tuple(merged.values()))
    write_atomically(folder / POINTS, file.model_dump_json(indent=1) + "\n")
