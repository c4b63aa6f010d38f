"""Attention to trees on a CPU: of a packed row's blocks, those that a block of queries sees, chosen while the program runs.

A CPU multiplies single matrices at almost its full speed, loops of a program cost it nothing, and what counts besides is how often
memory is passed over. So there is a loop for each number of blocks of keys, 1, 2, 3, 4, 6, 8, …, over the blocks of queries that
need so many; it adds to results and gradients in place, and a row of many short examples costs no more than its examples in several
rows. As in FlashAttention-2 (arXiv 2307.08691), the backward pass recomputes the weights from the logsumexp of each query's scores.
"""

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

T = TypeVar("T")


class _Settings(NamedTuple):
    window: int | None
    scale: float
    chunk: int
    matmul_dtype: DTypeLike | None


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
    """Compute softmax attention in blocks of `chunk` tokens. `matmul_dtype`: what the operands of products are rounded to."""
    attend = partial(_attend, _Settings(window, scale, chunk, matmul_dtype))

    def attend_row(row: tuple[Array, Array, Array, Layout]) -> Float[Array, "T N H"]:
        tokens, kv_heads, width = row[1].shape
        blocks = -(-tokens // chunk)
        missing = blocks * chunk - tokens
        query_TNH, key_TKH, value_TKH = (jnp.pad(x, [(0, missing), (0, 0), (0, 0)]) for x in row[:3])
        query_JKGCH = query_TNH.reshape(blocks, chunk, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
        key_KJCH, value_KJCH = (
            x.reshape(blocks, chunk, kv_heads, width).transpose(2, 0, 1, 3) for x in (key_TKH, value_TKH)
        )
        mixed_JKGCH: Array = attend(query_JKGCH, key_KJCH, value_KJCH, row[3].padded(missing))
        return mixed_JKGCH.transpose(0, 3, 1, 2, 4).reshape(blocks * chunk, -1, width)[:tokens]

    def attend_rows(*rows: Array | Layout) -> Array:
        mixed_BTNH: Array = jax.lax.map(attend_row, rows)
        return mixed_BTNH

    return per_device(attend_rows, query_BTNH, key_BTKH, value_BTKH, layout)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: _Settings, query_JKGCH: Array, key_KJCH: Array, value_KJCH: Array, layout: Layout
) -> Float[Array, "J K G C H"]:
    return _forward(settings, query_JKGCH, key_KJCH, value_KJCH, layout)[0]


def _forward(
    settings: _Settings, query_JKGCH: Array, key_KJCH: Array, value_KJCH: Array, layout: Layout
) -> tuple[Array, tuple[Any, ...]]:
    """Return the mixed values, and what the backward pass needs: beside the arguments, the logsumexp of each query's scores."""
    keys_KJCH, values_KJCH = (_rounded(settings, x) for x in (key_KJCH, value_KJCH))

    def attend(block: _Block, results: tuple[Array, Array]) -> tuple[Array, Array]:
        mixed, logsumexp = [], []
        # One key head at a time: a CPU multiplies single matrices faster than stacks of them.
        for query_GCH, key_JCH, value_JCH in zip(query_JKGCH[block.index], keys_KJCH, values_KJCH, strict=True):
            scores_GCS = _scores(settings, query_GCH, _joined(key_JCH, block), block)
            most_GC1 = jnp.max(scores_GCS, axis=-1, keepdims=True)
            weights_GCS = jnp.exp(scores_GCS - most_GC1)
            total_GC1 = jnp.sum(weights_GCS, axis=-1, keepdims=True)
            mixed.append(_multiply(settings, "GCS,SH->GCH", weights_GCS, _joined(value_JCH, block)) / total_GC1)
            logsumexp.append((most_GC1 + jnp.log(total_GC1))[..., 0])
        return results[0].at[block.index].set(jnp.stack(mixed)), results[1].at[block.index].set(jnp.stack(logsumexp))

    empty = jnp.zeros_like(query_JKGCH), jnp.zeros(query_JKGCH.shape[:-1], query_JKGCH.dtype)
    mixed_JKGCH, logsumexp_JKGC = (checkpoint_name(x, DOTS) for x in _for_each_block(settings, layout, attend, empty))
    return mixed_JKGCH, (query_JKGCH, key_KJCH, value_KJCH, layout, mixed_JKGCH, logsumexp_JKGC)


def _backward(settings: _Settings, saved: tuple[Any, ...], gradient_JKGCH: Array) -> tuple[Array, Array, Array, None]:
    query_JKGCH, key_KJCH, value_KJCH, layout, mixed_JKGCH, logsumexp_JKGC = saved
    keys_KJCH, values_KJCH = (_rounded(settings, x) for x in (key_KJCH, value_KJCH))
    # What the gradient of a query's weights has in common: a softmax does not change if all scores rise alike.
    common_JKGC = jnp.sum(gradient_JKGCH * mixed_JKGCH, axis=-1)
    by_query = query_JKGCH, gradient_JKGCH, logsumexp_JKGC, common_JKGC

    def differentiate(block: _Block, results: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        of_queries, of_keys, of_values = [], [], []
        for query_GCH, gradient_GCH, logsumexp_GC, common_GC, key_JCH, value_JCH in zip(
            *(x[block.index] for x in by_query), keys_KJCH, values_KJCH, strict=True
        ):
            key_SH, value_SH = _joined(key_JCH, block), _joined(value_JCH, block)
            weights_GCS = jnp.exp(_scores(settings, query_GCH, key_SH, block) - logsumexp_GC[..., None])
            of_weights_GCS = _multiply(settings, "GCH,SH->GCS", gradient_GCH, value_SH)
            of_scores_GCS = weights_GCS * (of_weights_GCS - common_GC[..., None]) * settings.scale
            of_queries.append(_multiply(settings, "GCS,SH->GCH", of_scores_GCS, key_SH))
            # The factor with few columns first: a CPU copies the first one transposed, see linear.py.
            of_keys.append(_multiply(settings, "GCH,GCS->HS", query_GCH, of_scores_GCS))
            of_values.append(_multiply(settings, "GCH,GCS->HS", gradient_GCH, weights_GCS))

        def added(sum_KJHC: Array, parts: list[Array]) -> Array:
            parts_KHIC = jnp.stack(parts).reshape(len(parts), -1, len(block.keys), settings.chunk)
            return sum_KJHC.at[:, block.keys].add(jnp.swapaxes(parts_KHIC, 1, 2), unique_indices=True)

        of_queries_JKGCH, of_keys_KJHC, of_values_KJHC = results
        of_queries_JKGCH = of_queries_JKGCH.at[block.index].set(jnp.stack(of_queries))
        return of_queries_JKGCH, added(of_keys_KJHC, of_keys), added(of_values_KJHC, of_values)

    zeros_KJHC = jnp.zeros_like(jnp.swapaxes(key_KJCH, 2, 3))
    empty = jnp.zeros_like(query_JKGCH), zeros_KJHC, zeros_KJHC
    of_queries, of_keys, of_values = _for_each_block(settings, layout, differentiate, empty)
    return of_queries, jnp.swapaxes(of_keys, 2, 3), jnp.swapaxes(of_values, 2, 3), None


_attend.defvjp(_forward, _backward)


def _for_each_block(settings: _Settings, layout: Layout, compute: Callable[[_Block, T], T], results: T) -> T:
    """Call compute(block, results) for each block of queries, with the least number of blocks of keys that suffices."""
    chunk = settings.chunk
    needed_JJ = layout.needed(settings.window, chunk, chunk)
    order_JJ = jnp.argsort(~needed_JJ, axis=-1, stable=True)
    needs_J = jnp.sum(needed_JJ, axis=-1)
    by_needs_J = jnp.argsort(needs_J)
    start = jnp.asarray(0)
    for count in _counts(len(needed_JJ)):

        def body(i: Array, results: T, count: int = count) -> T:
            index = by_needs_J[i]
            keys = order_JJ[index, :count]
            tokens_C, tokens_S = (block[..., None] * chunk + jnp.arange(chunk) for block in (index, keys))
            visible_CS = layout.visible(settings.window, tokens_C, tokens_S.reshape(-1))
            return compute(_Block(index, keys, visible_CS), results)

        stop = jnp.sum(needs_J <= count)
        results = jax.lax.fori_loop(start, stop, body, results)
        start = stop
    return results


def _counts(blocks: int) -> list[int]:
    """Return 1, 2, 3, 4, 6, 8, 12, … up to and with `blocks`."""
    counts = {count for k in range(blocks.bit_length()) for count in (2**k, 3 * 2**k // 2) if count < blocks}
    return [*sorted(counts), blocks]


def _scores(settings: _Settings, query_GCH: Array, key_SH: Array, block: _Block) -> Float[Array, "G C S"]:
    """Score keys; where a query does not see one, with the finite minimum, not -inf: without any key it must not become NaN."""
    scores_GCS = _multiply(settings, "GCH,SH->GCS", query_GCH, key_SH) * settings.scale
    return jnp.where(block.visible_CS, scores_GCS, jnp.finfo(scores_GCS.dtype).min)


def _joined(x_JCH: Array, block: _Block) -> Float[Array, "S H"]:
    return x_JCH[block.keys].reshape(-1, x_JCH.shape[-1])


def _rounded(settings: _Settings, x: Array) -> Array:
    return x if settings.matmul_dtype is None else x.astype(settings.matmul_dtype)


def _multiply(settings: _Settings, equation: str, x: Array, y: Array) -> Array:
    """Multiply what is rounded; the result has the type of `x`, which is not rounded yet."""
    return jnp.einsum(equation, _rounded(settings, x), _rounded(settings, y), preferred_element_type=x.dtype)
