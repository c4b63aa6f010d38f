"""The paper's results, from configs/published, for comparison."""

import math
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from jaxguard.config.base import Schema, read_yaml, validate
from jaxguard.config.lookup import find_yaml
from jaxguard.evaluate.scores.metrics import PROMPT_SHARE

PUBLISHED_FOLDER = Path("configs/published")
AVERAGES = ("prompt", "response", "safety", "custom")
"""The averages of an evaluation and of the paper, in the order of their columns."""
ROUNDING = 0.0011
"""How far the paper's safety average may be off the one computed from its rounded prompt and response averages."""

F1 = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Trained = Literal["none", "direct", "reasoning", "dual"]


class Protocol(Schema):
    """How answers are sampled."""

    generations: int
    temperature: float
    top_p: float


class Averages(Schema):
    """Which benchmarks the averages are over, by their names in configs/benchmarks."""

    prompt: tuple[str, ...]
    response: tuple[str, ...]
    custom: tuple[str, ...]

    def benchmarks(self, average: str) -> tuple[str, ...]:
        """Those of one of AVERAGES."""
        return {"safety": (*self.prompt, *self.response), **dict(self)}.get(average, ())


class PublishedRow(Schema):
    """A model of the paper; a score is None where it gives none."""

    id: str
    """The name that configs refer to."""
    name: str
    base: str | None = None
    """The base model."""
    data: str | None = None
    """The training set."""
    examples: int | None = None
    """Its size."""
    trained: Trained | None = None
    """The mode of the training examples; None: another project's model."""
    variant: str | None = None
    """What else was different."""
    mode: Literal["reasoning", "direct"]
    """The mode of the evaluation."""
    prompt: F1 | None = None
    response: F1 | None = None
    safety: F1 | None = None
    dynaguardrail: F1 | None = None
    cosapien: F1 | None = None
    custom: F1 | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.prompt is not None and self.response is not None and self.safety is not None:
            expected = PROMPT_SHARE * self.prompt + (1 - PROMPT_SHARE) * self.response
            if abs(expected - self.safety) > ROUNDING:
                raise ValueError(f"row {self.id!r}: safety is {self.safety}, but its parts come to {expected:.4f}")
        return self

    def average(self, name: str) -> float | None:
        """One of AVERAGES."""
        value: float | None = dict(self)[name]
        return value


class PublishedPoint(Schema):
    """A point of a curve: F1 at `x` training examples, or sentences of a trace."""

    x: Positive
    f1: F1
    deviation: F1 | None = None
    """Over several subsets."""
    words: Positive | None = None
    """Of a trace, mean."""


class LatencyPoint(Schema):
    """The latency of a model."""

    name: str
    seconds: Positive
    """For one example."""
    row: str
    """The id of the model's row."""


class Latency(Schema):
    """Seconds an example, and the hardware."""

    hardware: str
    points: tuple[LatencyPoint, ...]


class Published(Schema):
    """A paper's results."""

    title: str
    source: str
    url: str
    protocol: Protocol
    averages: Averages
    rows: tuple[PublishedRow, ...] = Field(min_length=1)
    sample_efficiency: tuple[PublishedPoint, ...] = ()
    sentence_budget: tuple[PublishedPoint, ...] = ()
    latency: Latency

    @model_validator(mode="after")
    def _check(self) -> Self:
        ids = [row.id for row in self.rows]
        twice = next((name for name in ids if ids.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"rows: {twice!r} is given twice")
        unknown = next((point.row for point in self.latency.points if point.row not in ids), None)
        if unknown is not None:
            raise ValueError(f"latency: there is no row {unknown!r}")
        for name, curve in (("sample_efficiency", self.sample_efficiency), ("sentence_budget", self.sentence_budget)):
            xs = [point.x for point in curve]
            if xs != sorted(set(xs)):
                raise ValueError(f"{name}: x must rise from point to point")
        return self

    def row(self, name: str) -> PublishedRow | None:
        """The row of an id; None if there is no such row."""
        return next((row for row in self.rows if row.id == name), None)


def read_published(name_or_path: str = "paper", folder: Path = PUBLISHED_FOLDER) -> Published:
    """Read published results by the name of a YAML file in `folder`, or by its path.

    Raises:
        JaxguardError: no such file; unknown, missing or ill-typed field; numbers that contradict each other.
    """
    path = find_yaml(name_or_path, folder, "published results")
    return validate(Published, read_yaml(path), str(path))


def nearest_row(
    published: Published, base: str, data: str | None, trained: Trained, mode: str, examples: int | None
) -> PublishedRow | None:
    """The row to compare a guard with, or None: same base, training, mode and data, then the nearest size.

    Rows of unknown data are taken where no other is there. Rows with a variant must be named in the config.

    Args:
        published: where to look.
        base: the base model, such as Gemma-3-4B; case, organisation, "-Instruct" and "-it" do not matter.
        data: the training set, such as WildGuardMix.
        trained: the mode of the training examples.
        mode: the mode of the evaluation.
        examples: the size of the training set.
    """

    def matches(row: PublishedRow) -> bool:
        same_training = (row.trained, row.mode, row.variant) == (trained, mode, None)
        return same_training and _plain(row.base) == _plain(base) and row.data in (data, None)

    def distance(row: PublishedRow) -> tuple[bool, float]:
        ratio = abs(math.log(row.examples / examples)) if row.examples and examples else math.inf
        return row.data != data, ratio

    return min(filter(matches, published.rows), key=distance, default=None)


def _plain(model: str | None) -> str:
    name = (model or "").rstrip("/").rsplit("/", 1)[-1].casefold()
    return name.removesuffix("-instruct").removesuffix("-it")
