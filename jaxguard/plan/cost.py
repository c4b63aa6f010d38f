"""Count the steps of a whole run, the programs that they are compiled into, hours and dollars."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxguard.config import Config
from jaxguard.data.packing import TARGET_MULTIPLE, Schedule, Shape, bucket_size, row_lengths, total_steps
from jaxguard.data.prepare import prepare

MOST_SHAPES = 4
"""Shapes that are listed; a run may have dozens."""


@dataclass(frozen=True)
class RunCost:
    """A whole run.

    Attributes:
        steps: how many; None where they depend on data that are not available.
        price: dollars for a device and hour.
        shapes: of batches, each a program to compile -> how many steps have it; None where the data are not available.
        possible: the shapes that the batches could have, in words.
    """

    steps: int | None
    price: float | None = None
    shapes: Mapping[Shape, int] | None = None
    possible: str = "unknown"

    def hours(self, seconds: float) -> float | None:
        """Time of the run, at so many seconds a step."""
        return None if self.steps is None else self.steps * seconds / 3600

    def dollars(self, seconds: float, devices: int) -> float | None:
        """Price of the run on all devices, at so many seconds a step."""
        hours = self.hours(seconds)
        return None if hours is None or self.price is None else hours * devices * self.price

    def describe(self, seconds: float, devices: int) -> str:
        """Steps, hours and dollars in words."""
        hours, dollars = self.hours(seconds), self.dollars(seconds, devices)
        if hours is None:
            return "unknown: set data.subset or train.max_steps"
        price = "" if dollars is None else f", ${dollars:,.2f}"
        return f"{self.steps:,} steps, {hours:,.2f} h, {hours * devices:,.1f} device-hours{price}"

    @property
    def largest(self) -> Shape | None:
        """The shape that needs most memory, and so decides whether the run fits; None where the data are not available."""
        return max(self.shapes, key=lambda s: (s.rows * s.tokens, s.targets)) if self.shapes else None

    @property
    def programs(self) -> str:
        """Number and shapes of the programs, in words."""
        if self.shapes is None:
            return self.possible
        shapes = sorted(self.shapes.items(), key=lambda item: -item[1])
        names = [
            f"{shape.rows} rows of {shape.tokens:,} tokens, {shape.targets:,} targets ({count:,} steps)"
            for shape, count in shapes[:MOST_SHAPES]
        ]
        more = [f"{len(shapes) - MOST_SHAPES} more"] if len(shapes) > MOST_SHAPES else []
        return f"{len(shapes)}: {'; '.join([*names, *more])}"


def run_cost(config: Config, devices: int, price: float | None = None) -> RunCost:
    """Count a run's steps and batch shapes, from its config or, where tokenizer and data are local files, from these.

    Args:
        config: the run.
        devices: number of devices of the mesh.
        price: dollars for a device and hour.

    Raises:
        JaxguardError: the data are local, but cannot be trained on.
    """
    train, data = config.train, config.data
    multiple = max(1, devices // config.mesh.tensor) * train.accumulation
    if _has_data(config):
        examples = prepare(config, Path(config.model.checkpoint)).train
        steps = total_steps(len(examples), train.batch_size, train.epochs, train.max_steps)
        schedule = Schedule(examples, train.batch_size, steps, data.max_seq_len, multiple, config.seed)
        return RunCost(steps, price, Counter(schedule.shape(step) for step in range(steps)))
    known = train.max_steps
    if data.subset is not None:
        known = total_steps(data.subset, train.batch_size, train.epochs, train.max_steps)
    rows, targets = _buckets(train.batch_size, multiple), _buckets(data.max_seq_len, TARGET_MULTIPLE)
    lengths = _short_list(row_lengths(data.max_seq_len))
    possible = f"one for each shape: rows {_short_list(rows)}; tokens {lengths}; targets {_short_list(targets)}"
    return RunCost(known, price, None, possible)


def _has_data(config: Config) -> bool:
    """Whether the tokenizer and all sources are local files."""
    sources = (*config.data.train, *config.data.validation)
    return (Path(config.model.checkpoint) / "tokenizer.json").is_file() and all(
        source.path is not None and Path(source.path).exists() for source in sources
    )


def _buckets(most: int, unit: int) -> list[int]:
    """The sizes that counts up to `most` are rounded up to."""
    return sorted({bucket_size(count, unit) for count in range(1, most + 1)})


def _short_list(sizes: list[int]) -> str:
    """`8, 16, 24, 32`; of more than five, the first two and the last."""
    return ", ".join(f"{n:,}" for n in sizes) if len(sizes) <= 5 else f"{sizes[0]:,}, {sizes[1]:,} … {sizes[-1]:,}"
