import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxguard.errors import JaxguardError
from jaxguard.models import attention_kernels
from jaxguard.models.attention_kernels import choose


def reference(query, key, value, segments, window, scale):
    """The definition, one score at a time in matrix form."""
    index = np.arange(query.shape[1])
    distance = index[:, None] - index[None, :]
    near = (distance >= 0) & (distance < (window or query.shape[1]))
    sees = near & (segments[:, :, None] == segments[:, None, :])
    key, value = (np.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    scores = np.where(sees[:, None], np.einsum("btnh,bsnh->bnts", query, key) * scale, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), value)


def packed(rows, tokens, heads=4, kv_heads=2, head_dim=128, seed=0):
    random = np.random.default_rng(seed)
    query, key, value = (
        random.normal(size=(rows, tokens, n, head_dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads)
    )
    segments = np.zeros((rows, tokens), np.int32)
    for row in segments:
        cuts = np.sort(random.choice(np.arange(1, tokens), 3, replace=False))
        for i, (start, end) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True)):
            row[start:end] = i + 1  # the rest is padding
    return query, key, value, segments


@pytest.mark.parametrize("window", [None, 1, 40, 1000])
def test_splash_is_packed_causal_attention(window):
    query, key, value, segments = packed(rows=2, tokens=256)
    got = attention_kernels.splash(*map(jnp.asarray, (query, key, value, segments)), window, 0.1, interpret=True)
    expected = reference(query, key, value, segments, window, 0.1)
    real = segments > 0
    np.testing.assert_allclose(np.asarray(got)[real], expected[real], atol=2e-5)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("window", [None, 1, 20, 1000])
def test_what_cudnn_is_asked_for_is_packed_causal_attention(monkeypatch, window):
    """cuDNN itself needs a GPU; JAX computes the same request, to the letter, without it."""
    ask = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **k: ask(*a, **k | {"implementation": "xla"}))
    query, key, value, segments = packed(rows=2, tokens=64, head_dim=16)
    got = attention_kernels.cudnn(*map(jnp.asarray, (query, key, value, segments)), window, 0.1)
    real = segments > 0
    np.testing.assert_allclose(got[real], reference(query, key, value, segments, window, 0.1)[real], atol=2e-5)
    assert np.isfinite(got).all()


def test_splash_over_a_mesh_is_splash_on_one_device():
    arrays = packed(rows=4, tokens=128)
    expected = reference(*arrays, None, 0.1)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)

    def run(query, key, value, segments):
        return attention_kernels.splash(query, key, value, segments, None, 0.1, interpret=True)

    with jax.set_mesh(mesh):
        got = jax.jit(run)(*arrays)
    assert got.sharding.shard_shape(got.shape) == (1, 128, 2, 128)
    real = arrays[-1] > 0
    np.testing.assert_allclose(np.asarray(got)[real], expected[real], atol=2e-5)


def test_splash_gradient():
    query, key, value, segments = (jnp.asarray(x) for x in packed(rows=1, tokens=128))
    real = (segments > 0)[..., None, None]

    def loss(attend, *qkv):
        return jnp.sum(jnp.where(real, attend(*qkv), 0) ** 2)

    def plain(query, key, value):
        index = jnp.arange(128)
        sees = (index[:, None] >= index) & (segments[:, None, :, None] == segments[:, None, None, :])
        return jax.nn.dot_product_attention(query, key, value, mask=sees, scale=0.1, implementation="xla")

    def fused(query, key, value):
        return attention_kernels.splash(query, key, value, segments, None, 0.1, interpret=True)

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
        ("gpu", None, 128, "bfloat16", "xla"),
        ("tpu", None, 256, "bfloat16", "splash"),
        ("tpu", None, 64, "bfloat16", "xla"),
        ("cpu", None, 128, "bfloat16", "xla"),
    ],
)
def test_auto_takes_the_best_that_works(platform, capability, head_dim, dtype, expected):
    assert choose(platform, capability, head_dim, dtype, row_tokens=2048) == expected
    assert choose(platform, capability, head_dim, dtype, "xla", row_tokens=2048) == "xla"


@pytest.mark.parametrize(
    ("platform", "capability", "head_dim", "row_tokens", "requested", "message"),
    [
        ("cpu", None, 128, 128, "cudnn", "needs an NVIDIA GPU, and this is cpu"),
        ("gpu", 8.0, 256, 128, "cudnn", "up to 128 dimensions"),
        ("gpu", 8.0, 128, 127, "cudnn", "even number of tokens"),
        ("gpu", 8.0, 128, 128, "splash", "needs a TPU"),
        ("tpu", None, 128, 200, "splash", "tokens of a row must be a multiple of 128, not 200"),
        ("tpu", None, 128, 128, "flash", "known: auto, cudnn, splash, xla"),
    ],
)
def test_a_forced_kernel_that_cannot_work_says_why(platform, capability, head_dim, row_tokens, requested, message):
    with pytest.raises(JaxguardError, match=message):
        choose(platform, capability, head_dim, jnp.bfloat16, requested, row_tokens)
