"""Packing loses and mixes nothing; the order is arithmetic."""

import dataclasses
import itertools

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
    row_lengths,
    target_space,
    total_steps,
)
from jaxguard.utils.errors import JaxguardError

ROW = 32
ORDER = {0: [0, 2, 9, 1, 8], 3: [4, 1, 0, 6, 9]}


def sequence(name: str, length: int, targets: int) -> EncodedExample:
    tokens = np.arange(1, length + 1, dtype=np.int32) + 100 * int(name)
    return EncodedExample(name, Mode.DIRECT, tokens, np.arange(length) >= length - targets, (), (), False)


lengths = st.lists(st.tuples(st.integers(11, ROW), st.integers(1, 8)), min_size=1, max_size=20)
trees = st.lists(
    st.tuples(st.lists(st.integers(1, 3), min_size=2, max_size=ROW), st.integers(1, 8)), min_size=1, max_size=20
)
"""Sequences of three tokens, of which many begin alike, at any depth; some are the beginning of others."""


def unlike(shapes) -> list[EncodedExample]:
    return [sequence(str(i), length, min(targets, length - 1)) for i, (length, targets) in enumerate(shapes)]


def alike(shapes) -> list[EncodedExample]:
    return [
        dataclasses.replace(sequence(str(i), len(tokens), min(targets, len(tokens) - 1)), tokens=np.int32(tokens))
        for i, (tokens, targets) in enumerate(shapes)
    ]


def ancestors(batch: Batch, row: int, index: int) -> np.ndarray:
    """Where in a row the tokens are that a token sees, itself included."""
    keys = np.arange(index + 1)
    return keys[batch.ends_BT[row, keys] >= index]


def read(batch: Batch) -> list[tuple[int, ...]]:
    """The sequences of a batch up to each of its targets, by positions and ends alone."""
    found = []
    for row, target in zip(*np.nonzero(batch.target_weights_BM), strict=True):
        path = ancestors(batch, row, batch.target_index_BM[row, target])
        np.testing.assert_array_equal(batch.positions_BT[row, path], np.arange(len(path)))
        found.append((*batch.tokens_BT[row, path].tolist(), int(batch.target_ids_BM[row, target])))
    return sorted(found)


@given(trees, st.integers(1, 8), st.booleans())
def test_every_target_sees_its_own_sequence_whatever_is_shared(shapes, multiple, share):
    sequences = alike(shapes)
    rows = pack(sequences, ROW, multiple, share)
    batch = assemble(rows, bucketed(rows, ROW, multiple))
    assert batch.tokens_BT.shape[0] % multiple == 0
    beginnings = [s.tokens[: i + 1].tolist() for s in sequences for i in np.flatnonzero(s.loss_mask)]
    assert read(batch) == sorted(map(tuple, beginnings))
    assert sorted(s.example_id for row in rows for s in row.sequences) == sorted(s.example_id for s in sequences)


@given(trees, st.integers(1, 8))
def test_each_token_is_in_a_row_once(shapes, multiple):
    rows = pack(alike(shapes), ROW, multiple)
    assert max(row.tokens for row in rows) <= ROW
    batch = assemble(rows, bucketed(rows, ROW, multiple))
    for r, row in enumerate(rows):
        beginnings = {tuple(s.tokens[: i + 1].tolist()) for s in row.sequences for i in range(len(s.tokens))}
        assert row.tokens == len(beginnings) == (batch.positions_BT[r] >= 0).sum()
        padding = batch.positions_BT[r] < 0
        assert not batch.tokens_BT[r, padding].any()
        np.testing.assert_array_equal(batch.ends_BT[r, padding], np.flatnonzero(padding))
    assert len(batch.valid_positions) == sum(row.tokens for row in rows)


@given(lengths, st.integers(1, 4))
def test_packing_needs_few_rows(shapes, multiple):
    """First-fit decreasing: no two rows could be poured together, so at most one would be half empty."""
    rows = pack(unlike(shapes), ROW, 1)
    assert max(row.tokens for row in rows) <= ROW
    assert len(rows) <= bucket_size(2 * sum(length for length, _ in shapes) // ROW + 1, 1)
    assert len(pack(unlike(shapes), ROW, multiple)) <= bucket_size(len(shapes), multiple)


def test_what_is_shared_is_held_once_a_row_and_rows_are_as_short_as_they_can_be():
    """Sixteen examples of 140 tokens, 100 of them shared: 100 + 16 x 40 on one device, 100 + 2 x 40 on each of eight."""
    policy = np.arange(100, dtype=np.int32)
    own = np.arange(16 * 40, dtype=np.int32).reshape(16, 40) + 100
    examples = [dataclasses.replace(sequence("0", 140, 10), tokens=np.concatenate([policy, each])) for each in own]

    def shape(row_multiple, share):
        return bucketed(pack(examples, 1024, row_multiple, share), 1024, row_multiple)

    assert [row.tokens for row in pack(examples, 1024, 8)] == [180] * 8
    assert shape(8, True) == Shape(8, 256, 64)
    assert shape(8, False) == Shape(8, 384, 64)
    assert shape(1, True) == Shape(1, 768, 256)
    assert shape(1, False) == Shape(3, 896, 64)


POLICY, PROMPT, SAMPLES = 436, 64, 8


@pytest.mark.parametrize(
    ("answer", "max_seq_len", "row_multiple", "computed"),
    [(12, 2048, 1, 214), (80, 8192, 1, 758), (430, 8192, 1, 3722), (12, 2048, 4, 378), (80, 8192, 8, 1140)],
)
def test_a_group_of_answers_costs_its_policy_a_row_and_its_prompt_once(answer, max_seq_len, row_multiple, computed):
    """Eight answers to each of eight prompts: on one device 19, 6.1 and 2.0 times fewer tokens than the sequences have."""
    random = np.random.default_rng(0)
    policy, own = random.integers(9, 999, POLICY), random.integers(9, 999, (8, PROMPT))
    answers = random.integers(9, 999, (8, SAMPLES, answer))
    tokens = [np.int32([*policy, *own[i], *each]) for i in range(8) for each in answers[i]]
    examples = [dataclasses.replace(sequence("0", len(each), answer), tokens=each) for each in tokens]
    rows = pack([examples[i] for i in random.permutation(len(examples))], max_seq_len, row_multiple)
    assert sum(row.tokens for row in rows) / 8 == pytest.approx(computed, rel=0.02)
    assert max(row.tokens for row in rows) * len(rows) / 8 <= 1.1 * computed


@given(st.integers(1, 5000))
def test_a_kernel_that_can_work_on_the_longest_row_can_on_every_row(max_seq_len):
    lengths = row_lengths(max_seq_len)
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == max_seq_len
    assert len(lengths) <= 16
    for multiple in (2, 8, 128):  # cuDNN takes an even number of tokens, kernels of TPUs whole blocks of 128
        assert max_seq_len % multiple or all(length % multiple == 0 for length in lengths)


def test_few_targets_have_few_sizes():
    counts = 1, 64, 65, 128, 129, 192, 256, 257, 513, 2049, 7000
    assert [target_space(count) for count in counts] == [64, 64, 128, 128, 256, 256, 256, 512, 768, 2560, 7168]


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


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 12))
def test_examples_of_one_prompt_can_be_kept_together(prompts, batch):
    """Each has a policy of its own length, that of its prompt, which all of the others begin with too."""
    policy = np.arange(20, dtype=np.int32)
    own = [dataclasses.replace(sequence(str(i), 40, 8), shared=20) for i in range(len(prompts))]
    tokens = [
        np.int32([*policy, *(100 * prompt + np.arange(12)), *s.tokens[-8:]])
        for prompt, s in zip(prompts, own, strict=True)
    ]
    own = [dataclasses.replace(s, tokens=each) for s, each in zip(own, tokens, strict=True)]
    apart = Schedule(own, batch, 3, ROW, 1, 0)
    together = dataclasses.replace(apart, together=True)
    steps = -(-len(own) // batch)
    order = [i for step in range(steps) for i in together.examples(step)][: len(own)]
    assert sorted(order) == list(range(len(own)))
    assert len([key for key, _ in itertools.groupby(order, key=lambda i: prompts[i])]) == len(set(prompts))
    if len(set(prompts)) == len(prompts):
        assert together.examples(0) == apart.examples(0)


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
