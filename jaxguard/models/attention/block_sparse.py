"""Attention for CPUs: a block of queries is multiplied with those blocks of keys alone that it sees something of."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxguard.models.attention.kernels import Layout, per_device
from jaxguard.models.linear import DOTS, project


def block_sparse(
    query_BTNH: Float[Array, "B T N H"],
    key_BTKH: Float[Array, "B T K H"],
    value_BTKH: Float[Array, "B T K H"],
    layout: Layout,
    *,
    window: int | None,
    scale: float,
    chunk: int,
    matmul_dtype: DTypeLike | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention in blocks of `chunk` tokens, scores of one block of queries at a time, computed again backward.

    How many blocks of keys a block needs is known when the program runs. It has a branch for 1, 2, 3, 4, 6, 8, … of them, which
    a CPU takes at no cost; so a row of many short examples costs no more than its examples in several rows.

    Args:
        query_BTNH: of packed rows.
        key_BTKH: of the same.
        value_BTKH: of the same.
        layout: who sees whom.
        window: of a local layer, in positions.
        scale: of the scores.
        chunk: tokens of a block.
        matmul_dtype: see models/products.
    """
    compute = partial(_row, window=window, scale=scale, chunk=chunk, matmul_dtype=matmul_dtype)

    def rows(*args: Array | Layout) -> Array:
        return jax.lax.map(lambda row: compute(*row), args)

    return checkpoint_name(per_device(rows, query_BTNH, key_BTKH, value_BTKH, layout), DOTS)


def _row(
    query_TNH: Array,
    key_TKH: Array,
    value_TKH: Array,
    layout: Layout,
    *,
    window: int | None,
    scale: float,
    chunk: int,
    matmul_dtype: DTypeLike | None,
) -> Float[Array, "T N H"]:
    tokens, kv_heads, width = key_TKH.shape
    blocks = -(-tokens // chunk)
    missing = blocks * chunk - tokens
    query_TNH, key_TKH, value_TKH, layout = jax.tree.map(
        lambda x: jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), (query_TNH, key_TKH, value_TKH, layout)
    )
    query_JKGCH = query_TNH.reshape(blocks, chunk, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
    key_KJCH, value_KJCH = (
        x.reshape(blocks, chunk, kv_heads, width).transpose(2, 0, 1, 3) for x in (key_TKH, value_TKH)
    )
    seen_JJ = _seen(jax.tree.map(lambda x: x.reshape(blocks, chunk), layout), window)
    over = partial(_over, window=window, scale=scale, matmul_dtype=matmul_dtype)

    def block(one: tuple[Array, Array, Array]) -> Float[Array, "K G C H"]:
        query_KGCH, place, seen_J = one
        return _block(over, query_KGCH, key_KJCH, value_KJCH, layout, place, seen_J)

    mixed_JKGCH = jax.lax.map(block, (query_JKGCH, jnp.arange(blocks), seen_JJ))
    return mixed_JKGCH.transpose(0, 3, 1, 2, 4).reshape(blocks * chunk, -1, width)[:tokens]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(
    over: Callable[..., Array],
    query_KGCH: Array,
    key_KJCH: Array,
    value_KJCH: Array,
    layout: Layout,
    place: Array,
    seen_J: Array,
) -> Float[Array, "K G C H"]:
    """A block of queries with the fewest blocks of keys for which there is a branch.

    Backward, the branch computes everything again: between two branches JAX would hand over what all branches keep.
    """
    return _branch(over, seen_J, query_KGCH, key_KJCH, value_KJCH, layout, place)


def _block_forward(over: Callable[..., Array], *args: Any) -> tuple[Array, Any]:
    return _block(over, *args), args


def _block_backward(over: Callable[..., Array], args: Any, gradient: Array) -> tuple[Array | None, ...]:
    *qkv, layout, place, seen_J = args

    def gradients(count: int, order_J: Array, *qkv: Array) -> tuple[Array, ...]:
        return jax.vjp(lambda *qkv: over(count, order_J, *qkv, layout, place), *qkv)[1](gradient)

    return (*_branch(gradients, seen_J, *qkv), None, None, None)


_block.defvjp(_block_forward, _block_backward)


def _branch(compute: Callable[..., Any], seen_J: Array, *args: Any) -> Any:
    """`compute(count, order_J, *args)`: the first `count` blocks in this order, few, are all that are seen."""
    blocks = len(seen_J)
    sizes = {count for k in range(blocks.bit_length()) for count in (2**k, 3 * 2**k // 2) if count < blocks}
    counts = [*sorted(sizes), blocks]
    enough = sum((jnp.sum(seen_J) > count).astype(jnp.int32) for count in counts[:-1])
    branches = [partial(compute, count) for count in counts]
    return jax.lax.switch(enough, branches, jnp.argsort(~seen_J, stable=True), *args)


def _over(
    count: int,
    order_J: Array,
    query_KGCH: Array,
    key_KJCH: Array,
    value_KJCH: Array,
    layout: Layout,
    place: Array,
    *,
    window: int | None,
    scale: float,
    matmul_dtype: DTypeLike | None,
) -> Float[Array, "K G C H"]:
    """The block of queries at `place` with the first `count` blocks of keys in this order."""
    chunk = query_KGCH.shape[2]
    chosen = order_J[:count]
    keys_S = (chosen[:, None] * chunk + jnp.arange(chunk)).reshape(-1)
    mask_CS = layout.visible(window, place * chunk + jnp.arange(chunk), keys_S)
    heads = [
        _head(query_GCH, key_JCH[chosen], value_JCH[chosen], mask_CS, scale, matmul_dtype)
        for query_GCH, key_JCH, value_JCH in zip(query_KGCH, key_KJCH, value_KJCH, strict=True)
    ]
    return jnp.stack(heads)


def _head(
    query_GCH: Array, key_JCH: Array, value_JCH: Array, mask_CS: Array, scale: float, matmul_dtype: DTypeLike | None
) -> Float[Array, "G C H"]:
    """One key head at a time: matrices are what a CPU multiplies fast, and stacks of them are not."""
    group, queries, width = query_GCH.shape
    key_SH, value_SH = (x.reshape(-1, width) for x in (key_JCH, value_JCH))
    multiply = jnp.einsum if matmul_dtype is None else partial(project, matmul_dtype=matmul_dtype)
    scores_QS = multiply("QH,SH->QS", query_GCH.reshape(-1, width), key_SH) * scale
    scores_GCS = scores_QS.reshape(group, queries, -1)
    # The finite minimum, not -inf: a query without any visible key must not become NaN.
    scores_GCS = jnp.where(mask_CS, scores_GCS, jnp.finfo(scores_GCS.dtype).min)
    weights_QS = jax.nn.softmax(scores_GCS, axis=-1).reshape(scores_QS.shape)
    return multiply("QS,SH->QH", weights_QS, value_SH).reshape(query_GCH.shape)


def _seen(layout: Layout, window: int | None) -> Bool[Array, "J J"]:
    """May a query of one block see a key of another? From the ranges of numbers in both: at times yes where none does."""
    real_JC = layout.segments_BT > 0

    def between(x_JC: Int[Array, "J C"]) -> tuple[Array, Array]:
        return jnp.min(x_JC, axis=1, where=real_JC, initial=2**30), jnp.max(x_JC, axis=1, where=real_JC, initial=-1)

    def meet(one: tuple[Array, Array], other: tuple[Array, Array]) -> Bool[Array, "J J"]:
        return (one[0][:, None] <= other[1]) & (other[0] <= one[1][:, None])

    segments = between(layout.segments_BT)
    seen_JJ = meet(segments, segments)
    if layout.prefixes_BT is not None:
        seen_JJ |= meet(between(layout.prefixes_BT), segments)
    if window is not None:
        first, last = between(layout.positions_BT)
        seen_JJ &= first[:, None] - last < window
    return jnp.tril(seen_JJ)
