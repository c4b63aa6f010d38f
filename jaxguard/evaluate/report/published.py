"""The paper's results, from configs/published/paper.yaml, for comparison."""

import math
from pathlib import Path
from typing import Literal

from pydantic import Field

from jaxguard.config.base import Schema, Share, find_yaml
from jaxguard.utils.parse import read_yaml

AVERAGES = ("prompt", "response", "safety", "custom")
"""The averages of an evaluation and of the paper, in the order of their columns."""

Trained = Literal["none", "direct", "reasoning", "dual"]


class PublishedRow(Schema):
    """A model of the paper, its training set and what else was different."""

    id: str
    """The name that configs refer to."""
    name: str
    base: str | None = None
    data: str | None = None
    examples: int | None = None
    trained: Trained | None = None
    """The mode of the training examples; None: another project's model."""
    variant: str | None = None
    mode: Literal["reasoning", "direct"]
    """The mode of the evaluation."""
    scores: dict[str, Share]
    """F1 of an average, a benchmark, or `benchmark/subset`."""
    deviations: dict[str, Share] = Field({})
    """Of the scores, over the generations."""
    restated: dict[str, dict[str, Share]] = Field({})
    """Table -> the scores for which it has other numbers."""


class PublishedPoint(Schema):
    """F1 at `x` training examples, with its deviation over subsets, or at `x` sentences of a trace, of `words` in the mean."""

    x: float
    scores: dict[str, Share]
    deviations: dict[str, Share] = Field({})
    words: float | None = None


class LatencyPoint(Schema):
    """Seconds that the model of a row takes for an example, and how much slower than the first model that is."""

    name: str
    row: str
    seconds: float
    slower: float


class Latency(Schema):
    """Seconds an example, and the hardware."""

    hardware: str
    points: tuple[LatencyPoint, ...]


class Published(Schema):
    """A paper's results."""

    title: str
    source: str
    url: str
    protocol: dict[str, int | float]
    """How answers are sampled: generations, temperature, top_p."""
    averages: dict[Literal["prompt", "response", "custom"], tuple[str, ...]]
    """Which benchmarks the averages are over, by their names in configs/benchmarks."""
    rows: tuple[PublishedRow, ...] = Field(min_length=1)
    sample_efficiency: tuple[PublishedPoint, ...] = ()
    sentence_budget: tuple[PublishedPoint, ...] = ()
    latency: Latency

    def benchmarks(self, average: str) -> tuple[str, ...]:
        """The benchmarks of one of AVERAGES."""
        safety = {"safety": (*self.averages["prompt"], *self.averages["response"])}
        return (safety | self.averages)[average]

    def row(self, name: str) -> PublishedRow | None:
        """The row of an id; None if there is no such row."""
        return next((row for row in self.rows if row.id == name), None)


def read_published() -> Published:
    """Read configs/published/paper.yaml."""
    path = find_yaml("paper", Path("configs/published"), "published results")
    return read_yaml(path, Published)


def nearest_row(
    published: Published, base: str, data: str | None, trained: Trained, mode: str, examples: int | None
) -> PublishedRow | None:
    """The row to compare a guard with, or None: same base, training, mode and data, then the nearest size.

    Of the base model's name, case, organisation, "-Instruct" and "-it" do not matter. Rows without data, such as those of
    models that the paper did not train, and rows with a variant must be named in the config.
    """

    def plain(model: str | None) -> str:
        name = (model or "").rstrip("/").rsplit("/", 1)[-1].casefold()
        return name.removesuffix("-instruct").removesuffix("-it")

    def matches(row: PublishedRow) -> bool:
        same_training = (row.trained, row.mode, row.variant) == (trained, mode, None)
        return same_training and plain(row.base) == plain(base) and row.data is not None and row.data == data

    def distance(row: PublishedRow) -> float:
        return abs(math.log(row.examples / examples)) if row.examples and examples else math.inf

    return min(filter(matches, published.rows), key=distance, default=None)
