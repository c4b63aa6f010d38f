"""Causal attention over packed rows, one function for every target. Results at padding are finite and unused."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxguard.models.attention import kernels
from jaxguard.models.attention.block_sparse import block_sparse
from jaxguard.models.attention.kernels import Layout

Query = Float[Array, "B T N H"]
KeyValue = Float[Array, "B T K H"]

FAR = 2**30
"""Position of padding where positions alone decide what a query sees: after every token, so that none sees it."""


def attend(
    query_BTNH: Query,
    key_BTKH: KeyValue,
    value_BTKH: KeyValue,
    layout: Layout,
    *,
    window: int | None,
    scale: float,
    implementation: kernels.Kernel,
    query_chunk: int,
    matmul_dtype: DTypeLike | None = None,
) -> Query:
    """Compute softmax attention with `implementation`; all agree up to rounding.

    `matmul_dtype` is what block-sparse attention rounds its operands to: see `linear.project`.
    """
    args = query_BTNH, key_BTKH, value_BTKH, layout
    match implementation:
        case "cudnn":
            return kernels.cudnn(*args, window=window, scale=scale)
        case "splash":
            return kernels.splash(*args, window=window, scale=scale)
        case "block_sparse":
            return block_sparse(*args, window=window, scale=scale, chunk=query_chunk, matmul_dtype=matmul_dtype)
    return xla(*args, window=window, scale=scale, chunk=query_chunk)


def xla(
    query_BTNH: Query,
    key_BTKH: KeyValue,
    value_BTKH: KeyValue,
    layout: Layout,
    *,
    window: int | None,
    scale: float,
    chunk: int,
) -> Query:
    """Compute attention with plain matmuls, one chunk of queries at a time, over only the keys that the chunk can see.

    Scores are recomputed in the backward pass, so that at most one chunk of them is held.
    """
    tokens = query_BTNH.shape[1]
    out = []
    for start in range(0, tokens, chunk):
        stop = min(start + chunk, tokens)
        # A prefix may be anywhere before the segments that continue it.
        first = 0 if window is None or layout.prefixes_BT is not None else max(0, start - window + 1)
        block = partial(
            _block, layout=layout, queries=slice(start, stop), keys=slice(first, stop), window=window, scale=scale
        )
        out.append(jax.checkpoint(block, prevent_cse=False)(query_BTNH, key_BTKH, value_BTKH))
    return jnp.concatenate(out, axis=1)


def _block(
    query_BTNH: Query,
    key_BTKH: KeyValue,
    value_BTKH: KeyValue,
    *,
    layout: Layout,
    queries: slice,
    keys: slice,
    window: int | None,
    scale: float,
) -> Float[Array, "B C N H"]:
    mask_BCS = layout.visible(window, queries, keys)
    query_BCNH, key_BSKH, value_BSKH = query_BTNH[:, queries], key_BTKH[:, keys], value_BTKH[:, keys]
    rows, chunk, heads, head_dim = query_BCNH.shape
    kv_heads = key_BSKH.shape[2]
    query_BCKGH = query_BCNH.reshape(rows, chunk, kv_heads, heads // kv_heads, head_dim)
    scores_BKGCS = jnp.einsum("BCKGH,BSKH->BKGCS", query_BCKGH, key_BSKH, preferred_element_type=jnp.float32) * scale
    # The finite minimum, not -inf: a row without any visible key must not become NaN.
    scores_BKGCS = jnp.where(mask_BCS[:, None, None], scores_BKGCS, jnp.finfo(jnp.float32).min)
    weights_BKGCS = jax.nn.softmax(scores_BKGCS, axis=-1).astype(value_BSKH.dtype)
    return jnp.einsum("BKGCS,BSKH->BCKGH", weights_BKGCS, value_BSKH).reshape(query_BCNH.shape)


class KeyValues(NamedTuple):
    """Keys and values that A rows of queries, or A groups of as many rows each, attend to, and their positions."""

    key_AKSH: Float[Array, "A K S H"]
    value_AKSH: Float[Array, "A K S H"]
    positions_AS: Int[Array, "A S"]


def attend_cached(
    query_BTNH: Query,
    positions_BT: Int[Array, "B T"],
    parts: Sequence[KeyValues],
    *,
    window: Int[Array, ""],
    scale: float,
    chunk: int,
) -> Query:
    """Compute softmax attention over all `parts` together, one chunk of queries at a time; for decoding, not differentiated.

    A query sees the keys at or before its position, at most `window` of them. Keys that several rows share are stored once
    and multiplied with all those rows' queries in one matmul.
    """
    tokens = query_BTNH.shape[1]
    out = []
    for start in range(0, tokens, chunk):
        block = slice(start, min(start + chunk, tokens))
        out.append(_cached_block(query_BTNH[:, block], positions_BT[:, block], parts, window, scale))
    return jnp.concatenate(out, axis=1)


def _cached_block(
    query_BCNH: Array, positions_BC: Array, parts: Sequence[KeyValues], window: Array, scale: float
) -> Float[Array, "B C N H"]:
    rows, queries, heads, width = query_BCNH.shape
    kv_heads = parts[0].key_AKSH.shape[1]
    grouped = (kv_heads, heads // kv_heads)
    scores = []
    for part in parts:
        groups, size = part.positions_AS.shape
        query_ARCKGH = query_BCNH.reshape(groups, -1, queries, *grouped, width)
        scores_ARCKGS = jnp.einsum(
            "ARCKGH,AKSH->ARCKGS", query_ARCKGH, part.key_AKSH, preferred_element_type=jnp.float32
        )
        distance_ARCS = positions_BC.reshape(groups, -1, queries, 1) - part.positions_AS[:, None, None]
        visible_ARCS = (distance_ARCS >= 0) & (distance_ARCS < window)
        scores_ARCKGS = jnp.where(visible_ARCS[:, :, :, None, None], scores_ARCKGS * scale, jnp.finfo(jnp.float32).min)
        scores.append(scores_ARCKGS.reshape(rows, queries, *grouped, size))
    weights_BCKGS = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(query_BCNH.dtype)
    mixed_BCKGH = jnp.zeros((rows, queries, *grouped, width), jnp.float32)
    start = 0
    for part in parts:
        groups, size = part.positions_AS.shape
        weights_ARCKGS = weights_BCKGS[..., start : start + size].reshape(groups, -1, queries, *grouped, size)
        # In the compute type: XLA on a CPU has no such product from bfloat16 to float32.
        mixed_ARCKGH = jnp.einsum("ARCKGS,AKSH->ARCKGH", weights_ARCKGS, part.value_AKSH)
        mixed_BCKGH += mixed_ARCKGH.reshape(mixed_BCKGH.shape)
        start += size
    return mixed_BCKGH.astype(query_BCNH.dtype).reshape(query_BCNH.shape)
