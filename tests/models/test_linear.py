from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxguard.models.linear import project

SHAPES = [
    ("BTD,DNH->BTNH", (2, 5, 8), (8, 3, 4)),
    ("BTNH,NHD->BTD", (2, 5, 3, 8), (3, 8, 6)),
    ("BTF,FD->BTD", (2, 5, 8), (8, 6)),
    ("BMD,CD->BMC", (2, 5, 8), (7, 8)),
]
LONG = [
    ("BTF,FD->BTD", (2, 5, 2000), (2000, 6)),  # summed in four parts
    ("BTNH,NHD->BTD", (2, 5, 7, 320), (7, 320, 6)),  # of 2, 2, 2 and 1 heads
    ("BTD,DF->BTF", (2, 5, 1600), (1600, 401)),  # in two, since it is wide
]


def operands(hidden, weight):
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal(shape, dtype=np.float32)) for shape in (hidden, weight)]


def gradients(multiply, *arguments):
    return jax.grad(lambda h, w: (multiply(h, w).astype(jnp.float32) ** 2).sum(), argnums=(0, 1))(*arguments)


@pytest.mark.parametrize(("equation", "hidden", "weight"), SHAPES)
def test_project_equals_einsum(equation, hidden, weight):
    check_same(equation, *operands(hidden, weight))


@pytest.mark.parametrize(("equation", "hidden", "weight"), LONG)
def test_pairwise_sums_equal_einsum(equation, hidden, weight):
    check_same(equation, *(x / 10 for x in operands(hidden, weight)))  # so that long sums are no larger than short ones


def check_same(equation, *arguments):
    def plain(h, w):
        return jnp.einsum(equation, h, w)

    got, expected = ([f(*arguments), *gradients(f, *arguments)] for f in (partial(project, equation), plain))
    for actual, wanted in zip(got, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight_type", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("equation", "hidden", "weight"), SHAPES)
def test_bfloat16_operands_are_summed_in_float32(equation, hidden, weight, weight_type):
    """Forward, operands that bfloat16 can represent lose nothing; backward, the gradient is rounded before it is multiplied."""
    h, w = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in operands(hidden, weight))
    rounded = project(equation, h, w.astype(weight_type), jnp.bfloat16)
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, jnp.einsum(equation, h, w), rtol=1e-6, atol=1e-6)
    got = gradients(lambda h, w: project(equation, h, w, jnp.bfloat16), h, w.astype(weight_type))
    assert [x.dtype for x in got] == [jnp.float32, weight_type]
    for actual, wanted in zip(got, gradients(lambda h, w: jnp.einsum(equation, h, w), h, w), strict=True):
        np.testing.assert_allclose(actual.astype(jnp.float32), wanted, rtol=2e-2, atol=2e-2 * np.abs(wanted).max())


def test_operands_are_rounded():
    one = jnp.full((2, 2), 1 + 2**-12, jnp.float32)
    assert (project("TD,DF->TF", one, one) > 2).all()
    assert (project("TD,DF->TF", one, one, jnp.bfloat16) == 2).all()


def test_pairwise_sums_are_more_accurate():
    hidden, weight = operands((200, 2304), (2304, 300))
    exact = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64)
    ours, plain = (
        np.square(np.asarray(x) - exact).mean() for x in (project("TF,FD->TD", hidden, weight), hidden @ weight)
    )
    assert ours < plain / 2
