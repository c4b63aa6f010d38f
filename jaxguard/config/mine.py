"""Config schema of hard-example mining."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from jaxguard.config.base import NonNegative, Positive, Schema
from jaxguard.config.evaluate import GuardConfig


class MineConfig(Schema):
    """Hard examples: training examples that the guard gets right in only some of its completions."""

    guard: GuardConfig = GuardConfig()
    """A guard in jaxguard's format, by default this run's; it is sampled as evaluate.temperature and its neighbours say."""
    generations: Annotated[int, Field(ge=2)] = 4
    """Completions for each example."""
    hard: tuple[NonNegative, ...] = Field(default=(2, 3), min_length=1)
    """Numbers of correct completions that make an example hard. The paper's; 0 correct of 4 is label noise there."""
    balance: Literal["none", "class", "category"] = "none"
    """Take equally many hard examples of each combination of labels, or of each category; none takes all."""
    most: Positive | None = None
    """Most hard examples to take, a seeded sample."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if max(self.hard) > self.generations:
            raise ValueError(f"hard={self.hard}: of {self.generations} completions no more can be correct")
        if self.guard.format != "jaxguard" or self.guard.modes:
            raise ValueError(
                "guard: examples are mined in the format and the mode that they are trained in; leave format and modes out"
            )
        return self
