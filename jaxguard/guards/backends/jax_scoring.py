"""Log-odds of two next tokens after each of many prompts, where each token is computed once.

What a PrefixCache holds of the prompts is not computed. Of the rest, prompts that go on alike, as the branches of an answer after
one text do, form a tree, in which a token sees its ancestors. Trees are packed into rows of few lengths and counts: each shape is
compiled.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxguard.data.packing import bucket_size
from jaxguard.guards.backends.jax_model import LENGTH_MULTIPLE, Model, PrefixCache, check_prompts
from jaxguard.guards.protocol import common_length
from jaxguard.models.attention.attend import FAR
from jaxguard.models.decoder import Cache

MIN_SHARED: Final = 0.25
"""Share of a prompt's tokens that it must have in common with a tree to be one of its branches."""
ROW: Final = 256
"""Tokens of a row for several trees: attention grows with the square of longer ones, and shorter ones have more padding."""


@dataclass
class _Tree:
    """Tokens in depth-first order, with their positions; `ends` as in Decoder.cached; prompt -> index of its last token."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    targets: dict[int, int] = field(default_factory=dict)


def next_log_odds(
    prefix_cache: PrefixCache, prompts: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]], *, most_tokens: int
) -> list[float]:
    """After each prompt, the log-probability of the first token of its pair less that of the second.

    A device computes at most `most_tokens` tokens at a time, or one row. JaxguardError: a prompt is empty, or too long for the
    model.
    """
    model = prefix_cache.model
    check_prompts(model.spec, prompts, 1)
    odds = np.zeros(len(prompts))
    for prefix, group in prefix_cache.groups(prompts):
        trees = _trees(
            {i: np.asarray(prompts[i][prefix.length :], np.int32) for i in group}, prefix.length, most_tokens
        )
        prefix_cache.computed += sum(len(tree.tokens) for tree in trees)
        prefix_cache.reused += prefix.length * len(trees)
        for rows, (count, length) in _calls(_packed(trees), most_tokens, model.row_multiple):
            arrays, targets = _arrays(rows, count, length, pairs)
            with model.running():
                odds_BM = np.asarray(_log_odds(model, prefix.caches, *model.put(arrays)))
            for row, own in enumerate(targets):
                odds[own] = odds_BM[row, : len(own)]
    return odds.tolist()


def warm_up(prefix_cache: PrefixCache, most_tokens: int) -> None:
    """Compile the programs for up to so many tokens at a time, after the prefixes that are cached now."""
    model = prefix_cache.model
    for prefix in prefix_cache.distinct():
        for count, length in shapes(most_tokens, model.row_multiple):
            arrays, _ = _arrays([], count, length, [])
            with model.running():
                jax.block_until_ready(_log_odds(model, prefix.caches, *model.put(arrays)))


def shapes(most_tokens: int, row_multiple: int) -> list[tuple[int, int]]:
    """Rows and tokens of all calls with at most `most_tokens` tokens for each device, which `row_multiple` counts."""
    lengths = sorted({bucket_size(tokens, LENGTH_MULTIPLE) for tokens in range(1, max(most_tokens, ROW) + 1)})
    several = [
        (2**k, length) for length in lengths if length >= ROW for k in range(1, (most_tokens // length).bit_length())
    ]
    return [(count * row_multiple, length) for count, length in [*((1, length) for length in lengths), *several]]


def _trees(suffixes: dict[int, np.ndarray], start: int, most_tokens: int) -> list[_Tree]:
    """What follows the first `start` tokens of prompts, as trees of at most `most_tokens`, unless a prompt has more."""
    trees: list[_Tree] = []
    path, last = list[int](), np.zeros(0, np.int32)
    for i in sorted(suffixes, key=lambda i: suffixes[i].tolist()):  # each shares most with the one before it
        suffix, shared = suffixes[i], common_length(last, suffixes[i])
        if not trees or shared < MIN_SHARED * len(suffix) or len(trees[-1].tokens) + len(suffix) - shared > most_tokens:
            trees.append(_Tree())
            path, shared = [], 0
        tree = trees[-1]
        path[shared:] = range(len(tree.tokens), len(tree.tokens) + len(suffix) - shared)
        tree.tokens += suffix[shared:].tolist()
        tree.positions += range(start + shared, start + len(suffix))
        tree.ends += path[shared:]
        for index in path:
            tree.ends[index] = len(tree.tokens) - 1
        tree.targets[i], last = path[-1], suffix
    return trees


def _packed(trees: Sequence[_Tree]) -> list[tuple[int, list[_Tree]]]:
    """Rows of trees with the space that they have, by first-fit decreasing."""
    rows: list[tuple[int, list[_Tree]]] = []
    for tree in sorted(trees, key=lambda tree: -len(tree.tokens)):
        fitting = (own for space, own in rows if _tokens(own) + len(tree.tokens) <= space)
        own = next(fitting, None)
        if own is None:
            rows.append((max(ROW, bucket_size(len(tree.tokens), LENGTH_MULTIPLE)), [tree]))
        else:
            own.append(tree)
    return rows


def _tokens(row: Sequence[_Tree]) -> int:
    return sum(len(tree.tokens) for tree in row)


def _calls(
    rows: Sequence[tuple[int, list[_Tree]]], most_tokens: int, row_multiple: int
) -> Iterator[tuple[list[list[_Tree]], tuple[int, int]]]:
    """Rows that are computed at the same time, and the shape to do that in, one of `shapes`."""
    first = 0
    while first < len(rows):
        space = rows[first][0]
        alike = sum(each == space for each, _ in rows[first:])
        # A power of two, at most what there is: no row is padding, unless each device has one.
        each = 1 << (min(-(-alike // row_multiple), max(1, most_tokens // space)).bit_length() - 1)
        part = [row for _, row in rows[first : first + min(alike, each * row_multiple)]]
        yield part, (each * row_multiple, bucket_size(max(map(_tokens, part)), LENGTH_MULTIPLE) if each == 1 else space)
        first += len(part)


def _arrays(
    rows: Sequence[Sequence[_Tree]], count: int, length: int, pairs: Sequence[tuple[int, int]]
) -> tuple[tuple[Any, ...], list[list[int]]]:
    """Tokens, positions and ends [B T], targets' indices [B M] and pairs [B M 2]; of each row its prompts, in that order."""
    tokens_BT, positions_BT = np.zeros((count, length), np.int32), np.full((count, length), FAR, np.int32)
    ends_BT = np.tile(np.arange(length, dtype=np.int32), (count, 1))
    targets = [[i for tree in row for i in tree.targets] for row in rows]
    most = max(map(len, targets), default=0)
    usual = max(8, length // 4)
    index_BM = np.zeros((count, usual if most <= usual else bucket_size(most, LENGTH_MULTIPLE)), np.int32)
    pairs_BM2 = np.zeros((*index_BM.shape, 2), np.int32)
    for r, row in enumerate(rows):
        start, indices = 0, list[int]()
        for tree in row:
            span = slice(start, start + len(tree.tokens))
            tokens_BT[r, span], positions_BT[r, span] = tree.tokens, tree.positions
            ends_BT[r, span] = np.add(tree.ends, start)
            indices += [start + index for index in tree.targets.values()]
            start = span.stop
        index_BM[r, : len(indices)] = indices
        pairs_BM2[r, : len(indices)] = [pairs[i] for i in targets[r]]
    return (tokens_BT, positions_BT, ends_BT, index_BM, pairs_BM2), targets


@jax.jit
def _log_odds(
    model: Model,
    seen: tuple[Cache, ...],
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    ends_BT: Int[Array, "B T"],
    index_BM: Int[Array, "B M"],
    pairs_BM2: Int[Array, "B M 2"],
) -> Float[Array, "B M"]:
    """From the difference of the two tokens' rows of the head: the other logits cancel out."""
    decoder = model.decoder
    hidden_BTD, _ = decoder.cached(tokens_BT, positions_BT, seen, ends_BT)
    hidden_BMD = jnp.take_along_axis(hidden_BTD, index_BM[..., None], axis=1)
    pairs_BM2D = jnp.take(decoder.head_VD, pairs_BM2, axis=0).astype(jnp.float32)
    return jnp.sum(hidden_BMD * (pairs_BM2D[:, :, 0] - pairs_BM2D[:, :, 1]), axis=-1)
