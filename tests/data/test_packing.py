"""Packing loses and mixes nothing; the order is arithmetic."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxguard.data.encoding import EncodedExample
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.packing import (
    Batch,
    Schedule,
    Shape,
    assemble,
    bucket_size,
    bucketed,
    pack,
    packed_tokens,
    row_lengths,
    total_steps,
)
from jaxguard.utils.errors import JaxguardError

ROW = 32
ORDER = {0: [0, 2, 9, 1, 8], 3: [4, 1, 0, 6, 9]}


HEADS = (b"", np.arange(7, dtype=np.int32).tobytes(), np.arange(9, dtype=np.int32).tobytes())


def sequence(name: str, length: int, targets: int, head: int = 0) -> EncodedExample:
    """So many tokens, `head` of them those that others begin with too."""
    tokens = np.arange(1, length + 1, dtype=np.int32) + 100 * int(name)
    shared = np.frombuffer(HEADS[head], np.int32)
    tokens[: len(shared)] = shared
    return EncodedExample(name, Mode.DIRECT, tokens, np.arange(length) >= length - targets, (), (), False, HEADS[head])


lengths = st.lists(st.tuples(st.integers(11, ROW), st.integers(1, 8), st.integers(0, 2)), min_size=1, max_size=20)


def build(shapes, shared: bool = True) -> list[EncodedExample]:
    """At least one token between head and targets, as a prompt has."""
    return [sequence(str(i), n, min(t, n - 10), head * shared) for i, (n, t, head) in enumerate(shapes)]


def read(batch: Batch) -> list[tuple[int, ...]]:
    """The sequences of a batch, by segments and prefixes alone."""
    found = []
    for r, segments in enumerate(batch.segments_BT):
        prefixes = segments if batch.prefixes_BT is None else batch.prefixes_BT[r]
        continued = {p for s, p in zip(segments, prefixes, strict=True) if s != p}
        for segment in set(segments) - {0} - continued:
            first = int(np.argmax(segments == segment))
            whole = [i for i, s in enumerate(segments) if s in (segment, prefixes[first])]
            np.testing.assert_array_equal(batch.positions_BT[r, whole], np.arange(len(whole)))
            found.append(tuple(int(t) for t in batch.tokens_BT[r, whole]))
        assert not batch.tokens_BT[r, segments == 0].any()
    return found


@given(lengths, st.integers(1, 8))
def test_every_token_and_target_is_in_the_batch_exactly_once(shapes, multiple):
    sequences = build(shapes)
    rows = pack(sequences, ROW, multiple)
    batch = assemble(rows, bucketed(rows, ROW, multiple))
    assert batch.tokens_BT.shape[0] % multiple == 0
    assert sorted(read(batch)) == sorted(tuple(s.tokens.tolist()) for s in sequences)
    assert len(batch.valid_positions) == sum(map(packed_tokens, rows))
    targets = batch.target_ids_BM[batch.target_weights_BM == 1]
    assert sorted(targets) == sorted(itertools.chain(*(s.tokens[s.loss_mask] for s in sequences)))
    assert batch.target_weights_BM.sum() == sum(s.loss_mask.sum() for s in sequences)


@given(lengths)
def test_a_target_is_predicted_from_the_token_before_it_in_its_own_segment(shapes):
    rows = pack(build(shapes), ROW, 1)
    batch = assemble(rows, bucketed(rows, ROW, 1))
    for r, m in zip(*np.nonzero(batch.target_weights_BM), strict=True):
        before = batch.target_index_BM[r, m]
        assert batch.tokens_BT[r, before + 1] == batch.target_ids_BM[r, m]
        assert batch.segments_BT[r, before] == batch.segments_BT[r, before + 1] > 0


@given(lengths, st.integers(1, 4))
def test_packing_needs_few_rows(shapes, multiple):
    """First-fit decreasing: no two rows could be poured together, so at most one would be half empty."""
    plain = build(shapes, shared=False)
    rows = pack(plain, ROW, 1)
    assert max(map(packed_tokens, rows)) <= ROW
    assert len(rows) <= bucket_size(2 * sum(len(s.tokens) for s in plain) // ROW + 1, 1)
    shared = pack(build(shapes), ROW, multiple)
    assert max(map(packed_tokens, shared)) <= ROW
    assert len(shared) <= bucket_size(len(shapes), multiple)


def test_a_prefix_is_held_once_a_row_and_rows_are_as_short_as_they_can_be():
    """Sixteen examples of 140 tokens, 100 of them shared: 100 + 16 x 40 on one device, 100 + 2 x 40 on each of eight."""
    head = np.arange(100, dtype=np.int32)
    tokens = np.concatenate([head, np.arange(40, dtype=np.int32)])
    whole = [EncodedExample(str(i), Mode.DIRECT, tokens, np.arange(140) >= 130, (), (), False) for i in range(16)]
    shared = [replace(s, shared_prefix=head.tobytes()) for s in whole]

    def shape(examples, row_multiple):
        return bucketed(pack(examples, 1024, row_multiple), 1024, row_multiple)

    assert [packed_tokens(row) for row in pack(shared, 1024, 8)] == [180] * 8
    assert shape(shared, 8) == Shape(8, 256, 256, shared=True)
    assert shape(whole, 8) == Shape(8, 512, 256, shared=False)
    assert shape(shared, 1) == Shape(1, 768, 256, shared=True)
    assert shape(whole, 1) == Shape(3, 1024, 256, shared=False)


@given(st.integers(1, 5000))
def test_a_kernel_that_can_work_on_the_longest_row_can_on_every_row(max_seq_len):
    lengths = row_lengths(max_seq_len)
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == max_seq_len
    assert len(lengths) <= 4
    for multiple in (2, 8, 128):  # cuDNN takes an even number of tokens, splash attention whole blocks of 128
        assert max_seq_len % multiple or all(length % multiple == 0 for length in lengths)


@given(st.integers(1, 5000), st.integers(1, 64))
def test_buckets_are_few_and_not_much_too_large(count, unit):
    bucket = bucket_size(count, unit)
    assert bucket >= count
    assert bucket % unit == 0
    assert bucket < 1.25 * count + unit
    assert len({bucket_size(n, 1) for n in range(1, 4097)}) == 8 + 4 * 9


def schedule(count: int, batch: int, steps: int, seed: int = 0) -> Schedule:
    return Schedule([sequence(str(i), 5 + i % 7, 2) for i in range(count)], batch, steps, ROW, 1, seed)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3))
def test_every_epoch_sees_every_example_once(count, batch, seed):
    s = schedule(count, batch, steps=4 * count, seed=seed)
    stream = list(itertools.chain(*(s.examples(step) for step in range(2 * count))))
    for epoch in range(len(stream) // count):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_order_is_fixed_for_ever():
    """The same numbers on every platform and version: a resumed run must never see another order."""
    assert schedule(10, 5, 4).examples(0) == ORDER[0]
    assert schedule(10, 5, 4).examples(3) == ORDER[3]
    assert schedule(10, 5, 4, seed=1).examples(0) != ORDER[0]


def test_reading_from_the_middle_gives_the_batches_of_those_steps():
    s = schedule(17, 4, steps=9)
    whole = list(s.read(0, prefetch=2))
    assert len(whole) == 9
    for step, batch in zip(range(5, 9), s.read(5, prefetch=3), strict=True):
        for got, want in zip(batch, whole[step], strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("examples", "epochs", "steps"), [(5000, 5, 781), (500, 5, 78), (500, 50, 781), (1000, 0.5, 15)]
)
def test_updates_of_the_recipe(examples, epochs, steps):
    assert total_steps(examples, 32, epochs, None) == steps
    assert total_steps(examples, 32, epochs, 7) == 7


def test_a_run_has_a_step():
    """Without one, the base would be exported as a trained guard."""
    with pytest.raises(JaxguardError, match=r"train\.epochs=0\.5 .* train\.batch_size=32"):
        total_steps(63, 32, 0.5, 7)
