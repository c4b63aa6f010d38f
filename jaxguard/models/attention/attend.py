"""Causal attention over packed rows, one function for every target. Results at padding are finite and unused."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxguard.models.attention import kernels
from jaxguard.models.attention.block_sparse import block_sparse
from jaxguard.models.attention.kernels import KeyValue, Layout, Query
from jaxguard.models.compute import Compute

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
    compute: Compute,
) -> Query:
    """Compute softmax attention with the kernel that `compute` names; all agree up to rounding."""
    args = query_BTNH, key_BTKH, value_BTKH, layout
    match compute.attention:
        case "cudnn":
            return kernels.cudnn(*args, window, scale)
        case "splash":
            return kernels.splash(*args, window, scale)
        case "block_sparse":
            return block_sparse(*args, window, scale, compute.query_chunk, compute.matmul_dtype)
    return xla(*args, window, scale, compute.query_chunk)


def xla(
    query_BTNH: Query,
    key_BTKH: KeyValue,
    value_BTKH: KeyValue,
    layout: Layout,
    window: int | None,
    scale: float,
    chunk: int,
) -> Query:
    """Compute attention with plain matmuls, one chunk of queries at a time, over only the keys that the chunk can see.

    Scores are recomputed in the backward pass, so that at most one chunk of them is held.
    """
    rows, tokens, heads, head_dim = query_BTNH.shape
    kv_heads = key_BTKH.shape[2]

    def attend_chunk(start: int, query_BTNH: Array, key_BTKH: Array, value_BTKH: Array) -> Array:
        stop = min(start + chunk, tokens)
        # A prefix may be anywhere before the segments that continue it.
        first = 0 if window is None or layout.prefixes_BT is not None else max(0, start - window + 1)
        mask_BCS = layout.visible(window, slice(start, stop), slice(first, stop))
        query_BCNH, key_BSKH, value_BSKH = query_BTNH[:, start:stop], key_BTKH[:, first:stop], value_BTKH[:, first:stop]
        query_BCKGH = query_BCNH.reshape(rows, stop - start, kv_heads, heads // kv_heads, head_dim)
        scores_BKGCS = (
            jnp.einsum("BCKGH,BSKH->BKGCS", query_BCKGH, key_BSKH, preferred_element_type=jnp.float32) * scale
        )
        # The finite minimum, not -inf: a row without any visible key must not become NaN.
        scores_BKGCS = jnp.where(mask_BCS[:, None, None], scores_BKGCS, jnp.finfo(jnp.float32).min)
        weights_BKGCS = jax.nn.softmax(scores_BKGCS, axis=-1).astype(value_BSKH.dtype)
        return jnp.einsum("BKGCS,BSKH->BCKGH", weights_BKGCS, value_BSKH).reshape(query_BCNH.shape)

    chunks = [
        jax.checkpoint(partial(attend_chunk, start), prevent_cse=False)(query_BTNH, key_BTKH, value_BTKH)
        for start in range(0, tokens, chunk)
    ]
    return jnp.concatenate(chunks, axis=1)


KeyValues = tuple[Float[Array, "A K S H"], Float[Array, "A K S H"], Int[Array, "A S"]]
"""Keys and values that A rows of queries, or A groups of as many rows each, attend to, and their positions."""


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
    rows, tokens, heads, width = query_BTNH.shape
    kv_heads = parts[0][0].shape[1]
    grouped = (kv_heads, heads // kv_heads)

    def attend_chunk(query_BCNH: Array, positions_BC: Array) -> Float[Array, "B C N H"]:
        queries, scores = query_BCNH.shape[1], []
        for key_AKSH, _, positions_AS in parts:
            groups, size = positions_AS.shape
            query_ARCKGH = query_BCNH.reshape(groups, -1, queries, *grouped, width)
            scores_ARCKGS = jnp.einsum(
                "ARCKGH,AKSH->ARCKGS", query_ARCKGH, key_AKSH, preferred_element_type=jnp.float32
            )
            distance_ARCS = positions_BC.reshape(groups, -1, queries, 1) - positions_AS[:, None, None]
            visible_ARC11S = ((distance_ARCS >= 0) & (distance_ARCS < window))[:, :, :, None, None]
            scores_ARCKGS = jnp.where(visible_ARC11S, scores_ARCKGS * scale, jnp.finfo(jnp.float32).min)
            scores.append(scores_ARCKGS.reshape(rows, queries, *grouped, size))
        weights_BCKGS = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(query_BCNH.dtype)
        mixed_BCKGH = jnp.zeros((rows, queries, *grouped, width), jnp.float32)
        start = 0
        for _, value_AKSH, positions_AS in parts:
            groups, size = positions_AS.shape
            weights_ARCKGS = weights_BCKGS[..., start : start + size].reshape(groups, -1, queries, *grouped, size)
            # In the compute type: XLA on a CPU has no such product from bfloat16 to float32.
            mixed_ARCKGH = jnp.einsum("ARCKGS,AKSH->ARCKGH", weights_ARCKGS, value_AKSH)
            mixed_BCKGH += mixed_ARCKGH.reshape(mixed_BCKGH.shape)
            start += size
        return mixed_BCKGH.astype(query_BCNH.dtype).reshape(query_BCNH.shape)

    blocks = [slice(start, start + chunk) for start in range(0, tokens, chunk)]
    return jnp.concatenate([attend_chunk(query_BTNH[:, block], positions_BT[:, block]) for block in blocks], axis=1)
