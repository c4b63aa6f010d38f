from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType

from jaxguard.models.attention import attend as attention
from jaxguard.models.attention import kernels as attention_kernels
from jaxguard.models.attention.block_sparse import block_sparse
from jaxguard.models.attention.kernels import Layout
from jaxguard.models.compute import choose_kernel
from jaxguard.utils.errors import JaxguardError


def reference(query, key, value, layout, sees, window, scale):
    """The definition, one score at a time in matrix form; `sees` [B T T] says which tokens are whose ancestors."""
    distance = layout.positions_BT[:, :, None] - layout.positions_BT[:, None, :]
    sees = sees & (distance < (window or query.shape[1]))
    key, value = (np.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    scores = np.where(sees[:, None], np.einsum("btnh,bsnh->bnts", query, key) * scale, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), value)


def packed(rows, tokens, heads=4, kv_heads=2, head_dim=128, seed=0, trees=True):
    """Random rows of trees, or of sequences that share nothing, and padding; and which tokens are whose ancestors."""
    random = np.random.default_rng(seed)
    query, key, value = (
        random.normal(size=(rows, tokens, n, head_dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads)
    )
    positions, ends = np.full((rows, tokens), -1), np.tile(np.arange(tokens), (rows, 1))
    sees = np.tile(np.eye(tokens, dtype=bool), (rows, 1, 1))
    for row in range(rows):
        path, start, last = np.zeros(0, int), 0, tokens - int(random.integers(0, max(1, tokens // 4)))
        while start < last:
            path = path[: random.integers(0, len(path) + 1)] if trees else path[:0]
            for index in range(start, min(last, start + int(random.integers(1, max(2, tokens // 4))))):
                path = np.append(path, index)
                positions[row, index], start = len(path) - 1, index + 1
                sees[row, index, path], ends[row, path] = True, index
    return query, key, value, Layout(ends, positions), sees


def assert_real(got, expected, layout, tolerance=2e-5):
    real = layout.positions_BT >= 0
    np.testing.assert_allclose(np.asarray(got)[real], expected[real], atol=tolerance)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize("window", [None, 1, 20, 1000])
def test_what_cudnn_is_asked_for_is_attention_to_ancestors(monkeypatch, window, trees):
    """cuDNN itself needs a GPU; JAX computes the same request, to the letter, without it."""
    ask = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **k: ask(*a, **k | {"implementation": "xla"}))
    *arrays, sees = packed(rows=2, tokens=64, head_dim=16, trees=trees)
    got = attention_kernels.cudnn(*jax.tree.map(jnp.asarray, arrays), window, 0.1)
    assert_real(got, reference(*arrays, sees, window, 0.1), arrays[-1])


@pytest.mark.parametrize("compute", [attention.xla, block_sparse])
@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize("window", [None, 1, 20, 1000])
@pytest.mark.parametrize("chunk", [4, 15, 24])
def test_attention_in_xla_is_attention_to_ancestors(chunk, window, trees, compute):
    *arrays, sees = packed(rows=2, tokens=44, head_dim=16, trees=trees)
    got = jax.jit(partial(compute, window=window, scale=0.1, chunk=chunk))(*jax.tree.map(jnp.asarray, arrays))
    assert_real(got, reference(*arrays, sees, window, 0.1), arrays[-1])


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 7, 13, 18])
def test_block_sparse_with_every_block_needed(blocks):
    """The last queries of one long sequence see every block of the row."""
    query, key, value, *_ = packed(rows=1, tokens=4 * blocks, head_dim=16)
    layout = Layout(np.full((1, 4 * blocks), 4 * blocks - 1), np.arange(4 * blocks)[None])
    got = jax.jit(partial(block_sparse, window=None, scale=0.1, chunk=4))(query, key, value, layout)
    sees = np.tril(np.ones((1, 4 * blocks, 4 * blocks), bool))
    np.testing.assert_allclose(got, reference(query, key, value, layout, sees, None, 0.1), atol=2e-5)


@given(st.integers(0, 2**31), st.sampled_from([None, 3, 12]))
def test_no_block_is_needed_in_vain(seed, window):
    *_, layout, sees = packed(rows=1, tokens=64, head_dim=1, seed=seed)
    distance = layout.positions_BT[0, :, None] - layout.positions_BT[0]
    sees = sees[0] & (distance < (window or 64))
    truly = sees.reshape(16, 4, 8, 8).any(axis=(1, 3))
    needed = np.asarray(Layout(*map(jnp.asarray, layout)).needed(window, 4, 8)[0])
    assert needed[truly].all()
    if window is None:
        np.testing.assert_array_equal(needed, truly)


@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize("window", [None, 20])
def test_block_sparse_gradients_equal_xla(window, trees):
    query, key, value, layout, _ = jax.tree.map(jnp.asarray, packed(rows=2, tokens=60, head_dim=16, trees=trees))
    real = (layout.positions_BT >= 0)[..., None, None]

    def gradients(compute):
        def total(*qkv):
            return jnp.sum(jnp.sin(compute(*qkv, layout, window=window, scale=0.1, chunk=16)) * real)

        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(query, key, value)

    for got, expected in zip(gradients(block_sparse), gradients(attention.xla), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2 * np.finfo(np.float32).eps, atol=2e-6)


@pytest.mark.parametrize(("window", "poisoned"), [(None, slice(32, 96)), (16, slice(0, 96))])
def test_block_sparse_skips_invisible_blocks(window, poisoned):
    """Values that must not be multiplied are NaN: a weight of zero would not hide them."""
    query, key, value, *_ = jax.tree.map(jnp.asarray, packed(rows=1, tokens=128, head_dim=16))
    index = np.arange(128)
    # Without a window all branches of eight tokens continue the first; with one, all are one long sequence.
    ends, positions = np.where(index < 8, 127, index // 8 * 8 + 7), index % 8 + 8 * (index >= 8)
    if window:
        ends, positions = np.full(128, 127), index
    layout = Layout(jnp.asarray(ends[None]), jnp.asarray(positions[None]))
    nan = value.at[:, poisoned].set(jnp.nan)

    @partial(jax.jit, static_argnums=0)
    def last(compute, value):
        return compute(query, key, value, layout, window=window, scale=0.1, chunk=16)[:, -16:]

    np.testing.assert_allclose(last(block_sparse, nan), last(attention.xla, value), atol=2e-5)


def test_block_sparse_over_a_mesh():
    *arrays, sees = packed(rows=4, tokens=64, head_dim=16)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    compute = jax.jit(partial(block_sparse, window=None, scale=0.1, chunk=16))
    with jax.set_mesh(mesh):
        got = compute(*jax.tree.map(jnp.asarray, arrays))
    assert_real(got, reference(*arrays, sees, None, 0.1), arrays[-1])


@pytest.mark.parametrize(
    ("platform", "capability", "head_dim", "dtype", "expected"),
    [
        ("gpu", 8.0, 128, "bfloat16", "flash"),  # Llama on A100
        ("gpu", 8.0, 256, "bfloat16", "flash"),  # Gemma on A100
        ("gpu", 9.0, 256, "bfloat16", "flash"),  # Gemma on H100
        ("gpu", 10.0, 96, "bfloat16", "cudnn"),
        ("gpu", 10.0, 160, "bfloat16", "xla"),
        ("cuda", 9.0, 128, "float32", "xla"),
        ("gpu", 7.5, 128, "bfloat16", "xla"),
        ("gpu", 0.0, 128, "bfloat16", "xla"),
        ("tpu", 5.0, 256, "bfloat16", "flash"),
        ("tpu", 5.0, 64, "bfloat16", "xla"),
        ("cpu", 0.0, 128, "bfloat16", "block_sparse"),
    ],
)
def test_auto_takes_the_best_kernel(platform, capability, head_dim, dtype, expected):
    device = platform, capability, head_dim, 4, jnp.dtype(dtype), 2048
    assert choose_kernel("auto", *device) == expected
    assert choose_kernel("xla", *device) == "xla"


@pytest.mark.parametrize(
    ("platform", "capability", "head_dim", "max_seq_len", "requested", "message"),
    [
        ("cpu", 0.0, 128, 128, "cudnn", "needs an NVIDIA GPU, and this is cpu"),
        ("gpu", 8.0, 256, 128, "cudnn", "up to 128"),
        ("gpu", 8.0, 128, 127, "cudnn", "must be even"),
        ("cpu", 0.0, 128, 128, "flash", "needs an NVIDIA GPU or a TPU, and this is cpu"),
        ("gpu", 8.0, 96, 128, "flash", "head_dim must be one of 64, 128, 256, not 96"),
        ("tpu", 5.0, 64, 128, "flash", "head_dim must be one of 128, 256, not 64"),
        ("tpu", 4.0, 128, 4096, "flash", "max_seq_len=4096 need 20 MiB of the chip's 16"),
        ("tpu", 5.0, 128, 16384, "flash", "max_seq_len=16384 need 68 MiB of the chip's 64"),
        ("gpu", 8.0, 128, 128, "block_sparse", "is for CPUs"),
    ],
)
def test_unsuitable_kernels_are_refused(platform, capability, head_dim, max_seq_len, requested, message):
    with pytest.raises(JaxguardError, match=message):
        choose_kernel(requested, platform, capability, head_dim, 4, jnp.dtype(jnp.bfloat16), max_seq_len)
