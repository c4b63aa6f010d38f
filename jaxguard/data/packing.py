"""Batches: which examples a step sees, and how they are packed into rows.

Everything is a function of (seed, step), so resuming needs only the step, on any number of hosts. Row counts, row lengths and
target counts are rounded up to a few distinct shapes, since each shape is compiled.

Examples that start with the same tokens, those of the policy, share this prefix: a row holds it once, as a segment that the
examples' segments continue. Attention sees both (models/attention/kernels.py), so loss and gradient are those of whole examples.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, Self

import grain
import numpy as np

from jaxguard.data.encoding import EncodedExample
from jaxguard.utils.errors import JaxguardError

TARGET_MULTIPLE = 256
ROW_LENGTHS = 4
"""Number of row lengths, the longest of which is `max_seq_len`."""
KERNEL_MULTIPLE = 128
"""Block size of attention kernels, in tokens."""


class Shape(NamedTuple):
    """Static sizes of a batch: B rows of T tokens with M targets each; `shared` if examples share prefixes."""

    rows: int
    tokens: int
    targets: int
    shared: bool = False


class Batch(NamedTuple):
    """Packed rows. Segment 0 is padding; positions restart in each segment, or continue those of its prefix.

    `prefixes_BT` is the segment that a token's segment continues, or its own; None if no segment of the batch continues
    another. The token at `target_index` predicts `target_ids`; `target_weights` is 1, or 0 for padding.
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
        """Build a batch whose arrays are `make(shape, dtype)`."""
        tokens, targets = (shape.rows, shape.tokens), (shape.rows, shape.targets)
        tokens_BT, positions_BT, segments_BT = (make(tokens, np.int32) for _ in range(3))
        prefixes_BT = make(tokens, np.int32) if shape.shared else None
        target_arrays_BM = (make(targets, dtype) for dtype in (np.int32, np.int32, np.float32))
        return cls(tokens_BT, positions_BT, segments_BT, prefixes_BT, *target_arrays_BM)

    @property
    def valid_positions(self) -> np.ndarray:
        """Positions of all tokens that are not padding; for arrays on the host."""
        return np.asarray(self.positions_BT[self.segments_BT > 0])


@dataclass(frozen=True)
class Schedule:
    """The batches of a run: exactly `batch_size` examples a step, in an order of `seed`, in a multiple of `row_multiple` rows."""

    sequences: Sequence[EncodedExample]
    batch_size: int
    steps: int
    max_seq_len: int
    row_multiple: int
    seed: int

    def examples(self, step: int) -> list[int]:
        """Return the indices of a step's examples: the next `batch_size` of the concatenated permutations of all epochs."""
        count = len(self.sequences)
        indices = (divmod(i, count) for i in range(step * self.batch_size, (step + 1) * self.batch_size))
        return [int(_permutation(self.seed, epoch, count)[i]) for epoch, i in indices]

    def rows(self, step: int) -> list[list[EncodedExample]]:
        """Pack the sequences of a step."""
        return pack([self.sequences[i] for i in self.examples(step)], self.max_seq_len, self.row_multiple)

    def shape(self, step: int) -> Shape:
        return bucketed(self.rows(step), self.max_seq_len, self.row_multiple)

    def batch(self, step: int) -> Batch:
        rows = self.rows(step)
        return assemble(rows, bucketed(rows, self.max_seq_len, self.row_multiple))

    def read(self, start: int, prefetch: int) -> Iterator[Batch]:
        """Iterate over the batches of steps start, start + 1, …, which grain prepares ahead."""
        dataset = grain.MapDataset.range(start, self.steps).map(self.batch)
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)))


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return a random order. numpy guarantees only the raw generator output to stay the same across versions."""
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(count), kind="stable")


def total_steps(examples: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Return the number of steps in a run: 5,000 examples × 5 epochs / 32 = 781; JaxguardError: there would be none."""
    steps = int(examples * epochs / batch_size)
    if not steps:
        raise JaxguardError(
            f"train.epochs={epochs:g} of {examples} training examples is less than one step of "
            f"train.batch_size={batch_size}: raise train.epochs"
        )
    return steps if max_steps is None else min(steps, max_steps)


@dataclass
class _Row:
    """A row being filled, with each shared prefix once."""

    sequences: list[EncodedExample] = field(default_factory=list)
    prefixes: set[bytes] = field(default_factory=set)
    tokens: int = 0

    def tokens_with(self, sequence: EncodedExample) -> int:
        shared = sequence.shared_prefix_len if sequence.shared_prefix in self.prefixes else 0
        return self.tokens + len(sequence.tokens) - shared

    def add(self, sequence: EncodedExample) -> None:
        self.tokens = self.tokens_with(sequence)
        self.prefixes.add(sequence.shared_prefix)
        self.sequences.append(sequence)


def pack(sequences: Sequence[EncodedExample], max_seq_len: int, row_multiple: int) -> list[list[EncodedExample]]:
    """Pack into the rows of first-fit decreasing, rounded up to a bucketed number, and about equally long."""
    longest_first = sorted(sequences, key=lambda s: -len(s.tokens))
    few: list[_Row] = []
    for sequence in longest_first:  # into the row with space that it lengthens least
        fitting = [row for row in few if row.tokens_with(sequence) <= max_seq_len]
        if not fitting:
            fitting = [_Row()]
            few += fitting
        min(fitting, key=lambda row: row.tokens_with(sequence) - row.tokens).add(sequence)
    even = [_Row() for _ in range(bucket_size(len(few), row_multiple))]
    for sequence in longest_first:  # into the row that is then the shortest
        min(even, key=lambda row: row.tokens_with(sequence)).add(sequence)
    rows = even if max(row.tokens for row in even) <= max_seq_len else few
    return [row.sequences for row in rows]


def packed_tokens(row: Sequence[EncodedExample]) -> int:
    """Return the length of a row without padding, each prefix counted once."""
    prefixes = {sequence.shared_prefix: sequence.shared_prefix_len for sequence in row}
    return sum(len(s.tokens) - s.shared_prefix_len for s in row) + sum(prefixes.values())


def bucketed(rows: Sequence[Sequence[EncodedExample]], max_seq_len: int, row_multiple: int) -> Shape:
    """Return the smallest bucketed shape that holds these rows."""
    longest = max(map(packed_tokens, rows))
    targets = max(sum(int(s.loss_mask.sum()) for s in row) for row in rows)
    tokens = next(length for length in row_lengths(max_seq_len) if length >= longest)
    shared = any(s.shared_prefix_len for row in rows for s in row)
    return Shape(bucket_size(len(rows), row_multiple), tokens, bucket_size(targets, TARGET_MULTIPLE), shared)


def row_lengths(max_seq_len: int) -> list[int]:
    """Return the possible row lengths: quarters of the longest, in whole kernel blocks if it consists of them."""
    unit = math.gcd(max_seq_len, KERNEL_MULTIPLE)
    return sorted({-(-max_seq_len * part // (ROW_LENGTHS * unit)) * unit for part in range(1, ROW_LENGTHS + 1)})


def bucket_size(count: int, unit: int) -> int:
    """Return the smallest of unit × 1 … 8, 10, 12, 14, 16, 20, … that is at least count: four sizes per doubling."""
    units = -(-count // unit)
    step = max(1, (1 << max(0, units - 1).bit_length()) // 8)
    return unit * -(-units // step) * step


def assemble(rows: Sequence[Sequence[EncodedExample]], shape: Shape) -> Batch:
    """Write packed sequences into the arrays of a batch."""
    batch = Batch.build(shape, np.zeros)
    for r, row in enumerate(rows):
        shared = {s.shared_prefix: s.tokens[: s.shared_prefix_len] for s in row if s.shared_prefix_len}
        numbers = {prefix: number for number, prefix in enumerate(shared, start=1)}
        # (tokens, first position, segment that it continues): prefixes come first, near to what attends to them.
        segments: list[tuple[np.ndarray, int, int | None]] = [(tokens, 0, None) for tokens in shared.values()]
        segments += [(s.tokens[s.shared_prefix_len :], s.shared_prefix_len, numbers.get(s.shared_prefix)) for s in row]
        starts = np.cumsum([0, *(len(tokens) for tokens, _, _ in segments)])
        for number, (start, (tokens, position, prefix)) in enumerate(zip(starts, segments, strict=False), start=1):
            span = slice(start, start + len(tokens))
            batch.tokens_BT[r, span] = tokens
            batch.positions_BT[r, span] = np.arange(position, position + len(tokens))
            batch.segments_BT[r, span] = number
            if batch.prefixes_BT is not None:
                batch.prefixes_BT[r, span] = prefix or number
        targets = 0
        for start, sequence in zip(starts[len(shared) :], row, strict=False):
            indices = np.flatnonzero(sequence.loss_mask)
            span = slice(targets, targets + len(indices))
            # The first token of a segment is never a target, since prompts come first: its predecessor is not in the segment.
            batch.target_index_BM[r, span] = start + indices - sequence.shared_prefix_len - 1
            batch.target_ids_BM[r, span] = sequence.tokens[indices]
            batch.target_weights_BM[r, span] = 1
            targets += len(indices)
    return batch
