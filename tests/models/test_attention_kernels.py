from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxguard.models.attention import attend as attention
from jaxguard.models.attention import kernels as attention_kernels
from jaxguard.models.attention.attend import block_sparse
from jaxguard.models.attention.kernels import Layout
from jaxguard.models.compute import choose_kernel
from jaxguard.utils.errors import JaxguardError


def reference(query, key, value, layout, window, scale):
    """The definition, one score at a time in matrix form."""
    query, key, value, layout = jax.tree.map(np.asarray, (query, key, value, layout))
    index = np.arange(query.shape[1])
    distance = layout.positions_BT[:, :, None] - layout.positions_BT[:, None, :]
    segments = layout.segments_BT
    prefixes = segments if layout.prefixes_BT is None else layout.prefixes_BT
    sees = (segments[:, :, None] == segments[:, None, :]) | (prefixes[:, :, None] == segments[:, None, :])
    sees &= (index[:, None] >= index) & (distance < (window or query.shape[1]))
    key, value = (np.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    scores = np.where(sees[:, None], np.einsum("btnh,bsnh->bnts", query, key) * scale, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), value)


def packed(rows, tokens, heads=4, kv_heads=2, head_dim=128, seed=0, shared=False):
    """Random rows of three segments and padding; where they are `shared`, the second and the third continue the first."""
    random = np.random.default_rng(seed)
    query, key, value = (
        random.normal(size=(rows, tokens, n, head_dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads)
    )
    segments, positions, prefixes = np.zeros((3, rows, tokens), np.int32)
    for row in range(rows):
        first, *_ = cuts = np.sort(random.choice(np.arange(1, tokens), 3, replace=False))
        for i, (start, end) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True)):
            segments[row, start:end] = i + 1  # the rest is padding
            prefixes[row, start:end] = 1
            positions[row, start:end] = np.arange(end - start) + (first if shared and i else 0)
    return query, key, value, Layout(segments, positions, prefixes if shared else None)


@pytest.mark.parametrize(
    ("window", "shared"), [(None, False), (1, False), (40, False), (1000, False), (None, True), (40, True)]
)
def test_splash_is_packed_causal_attention(window, shared):
    query, key, value, layout = jax.tree.map(jnp.asarray, packed(rows=2, tokens=256, shared=shared))
    got = attention_kernels.splash(query, key, value, layout, window, 0.1, interpret=True)
    expected = reference(query, key, value, layout, window, 0.1)
    real = layout.segments_BT > 0
    np.testing.assert_allclose(np.asarray(got)[real], expected[real], atol=2e-5)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("window", [None, 1, 20, 1000])
def test_what_cudnn_is_asked_for_is_packed_causal_attention(monkeypatch, window, shared):
    """cuDNN itself needs a GPU; JAX computes the same request, to the letter, without it."""
    ask = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **k: ask(*a, **k | {"implementation": "xla"}))
    query, key, value, layout = jax.tree.map(jnp.asarray, packed(rows=2, tokens=64, head_dim=16, shared=shared))
    got = attention_kernels.cudnn(query, key, value, layout, window, 0.1)
    real = layout.segments_BT > 0
    np.testing.assert_allclose(got[real], reference(query, key, value, layout, window, 0.1)[real], atol=2e-5)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("compute", [attention.xla, block_sparse])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("window", [None, 1, 20, 1000])
@pytest.mark.parametrize("chunk", [4, 24])
def test_attention_in_xla_is_packed_causal_attention(chunk, window, shared, compute):
    query, key, value, layout = jax.tree.map(jnp.asarray, packed(rows=2, tokens=44, head_dim=16, shared=shared))
    got = jax.jit(partial(compute, window=window, scale=0.1, chunk=chunk))(query, key, value, layout)
    real = layout.segments_BT > 0
    np.testing.assert_allclose(got[real], reference(query, key, value, layout, window, 0.1)[real], atol=2e-5)


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 7, 13, 18])
def test_block_sparse_with_every_block_needed(blocks):
    """The last queries of one long segment see every block of the row."""
    query, key, value, _ = jax.tree.map(jnp.asarray, packed(rows=1, tokens=4 * blocks, head_dim=16))
    layout = Layout(jnp.ones((1, 4 * blocks), int), jnp.arange(4 * blocks)[None])
    got = jax.jit(partial(block_sparse, window=None, scale=0.1, chunk=4))(query, key, value, layout)
    np.testing.assert_allclose(got, reference(query, key, value, layout, None, 0.1), atol=2e-5)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("window", [None, 20])
def test_block_sparse_gradients_equal_xla(window, shared):
    query, key, value, layout = jax.tree.map(jnp.asarray, packed(rows=2, tokens=60, head_dim=16, shared=shared))
    real = (layout.segments_BT > 0)[..., None, None]

    def gradients(compute):
        def total(*qkv):
            return jnp.sum(jnp.sin(compute(*qkv, layout, window=window, scale=0.1, chunk=16)) * real)

        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(query, key, value)

    for got, expected in zip(gradients(block_sparse), gradients(attention.xla), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize(("window", "poisoned"), [(None, slice(32, 96)), (16, slice(0, 96))])
def test_block_sparse_skips_invisible_blocks(window, poisoned):
    """Values that must not be multiplied are NaN: a weight of zero would not hide them."""
    query, key, value, _ = jax.tree.map(jnp.asarray, packed(rows=1, tokens=128, head_dim=16))
    branches = np.arange(128) // 8 + 1
    # Without a window everyone continues the first; with one, all are one long segment.
    layout = Layout(*jnp.asarray([branches, np.arange(128) % 8 + 8 * (branches > 1), np.ones(128, int)])[:, None])
    if window:
        layout = Layout(*jnp.asarray([np.ones(128, int), np.arange(128)])[:, None])
    nan = value.at[:, poisoned].set(jnp.nan)

    @partial(jax.jit, static_argnums=0)
    def last(compute, value):
        return compute(query, key, value, layout, window=window, scale=0.1, chunk=16)[:, -16:]

    np.testing.assert_allclose(last(block_sparse, nan), last(attention.xla, value), atol=2e-5)


def test_block_sparse_over_a_mesh():
    query, key, value, layout = packed(rows=4, tokens=64, head_dim=16, shared=True)
    expected = reference(query, key, value, layout, None, 0.1)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    compute = jax.jit(partial(block_sparse, window=None, scale=0.1, chunk=16))
    with jax.set_mesh(mesh):
        got = compute(*jax.tree.map(jnp.asarray, (query, key, value, layout)))
    real = layout.segments_BT > 0
    np.testing.assert_allclose(np.asarray(got)[real], expected[real], atol=2e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_splash_over_a_mesh_is_splash_on_one_device(shared):
    arrays = packed(rows=4, tokens=128, shared=shared)
    expected = reference(*arrays, None, 0.1)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)

    def run(query, key, value, layout):
        return attention_kernels.splash(query, key, value, layout, None, 0.1, interpret=True)

    with jax.set_mesh(mesh):
        got = jax.jit(run)(*arrays)
    assert got.sharding.shard_shape(got.shape) == (1, 128, 2, 128)
    real = arrays[-1].segments_BT > 0
    np.testing.assert_allclose(np.asarray(got)[real], expected[real], atol=2e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_splash_gradient(shared):
    query, key, value, layout = jax.tree.map(jnp.asarray, packed(rows=1, tokens=128, shared=shared))
    real = (layout.segments_BT > 0)[..., None, None]

    def loss(attend, *qkv):
        return jnp.sum(jnp.where(real, attend(*qkv), 0) ** 2)

    def plain(query, key, value):
        sees = layout.visible(None, slice(None), slice(None))[:, None]
        return jax.nn.dot_product_attention(query, key, value, mask=sees, scale=0.1, implementation="xla")

    def fused(query, key, value):
        return attention_kernels.splash(query, key, value, layout, None, 0.1, interpret=True)

    for got, expected in zip(
        *(
            jax.grad(lambda q, k, v, f=f: loss(f, q, k, v), argnums=(0, 1, 2))(query, key, value)
            for f in (fused, plain)
        ),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("platform", "capability", "head_dim", "dtype", "expected"),
    [
        ("gpu", 8.0, 128, "bfloat16", "cudnn"),  # Llama on A100
        ("gpu", 8.0, 256, "bfloat16", "xla"),  # Gemma on A100
        ("gpu", 9.0, 256, "bfloat16", "cudnn"),  # Gemma on H100
        ("gpu", 10.0, 256, "bfloat16", "xla"),  # Gemma on B200
        ("gpu", 10.0, 128, "bfloat16", "cudnn"),
        ("cuda", 9.0, 128, "float32", "xla"),
        ("gpu", 7.5, 128, "bfloat16", "xla"),
        ("gpu", 0.0, 128, "bfloat16", "xla"),
        ("tpu", 0.0, 256, "bfloat16", "splash"),
        ("tpu", 0.0, 64, "bfloat16", "xla"),
        ("cpu", 0.0, 128, "bfloat16", "block_sparse"),
    ],
)
def test_auto_takes_the_best_kernel(platform, capability, head_dim, dtype, expected):
    device = platform, capability, head_dim, jnp.dtype(dtype), 2048
    assert choose_kernel("auto", *device) == expected
    assert choose_kernel("xla", *device) == "xla"


@pytest.mark.parametrize(
    ("platform", "capability", "head_dim", "max_seq_len", "requested", "message"),
    [
        ("cpu", 0.0, 128, 128, "cudnn", "needs an NVIDIA GPU, and this is cpu"),
        ("gpu", 8.0, 256, 128, "cudnn", "up to 128"),
        ("gpu", 8.0, 128, 127, "cudnn", "must be even"),
        ("gpu", 8.0, 128, 128, "splash", "needs a TPU"),
        ("gpu", 8.0, 128, 128, "block_sparse", "is for CPUs"),
        ("tpu", 0.0, 128, 200, "splash", "max_seq_len must be a multiple of 128, not 200"),
    ],
)
def test_unsuitable_kernels_are_refused(platform, capability, head_dim, max_seq_len, requested, message):
    with pytest.raises(JaxguardError, match=message):
        choose_kernel(requested, platform, capability, head_dim, jnp.dtype(jnp.bfloat16), max_seq_len)
