"""Attention to trees on a CPU: of a packed row's blocks, those that a block of queries sees, chosen while the program runs.

A CPU multiplies single matrices at almost its full speed, loops of a program cost it nothing, and what counts besides is how often
memory is passed over. So there is a loop for each number of blocks of keys, 2, 4, 6, …, over the blocks of queries that need so
many; it adds to results and gradients in place, and a row of many short examples costs no more than its examples in several rows.
As in FlashAttention-2 (arXiv 2307.08691), the backward pass recomputes the weights from the logsumexp of each query's scores.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxguard.models.attention.kernels import KeyValue, Layout, Query, per_device
from jaxguard.models.linear import DOTS

Results = TypeVar("Results")


class _Settings(NamedTuple):
    window: int | None
    scale: float
    chunk: int
    matmul_dtype: DTypeLike | None

    @property
    def key_block(self) -> int:
        """Half a chunk: larger blocks would hold more keys that no query of a chunk sees, smaller ones would take more loops."""
        return self.chunk // math.gcd(self.chunk, 2)


@dataclass(frozen=True)
class _Block:
    """The block of queries with this index, the blocks of keys for it, and which of their S keys each of its C queries sees."""

    index: Int[Array, ""]
    keys: Int[Array, "_"]
    visible_CS: Bool[Array, "C S"]


def block_sparse(
    query_BTNH: Query,
    key_BTKH: KeyValue,
    value_BTKH: KeyValue,
    layout: Layout,
    window: int | None,
    scale: float,
    chunk: int,
    matmul_dtype: DTypeLike | None = None,
) -> Query:
    """Compute softmax attention in J blocks of C = `chunk` queries and L blocks of U keys.

    `matmul_dtype`: what the operands of products are rounded to.
    """
    settings = _Settings(window, scale, chunk, matmul_dtype)
    attend = partial(_attend, settings)

    def attend_row(row: tuple[Array, Array, Array, Layout]) -> Float[Array, "T N H"]:
        tokens, kv_heads, width = row[1].shape
        blocks = -(-tokens // chunk)
        missing = blocks * chunk - tokens
        query_TNH, key_TKH, value_TKH = (jnp.pad(x, [(0, missing), (0, 0), (0, 0)]) for x in row[:3])
        query_JKGCH = query_TNH.reshape(blocks, chunk, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
        key_KLUH, value_KLUH = (
            x.reshape(-1, settings.key_block, kv_heads, width).transpose(2, 0, 1, 3) for x in (key_TKH, value_TKH)
        )
        mixed_JKGCH: Array = attend(query_JKGCH, key_KLUH, value_KLUH, row[3].padded(missing))
        return mixed_JKGCH.transpose(0, 3, 1, 2, 4).reshape(blocks * chunk, -1, width)[:tokens]

    def attend_rows(*rows: Array | Layout) -> Array:
        mixed_BTNH: Array = jax.lax.map(attend_row, rows)
        return mixed_BTNH

    return per_device(attend_rows, query_BTNH, key_BTKH, value_BTKH, layout)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: _Settings, query_JKGCH: Array, key_KLUH: Array, value_KLUH: Array, layout: Layout
) -> Float[Array, "J K G C H"]:
    return _forward(settings, query_JKGCH, key_KLUH, value_KLUH, layout)[0]


def _forward(
    settings: _Settings, query_JKGCH: Array, key_KLUH: Array, value_KLUH: Array, layout: Layout
) -> tuple[Array, tuple[Any, ...]]:
    """Return the mixed values, and what the backward pass needs: beside the arguments, the logsumexp of each query's scores."""
    keys_KLUH, values_KLUH = (_rounded(settings, x) for x in (key_KLUH, value_KLUH))

    def attend(block: _Block, results: tuple[Array, Array]) -> tuple[Array, Array]:
        mixed, logsumexp = [], []
        # One key head at a time: a CPU multiplies single matrices faster than stacks of them.
        for query_GCH, key_LUH, value_LUH in zip(query_JKGCH[block.index], keys_KLUH, values_KLUH, strict=True):
            scores_GCS = _scores(settings, query_GCH, _joined(key_LUH, block), block)
            most_GC1 = jnp.max(scores_GCS, axis=-1, keepdims=True)
            weights_GCS = jnp.exp(scores_GCS - most_GC1)
            total_GC1 = jnp.sum(weights_GCS, axis=-1, keepdims=True)
            mixed.append(_multiply(settings, "GCS,SH->GCH", weights_GCS, _joined(value_LUH, block)) / total_GC1)
            logsumexp.append((most_GC1 + jnp.log(total_GC1))[..., 0])
        return results[0].at[block.index].set(jnp.stack(mixed)), results[1].at[block.index].set(jnp.stack(logsumexp))

    empty = jnp.zeros_like(query_JKGCH), jnp.zeros(query_JKGCH.shape[:-1], query_JKGCH.dtype)
    mixed_JKGCH, logsumexp_JKGC = (checkpoint_name(x, DOTS) for x in _for_each_block(settings, layout, attend, empty))
    return mixed_JKGCH, (query_JKGCH, key_KLUH, value_KLUH, layout, mixed_JKGCH, logsumexp_JKGC)


def _backward(settings: _Settings, saved: tuple[Any, ...], gradient_JKGCH: Array) -> tuple[Array, Array, Array, None]:
    query_JKGCH, key_KLUH, value_KLUH, layout, mixed_JKGCH, logsumexp_JKGC = saved
    keys_KLUH, values_KLUH = (_rounded(settings, x) for x in (key_KLUH, value_KLUH))
    # What the gradient of a query's weights has in common: a softmax does not change if all scores rise alike.
    common_JKGC = jnp.sum(gradient_JKGCH * mixed_JKGCH, axis=-1)
    by_query = query_JKGCH, gradient_JKGCH, logsumexp_JKGC, common_JKGC

    def differentiate(block: _Block, results: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        of_queries, of_keys, of_values = [], [], []
        for query_GCH, gradient_GCH, logsumexp_GC, common_GC, key_LUH, value_LUH in zip(
            *(x[block.index] for x in by_query), keys_KLUH, values_KLUH, strict=True
        ):
            key_SH, value_SH = _joined(key_LUH, block), _joined(value_LUH, block)
            weights_GCS = jnp.exp(_scores(settings, query_GCH, key_SH, block) - logsumexp_GC[..., None])
            of_weights_GCS = _multiply(settings, "GCH,SH->GCS", gradient_GCH, value_SH)
            of_scores_GCS = weights_GCS * (of_weights_GCS - common_GC[..., None]) * settings.scale
            of_queries.append(_multiply(settings, "GCS,SH->GCH", of_scores_GCS, key_SH))
            # The factor with few columns first: a CPU copies the first one transposed, see linear.py.
            of_keys.append(_multiply(settings, "GCH,GCS->HS", query_GCH, of_scores_GCS))
            of_values.append(_multiply(settings, "GCH,GCS->HS", gradient_GCH, weights_GCS))

        def added(sum_KLHU: Array, parts: list[Array]) -> Array:
            parts_KHIU = jnp.stack(parts).reshape(len(parts), -1, len(block.keys), settings.key_block)
            return sum_KLHU.at[:, block.keys].add(jnp.swapaxes(parts_KHIU, 1, 2), unique_indices=True)

        of_queries_JKGCH, of_keys_KLHU, of_values_KLHU = results
        of_queries_JKGCH = of_queries_JKGCH.at[block.index].set(jnp.stack(of_queries))
        return of_queries_JKGCH, added(of_keys_KLHU, of_keys), added(of_values_KLHU, of_values)

    zeros_KLHU = jnp.zeros_like(jnp.swapaxes(key_KLUH, 2, 3))
    empty = jnp.zeros_like(query_JKGCH), zeros_KLHU, zeros_KLHU
    of_queries, of_keys, of_values = _for_each_block(settings, layout, differentiate, empty)
    return of_queries, jnp.swapaxes(of_keys, 2, 3), jnp.swapaxes(of_values, 2, 3), None


_attend.defvjp(_forward, _backward)


def _for_each_block(
    settings: _Settings, layout: Layout, compute: Callable[[_Block, Results], Results], results: Results
) -> Results:
    """Call compute(block, results) for each block of queries, with the least number of blocks of keys that suffices."""
    needed_JL = layout.needed(settings.window, settings.chunk, settings.key_block)
    order_JL = jnp.argsort(~needed_JL, axis=-1, stable=True)
    needs_J = jnp.sum(needed_JL, axis=-1)
    by_needs_J = jnp.argsort(needs_J)
    start = jnp.asarray(0)
    for count in _counts(needed_JL.shape[1]):

        def body(i: Array, results: Results, count: int = count) -> Results:
            index = by_needs_J[i]
            keys = order_JL[index, :count]
            sized = (index, settings.chunk), (keys, settings.key_block)
            tokens_C, tokens_S = ((block[..., None] * size + jnp.arange(size)).reshape(-1) for block, size in sized)
            visible_CS = layout.visible(settings.window, tokens_C, tokens_S)
            return compute(_Block(index, keys, visible_CS), results)

        stop = jnp.sum(needs_J <= count)
        results = jax.lax.fori_loop(start, stop, body, results)
        start = stop
    return results


def _counts(blocks: int) -> list[int]:
    """Return 2, 4, 6, … 16, 24, 32, 48, … up to and with `blocks`."""
    larger = (count for k in range(4, blocks.bit_length()) for count in (2**k, 3 * 2**k // 2))
    return [*(count for count in (*range(2, 16, 2), *larger) if count < blocks), blocks]


def _scores(settings: _Settings, query_GCH: Array, key_SH: Array, block: _Block) -> Float[Array, "G C S"]:
    """Score keys; where a query does not see one, with the finite minimum, not -inf: without any key it must not become NaN."""
    scores_GCS = _multiply(settings, "GCH,SH->GCS", query_GCH, key_SH) * settings.scale
    return jnp.where(block.visible_CS, scores_GCS, jnp.finfo(scores_GCS.dtype).min)


def _joined(x_LUH: Array, block: _Block) -> Float[Array, "S H"]:
    return x_LUH[block.keys].reshape(-1, x_LUH.shape[-1])


def _rounded(settings: _Settings, x: Array) -> Array:
    return x if settings.matmul_dtype is None else x.astype(settings.matmul_dtype)


def _multiply(settings: _Settings, equation: str, x: Array, y: Array) -> Array:
    """Multiply what is rounded; the result has the type of `x`, which is not rounded yet."""
    return jnp.einsum(equation, _rounded(settings, x), _rounded(settings, y), preferred_element_type=x.dtype)
