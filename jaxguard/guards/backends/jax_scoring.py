"""Log-odds of two next tokens after each of many prompts, and whether drafts are greedy, where each token is computed once.

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

from jaxguard.data.encoding import common_length
from jaxguard.data.packing import bucket_size
from jaxguard.guards.backends.jax_model import Model, PrefixCache, check_prompts
from jaxguard.guards.protocol import Draft
from jaxguard.models.attention.attend import FAR
from jaxguard.models.decoder import Cache
from jaxguard.models.sharding import constrain

LENGTH_MULTIPLE: Final = 16
"""Tokens that rows are rounded up by: less than generation's, since a CPU takes as long for padding as for text."""
MIN_SHARED: Final = 0.25
"""Share of a prompt's tokens that it must have in common with a tree to be one of its branches."""
MOST_BRANCHES: Final = 256
"""Tokens of other branches in the tree of a sequence that is itself longer than a tree should be."""
ASKED: Final = 16
"""Tokens of a row after which the next one may be asked for, at least; logits are computed after so many at a time."""
ROW: Final = 256
"""Tokens of a row for several trees: attention grows with the square of longer ones, and shorter ones have more padding."""


@dataclass
class _Tree:
    """Tokens in depth-first order, with their positions; `ends` as in Decoder.cached.

    `paths`: sequence -> indices of its tokens; `targets`: of those after which the next one is asked for.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    paths: dict[int, list[int]] = field(default_factory=dict)
    targets: dict[int, list[int]] = field(default_factory=dict)


def score(
    prefix_cache: PrefixCache,
    prompts: Sequence[Sequence[int]],
    pairs: Sequence[tuple[int, int]],
    drafts: Sequence[Draft],
    growing: Sequence[Sequence[int]] = (),
    *,
    most_tokens: int,
) -> tuple[list[float], list[bool]]:
    """After each prompt, the log-probability of the first token of its pair less that of the second; and which drafts are greedy.

    That is, each token of the answer is the likeliest one. A device computes at most `most_tokens` tokens at a time, or one row.
    Of `growing`, beginnings of prompts that later prompts have more of, the keys and values are cached.
    JaxguardError: a prompt is empty, or too long for the model.
    """
    model = prefix_cache.model
    sequences = [*prompts, *((*draft.prompt, *draft.answer[:-1]) for draft in drafts)]
    check_prompts(model.spec, sequences, 1)
    asked = [len(prompt) - 1 for prompt in (*prompts, *(draft.prompt for draft in drafts))]
    pairs = [*pairs, *[(0, 0)] * len(drafts)]
    odds, greedy = np.zeros(len(prompts)), [False] * len(drafts)
    texts = dict[int, Sequence[int]]()  # of the first sequence that continues it
    for text in dict.fromkeys(map(tuple, growing)):
        first = next((i for i, sequence in enumerate(sequences) if tuple(sequence[: len(text)]) == text), None)
        if first is not None:
            texts[first] = text
    # Where an answer begins something is asked, also if what is cached has more.
    for prefix, group in prefix_cache.groups([each[: at + 1] for each, at in zip(sequences, asked, strict=True)]):
        suffixes = {i: np.asarray(sequences[i][prefix.length :], np.int32) for i in group}
        trees = _trees(suffixes, {i: asked[i] - prefix.length for i in group}, prefix.length, most_tokens)
        prefix_cache.computed += sum(len(tree.tokens) for tree in trees)
        prefix_cache.reused += prefix.length * len(trees)
        # A call of one row for each device returns its keys and values.
        for rows, (count, length) in _calls(_packed(trees), 0 if texts else most_tokens, model.row_multiple):
            arrays, targets, paths = _arrays(rows, count, length, pairs)
            with model.running():
                most_asked = 1 + max(max(slots) for own in targets for slots in own.values())
                placed = model.put(arrays)
                *scored, cache = _next_tokens(model, prefix.caches, *placed, most_asked if drafts else None)
            odds_BM, likeliest_BM = jax.device_get(scored)
            for row, own in enumerate(targets):
                for i in (i for i in texts.keys() & own.keys() if len(texts[i]) > prefix.length):
                    behind = paths[row][i][: len(texts[i]) - prefix.length]
                    prefix_cache.keep(texts[i], prefix, cache, row, behind)
                for i, slots in own.items():
                    if i < len(prompts):
                        odds[i] = odds_BM[row, slots[-1]]
                    else:
                        answer = drafts[i - len(prompts)].answer
                        greedy[i - len(prompts)] = tuple(likeliest_BM[row, slots].tolist()) == answer
    return odds.tolist(), greedy


def warm_up(prefix_cache: PrefixCache, most_tokens: int) -> None:
    """Compile the programs for up to so many tokens at a time, after the prefixes that are cached now.

    Where JAX has a compilation cache, they are taken from there, and put there; else each runs once.
    """
    model, cached = prefix_cache.model, bool(jax.config.values["jax_compilation_cache_dir"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small ones take long together
    for prefix in prefix_cache.distinct():
        for count, length in shapes(most_tokens, model.row_multiple):
            arrays, _, _ = _arrays([], count, length, [])
            with model.running():
                args = (model, prefix.caches, *model.put(arrays))
                if cached:
                    _next_tokens.lower(*args, 0).compile()
                else:
                    jax.block_until_ready(_next_tokens(*args, 0))


def shapes(most_tokens: int, row_multiple: int) -> list[tuple[int, int]]:
    """Rows and tokens of all calls with at most `most_tokens` tokens for each device, which `row_multiple` counts."""
    lengths = sorted({bucket_size(tokens, LENGTH_MULTIPLE) for tokens in range(1, max(most_tokens, ROW) + 1)})
    several = [
        (2**k, length) for length in lengths if length >= ROW for k in range(1, (most_tokens // length).bit_length())
    ]
    return [(count * row_multiple, length) for count, length in [*((1, length) for length in lengths), *several]]


def _trees(suffixes: dict[int, np.ndarray], asked: dict[int, int], start: int, most_tokens: int) -> list[_Tree]:
    """What follows the first `start` tokens of sequences, as trees of at most `most_tokens`, more only where one alone has more.

    Next tokens are asked for from the index `asked` of a suffix on.
    """
    trees: list[_Tree] = []
    path, last = list[int](), np.zeros(0, np.int32)
    for i in sorted(suffixes, key=lambda i: suffixes[i].tolist()):  # each shares most with the one before it
        suffix, shared = suffixes[i], common_length(last, suffixes[i])
        most = max(most_tokens, len(suffix) + MOST_BRANCHES)
        if not trees or shared < MIN_SHARED * len(suffix) or len(trees[-1].tokens) + len(suffix) - shared > most:
            trees.append(_Tree())
            path, shared = [], 0
        tree = trees[-1]
        path[shared:] = range(len(tree.tokens), len(tree.tokens) + len(suffix) - shared)
        tree.tokens += suffix[shared:].tolist()
        tree.positions += range(start + shared, start + len(suffix))
        tree.ends += path[shared:]
        for index in path:
            tree.ends[index] = len(tree.tokens) - 1
        tree.paths[i], tree.targets[i], last = path.copy(), path[asked[i] :], suffix
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
) -> tuple[tuple[Any, ...], list[dict[int, list[int]]], list[dict[int, list[int]]]]:
    """Tokens, positions and ends [B T], indices [B M] and pairs [B M 2] of what is asked for.

    And of each row sequence -> where in M its own stand, which those of others may share; and the indices of its tokens in T.
    """
    tokens_BT, positions_BT = np.zeros((count, length), np.int32), np.full((count, length), FAR, np.int32)
    ends_BT = np.tile(np.arange(length, dtype=np.int32), (count, 1))
    slots = [dict[tuple[int, tuple[int, int]], int]() for _ in rows]
    targets, paths = ([dict[int, list[int]]() for _ in rows] for _ in range(2))
    for r, row in enumerate(rows):
        start = 0
        for tree in row:
            span = slice(start, start + len(tree.tokens))
            tokens_BT[r, span], positions_BT[r, span] = tree.tokens, tree.positions
            ends_BT[r, span] = np.add(tree.ends, start)
            paths[r] |= {i: [start + index for index in path] for i, path in tree.paths.items()}
            for i, indices in tree.targets.items():
                own = [(start + index, pairs[i]) for index in indices]
                targets[r][i] = [slots[r].setdefault(each, len(slots[r])) for each in own]
            start = span.stop
    most, usual = max(map(len, slots), default=0), max(ASKED, min(length, ROW) // 4)
    index_BM = np.zeros((count, usual if most <= usual else bucket_size(most, LENGTH_MULTIPLE)), np.int32)
    pairs_BM2 = np.zeros((*index_BM.shape, 2), np.int32)
    for r, of_row in enumerate(slots):
        for slot, (index, pair) in enumerate(of_row):
            index_BM[r, slot], pairs_BM2[r, slot] = index, pair
    return (tokens_BT, positions_BT, ends_BT, index_BM, pairs_BM2), targets, paths


@jax.jit
def _next_tokens(
    model: Model,
    seen: tuple[Cache, ...],
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    ends_BT: Int[Array, "B T"],
    index_BM: Int[Array, "B M"],
    pairs_BM2: Int[Array, "B M 2"],
    asked: Int[Array, ""] | int | None,
) -> tuple[Float[Array, "B M"], Int[Array, "B M"] | None, Cache | None]:
    """Log-odds, from the difference of two rows of the head, since other logits cancel out; and the first `asked` likeliest tokens.

    And of one row for each device the cache, which is small.
    """
    decoder = model.decoder
    hidden_BTD, cache = decoder.cached(tokens_BT, positions_BT, seen, ends_BT)
    hidden_BMD = jnp.take_along_axis(hidden_BTD, index_BM[..., None], axis=1)
    pairs_BM2D = jnp.take(decoder.head_VD, pairs_BM2, axis=0).astype(jnp.float32)
    odds_BM = jnp.sum(hidden_BMD * (pairs_BM2D[:, :, 0] - pairs_BM2D[:, :, 1]), axis=-1)
    kept = cache if len(tokens_BT) == model.row_multiple else None
    if asked is None:
        return odds_BM, None, kept

    def add_best(part: Array, best_BM: Array) -> Array:
        hidden_BCD = jax.lax.dynamic_slice_in_dim(hidden_BMD, part * ASKED, ASKED, axis=1)
        best_BC = jnp.argmax(constrain(decoder.logits(hidden_BCD), "batch", None, None), axis=-1)
        return jax.lax.dynamic_update_slice_in_dim(best_BM, best_BC.astype(jnp.int32), part * ASKED, axis=1)

    return odds_BM, jax.lax.fori_loop(0, -(-asked // ASKED), add_best, jnp.zeros_like(index_BM)), kept
