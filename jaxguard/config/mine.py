"""Config schema of hard-example mining.

Where the paper (arXiv 2505.20087) is silent, the default here is our choice; docs/configuration.md says which.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from jaxguard.config.base import NonNegative, Positive, Schema
from jaxguard.config.evaluate import GuardConfig


class MineConfig(Schema):
    """Difficult samples: training examples that the guard judges right in some of its answers only."""

    guard: GuardConfig = GuardConfig()
    """Who is asked: a guard in our format, by default this run's; how, say evaluate.temperature and its neighbours."""
    generations: Annotated[int, Field(ge=2)] = 4
    """Answers to each example."""
    difficult: tuple[NonNegative, ...] = Field(default=(2, 3), min_length=1)
    """Numbers of right answers that make an example difficult. The paper's; 0 right of 4 is label noise there."""
    balance: Literal["none", "class", "category"] = "none"
    """Of the difficult ones take equally many of each combination of labels, or of each category; none takes all."""
    most: Positive | None = None
    """Take at most so many, a seeded choice."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if max(self.difficult) > self.generations:
            raise ValueError(f"difficult={self.difficult}: of {self.generations} answers no more can be right")
        if self.guard.format != "jaxguard" or self.guard.modes:
            raise ValueError(
                "guard: examples are mined in the format and the mode that they are trained in; leave both out"
            )
        return self
