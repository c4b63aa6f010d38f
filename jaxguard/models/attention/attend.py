"""Causal attention over packed rows, one function for every target. Results at padding are finite and unused."""

from collections.abc import Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxguard.models.attention import kernels
from jaxguard.models.attention.block_sparse import block_sparse
from jaxguard.models.attention.flash import flash
from jaxguard.models.attention.kernels import KeyValue, Layout, Query
from jaxguard.models.compute import Compute

FAR = 2**30
"""Position of padding where positions alone decide what a query sees: after every token, so that none sees it."""


def attend(
    query: Query, key: KeyValue, value: KeyValue, layout: Layout, *, window: int | None, scale: float, compute: Compute
) -> Query:
    """Compute softmax attention with the kernel that `compute` names; all agree up to rounding."""
    args = query, key, value, layout
    match compute.attention:
        case "cudnn":
            return kernels.cudnn(*args, window, scale)
        case "flash":
            if compute.tiling is None:
                raise AssertionError("choose_compute chooses the tiling with the kernel")
            return flash(*args, window, scale, compute.tiling)
        case "block_sparse":
            return block_sparse(*args, window, scale, compute.query_chunk, compute.matmul_dtype)
    return xla(*args, window, scale, compute.query_chunk)


def xla(
    query: Query, key: KeyValue, value: KeyValue, layout: Layout, window: int | None, scale: float, chunk: int
) -> Query:
    """Compute attention with plain matmuls, one chunk of queries at a time, over the keys that are not after the chunk.

    Scores are recomputed in the backward pass, so that at most one chunk of them is held.
    """
    rows, tokens, heads, head_dim = query.shape
    kv_heads = key.shape[2]

    def attend_chunk(start: int, query_BTNH: Array, key_BTKH: Array, value_BTKH: Array) -> Array:
        stop = min(start + chunk, tokens)
        # An ancestor may be anywhere before a token, also in a window.
        mask_BCS = layout.visible(window, slice(start, stop), slice(stop))
        query_BCNH, key_BSKH, value_BSKH = query_BTNH[:, start:stop], key_BTKH[:, :stop], value_BTKH[:, :stop]
        query_BCKGH = query_BCNH.reshape(rows, stop - start, kv_heads, heads // kv_heads, head_dim)
        scores_BKGCS = (
            jnp.einsum("BCKGH,BSKH->BKGCS", query_BCKGH, key_BSKH, preferred_element_type=jnp.float32) * scale
        )
        # The finite minimum, not -inf: a row without any visible key must not become NaN.
        scores_BKGCS = jnp.where(mask_BCS[:, None, None], scores_BKGCS, jnp.finfo(jnp.float32).min)
        weights_BKGCS = jax.nn.softmax(scores_BKGCS, axis=-1).astype(value_BSKH.dtype)
        return jnp.einsum("BKGCS,BSKH->BCKGH", weights_BKGCS, value_BSKH).reshape(query_BCNH.shape)

    chunks = [
        jax.checkpoint(partial(attend_chunk, start), prevent_cse=False)(query, key, value)
        for start in range(0, tokens, chunk)
    ]
    return jnp.concatenate(chunks, axis=1)


KeyValues = tuple[Float[Array, "_ K _ H"], Float[Array, "_ K _ H"], Int[Array, "_ _"]]
"""Keys and values [A K S H] that A rows of queries, or A groups of as many rows each, attend to, and their positions [A S]."""


def attend_cached(
    query_BTNH: Query,
    positions_BT: Int[Array, "B T"],
    parts: Sequence[KeyValues],
    *,
    window: Int[Array, ""],
    scale: float,
    chunk: int,
    ends_BT: Int[Array, "B T"] | None = None,
) -> Query:
    """Compute softmax attention over all `parts` together, one chunk of queries at a time; for decoding, not differentiated.

    The last part is that of the queries' own tokens, in the order of their positions. A query sees the keys at or before its
    position, at most `window` of them. With `ends_BT` the rows hold trees, see Decoder.cached: of the last part, a query sees those
    keys alone that it continues. Keys that several rows share are stored once and multiplied with all those rows' queries in one
    matmul.
    """
    rows, tokens, heads, width = query_BTNH.shape
    kv_heads = parts[0][0].shape[1]
    *earlier, (own_key_BKTH, own_value_BKTH, own_positions_BT) = parts

    def attend_chunk(block: slice) -> Float[Array, "B C N H"]:
        query_BCNH, positions_BC = query_BTNH[:, block], positions_BT[:, block]
        queries, sums, seen = query_BCNH.shape[1], [], slice(0, block.stop if block.stop < tokens else None)
        own = own_key_BKTH[:, :, seen], own_value_BKTH[:, :, seen], own_positions_BT[:, seen]
        for key_AKSH, value_AKSH, positions_AS in [*earlier, own]:
            distance_ARCS = positions_BC.reshape(len(key_AKSH), -1, queries, 1) - positions_AS[:, None, None]
            visible_ARCS = (distance_ARCS >= 0) & (distance_ARCS < window)
            if ends_BT is not None and key_AKSH is own[0]:
                slots_T = jnp.arange(tokens)
                slots_C1 = slots_T[block, None]
                visible_ARCS &= ((slots_T[seen] <= slots_C1) & (slots_C1 <= ends_BT[:, None, seen]))[:, None]
            # Batch axes first: a CPU multiplies other layouts at less than half the speed.
            query_ARCKGH = query_BCNH.reshape(len(key_AKSH), -1, queries, kv_heads, heads // kv_heads, width)
            query_AKRCGH = query_ARCKGH.transpose(0, 3, 1, 2, 4, 5).astype(key_AKSH.dtype)
            scores_AKRCGS = jnp.einsum(
                "AKRCGH,AKSH->AKRCGS", query_AKRCGH, key_AKSH, preferred_element_type=jnp.float32
            )
            scores_AKRCGS = jnp.where(
                visible_ARCS[:, None, :, :, None], scores_AKRCGS * scale, jnp.finfo(jnp.float32).min
            )
            most_AKRCG1 = jnp.max(scores_AKRCGS, axis=-1, keepdims=True)
            weights_AKRCGS = jnp.exp(scores_AKRCGS - most_AKRCG1)
            total_AKRCG1 = jnp.sum(weights_AKRCGS, axis=-1, keepdims=True)
            operands = weights_AKRCGS.astype(value_AKSH.dtype), value_AKSH
            mixed_AKRCGH = jnp.einsum("AKRCGS,AKSH->AKRCGH", *operands, preferred_element_type=jnp.float32)
            of_part = most_AKRCG1, total_AKRCG1, mixed_AKRCGH
            sums.append([x.transpose(0, 2, 3, 1, 4, 5).reshape(rows, queries, heads, -1) for x in of_part])
        return _combined(sums).astype(query_BCNH.dtype)

    return jnp.concatenate([attend_chunk(slice(start, start + chunk)) for start in range(0, tokens, chunk)], axis=1)


def attend_next(
    query_RNH: Float[Array, "R N H"],
    positions_R: Int[Array, "R"],
    parts: Sequence[tuple[Float[Array, "_ K H _"], Float[Array, "_ K _ H"], Int[Array, "_ _"]]],
    *,
    window: Int[Array, ""],
    scale: float,
) -> Float[Array, "R N H"]:
    """Compute softmax attention of one query per row over all `parts` together, as `attend_cached` with keys [A K H S]."""
    rows, heads, width = query_RNH.shape
    sums = []
    for key_AKHS, value_AKSH, positions_AS in parts:
        shared, kv_heads, _, size = key_AKHS.shape
        of_rows = (shared, rows // shared, kv_heads, heads // kv_heads)
        query_AKQH = query_RNH.reshape(*of_rows, width).transpose(0, 2, 1, 3, 4).reshape(shared, kv_heads, -1, width)
        operands = query_AKQH.astype(key_AKHS.dtype), key_AKHS
        scores_AKQS = jnp.einsum("AKQH,AKHS->AKQS", *operands, preferred_element_type=jnp.float32) * scale
        distance_ARS = positions_R.reshape(shared, -1, 1) - positions_AS[:, None]
        visible_AKRGS = ((distance_ARS >= 0) & (distance_ARS < window))[:, None, :, None]
        scores_AKRGS = scores_AKQS.reshape(shared, kv_heads, of_rows[1], of_rows[3], size)
        scores_AKRGS = jnp.where(visible_AKRGS, scores_AKRGS, jnp.finfo(jnp.float32).min)
        most_AKRG1 = jnp.max(scores_AKRGS, axis=-1, keepdims=True)
        weights_AKRGS = jnp.exp(scores_AKRGS - most_AKRG1)
        operands = weights_AKRGS.reshape(scores_AKQS.shape).astype(value_AKSH.dtype), value_AKSH
        mixed_AKQH = jnp.einsum("AKQS,AKSH->AKQH", *operands, preferred_element_type=jnp.float32)
        of_part = (
            most_AKRG1,
            jnp.sum(weights_AKRGS, axis=-1, keepdims=True),
            mixed_AKQH.reshape(*most_AKRG1.shape[:-1], width),
        )
        sums.append([x.transpose(0, 2, 1, 3, 4).reshape(rows, heads, -1) for x in of_part])
    return _combined(sums).astype(query_RNH.dtype)


def _combined(sums: Sequence[Sequence[Array]]) -> Array:
    """Of each part the greatest score, the sum of weights relative to it, and the sum of values times weights -> mixed values."""
    most = reduce(jnp.maximum, (most for most, _, _ in sums))
    scaled = [(jnp.exp(greatest - most), total, mixed) for greatest, total, mixed in sums]
    total = reduce(jnp.add, (factor * total for factor, total, _ in scaled))
    mixed: Array = reduce(jnp.add, (factor * mixed for factor, _, mixed in scaled)) / total
    return mixed
