"""Flash attention over rows that hold trees: Pallas kernels for GPUs and TPUs that skip what no query of a block sees.

FlashAttention-2 (Dao, 2023, algorithms 1 and 2) with a mask that is computed from two integers of each token. The blocks that a
block needs are listed beforehand, and its program visits those alone.

Letters as in models/, and: Q queries and S keys of a block, I blocks of queries and J blocks of keys of a row.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float

from jaxguard.models.attention.kernels import KeyValue, Layout, Query, per_device

LANES = 128
"""Rows are padded to a multiple of it: to whole blocks, and to whole vector registers of a TPU."""
UNSEEN = -1e30
"""Score of a key that a query does not see: finite, since a query may see no key of a block."""
LOG2_E = math.log2(math.e)
"""Weights are computed as powers of 2, which a GPU does faster than those of e."""


class Tile(NamedTuple):
    """Tokens of a block of queries and of one of keys; on a GPU also the warps that compute it, and the loads in flight."""

    queries: int
    keys: int
    warps: int = 8
    stages: int = 2


@dataclass(frozen=True)
class Tiling:
    """Tiles of the kernels for the result, for the gradient of queries, and for those of keys and values.

    `interpret` emulates the platform's kernels on any other, slowly.
    """

    platform: Literal["gpu", "tpu"]
    forward: Tile
    dq: Tile
    dkv: Tile
    interpret: bool = False

    @property
    def multiple(self) -> int:
        """What the tokens of a row are padded to a multiple of."""
        return min(LANES, math.lcm(*(size for tile in (self.forward, self.dq, self.dkv) for size in tile[:2])))

    def fit(self, tokens: int) -> "Tiling":
        """Shrink the tiles to those that divide a row."""

        def fit(tile: Tile) -> Tile:
            return tile._replace(queries=math.gcd(tile.queries, tokens), keys=math.gcd(tile.keys, tokens))

        return replace(self, forward=fit(self.forward), dq=fit(self.dq), dkv=fit(self.dkv))


def choose_tiling(platform: str, compute_capability: float, head_dim: int) -> Tiling:
    """Choose the largest tiles that fit on the chip, and on A100 and H100 spill no register (docs/performance.md).

    The arguments are those of models/compute.choose_kernel.
    """
    if platform == "tpu":
        return Tiling("tpu", Tile(256, 256), Tile(256, 256), Tile(256, 256))
    if head_dim <= 128:
        return Tiling("gpu", Tile(128, 64), Tile(128, 64), Tile(64, 64))
    if compute_capability in (8.0, 9.0, 10.0):  # of data centers: a program may take 163 KiB or more of shared memory
        return Tiling("gpu", Tile(64, 64), Tile(64, 64), Tile(32, 64))
    return Tiling("gpu", Tile(64, 32), Tile(32, 32, warps=4), Tile(32, 32, warps=4))  # others: 99 KiB


def memory_on_chip(tokens: int, group: int, head_dim: int) -> int:
    """Bytes of a TPU's memory on chip for rows of so many tokens and keys of `group` query heads, in bfloat16.

    Most of it holds a row's queries and gradients, as long as they are those of one key head, and the next one's.
    """
    return 8 * tokens * group * head_dim + 4 * 2**20


def flash(
    query_BTNH: Query,
    key_BTKH: KeyValue,
    value_BTKH: KeyValue,
    layout: Layout,
    window: int | None,
    scale: float,
    tiling: Tiling,
) -> Query:
    """Compute softmax attention with the kernels that `tiling` is for."""

    def attend(query_BTNH: Query, key_BTKH: KeyValue, value_BTKH: KeyValue, layout: Layout) -> Query:
        tokens = query_BTNH.shape[1]
        missing = -tokens % tiling.multiple
        if missing:
            pad = [(0, 0), (0, missing), (0, 0), (0, 0)]
            query_BTNH, key_BTKH, value_BTKH = (jnp.pad(x, pad) for x in (query_BTNH, key_BTKH, value_BTKH))
            layout = layout.padded(missing)
        settings = _Settings(tiling.fit(tokens + missing), window, scale)
        mixed_BTNH: Array = _flash(settings, query_BTNH, key_BTKH, value_BTKH, layout)
        return mixed_BTNH[:, :tokens]

    return per_device(attend, query_BTNH, key_BTKH, value_BTKH, layout)


class _Settings(NamedTuple):
    """What is known when the kernels are compiled."""

    tiling: Tiling
    window: int | None
    scale: float


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(settings: _Settings, query_BTNH: Query, key_BTKH: KeyValue, value_BTKH: KeyValue, layout: Layout) -> Query:
    return _flash_forward(settings, query_BTNH, key_BTKH, value_BTKH, layout)[0]


def _flash_forward(
    settings: _Settings, query_BTNH: Query, key_BTKH: KeyValue, value_BTKH: KeyValue, layout: Layout
) -> tuple[Query, tuple[Any, ...]]:
    rows, tokens, heads, _ = query_BTNH.shape
    tile = settings.tiling.forward
    queries, keys, sums = _specs_by_query(tile, query_BTNH, key_BTKH)
    mixed, total_BN1T = _run(
        "flash_forward",
        partial(_forward_kernel, tile, settings.scale),
        settings,
        tile,
        heads,
        layout,
        layout.needed(settings.window, *tile[:2]),
        [(_flat(query_BTNH), queries), (_flat(key_BTKH), keys), (_flat(value_BTKH), keys)],
        [(_flat(query_BTNH), queries), (jax.ShapeDtypeStruct((rows, heads, 1, tokens), jnp.float32), sums)],
    )
    mixed_BTNH = mixed.reshape(query_BTNH.shape)
    return mixed_BTNH, (query_BTNH, key_BTKH, value_BTKH, layout, mixed_BTNH, total_BN1T)


def _flash_backward(settings: _Settings, saved: tuple[Any, ...], gradient_BTNH: Query) -> tuple[Array | None, ...]:
    query_BTNH, key_BTKH, value_BTKH, layout, mixed_BTNH, total_BN1T = saved
    _, tokens, kv_heads, width = key_BTKH.shape
    heads = query_BTNH.shape[2]
    group = heads // kv_heads
    query, key, value, mixed, gradient = map(_flat, (query_BTNH, key_BTKH, value_BTKH, mixed_BTNH, gradient_BTNH))

    tile = settings.tiling.dq
    queries, keys, sums = _specs_by_query(tile, query_BTNH, key_BTKH)
    dq, inner_BN1T = _run(
        "flash_dq",
        partial(_dq_kernel, tile, settings.scale),
        settings,
        tile,
        heads,
        layout,
        layout.needed(settings.window, *tile[:2]),
        [(query, queries), (key, keys), (value, keys), (mixed, queries), (gradient, queries), (total_BN1T, sums)],
        [(query, queries), (total_BN1T, sums)],
    )

    tile = settings.tiling.dkv
    queries = pl.BlockSpec((None, tokens, group * width), lambda b, k, _: (b, 0, k))
    keys = pl.BlockSpec((None, tile.keys, width), lambda b, k, j: (b, j, k))
    sums = pl.BlockSpec((None, group, None, tokens), lambda b, k, _: (b, k, 0, 0))
    dk, dv = _run(
        "flash_dkv",
        partial(_dkv_kernel, tile, settings.scale),
        settings,
        tile,
        kv_heads,
        layout,
        layout.needed(settings.window, *tile[:2]).swapaxes(1, 2),
        [(query, queries), (key, keys), (value, keys), (gradient, queries), (total_BN1T, sums), (inner_BN1T, sums)],
        [(key, keys), (value, keys)],
    )
    return dq.reshape(query_BTNH.shape), dk.reshape(key_BTKH.shape), dv.reshape(key_BTKH.shape), None


_flash.defvjp(_flash_forward, _flash_backward)


def _specs_by_query(
    tile: Tile, query_BTNH: Query, key_BTKH: KeyValue
) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """What a program for a block of queries gets: the block, all keys of its head, and one number for each query."""
    _, tokens, heads, width = query_BTNH.shape
    group = heads // key_BTKH.shape[2]
    return (
        pl.BlockSpec((None, tile.queries, width), lambda b, n, i: (b, i, n)),
        pl.BlockSpec((None, tokens, width), lambda b, n, _: (b, 0, jax.lax.div(n, group))),
        pl.BlockSpec((None, None, None, tile.queries), lambda b, n, i: (b, n, 0, i)),
    )


def _flat(x_BTNH: Float[Array, "B T N H"]) -> Float[Array, "B T NH"]:
    """Put the heads of a token beside one another: those of a block are then a range of columns."""
    return x_BTNH.reshape(*x_BTNH.shape[:2], -1)


def _run(
    name: str,
    kernel: Callable[..., None],
    settings: _Settings,
    tile: Tile,
    heads: int,
    layout: Layout,
    needed_BIJ: Bool[Array, "B I J"],
    inputs: Sequence[tuple[Array, pl.BlockSpec]],
    outputs: Sequence[tuple[Array | jax.ShapeDtypeStruct, pl.BlockSpec]],
) -> Sequence[Array]:
    """Run a program for each row, head and block: in this order the specs say what of an array a program gets."""
    rows, blocks, others = needed_BIJ.shape
    until_BIJ = jnp.cumsum(needed_BIJ, axis=-1, dtype=jnp.int32)
    # The needed block of rank r comes after those blocks up to which at most r are needed. What follows the last is not used.
    ranks_J1 = jnp.arange(others)[:, None]
    blocks_BIJ = jnp.sum(until_BIJ[:, :, None] <= ranks_J1, axis=-1, dtype=jnp.int32)

    gpu = settings.tiling.platform == "gpu"
    # The first axis of a GPU's grid varies fastest, and the last of a TPU's: successive programs share their other blocks.
    row, head, block = axes = (2, 1, 0) if gpu else (0, 1, 2)

    def in_order(spec: pl.BlockSpec) -> pl.BlockSpec:
        index_map: Any = spec.index_map
        return replace(spec, index_map=lambda *ids: index_map(*(ids[axis] for axis in axes)))

    def program(counts_ref: Any, blocks_ref: Any, ends_ref: Any, positions_ref: Any, *refs: Any) -> None:
        ids = pl.program_id(row), pl.program_id(block)
        kernel(_Mask(*ids, counts_ref, blocks_ref, ends_ref, positions_ref, settings.window), *refs)

    whole = pl.BlockSpec() if gpu else pl.BlockSpec(memory_space=pltpu.SMEM)
    by_row = pl.BlockSpec((None, None, layout.ends_BT.shape[1]), lambda b, _n, _i: (b, 0, 0))
    arrays, specs = zip(*((x[:, None], by_row) for x in layout), *inputs, strict=True)
    on_gpu = triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
    on_tpu = pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=64 * 2**20
    )
    results: Sequence[Array] = pl.pallas_call(
        program,
        grid=tuple({row: rows, head: heads, block: blocks}[axis] for axis in range(3)),
        in_specs=[whole, whole, *map(in_order, specs)],
        out_specs=[in_order(spec) for _, spec in outputs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
        compiler_params=on_gpu if gpu else on_tpu,
        interpret=settings.tiling.interpret,
        name=name,
    )(until_BIJ[..., -1], blocks_BIJ, *arrays)
    return results


class _Side(NamedTuple):
    """What the mask needs to know of a block's tokens, along one axis of the scores."""

    row_index: Array
    end: Array
    position: Array


@dataclass(frozen=True)
class _Mask:
    """What one program's block sees: the other blocks that it visits, and which of their scores count."""

    row: Array
    block: Array
    counts_ref: Any
    blocks_ref: Any
    ends_ref: Any
    positions_ref: Any
    window: int | None

    @property
    def count(self) -> Array:
        """The number of blocks to visit."""
        count: Array = self.counts_ref[self.row, self.block]
        return count

    def start(self, i: Array, size: int) -> Array:
        """Return the first token of the i-th block to visit."""
        start: Array = pl.multiple_of(self.blocks_ref[self.row, self.block, i] * size, size)
        return start

    def side(self, start: Array, size: int, axis: Literal[0, 1]) -> _Side:
        """Describe the tokens of a block, which lies along this axis."""
        row_index = start + jax.lax.broadcasted_iota(jnp.int32, (size, 1) if axis == 0 else (1, size), axis)
        block = (ref[pl.ds(start, size)] for ref in (self.ends_ref, self.positions_ref))
        return _Side(row_index, *(_turn(x[None]) if axis == 0 else x[None] for x in block))

    def apply(self, scores: Float[Array, "_ _"], query: _Side, key: _Side) -> Float[Array, "_ _"]:
        """Keep the scores of keys that a query sees."""
        visible = (key.row_index <= query.row_index) & (query.row_index <= key.end)
        if self.window is not None:
            visible &= query.position - key.position < self.window
        return jnp.where(visible, scores, UNSEEN)


def _forward_kernel(
    tile: Tile,
    scale: float,
    mask: _Mask,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    mixed_ref: Any,
    total_ref: Any,
) -> None:
    """Attend from a block of queries of one head; of the sum of their weights keep the logarithm to the base 2."""
    query_QH = query_ref[...]
    query = mask.side(mask.block * tile.queries, tile.queries, 0)

    def attend(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mixed_QH, most_Q1, total_Q1 = carry
        start = mask.start(i, tile.keys)
        key_SH, value_SH = key_ref[pl.ds(start, tile.keys), :], value_ref[pl.ds(start, tile.keys), :]
        scores_QS = _dot(query_QH, key_SH, (1, 1)) * (scale * LOG2_E)
        scores_QS = mask.apply(scores_QS, query, mask.side(start, tile.keys, 1))
        higher_Q1 = jnp.maximum(most_Q1, jnp.max(scores_QS, axis=1, keepdims=True))
        weights_QS, factor_Q1 = jnp.exp2(scores_QS - higher_Q1), jnp.exp2(most_Q1 - higher_Q1)
        mixed_QH = mixed_QH * factor_Q1 + _dot(weights_QS.astype(value_SH.dtype), value_SH, (1, 0))
        return mixed_QH, higher_Q1, total_Q1 * factor_Q1 + jnp.sum(weights_QS, axis=1, keepdims=True)

    column = partial(jnp.full, (tile.queries, 1), dtype=jnp.float32)
    initial = jnp.zeros(query_QH.shape, jnp.float32), column(UNSEEN), column(0)
    mixed_QH, most_Q1, total_Q1 = jax.lax.fori_loop(0, mask.count, attend, initial)
    mixed_ref[...] = (mixed_QH / total_Q1).astype(mixed_ref.dtype)
    total_ref[...] = _turn(most_Q1 + jnp.log2(total_Q1)).reshape(tile.queries)


def _dq_kernel(
    tile: Tile,
    scale: float,
    mask: _Mask,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    mixed_ref: Any,
    gradient_ref: Any,
    total_ref: Any,
    dq_ref: Any,
    inner_ref: Any,
) -> None:
    """Compute the gradient of a block of queries of one head, and the inner product of each result and its gradient."""
    query_QH, gradient_QH = query_ref[...], gradient_ref[...]
    products_QH = mixed_ref[...].astype(jnp.float32) * gradient_QH.astype(jnp.float32)
    inner_Q1 = jnp.sum(products_QH, axis=1, keepdims=True)
    inner_ref[...] = _turn(inner_Q1).reshape(tile.queries)
    total_Q1 = _turn(total_ref[...][None])
    query = mask.side(mask.block * tile.queries, tile.queries, 0)

    def add(i: Array, dq_QH: Array) -> Array:
        start = mask.start(i, tile.keys)
        key_SH, value_SH = key_ref[pl.ds(start, tile.keys), :], value_ref[pl.ds(start, tile.keys), :]
        scores_QS = _dot(query_QH, key_SH, (1, 1)) * (scale * LOG2_E)
        scores_QS = mask.apply(scores_QS, query, mask.side(start, tile.keys, 1))
        dscores_QS = jnp.exp2(scores_QS - total_Q1) * (_dot(gradient_QH, value_SH, (1, 1)) - inner_Q1)
        return dq_QH + _dot(dscores_QS.astype(key_SH.dtype), key_SH, (1, 0))

    dq_QH = jax.lax.fori_loop(0, mask.count, add, jnp.zeros(query_QH.shape, jnp.float32))
    dq_ref[...] = (dq_QH * scale).astype(dq_ref.dtype)


def _dkv_kernel(
    tile: Tile,
    scale: float,
    mask: _Mask,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    gradient_ref: Any,
    total_ref: Any,
    inner_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
) -> None:
    """Compute the gradients of a block of keys and values, summed over the query heads that share them."""
    key_SH, value_SH = key_ref[...], value_ref[...]
    key = mask.side(mask.block * tile.keys, tile.keys, 0)
    group, width = total_ref.shape[0], key_SH.shape[1]

    def add(head: Array, i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        dk_SH, dv_SH = carry
        start = mask.start(i, tile.queries)
        queries, columns = pl.ds(start, tile.queries), pl.ds(pl.multiple_of(head * width, width), width)
        query_QH, gradient_QH = query_ref[queries, columns], gradient_ref[queries, columns]
        total_1Q, inner_1Q = (jnp.expand_dims(ref[head, queries], 0) for ref in (total_ref, inner_ref))
        # Keys lie along the first axis, so that weights need no transposition before the products with them.
        scores_SQ = _dot(key_SH, query_QH, (1, 1)) * (scale * LOG2_E)
        scores_SQ = mask.apply(scores_SQ, mask.side(start, tile.queries, 1), key)
        weights_SQ = jnp.exp2(scores_SQ - total_1Q)
        dscores_SQ = weights_SQ * (_dot(value_SH, gradient_QH, (1, 1)) - inner_1Q)
        dv_SH += _dot(weights_SQ.astype(gradient_QH.dtype), gradient_QH, (1, 0))
        return dk_SH + _dot(dscores_SQ.astype(query_QH.dtype), query_QH, (1, 0)), dv_SH

    def add_head(head: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        sums: tuple[Array, Array] = jax.lax.fori_loop(0, mask.count, partial(add, head), carry)
        return sums

    zeros_SH = jnp.zeros(key_SH.shape, jnp.float32)
    dk_SH, dv_SH = jax.lax.fori_loop(0, group, add_head, (zeros_SH, zeros_SH))
    dk_ref[...] = (dk_SH * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_SH.astype(dv_ref.dtype)


def _dot(left: Float[Array, "_ _"], right: Float[Array, "_ _"], over: tuple[int, int]) -> Float[Array, "_ _"]:
    """Multiply two matrices, with float32 sums over these axes of theirs."""
    axes = (((over[0],), (over[1],)), ((), ()))
    product: Array = jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)
    return product


def _turn(x: Array) -> Array:
    """Turn a row into a column, or a column into a row: a sum along a diagonal, which every chip has instructions for."""
    size, axis = x.size, 1 if x.shape[0] == 1 else 0
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return jnp.sum(jnp.where(row == column, x, 0), axis=axis, keepdims=True)
