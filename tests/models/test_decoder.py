"""The decoder as a flax module, the names that profiles show, and the two forms of RMSNorm."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxguard.config import load
from jaxguard.data.packing import Shape
from jaxguard.models.compute import REFERENCE
from jaxguard.models.decoder import Decoder
from jaxguard.models.sharding import make_mesh
from jaxguard.models.spec import read_spec
from jaxguard.models.weights import initialize, table
from jaxguard.train.step import build_program


@pytest.fixture(scope="module")
def spec(write_gemma3_config, tmp_path_factory):
    return read_spec(write_gemma3_config(tmp_path_factory.mktemp("decoder")))


@pytest.fixture(scope="module")
def weights(spec):
    return initialize(spec, jax.random.key(0))


def test_nnx_split_names_the_table(spec, weights):
    graph, state = nnx.split(Decoder(spec, weights), nnx.Param)
    assert {".".join(path) for path, _ in nnx.to_flat_state(state)} == {row.path for row in table(spec)}
    tokens = jnp.arange(8)[None]
    merged = jax.jit(lambda state: nnx.merge(graph, state)(tokens))(state)
    np.testing.assert_array_equal(merged, jax.jit(lambda weights: Decoder(spec, weights)(tokens))(weights))


def test_blocks_are_named_in_the_program(spec):
    data = {"train": [{"kind": "jsonl", "path": "none"}]}
    config = load({"name": "x", "model": {"checkpoint": "none"}, "data": data})
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        program = build_program(config, spec, mesh, steps=1)
        text = program.train_step.lower(program.state, program.batch(Shape(8, 64, 8))).as_text(debug_info=True)
    blocks = [f"layer/attention/{part}" for part in ("norm", "qkv", "rope", "attend", "out")]
    for block in (*blocks, "embed", "layer/mlp", "final_norm", "head", "loss", "optimizer"):
        assert f"/{block}/" in text or f"({block})/" in text or f'"{block}/' in text, block


def test_norm_by_einsum_equals_the_elementwise_one(spec, weights):
    def loss(weights, compute):
        return Decoder(spec, weights, compute)(jnp.arange(16)[None])[..., 0].sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    by_einsum, elementwise = gradient(weights, replace(REFERENCE, norm_by_einsum=True)), gradient(weights, REFERENCE)
    for got, expected in zip(jax.tree.leaves(by_einsum), jax.tree.leaves(elementwise), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
