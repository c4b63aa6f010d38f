from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from jaxguard.models.attention.flash import Tile, Tiling, choose_tiling, flash
from jaxguard.models.attention.kernels import Layout

TOKENS, WIDTH, SCALE = 44, 16, 0.3
TILES = Tile(16, 8), Tile(8, 16), Tile(16, 4)


def grow(segments, tokens):
    """Trees in depth-first order: each segment has a length, and goes so many levels up before it continues one."""
    parents, positions, ancestors = [], [], []
    for length, levels in segments:
        ancestors = ancestors[: max(0, len(ancestors) - levels)]
        for _ in range(min(length, tokens - len(parents))):
            parent = ancestors[-1] if ancestors else None
            parents.append(parent)
            positions.append(0 if parent is None else positions[parent] + 1)
            ancestors.append(len(parents) - 1)
    ends = list(range(len(parents)))
    for token in reversed(range(len(parents))):
        if parents[token] is not None:
            ends[parents[token]] = max(ends[parents[token]], ends[token])
    padding = range(len(parents), tokens)
    return np.array([*ends, *padding]), np.array([*positions, *(-1 for _ in padding)])


def layout_of(*rows):
    return Layout(*(jnp.asarray(x) for x in zip(*(grow(row, TOKENS) for row in rows), strict=True)))


rows = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 30)), min_size=1, max_size=12)


def reference(query, key, value, layout, window):
    """The definition, with a dense mask."""
    sees = layout.visible(window, slice(None), slice(None))
    group = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, group, axis=2).astype(jnp.float32) for x in (key, value))
    scores = jnp.einsum("btnh,bsnh->bnts", query.astype(jnp.float32), key) * SCALE
    weights = jax.nn.softmax(jnp.where(sees[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, value)


def normal(shape, seed, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def qkv(batch, heads, kv_heads, dtype=jnp.float32):
    return [normal((batch, TOKENS, n, WIDTH), seed, dtype) for seed, n in enumerate((heads, kv_heads, kv_heads))]


@cache
def values_and_gradients(window, platform=None):
    """Attention with the platform's kernels, or by definition, and the gradients of a function of it."""
    attend = partial(reference, window=window)
    if platform:
        tiling = Tiling(platform, *TILES, interpret=True)
        attend = partial(flash, window=window, scale=SCALE, tiling=tiling)

    def total(*args):
        mixed = attend(*args)
        return jnp.sum(jnp.sin(mixed.astype(jnp.float32))), mixed

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.parametrize(("platform", "heads"), [("gpu", (6, 2)), ("gpu", (4, 1)), ("tpu", (6, 2)), ("tpu", (2, 2))])
@pytest.mark.parametrize("window", [None, 11])
@given(batch=st.tuples(rows, rows))
@settings(max_examples=6)
def test_values_and_gradients_are_those_of_the_definition(platform, heads, window, batch):
    args = *qkv(2, *heads), layout_of(*batch)
    (_, expected), gradients = values_and_gradients(window)(*args)
    (_, got), found = values_and_gradients(window, platform)(*args)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    for one, other in zip(found, gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_bfloat16_differs_by_its_rounding():
    args = *qkv(1, 6, 2, jnp.bfloat16), layout_of([(9, 0), (8, 0), (12, 8), (15, 20)])
    (_, expected), gradients = values_and_gradients(11)(*args)
    (_, got), found = values_and_gradients(11, "gpu")(*args)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=0.02)
    for one, other in zip(found, gradients, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_blocks_that_are_not_needed_are_not_loaded(platform):
    """A weight of zero would not hide a NaN."""
    args = [*qkv(1, 4, 2), layout_of([(16, 0), (28, 16)])]
    (_, expected), gradients = values_and_gradients(None, platform)(*args)
    poisoned = [x.at[:, :16].set(jnp.nan) for x in args[:3]]
    (_, got), found = values_and_gradients(None, platform)(*poisoned, args[3])
    for one, other in zip((got, *found), (expected, *gradients), strict=True):
        np.testing.assert_array_equal(one[:, 16:], other[:, 16:])


def test_a_mesh_cuts_rows_and_heads():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    args = *qkv(4, 4, 2), layout_of(*[[(9, 0), (8, 0), (12, 8), (15, 20)], [(44, 0)]] * 2)
    attend = partial(flash, window=11, scale=SCALE, tiling=Tiling("gpu", *TILES, interpret=True))
    with jax.set_mesh(mesh):
        got = jax.jit(attend)(*args)
    assert got.sharding.shard_shape(got.shape) == (1, TOKENS, 2, WIDTH)
    np.testing.assert_allclose(got, reference(*args, 11), atol=1e-5)


@pytest.mark.parametrize("tokens", [128, 384, 2048])
def test_tiles_divide_a_row(tokens):
    for tiling in (choose_tiling("gpu", 8.0, 256), choose_tiling("gpu", 8.9, 256), choose_tiling("tpu", 0.0, 128)):
        fitting = tiling.fit(tokens)
        assert tokens % fitting.multiple == 0
        assert all(tokens % size == 0 for tile in (fitting.forward, fitting.dq, fitting.dkv) for size in tile[:2])
