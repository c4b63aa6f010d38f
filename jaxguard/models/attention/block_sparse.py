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

    A query's heads stay side by side, F = N H numbers: copies of other orders cost a CPU a sixth of all.

    `matmul_dtype`: what the operands of products are rounded to.
    """
    settings = _Settings(window, scale, chunk, matmul_dtype)
    attend = partial(_attend, settings)

    def attend_row(row: tuple[Array, Array, Array, Layout]) -> Float[Array, "T N H"]:
        tokens, kv_heads, width = row[1].shape
        blocks = -(-tokens // chunk)
        missing = blocks * chunk - tokens
        query_TNH, key_TKH, value_TKH = (jnp.pad(x, [(0, missing), (0, 0), (0, 0)]) for x in row[:3])
        query_JCF = query_TNH.reshape(blocks, chunk, -1)
        key_KLUH, value_KLUH = (
            x.reshape(-1, settings.key_block, kv_heads, width).transpose(2, 0, 1, 3) for x in (key_TKH, value_TKH)
        )
        mixed_JCF: Array = attend(query_JCF, key_KLUH, value_KLUH, row[3].padded(missing))
        return mixed_JCF.reshape(blocks * chunk, -1, width)[:tokens]

    def attend_rows(*rows: Array | Layout) -> Array:
        mixed_BTNH: Array = jax.lax.map(attend_row, rows)
        return mixed_BTNH

    return per_device(attend_rows, query_BTNH, key_BTKH, value_BTKH, layout)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: _Settings, query_JCF: Array, key_KLUH: Array, value_KLUH: Array, layout: Layout
) -> Float[Array, "J C F"]:
    return _forward(settings, query_JCF, key_KLUH, value_KLUH, layout)[0]


def _forward(
    settings: _Settings, query_JCF: Array, key_KLUH: Array, value_KLUH: Array, layout: Layout
) -> tuple[Array, tuple[Any, ...]]:
    """Return the mixed values, and what the backward pass needs: beside the arguments, the logsumexp of each query's scores."""
    keys_KLUH, values_KLUH = (_rounded(settings, x) for x in (key_KLUH, value_KLUH))
    heads, width = key_KLUH.shape[0], key_KLUH.shape[-1]

    def attend(block: _Block, results: tuple[Array, Array]) -> tuple[Array, Array]:
        mixed, logsumexp = [], []
        # One key head at a time: a CPU multiplies single matrices faster than stacks of them.
        queries = _by_key_head(query_JCF[block.index], heads, width)
        for query_CGH, key_LUH, value_LUH in zip(queries, keys_KLUH, values_KLUH, strict=True):
            scores_CGS = _scores(settings, query_CGH, _joined(key_LUH, block), block)
            most_CG1 = jnp.max(scores_CGS, axis=-1, keepdims=True)
            weights_CGS = jnp.exp(scores_CGS - most_CG1)
            total_CG1 = jnp.sum(weights_CGS, axis=-1, keepdims=True)
            mixed.append(_multiply(settings, "CGS,SH->CGH", weights_CGS, _joined(value_LUH, block)) / total_CG1)
            logsumexp.append(most_CG1 + jnp.log(total_CG1))
        return results[0].at[block.index].set(_merged(mixed)), results[1].at[block.index].set(_merged(logsumexp))

    empty_JCN = jnp.zeros((*query_JCF.shape[:2], query_JCF.shape[2] // width), query_JCF.dtype)
    empty = jnp.zeros_like(query_JCF), empty_JCN
    mixed_JCF, logsumexp_JCN = (checkpoint_name(x, DOTS) for x in _for_each_block(settings, layout, attend, empty))
    return mixed_JCF, (query_JCF, key_KLUH, value_KLUH, layout, mixed_JCF, logsumexp_JCN)


def _backward(settings: _Settings, saved: tuple[Any, ...], gradient_JCF: Array) -> tuple[Array, Array, Array, None]:
    query_JCF, key_KLUH, value_KLUH, layout, mixed_JCF, logsumexp_JCN = saved
    keys_KLUH, values_KLUH = (_rounded(settings, x) for x in (key_KLUH, value_KLUH))
    heads, width = key_KLUH.shape[0], key_KLUH.shape[-1]
    # What the gradient of a query's weights has in common: a softmax does not change if all scores rise alike.
    common_JCN = jnp.sum((gradient_JCF * mixed_JCF).reshape(*logsumexp_JCN.shape, width), axis=-1)
    by_query = (query_JCF, width), (gradient_JCF, width), (logsumexp_JCN, 1), (common_JCN, 1)

    def differentiate(block: _Block, results: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        of_queries, of_keys, of_values = [], [], []
        of_block = (_by_key_head(x[block.index], heads, size) for x, size in by_query)
        for query_CGH, gradient_CGH, logsumexp_CG1, common_CG1, key_LUH, value_LUH in zip(
            *of_block, keys_KLUH, values_KLUH, strict=True
        ):
            key_SH, value_SH = _joined(key_LUH, block), _joined(value_LUH, block)
            weights_CGS = jnp.exp(_scores(settings, query_CGH, key_SH, block) - logsumexp_CG1)
            of_weights_CGS = _multiply(settings, "CGH,SH->CGS", gradient_CGH, value_SH)
            of_scores_CGS = weights_CGS * (of_weights_CGS - common_CG1) * settings.scale
            of_queries.append(_multiply(settings, "CGS,SH->CGH", of_scores_CGS, key_SH))
            # The factor with few columns first: a CPU copies the first one transposed, see linear.py.
            of_keys.append(_multiply(settings, "CGH,CGS->HS", query_CGH, of_scores_CGS))
            of_values.append(_multiply(settings, "CGH,CGS->HS", gradient_CGH, weights_CGS))

        def added(sum_KLHU: Array, parts: list[Array]) -> Array:
            parts_KHIU = jnp.stack(parts).reshape(len(parts), -1, len(block.keys), settings.key_block)
            return sum_KLHU.at[:, block.keys].add(jnp.swapaxes(parts_KHIU, 1, 2), unique_indices=True)

        of_queries_JCF, of_keys_KLHU, of_values_KLHU = results
        of_queries_JCF = of_queries_JCF.at[block.index].set(_merged(of_queries))
        return of_queries_JCF, added(of_keys_KLHU, of_keys), added(of_values_KLHU, of_values)

    zeros_KLHU = jnp.zeros_like(jnp.swapaxes(key_KLUH, 2, 3))
    empty = jnp.zeros_like(query_JCF), zeros_KLHU, zeros_KLHU
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


def _scores(settings: _Settings, query_CGH: Array, key_SH: Array, block: _Block) -> Float[Array, "C G S"]:
    """Score keys; where a query does not see one, with the finite minimum, not -inf: without any key it must not become NaN."""
    scores_CGS = _multiply(settings, "CGH,SH->CGS", query_CGH, key_SH) * settings.scale
    return jnp.where(block.visible_CS[:, None], scores_CGS, jnp.finfo(scores_CGS.dtype).min)


def _by_key_head(x_CF: Array, heads: int, width: int) -> list[Float[Array, "C G _"]]:
    """Cut what a block of queries has of all heads into the parts of those that share a key head."""
    return [x.reshape(len(x), -1, width) for x in jnp.split(x_CF, heads, axis=1)]


def _merged(by_key_head: list[Array]) -> Float[Array, "C F"]:
    return jnp.concatenate([x.reshape(len(x), -1) for x in by_key_head], axis=1)


def _joined(x_LUH: Array, block: _Block) -> Float[Array, "S H"]:
    return x_LUH[block.keys].reshape(-1, x_LUH.shape[-1])


def _rounded(settings: _Settings, x: Array) -> Array:
    return x if settings.matmul_dtype is None else x.astype(settings.matmul_dtype)


def _multiply(settings: _Settings, equation: str, x: Array, y: Array) -> Array:
    """Multiply what is rounded; the result has the type of `x`, which is not rounded yet."""
    return jnp.einsum(equation, _rounded(settings, x), _rounded(settings, y), preferred_element_type=x.dtype)
