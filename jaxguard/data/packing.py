"""Batches: which examples a step sees, and how they are packed into rows.

Everything is a function of (seed, step), so resuming needs only the step, on any number of hosts. Row counts, row lengths and
target counts are rounded up to a few distinct shapes, since each shape is compiled.

Examples that begin with the same tokens, such as those of one policy or of one prompt, form a tree: a row holds these tokens once,
and a token sees its ancestors alone (models/attention/kernels.py). So loss and gradient are those of whole examples.
"""

import math
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, Self

import grain
import numpy as np

from jaxguard.config import Config
from jaxguard.data.encoding import EncodedExample, common_length
from jaxguard.utils.errors import JaxguardError

MIN_TARGETS, TARGET_MULTIPLE = 64, 256
"""A row has space for 64 or 128 targets, or for a bucketed multiple of 256."""
PAIR_MULTIPLE = 8
ROW_LENGTHS = 16
"""Number of row lengths, the longest of which is `max_seq_len`."""
KERNEL_MULTIPLE = 128
"""Block size of attention kernels, in tokens."""


class Shape(NamedTuple):
    """Static sizes of a batch: B rows of T tokens with M targets each, of P pairs."""

    rows: int
    tokens: int
    targets: int
    pairs: int = 0


class Batch(NamedTuple):
    """Packed rows of trees in depth-first order.

    `positions_BT` are those of tokens in their own sequences, -1 for padding; `ends_BT` is the last index in the row of a token
    that continues this one, its own where none does. The token at `target_index` predicts `target_ids`; `target_weights` is its
    example's weight, or 0 for padding.

    With preferences, pairs of a chosen and a rejected answer in one row: `target_pairs` is p for the chosen answer of the row's
    pair p = 1, 2, …, -p for its rejected one, and 0 for padding; `target_reference` is the target's log-probability by the
    reference model. `target_weights` are then 1 / length for the chosen answer and 0 for the rejected one, and the pair's weight
    is in `pair_weights`, 0 for padding. A sampled answer is a chosen one without a rejected one, its weight the advantage, and its
    reference the model that sampled it. Else these three are None.
    """

    tokens_BT: Any
    positions_BT: Any
    ends_BT: Any
    target_index_BM: Any
    target_ids_BM: Any
    target_weights_BM: Any
    target_pairs_BM: Any = None
    target_reference_BM: Any = None
    pair_weights_BP: Any = None

    @classmethod
    def build(cls, shape: Shape, make: Callable[[tuple[int, int], type], Any]) -> Self:
        """Build a batch whose arrays are `make(shape, dtype)`."""
        tokens, targets = (shape.rows, shape.tokens), (shape.rows, shape.targets)
        token_arrays_BT = (make(tokens, np.int32) for _ in range(3))
        dtypes = (np.int32, np.int32, np.float32, *((np.int32, np.float32) if shape.pairs else ()))
        target_arrays_BM = (make(targets, dtype) for dtype in dtypes)
        pairs = (make((shape.rows, shape.pairs), np.float32),) if shape.pairs else ()
        return cls(*token_arrays_BT, *target_arrays_BM, *pairs)

    @property
    def valid_positions(self) -> np.ndarray:
        """Positions of all tokens that are not padding; for arrays on the host."""
        return np.asarray(self.positions_BT[self.positions_BT >= 0])

    @property
    def num_targets(self) -> int:
        """Targets that are not padding; for arrays on the host."""
        return int(np.count_nonzero(self.target_weights_BM if self.target_pairs_BM is None else self.target_pairs_BM))


class Order:
    """Sequences sorted by their tokens, which is depth-first order: each shares most with its neighbours.

    `common[i]` is the number of tokens that sequence i has in common with the one before it; 0 where nothing shall be shared.
    `example_of[i]` is the example of sequence i; `examples` are the sequences of each: two of a preference, which stay in one row.
    `relative`: the loss is relative to another model's log-probabilities.
    """

    def __init__(self, examples: Sequence[EncodedExample], share: bool = True):
        numbered = [(sequence, number) for number, example in enumerate(examples) for sequence in example.sequences]
        if share:
            numbered.sort(key=lambda each: each[0].tokens.tobytes())
        self.sequences = [sequence for sequence, _ in numbered]
        self.example_of = [number for _, number in numbered]
        self.relative = any(each.rejected is not None or each.reference is not None for each in examples)
        self.examples: list[tuple[int, ...]] = [()] * len(examples)
        for i, number in enumerate(self.example_of):
            self.examples[number] += (i,)
        common = [common_length(a.tokens, b.tokens) if share else 0 for a, b in pairwise(self.sequences)]
        self.common = np.asarray([0, *common])
        self.lengths = np.asarray([len(s.tokens) for s in self.sequences])

    def shared(self, first: int, second: int) -> int:
        """Tokens that two sequences begin with."""
        return int(self.common[first + 1 : second + 1].min())


class Row:
    """Some sequences of an order, each token that several begin with counted, and computed, once."""

    def __init__(self, order: Order, members: Sequence[int] = ()):
        self.order = order
        self.members = list(members)
        self.tokens = int(order.lengths[self.members].sum()) - sum(self.shared)

    @property
    def sequences(self) -> list[EncodedExample]:
        return [self.order.sequences[i] for i in self.members]

    @property
    def examples(self) -> set[int]:
        return {self.order.example_of[i] for i in self.members}

    @property
    def shared(self) -> list[int]:
        """Tokens that each sequence has in common with the one before it."""
        return [0, *(self.order.shared(*both) for both in pairwise(self.members))] if self.members else []

    def tokens_with(self, example: tuple[int, ...]) -> int:
        """Return the row's tokens if it also had these sequences, of which all that a neighbour begins with is there."""
        tokens, last = self.tokens, -1
        for i in example:
            at = bisect(self.members, i)
            before = self.order.shared(max(last, self.members[at - 1] if at else -1), i) if at or last >= 0 else 0
            after = self.order.shared(i, self.members[at]) if at < len(self.members) else 0
            tokens, last = tokens + int(self.order.lengths[i]) - max(before, after), i
        return tokens

    def add(self, example: tuple[int, ...]) -> None:
        self.tokens = self.tokens_with(example)
        self.members = sorted((*self.members, *example))


@dataclass(frozen=True)
class Schedule:
    """The batches of a run: exactly `batch_size` examples a step, in an order of `seed`, in a multiple of `row_multiple` rows.

    `share`: compute what the examples of a row begin with once. `together`: examples that begin alike beyond their policy, such as
    the traces of one prompt or the turns of a dialogue, follow each other, so that a step has all of them, or two steps do.
    """

    sequences: Sequence[EncodedExample]
    batch_size: int
    steps: int
    max_seq_len: int
    row_multiple: int
    seed: int
    share: bool = True
    together: bool = False

    @classmethod
    def of(cls, config: Config, sequences: Sequence[EncodedExample], steps: int, row_multiple: int) -> Self:
        """The batches that a config asks for."""
        data, batch_size = config.data, config.train.batch_size
        sharing = data.share_prefixes, data.keep_together
        return cls(sequences, batch_size, steps, data.max_seq_len, row_multiple, config.seed, *sharing)

    def examples(self, step: int) -> list[int]:
        """Return the indices of a step's examples: the next `batch_size` of the concatenated permutations of all epochs."""
        count = len(self.sequences)
        indices = (divmod(i, count) for i in range(step * self.batch_size, (step + 1) * self.batch_size))
        return [int(self._order(epoch)[i]) for epoch, i in indices]

    @cached_property
    def _order(self) -> Callable[[int], np.ndarray]:
        """The order of the examples in an epoch: that of their groups, which are in a random one."""
        groups = np.asarray(similar(self.sequences)) if self.together else np.arange(len(self.sequences))

        @lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:
            ranks = np.argsort(_permutation(self.seed, epoch, int(groups.max()) + 1))
            return np.argsort(ranks[groups], kind="stable")

        return order

    def rows(self, step: int) -> list[Row]:
        """Pack the sequences of a step."""
        return pack([self.sequences[i] for i in self.examples(step)], self.max_seq_len, self.row_multiple, self.share)

    def logged(self, _: int) -> dict[str, float]:
        """Return what is known of a batch besides its arrays: nothing."""
        return {}

    def shape(self, step: int) -> Shape:
        return bucketed(self.rows(step), self.max_seq_len, self.row_multiple)

    def batch(self, step: int) -> Batch:
        rows = self.rows(step)
        return assemble(rows, bucketed(rows, self.max_seq_len, self.row_multiple))

    def read(self, start: int, prefetch: int, _: Callable[[], dict[str, Any]] | None = None) -> Iterator[Batch]:
        """Iterate over the batches of steps start, start + 1, …, which grain prepares ahead; no weights decide them."""
        dataset = grain.MapDataset.range(start, self.steps).map(self.batch)
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)))


def similar(sequences: Sequence[EncodedExample]) -> list[int]:
    """Number the groups of sequences that have half of a prompt in common beyond the policy, in the order of their first ones."""
    prompts = [int(np.argmax(s.loss_mask)) for s in sequences]
    first_of = list(range(len(sequences)))
    for a, b in pairwise(sorted(first_of, key=lambda i: sequences[i].tokens.tobytes())):
        policy = max(sequences[a].shared, sequences[b].shared)
        common = common_length(sequences[a].tokens, sequences[b].tokens)
        if common - policy >= (min(prompts[a], prompts[b]) - policy) / 2 > 0:
            first_of[b] = first_of[a]
    numbers: dict[int, int] = {}
    return [numbers.setdefault(group, len(numbers)) for group in first_of]


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


def pack(examples: Sequence[EncodedExample], max_seq_len: int, row_multiple: int, share: bool = True) -> list[Row]:
    """Pack into the rows of first-fit decreasing, rounded up to a bucketed number, and about equally long.

    `share`: compute what sequences begin with once a row. JaxguardError: a preference is longer than a row.
    """
    order = Order(examples, share)
    longest_first = sorted(order.examples, key=lambda each: -Row(order, each).tokens)
    few: list[Row] = []
    for each in longest_first:  # into the row with space that it lengthens least
        fitting = [row for row in few if row.tokens_with(each) <= max_seq_len]
        if not fitting:
            fitting = [Row(order)]
            few += fitting
        min(fitting, key=lambda row: row.tokens_with(each) - row.tokens).add(each)
    if _longest(few) > max_seq_len:
        name = next(row.sequences[0].example_id for row in few if row.tokens > max_seq_len)
        raise JaxguardError(
            f"example {name!r}: its two answers take more than data.max_seq_len={max_seq_len} tokens together: raise that, or "
            "leave the example out"
        )
    count = bucket_size(len(few), row_multiple)
    even = [Row(order) for _ in range(count)]
    for each in longest_first:  # into the row that is then the shortest
        min(even, key=lambda row: row.tokens_with(each)).add(each)
    rows = min(even, _in_order(order, count), key=_longest)
    return rows if _longest(rows) <= max_seq_len else few


def _in_order(order: Order, count: int) -> list[Row]:
    """Cut an order into `count` rows whose longest is as short as possible, which keeps subtrees together."""
    # Pieces that no example crosses; most are single sequences.
    crossed = np.zeros(len(order.lengths) + 1, bool)
    for first, *rest in order.examples:
        crossed[first + 1 : max(rest, default=first) + 1] = True
    starts = np.flatnonzero(~crossed)
    pieces = [Row(order, range(*each)).tokens for each in pairwise(starts)]

    def cut(most: int) -> list[Row]:
        cuts, tokens = [0], 0
        for start, own in zip(starts.tolist(), pieces, strict=False):
            tokens += own - order.common[start]
            if tokens > most:
                cuts.append(start)
                tokens = own
        return [Row(order, range(*each)) for each in pairwise([*cuts, len(order.lengths)])]

    low, high = max(pieces), sum(pieces)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= count else (middle + 1, high)
    rows = cut(low)
    return rows + [Row(order)] * (count - len(rows))


def _longest(rows: Sequence[Row]) -> int:
    return max(row.tokens for row in rows)


def bucketed(rows: Sequence[Row], max_seq_len: int, row_multiple: int) -> Shape:
    """Return the smallest bucketed shape that holds these rows."""
    longest = _longest(rows)
    targets = max(sum(int(s.loss_mask.sum()) for s in row.sequences) for row in rows)
    tokens = next(length for length in row_lengths(max_seq_len) if length >= longest)
    pairs = max(len(row.examples) if row.order.relative else 0 for row in rows)
    size = bucket_size(len(rows), row_multiple), tokens, target_space(targets)
    return Shape(*size, pairs and bucket_size(pairs, PAIR_MULTIPLE))


def row_lengths(max_seq_len: int) -> list[int]:
    """Return the possible row lengths: sixteenths of the longest, in whole kernel blocks if it consists of them."""
    unit = math.gcd(max_seq_len, KERNEL_MULTIPLE)
    return sorted({-(-max_seq_len * part // (ROW_LENGTHS * unit)) * unit for part in range(1, ROW_LENGTHS + 1)})


def target_space(targets: int) -> int:
    """Return the targets that the smallest bucketed shape has space for: few sizes, since each is compiled."""
    return bucket_size(targets, min(TARGET_MULTIPLE, max(MIN_TARGETS, 1 << (targets - 1).bit_length())))


def bucket_size(count: int, unit: int) -> int:
    """Return the smallest of unit × 1 … 8, 10, 12, 14, 16, 20, … that is at least count: four sizes per doubling."""
    units = -(-count // unit)
    step = max(1, (1 << max(0, units - 1).bit_length()) // 8)
    return unit * -(-units // step) * step


def assemble(rows: Sequence[Row], shape: Shape) -> Batch:
    """Write packed sequences into the arrays of a batch."""
    batch = Batch.build(shape, np.zeros)
    batch.positions_BT[:] = -1
    batch.ends_BT[:] = np.arange(shape.tokens)
    for r, row in enumerate(rows):
        path = np.zeros(0, np.int64)  # indices in the row of a sequence's tokens
        stop, pairs = 0, dict[int, int]()
        for (sequence, span), shared, i in zip(target_spans(row), row.shared, row.members, strict=True):
            start, stop = stop, stop + len(sequence.tokens) - shared
            path = np.concatenate([path[:shared], np.arange(start, stop)])
            batch.tokens_BT[r, start:stop] = sequence.tokens[shared:]
            batch.positions_BT[r, start:stop] = np.arange(shared, len(path))
            batch.ends_BT[r, path] = stop - 1
            indices = np.flatnonzero(sequence.loss_mask)
            # The first token is never a target, since prompts come first.
            batch.target_index_BM[r, span] = path[indices - 1]
            batch.target_ids_BM[r, span] = sequence.tokens[indices]
            if batch.pair_weights_BP is None:
                batch.target_weights_BM[r, span] = sequence.weight
            else:
                example = row.order.example_of[i]
                chosen = sequence.rejected is not None or len(row.order.examples[example]) == 1
                pair = pairs.setdefault(example, len(pairs) + 1)
                batch.target_weights_BM[r, span] = chosen / len(indices)
                batch.target_pairs_BM[r, span] = pair if chosen else -pair
                batch.target_reference_BM[r, span] = sequence.reference
                batch.pair_weights_BP[r, pair - 1] = sequence.weight
    return batch


def target_spans(row: Row) -> Iterator[tuple[EncodedExample, slice]]:
    """Yield each sequence of a row with the span of its targets among those of the row."""
    start = 0
    for sequence in row.sequences:
        stop = start + int(sequence.loss_mask.sum())
        yield sequence, slice(start, stop)
        start = stop
