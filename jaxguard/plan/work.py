"""A whole run: its updates, the programs that they are compiled into, hours and dollars."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxguard.config import Config
from jaxguard.data.packing import TARGET_MULTIPLE, Schedule, Shape, bucket_size, row_lengths, total_steps
from jaxguard.data.prepare import prepare

SHOWN = 4
"""Shapes that are named; a run may have dozens."""


@dataclass(frozen=True)
class Work:
    """A whole run.

    Attributes:
        updates: how many; None where nobody can say before the data are there.
        price: dollars that a device costs an hour.
        shapes: of batches, each a program to compile -> how many updates have it; None before the data are there.
        possible: the shapes that there could be, for people.
    """

    updates: int | None
    price: float | None = None
    shapes: Mapping[Shape, int] | None = None
    possible: str = "unknown"

    def hours(self, step: float) -> float | None:
        """At `step` seconds an update."""
        return None if self.updates is None else self.updates * step / 3600

    def dollars(self, step: float, devices: int) -> float | None:
        """Of all devices."""
        hours = self.hours(step)
        return None if hours is None or self.price is None else hours * devices * self.price

    def said(self, step: float, devices: int) -> str:
        """For people."""
        hours, dollars = self.hours(step), self.dollars(step, devices)
        if hours is None:
            return "unknown: give data.subset or train.max_steps"
        cost = "" if dollars is None else f", ${dollars:,.2f}"
        return f"{self.updates:,} updates, {hours:,.2f} h, {hours * devices:,.1f} device-hours{cost}"

    @property
    def largest(self) -> Shape | None:
        """The shape that needs most memory, and so decides whether the run fits; None before the data are there."""
        return max(self.shapes, key=lambda s: (s.rows * s.tokens, s.targets)) if self.shapes else None

    @property
    def programs(self) -> str:
        """How many programs the updates are, and of which shapes, for people."""
        if self.shapes is None:
            return self.possible
        often = sorted(self.shapes.items(), key=lambda pair: -pair[1])
        named = [
            f"{shape.rows} rows of {shape.tokens:,} tokens, {shape.targets:,} targets ({count:,} updates)"
            for shape, count in often[:SHOWN]
        ]
        rest = [f"{len(often) - SHOWN} more"] if len(often) > SHOWN else []
        return f"{len(often)}: {'; '.join([*named, *rest])}"


def work_of(config: Config, devices: int, price: float | None = None) -> Work:
    """How many updates a run makes and in which shapes, as far as its config, or data that lie here, tell.

    Args:
        config: the run.
        devices: of the mesh.
        price: dollars that one costs an hour.

    Raises:
        JaxguardError: the data lie here, but cannot be trained on.
    """
    train, data = config.train, config.data
    multiple = max(1, devices // config.mesh.tensor) * train.accumulation
    if _at_hand(config):
        sequences = prepare(config, Path(config.model.checkpoint)).train
        steps = total_steps(len(sequences), train.batch_size, train.epochs, train.max_steps)
        schedule = Schedule(sequences, train.batch_size, steps, data.max_seq_len, multiple, config.seed)
        return Work(steps, price, Counter(schedule.shape(step) for step in range(steps)))
    updates = train.max_steps
    if data.subset is not None:
        updates = total_steps(data.subset, train.batch_size, train.epochs, train.max_steps)
    rows, targets = _buckets(train.batch_size, multiple), _buckets(data.max_seq_len, TARGET_MULTIPLE)
    possible = (
        f"one for each shape: rows {_few(rows)}; tokens {_few(row_lengths(data.max_seq_len))}; targets {_few(targets)}"
    )
    return Work(updates, price, None, possible)


def _at_hand(config: Config) -> bool:
    """Whether the tokenizer and all sources are files here."""
    sources = (*config.data.train, *config.data.validation)
    return (Path(config.model.checkpoint) / "tokenizer.json").is_file() and all(
        source.path is not None and Path(source.path).exists() for source in sources
    )


def _buckets(most: int, unit: int) -> list[int]:
    """The sizes that up to `most` are rounded up to."""
    return sorted({bucket_size(count, unit) for count in range(1, most + 1)})


def _few(sizes: list[int]) -> str:
    """`8, 16, 24, 32`, the middle left out where there are many."""
    return ", ".join(f"{n:,}" for n in sizes) if len(sizes) <= 5 else f"{sizes[0]:,}, {sizes[1]:,} … {sizes[-1]:,}"
