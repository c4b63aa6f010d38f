"""Batches: which examples an update sees, and how they are packed into rows.

Everything here is arithmetic on (seed, step): resuming needs the step alone, on any number of hosts. A batch is exactly
`batch_size` examples packed into as few rows as fit; row counts, row lengths and target counts are rounded up to few
distinct shapes, since every shape is a program to compile.

Examples that begin alike, with the policy, share that beginning: a row holds it once, as a segment of its own, and each
example goes on from it. Attention sees both (models/attention_kernels.Layout), so loss and gradient are those of whole
examples.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, Self

import grain
import numpy as np

from jaxguard.data.encoding import EncodedExample

TARGET_MULTIPLE = 256
ROW_LENGTHS = 4
"""Lengths that rows may have, the longest `max_seq_len`."""
KERNEL_MULTIPLE = 128
"""Attention kernels work on whole blocks of so many tokens."""


class Shape(NamedTuple):
    """Static sizes of a batch: B rows of T tokens with M targets each; `shared` where examples share prefixes."""

    rows: int
    tokens: int
    targets: int
    shared: bool = False


class Batch(NamedTuple):
    """Packed rows. Segment 0 is padding; positions start anew in every sequence, and go on from the prefix it continues.

    `prefixes_BT` is the segment that a token's segment continues, its own where it continues none; None where no segment of
    the batch does. The token at `target_index` predicts `target_ids`; `target_weights` is 1, or 0 for padding.
    """

    tokens_BT: Any
    positions_BT: Any
    segments_BT: Any
    prefixes_BT: Any
    target_index_BM: Any
    target_ids_BM: Any
    target_weights_BM: Any

    @classmethod
    def build(cls, shape: Shape, make: Callable[[tuple[int, int], type], Any]) -> Self:
        """A batch whose fields are each `make(its sides, its type)`."""
        tokens, targets = (shape.rows, shape.tokens), (shape.rows, shape.targets)
        return cls(
            tokens_BT=make(tokens, np.int32),
            positions_BT=make(tokens, np.int32),
            segments_BT=make(tokens, np.int32),
            prefixes_BT=make(tokens, np.int32) if shape.shared else None,
            target_index_BM=make(targets, np.int32),
            target_ids_BM=make(targets, np.int32),
            target_weights_BM=make(targets, np.float32),
        )

    @property
    def valid_positions(self) -> np.ndarray:
        """Positions of all tokens that are not padding; host arrays only."""
        return np.asarray(self.positions_BT[self.segments_BT > 0])


@dataclass(frozen=True)
class Schedule:
    """The whole run's batches, as arithmetic.

    Attributes:
        sequences: the encoded training examples.
        batch_size: examples in an update.
        steps: updates in the run.
        max_seq_len: the longest that a row gets; no sequence is longer.
        row_multiple: rows of a batch are a multiple of this.
        seed: of the order.
    """

    sequences: Sequence[EncodedExample]
    batch_size: int
    steps: int
    max_seq_len: int
    row_multiple: int
    seed: int

    def examples(self, step: int) -> list[int]:
        """Indices of the examples of update `step`: the next `batch_size` of the epochs' permutations laid end to end."""
        count = len(self.sequences)
        places = (divmod(place, count) for place in range(step * self.batch_size, (step + 1) * self.batch_size))
        return [int(_permutation(self.seed, epoch, count)[place]) for epoch, place in places]

    def rows(self, step: int) -> list[list[EncodedExample]]:
        """The sequences of update `step`, packed."""
        return pack([self.sequences[i] for i in self.examples(step)], self.max_seq_len, self.row_multiple)

    def shape(self, step: int) -> Shape:
        return bucketed(self.rows(step), self.max_seq_len, self.row_multiple)

    def batch(self, step: int) -> Batch:
        rows = self.rows(step)
        return assemble(rows, bucketed(rows, self.max_seq_len, self.row_multiple))

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


@dataclass
class _Row:
    """A row while it is filled; every prefix is in it once."""

    sequences: list[EncodedExample] = field(default_factory=list)
    heads: set[bytes] = field(default_factory=set)
    tokens: int = 0

    def with_(self, sequence: EncodedExample) -> int:
        """Its tokens if the sequence is added."""
        return (
            self.tokens
            + len(sequence.tokens)
            - (sequence.shared_prefix_len if sequence.shared_prefix in self.heads else 0)
        )

    def add(self, sequence: EncodedExample) -> None:
        self.tokens = self.with_(sequence)
        self.heads.add(sequence.shared_prefix)
        self.sequences.append(sequence)


def pack(sequences: Sequence[EncodedExample], max_seq_len: int, row_multiple: int) -> list[list[EncodedExample]]:
    """As few rows as first-fit decreasing finds, rounded up to a bucketed number, and about equally full."""
    longest_first = sorted(sequences, key=lambda s: -len(s.tokens))
    few = _first_fit(longest_first, max_seq_len)
    even = _spread(longest_first, bucket_size(len(few), row_multiple))
    rows = even if max(row.tokens for row in even) <= max_seq_len else few
    return [row.sequences for row in rows]


def _first_fit(sequences: Sequence[EncodedExample], max_seq_len: int) -> list[_Row]:
    """Each into the row that it lengthens least, the first of equals, of those that have room."""
    rows: list[_Row] = []
    for sequence in sequences:
        fitting = [row for row in rows if row.with_(sequence) <= max_seq_len]
        if not fitting:
            fitting = [_Row()]
            rows += fitting
        min(fitting, key=lambda row: row.with_(sequence) - row.tokens).add(sequence)
    return rows


def _spread(sequences: Sequence[EncodedExample], count: int) -> list[_Row]:
    """Each into the row that is then the shortest."""
    rows = [_Row() for _ in range(count)]
    for sequence in sequences:
        min(rows, key=lambda row: row.with_(sequence)).add(sequence)
    return rows


def packed_tokens(row: Sequence[EncodedExample]) -> int:
    """Tokens of a row without padding: every prefix once."""
    heads = {sequence.shared_prefix: sequence.shared_prefix_len for sequence in row}
    return sum(len(s.tokens) - s.shared_prefix_len for s in row) + sum(heads.values())


def bucketed(rows: Sequence[Sequence[EncodedExample]], max_seq_len: int, row_multiple: int) -> Shape:
    """The smallest of the few shapes that holds these rows."""
    longest = max(map(packed_tokens, rows))
    targets = max(sum(int(s.loss_mask.sum()) for s in row) for row in rows)
    return Shape(
        rows=bucket_size(len(rows), row_multiple),
        tokens=next(length for length in row_lengths(max_seq_len) if length >= longest),
        targets=bucket_size(targets, TARGET_MULTIPLE),
        shared=any(s.shared_prefix_len for row in rows for s in row),
    )


def row_lengths(max_seq_len: int) -> list[int]:
    """The lengths that rows may have: quarters of the longest, rounded up to whole blocks if that one consists of such."""
    unit = math.gcd(max_seq_len, KERNEL_MULTIPLE)
    return sorted({-(-max_seq_len * part // (ROW_LENGTHS * unit)) * unit for part in range(1, ROW_LENGTHS + 1)})


def bucket_size(count: int, unit: int) -> int:
    """The smallest of unit × 1 … 8, 10, 12, 14, 16, 20, … that is at least count: four sizes for each doubling."""
    units = -(-count // unit)
    step = max(1, (1 << max(0, units - 1).bit_length()) // 8)
    return unit * -(-units // step) * step


def assemble(rows: Sequence[Sequence[EncodedExample]], shape: Shape) -> Batch:
    """Lay packed sequences out as arrays."""
    batch = Batch.build(shape, np.zeros)
    for r, row in enumerate(rows):
        segment = start = targets = 0
        heads: dict[bytes, int] = {}
        # Prefixes first, so that not much lies between an example and what it sees.
        for sequence in row:
            if sequence.shared_prefix_len and sequence.shared_prefix not in heads:
                segment += 1
                heads[sequence.shared_prefix] = segment
                start = _lay(batch, r, start, sequence.tokens[: sequence.shared_prefix_len], 0, segment, segment)
        for sequence in row:
            segment += 1
            own = sequence.tokens[sequence.shared_prefix_len :]
            stop = _lay(
                batch, r, start, own, sequence.shared_prefix_len, segment, heads.get(sequence.shared_prefix, segment)
            )
            places = np.flatnonzero(sequence.loss_mask)
            span = slice(targets, targets + len(places))
            # The first token of a segment has no predecessor there and is never a target: prompts come first.
            batch.target_index_BM[r, span] = start + places - sequence.shared_prefix_len - 1
            batch.target_ids_BM[r, span] = sequence.tokens[places]
            batch.target_weights_BM[r, span] = 1
            start, targets = stop, targets + len(places)
    return batch


def _lay(batch: Batch, row: int, start: int, tokens: np.ndarray, position: int, segment: int, prefix: int) -> int:
    """Write one segment; where it ends."""
    stop = start + len(tokens)
    batch.tokens_BT[row, start:stop] = tokens
    batch.positions_BT[row, start:stop] = np.arange(position, position + len(tokens))
    batch.segments_BT[row, start:stop] = segment
    if batch.prefixes_BT is not None:
        batch.prefixes_BT[row, start:stop] = prefix
    return stop
