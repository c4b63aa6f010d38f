"""Schedule, clipping and decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxguard.config.train import OptimizerConfig
from jaxguard.models.spec import read_spec
from jaxguard.models.weights import abstract
from jaxguard.train.step import learning_rate, optimizer


@pytest.fixture(scope="module")
def spec(write_llama_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spec")
    write_llama_config(folder)
    return read_spec(folder)


def some(spec, value: float):
    return {path: jnp.full(x.shape, value, x.dtype) for path, x in abstract(spec).items()}


def update(transformation, gradient, weights):
    """The first changes, and the state after them."""
    first = jax.jit(lambda *trees: transformation.update(trees[0], transformation.init(trees[1]), trees[1]))
    return first(gradient, weights)


def test_cosine_follows_its_formula_after_the_warmup():
    config = OptimizerConfig(learning_rate=2e-5, warmup_steps=10, final_learning_rate_share=0.1)
    rate = learning_rate(config, steps=110)
    assert float(rate(0)) == pytest.approx(2e-5 / 11)
    assert float(rate(10)) == pytest.approx(2e-5)
    assert float(rate(60)) == pytest.approx(2e-5 * (0.1 + 0.9 * 0.5), rel=1e-5)
    assert float(rate(110)) == pytest.approx(2e-6, rel=1e-5)
    rates = [float(rate(s)) for s in range(111)]
    assert np.argmax(rates) == 10


@pytest.mark.parametrize(("schedule", "half"), [("linear", 0.5), ("constant", 1.0), ("cosine", 0.5)])
def test_schedules_start_at_the_peak_without_warmup(schedule, half):
    rate = learning_rate(OptimizerConfig(learning_rate=1.0, schedule=schedule), steps=100)
    assert float(rate(0)) == pytest.approx(1.0)
    assert float(rate(50)) == pytest.approx(half)


@pytest.mark.parametrize("clip", [1e-2, None])
def test_clipping_bounds_what_adam_sees(spec, clip):
    gradient = some(spec, 3e-3)
    transformation = optimizer(OptimizerConfig(clip_norm=clip), spec, steps=10)
    _, state = update(transformation, gradient, gradient)
    seen = float(optax.tree.norm(optax.tree.get(state, "mu"))) / 0.1
    assert seen == pytest.approx(clip or float(optax.tree.norm(gradient)), rel=1e-4)


def test_decay_shrinks_matrices_and_spares_norms(spec):
    weights, gradient = some(spec, 1.0), some(spec, 0.0)
    transformation = optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5), spec, steps=10)
    changes, _ = update(transformation, gradient, weights)
    for path, change in changes.items():
        np.testing.assert_allclose(change, 0.0 if "norm" in path else -0.05, rtol=1e-5)


def test_the_recipe_decays_nothing(spec):
    weights, gradient = some(spec, 1.0), some(spec, 0.0)
    transformation = optimizer(OptimizerConfig(), spec, steps=10)
    changes, _ = update(transformation, gradient, weights)
    assert all(not np.any(change) for change in changes.values())
