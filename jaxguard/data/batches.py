"""Batches: which examples an update sees, and how they are packed into rows.

Everything here is arithmetic on (seed, step): resuming needs the step alone, on any number of hosts. A batch is exactly
`batch_size` examples packed into as few rows as fit; row and target counts are rounded up to few distinct shapes, since
every shape is a program to compile.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import grain
import numpy as np

from jaxguard.data.encode import Sequence as Encoded

TARGET_MULTIPLE = 64


class Shape(NamedTuple):
    """Static sizes of a batch: B rows of T tokens with M targets each."""

    rows: int
    tokens: int
    targets: int


class Batch(NamedTuple):
    """Packed rows. Segment 0 is padding; positions start anew in every segment.

    The token at `target_index` predicts `target_ids`; `target_weights` is 1, or 0 for padding.
    """

    tokens_BT: Any
    positions_BT: Any
    segments_BT: Any
    target_index_BM: Any
    target_ids_BM: Any
    target_weights_BM: Any

    @staticmethod
    def layout(shape: Shape) -> list[tuple[tuple[int, int], type]]:
        """Shape and type of each field."""
        tokens, targets = (shape.rows, shape.tokens), (shape.rows, shape.targets)
        return [(tokens, np.int32)] * 3 + [(targets, np.int32)] * 2 + [(targets, np.float32)]


@dataclass(frozen=True)
class Schedule:
    """The whole run's batches, as arithmetic.

    Attributes:
        sequences: the encoded training examples.
        batch_size: examples in an update.
        steps: updates in the run.
        row_tokens: length of a row; no sequence is longer.
        row_multiple: rows of a batch are a multiple of this.
        seed: of the order.
    """

    sequences: Sequence[Encoded]
    batch_size: int
    steps: int
    row_tokens: int
    row_multiple: int
    seed: int

    def examples(self, step: int) -> list[int]:
        """Indices of the examples of update `step`: the next `batch_size` of the epochs' permutations laid end to end."""
        count = len(self.sequences)
        places = (divmod(place, count) for place in range(step * self.batch_size, (step + 1) * self.batch_size))
        return [int(_permutation(self.seed, epoch, count)[place]) for epoch, place in places]

    def rows(self, step: int) -> list[list[Encoded]]:
        """The sequences of update `step`, packed."""
        return pack([self.sequences[i] for i in self.examples(step)], self.row_tokens)

    def shape(self, step: int) -> Shape:
        return bucketed(self.rows(step), self.row_tokens, self.row_multiple)

    def batch(self, step: int) -> Batch:
        rows = self.rows(step)
        return assemble(rows, bucketed(rows, self.row_tokens, self.row_multiple))

    def read(self, start: int, prefetch: int) -> Iterator[Batch]:
        """Batches of updates start, start + 1, … prepared ahead by grain."""
        dataset = grain.MapDataset.range(start, self.steps).map(self.batch)
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)))


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """A random order. Raw generator output is the one stream that numpy promises never to change."""
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(count), kind="stable")


def total_steps(examples: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Updates in a run: 5,000 examples × 5 epochs / 32 = 781."""
    steps = int(examples * epochs / batch_size)
    return steps if max_steps is None else min(steps, max_steps)


def pack(sequences: Sequence[Encoded], row_tokens: int) -> list[list[Encoded]]:
    """First-fit decreasing: the longest first, each into the first row that has room for it."""
    rows: list[list[Encoded]] = []
    room: list[int] = []
    for sequence in sorted(sequences, key=lambda s: -len(s.tokens)):
        length = len(sequence.tokens)
        row = next((i for i, free in enumerate(room) if free >= length), None)
        if row is None:
            rows.append([])
            room.append(row_tokens)
            row = -1
        rows[row].append(sequence)
        room[row] -= length
    return rows


def bucketed(rows: Sequence[Sequence[Encoded]], row_tokens: int, row_multiple: int) -> Shape:
    """The smallest of the few shapes that holds these rows."""
    targets = max(sum(int(s.target.sum()) for s in row) for row in rows)
    return Shape(bucket_size(len(rows), row_multiple), row_tokens, bucket_size(targets, TARGET_MULTIPLE))


def bucket_size(count: int, unit: int) -> int:
    """The smallest of unit × 1 … 8, 10, 12, 14, 16, 20, … that is at least count: four sizes for each doubling."""
    units = -(-count // unit)
    step = max(1, (1 << max(0, units - 1).bit_length()) // 8)
    return unit * -(-units // step) * step


def assemble(rows: Sequence[Sequence[Encoded]], shape: Shape) -> Batch:
    """Lay packed sequences out as arrays."""
    batch = Batch(*(np.zeros(size, dtype) for size, dtype in Batch.layout(shape)))
    for r, row in enumerate(rows):
        start = targets = 0
        for segment, sequence in enumerate(row, start=1):
            stop = start + len(sequence.tokens)
            batch.tokens_BT[r, start:stop] = sequence.tokens
            batch.positions_BT[r, start:stop] = np.arange(stop - start)
            batch.segments_BT[r, start:stop] = segment
            places = np.flatnonzero(sequence.target)
            span = slice(targets, targets + len(places))
            # The first token of a sequence has no predecessor and is never a target: prompts come first.
            batch.target_index_BM[r, span] = start + places - 1
            batch.target_ids_BM[r, span] = sequence.tokens[places]
            batch.target_weights_BM[r, span] = 1
            start, targets = stop, targets + len(places)
    return batch
