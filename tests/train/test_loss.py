"""Blocks of the vocabulary give what the whole of it gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxguard.config.train import MeshConfig
from jaxguard.models.sharding import make_mesh
from jaxguard.train.objectives import target_logprobs

ROWS, TOKENS, WIDTH, VOCABULARY = 3, 11, 16, 97


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    hidden, head = random.normal(size=(ROWS, TOKENS, WIDTH)), random.normal(size=(VOCABULARY, WIDTH))
    index = random.integers(0, TOKENS, (ROWS, 7))
    ids = random.integers(0, VOCABULARY, (ROWS, 7, 2))
    return jnp.float32(hidden), jnp.float32(head), jnp.int32(index), jnp.int32(ids)


def plain(hidden_BTD, head_VD, index_BM, ids_BMQ):
    logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, head_VD, preferred_element_type=jnp.float32)
    logprobs_BMV = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), index_BM[..., None], axis=1)
    return jnp.take_along_axis(logprobs_BMV, ids_BMQ, axis=2)


def gradients(function, hidden, head, *rest):
    def total(hidden, head):
        actual = function(hidden, head, *rest)
        return jnp.sum(actual * jnp.cos(jnp.arange(actual.size).reshape(actual.shape)))

    return jax.jit(jax.grad(total, argnums=(0, 1)))(hidden, head)


@pytest.mark.parametrize("chunk", [1, 2, 5, 21, 1000])  # 21, 11, 5 and 1 blocks, of which only the last has no padding
def test_logprobs_and_gradients_are_those_of_all_logits(batch, chunk):
    def blocks(*args):
        return target_logprobs(*args, chunk)

    np.testing.assert_allclose(jax.jit(blocks)(*batch), jax.jit(plain)(*batch), atol=1e-5)
    for actual, expected in zip(gradients(blocks, *batch), gradients(plain, *batch), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize(("keep_logits", "products"), [(False, 4), (True, 3)])
def test_logits_are_computed_once_if_they_are_kept(batch, keep_logits, products):
    def blocks(*args):
        return target_logprobs(*args, 5, keep_logits=keep_logits)

    hidden, head, *rest = batch
    program = jax.make_jaxpr(lambda *args: gradients(blocks, *args, *rest))(hidden, head)
    assert str(program).count("dot_general") == products
    for actual, expected in zip(gradients(blocks, *batch), gradients(plain, *batch), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_few_positions_gather_no_more_of_the_head_than_their_logits_take(batch):
    """Three positions of four: one block on a device; where fsdp cuts the head's 16 numbers, four."""
    hidden, head, index, ids = batch
    few = hidden, head, index[:, :1], ids[:, :1]

    def blocks(*args):
        return target_logprobs(*args, 4)

    assert "length=1\n" in str(jax.make_jaxpr(blocks)(*few))
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])):
        assert "length=4\n" in str(jax.make_jaxpr(blocks)(*few))
        np.testing.assert_allclose(jax.jit(blocks)(*few), plain(*few), atol=1e-5)


def test_in_bfloat16_blocks_add_up_in_float32(batch):
    """The gradient errs no more with many blocks than with one."""
    hidden, head, *rest = batch
    expected = gradients(plain, *batch)

    def error(chunk):
        def blocks(*args):
            return target_logprobs(*args, chunk)

        actual = gradients(blocks, hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16), *rest)
        return [float(jnp.linalg.norm(f - e) / jnp.linalg.norm(e)) for f, e in zip(actual, expected, strict=True)]

    many, one = error(1), error(1000)
    assert max(many) < 0.01
    assert all(m < 1.1 * o for m, o in zip(many, one, strict=True)), (many, one)
