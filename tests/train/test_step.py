"""The recipe survives packing, accumulation and sharding: same loss, same gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from jaxguard.config import load
from jaxguard.data.encoding import EncodedExample
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.packing import Batch, Order, Row, Shape, assemble, bucketed, pack
from jaxguard.models import compute as compute_module
from jaxguard.models.attention.flash import Tile, Tiling
from jaxguard.models.compute import Compute, choose_compute
from jaxguard.models.sharding import batch_sharding, make_mesh, row_multiple, shard_batch
from jaxguard.models.spec import read_spec
from jaxguard.models.weights import initialize
from jaxguard.train.objectives import Likelihood, Objective
from jaxguard.train.step import build_program, logprobs, loss_and_gradient

ROW_TOKENS = 64
_gradient = jax.jit(loss_and_gradient, static_argnames=("objective", "spec", "compute", "accumulation", "loss_chunk"))
SFT = Likelihood()


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def spec(request, write_llama_config, write_gemma3_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spec")
    if request.param == "llama":
        write_llama_config(folder)
    else:
        write_gemma3_config(folder)
    return read_spec(folder)


@pytest.fixture(scope="module")
def weights(spec):
    found = initialize(spec, jax.random.key(0))
    # Deviation 0.02 leaves the logits nearly uniform; a sharper model tells errors apart.
    return {path: x if "norm" in path else 5 * x for path, x in found.items()}


def sequences(count: int, vocab: int = 512, seed: int = 0) -> list[EncodedExample]:
    """Random examples of 6 to 40 tokens, the last few of which are trained on."""
    random = np.random.default_rng(seed)
    out = []
    for i in range(count):
        length = int(random.integers(6, 40))
        target = np.arange(length) >= length - int(random.integers(1, 6))
        out.append(
            EncodedExample(
                str(i), Mode.DIRECT, random.integers(0, vocab, length).astype(np.int32), target, (), (), False
            )
        )
    return out


def config(**overrides):
    tree = {
        "name": "test",
        "model": {
            "checkpoint": "none",
            "compute_dtype": "float32",
            "remat": "full",
            "query_chunk": 32,
            "loss_chunk": 64,
        },
        "data": {"train": [{"kind": "jsonl", "path": "none"}], "max_seq_len": ROW_TOKENS},
        "optimizer": {"learning_rate": 1e-2},
        "train": {"batch_size": 16},
    }
    for key, value in overrides.items():
        tree[key] = tree.get(key, {}) | value
    return load(tree)


def gradient(spec, weights, batch: Batch, accumulation: int = 1, objective: Objective = SFT, **compute):
    settings = {"spec": spec, "compute": Compute(**compute), "accumulation": accumulation, "loss_chunk": 64}
    return _gradient(weights, batch, objective, **settings)[:2]


def packed(examples, row_multiple: int = 1) -> Batch:
    rows = pack(examples, ROW_TOKENS, row_multiple)
    return assemble(rows, bucketed(rows, ROW_TOKENS, row_multiple))


def unpacked(examples) -> Batch:
    rows = [row for s in examples for row in pack([s], ROW_TOKENS, 1)]
    return assemble(rows, bucketed(rows, ROW_TOKENS, 1))


def assert_same(found, expected, tolerance: float = 1e-5):
    """Every leaf within `tolerance` of the expected leaf, relative to that leaf's largest value."""
    paths, _ = jax.tree.flatten_with_path(expected)
    for (path, want), got in zip(paths, jax.tree.leaves(found), strict=True):
        want, got = np.asarray(want), np.asarray(got)
        difference = np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)
        assert difference <= tolerance, f"{jax.tree_util.keystr(path)}: relative difference {difference:.2e}"


def test_packed_gradient_equals_the_unpacked_one(spec, weights):
    examples = sequences(16)
    assert packed(examples).tokens_BT.shape[0] < 16
    assert_same(gradient(spec, weights, packed(examples)), gradient(spec, weights, unpacked(examples)))


def alike(count: int, seed: int = 0, answers: int = 2) -> list[EncodedExample]:
    """Every third prompt begins with nothing known, the others with one of two policies; each has so many answers."""
    random = np.random.default_rng(seed)
    policies = [random.integers(0, 512, n).astype(np.int32) for n in (0, 9, 17)]
    out = []
    for i, s in enumerate(sequences(count // answers, seed=seed)):
        policy, targets = policies[i % 3], int(s.loss_mask.sum())
        for _ in range(answers):
            tokens = np.int32([*policy, *s.tokens[:-targets], *random.integers(0, 512, targets)])
            mask = np.concatenate([np.zeros(len(policy), bool), s.loss_mask])
            out.append(dataclasses.replace(s, tokens=tokens, loss_mask=mask))
    return out


@pytest.mark.parametrize(
    ("attention", "chunk", "accumulation", "answers"),
    [
        ("xla", 16, 1, 8),
        ("block_sparse", 16, 2, 2),
        ("flash", 16, 1, 8),
        pytest.param("xla", 64, 2, 2, marks=pytest.mark.slow),
        pytest.param("block_sparse", 16, 1, 8, marks=pytest.mark.slow),
        pytest.param("block_sparse", 64, 1, 2, marks=pytest.mark.slow),
    ],
)
def test_gradient_of_trees_equals_the_unpacked_one(spec, weights, attention, chunk, accumulation, answers):
    """Pairs and groups of eight answers to a prompt, after policies that several prompts share."""
    examples = alike(16, answers=answers)
    batch = packed(examples, accumulation)
    assert len(batch.valid_positions) < 0.8 * sum(len(s.tokens) for s in examples)
    tile = Tile(chunk, chunk)
    tiling = Tiling("gpu", tile, tile, tile, interpret=True) if attention == "flash" else None
    found = gradient(spec, weights, batch, accumulation, attention=attention, query_chunk=chunk, tiling=tiling)
    assert_same(found, gradient(spec, weights, unpacked(examples)))


@pytest.mark.parametrize(("units", "matmul_dtype"), [(True, jnp.bfloat16), (False, None)])
def test_a_cpu_multiplies_in_bfloat16_if_it_has_units_for_that(spec, monkeypatch, units, matmul_dtype):
    monkeypatch.setattr(compute_module, "has_bfloat16_units", lambda: units)
    chosen = choose_compute(config(model={"compute_dtype": "bfloat16"}).model, spec, make_mesh(config().mesh), 512)
    assert (chosen.dtype, chosen.matmul_dtype, chosen.attention) == (jnp.float32, matmul_dtype, "block_sparse")


def test_operands_are_rounded_to_bfloat16_and_nothing_else(spec, weights):
    batch = packed(alike(16))
    loss, found = gradient(spec, weights, batch, attention="block_sparse", matmul_dtype=jnp.dtype(jnp.bfloat16))
    exact_loss, exact = gradient(spec, weights, batch)
    assert abs(loss - exact_loss) < 0.01 * exact_loss
    assert {x.dtype for x in found.values()} == {jnp.dtype(jnp.float32)}
    found, exact = (np.concatenate([np.ravel(x) for x in tree.values()]) for tree in (found, exact))
    assert np.linalg.norm(found - exact) < 0.05 * np.linalg.norm(exact)


def test_gradients_in_buffers_are_those_of_the_weights(spec, weights):
    batch = jax.tree.map(jnp.asarray, packed(sequences(8)))

    def loss(weights):
        ids = batch.target_ids_BM[..., None]
        found = logprobs(weights, batch, ids, spec=spec, compute=Compute(), loss_chunk=64)[..., 0]
        return SFT.loss(found, batch)[0] / SFT.count(batch)

    assert_same(gradient(spec, weights, batch), jax.jit(jax.value_and_grad(loss))(weights))


def test_loss_is_the_mean_over_all_target_tokens(spec, weights):
    examples = sequences(3)
    loss, _ = gradient(spec, weights, packed(examples))
    each = [(gradient(spec, weights, unpacked([s]))[0], s.loss_mask.sum()) for s in examples]
    expected = sum(float(x) * n for x, n in each) / sum(n for _, n in each)
    assert abs(float(loss) - expected) < 1e-5 * expected


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_gradient_equals_the_big_batch(spec, weights, accumulation):
    examples = sequences(16)
    assert_same(
        gradient(spec, weights, packed(examples, accumulation), accumulation), gradient(spec, weights, packed(examples))
    )


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_nothing(spec, weights, remat):
    batch = packed(sequences(8))
    assert_same(gradient(spec, weights, batch, remat=remat, query_chunk=16), gradient(spec, weights, batch))


def test_gradient_of_padding_and_of_other_examples_does_not_leak(spec, weights):
    """What stands beside an example in its row does not change what it computes."""
    ours, others, different = sequences(1), sequences(2, seed=1), sequences(2, seed=2)

    def neighbours(tokens_of):
        """Untrained examples of the same lengths, with other tokens."""
        pairs = zip(others, tokens_of, strict=True)
        return [
            dataclasses.replace(o, tokens=np.resize(t.tokens, o.tokens.shape), loss_mask=np.zeros_like(o.loss_mask))
            for o, t in pairs
        ]

    shape = Shape(3, 128, 64)
    rows = [Row(Order([*neighbours(t), *ours], share=False), range(3)) for t in (others, different)]
    a, b = (gradient(spec, weights, assemble([row], shape)) for row in rows)
    assert_same(a, b, 1e-6)
    assert float(a[0]) > 0


MESHES = (
    {"data": 1, "fsdp": 1, "tensor": 1},
    {"data": 1, "fsdp": 8, "tensor": 1},
    {"data": 1, "fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 1, "fsdp": 2, "line": 2, "tensor": 2},  # many TPU chips'
)


def two_updates(spec, weights, sizes, examples=sequences):
    """Adam's first moments after one update, which are a tenth of the gradient, and the metrics of two."""
    cfg = config(optimizer={"clip_norm": None})
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    with jax.set_mesh(mesh):
        program = build_program(cfg, spec, mesh, steps=10)
        placed = jax.device_put(weights, {k: x.sharding for k, x in program.state["weights"].items()})
        state = program.initialize(jax.tree.map(jnp.copy, placed))
        metrics, moments = [], None
        for seed in (0, 1):
            rows = pack(examples(16, seed=seed), ROW_TOKENS, 8)
            batch = assemble(rows, bucketed(rows, ROW_TOKENS, 8))
            state, found = program.train_step(state, shard_batch(batch, batch_sharding(mesh)))
            metrics.append(jax.tree.map(np.asarray, found))
            moments = moments or jax.tree.map(np.asarray, optax.tree.get(state["optimizer"], "mu"))
        return moments, metrics


@pytest.mark.parametrize(
    ("examples", "meshes"), [pytest.param(sequences, MESHES[1:], marks=pytest.mark.slow), (alike, MESHES[3:])]
)
def test_every_mesh_computes_the_same_gradient_and_update(spec, weights, examples, meshes):
    expected = two_updates(spec, weights, MESHES[0], examples)
    assert expected[1][1].loss != expected[1][0].loss
    for mesh in meshes:
        assert_same(two_updates(spec, weights, mesh, examples), expected)


def test_weights_are_cut_over_fsdp(spec):
    mesh = make_mesh(config(mesh={"fsdp": 8}).mesh)
    program = build_program(config(), spec, mesh, steps=10)
    whole = cut = 0
    for x in jax.tree.leaves(program.state["weights"]):
        whole += x.size
        cut += int(np.prod(x.sharding.shard_shape(x.shape)))
    assert cut < whole / 7


def test_more_devices_than_examples_is_refused():
    mesh = make_mesh(config(mesh={"fsdp": 8}).mesh)
    with pytest.raises(Exception, match=r"train\.batch_size=16 cannot be divided"):
        row_multiple(config(train={"accumulation": 4}), mesh)


def test_mesh_larger_than_the_devices_is_refused():
    with pytest.raises(Exception, match=r"mesh\.fsdp=16.*but there are 8"):
        make_mesh(config(mesh={"fsdp": 16}).mesh)
