"""Log-odds of packed prompts against those of each prompt alone."""

import asyncio

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxguard.config import load
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.config.train import MeshConfig
from jaxguard.data.packing import pack, packed_tokens
from jaxguard.guards.backends.jax import _sequences, load_backend, next_log_odds, place_model, precision
from jaxguard.models import compute
from jaxguard.models.compute import Compute
from jaxguard.models.decoder import Decoder
from jaxguard.models.sharding import make_mesh, weight_shardings
from jaxguard.models.spec import read_spec
from jaxguard.models.weights import initialize
from jaxguard.utils.errors import JaxguardError

PAIRS = [(7, 300), (8, 9), (7, 300), (11, 12), (300, 7), (40, 41), (42, 43)]


def tree(shared: int = 37) -> list[list[int]]:
    """Seven prompts that begin alike; some go on from others, and one is there twice."""
    random = np.random.default_rng(0)
    head, long, other = (random.integers(5, 400, n).tolist() for n in (shared, 60, 25))
    one = head + long
    return [head + other, one[:-20], [*one, 9, 9], [*one, 9, 8, 7], one, one[:-20], head + other[:1]]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def spec(request, write_llama_config, write_gemma3_config, tmp_path_factory):
    write = write_llama_config if request.param == "llama" else write_gemma3_config
    return read_spec(write(tmp_path_factory.mktemp("spec")))


@pytest.fixture(scope="module")
def weights(spec):
    return {path: x if "norm" in path else 6 * x for path, x in initialize(spec, jax.random.key(0)).items()}


@pytest.fixture(scope="module")
def alone(spec, weights):
    """Log-odds of each prompt of the tree in a row of its own."""
    longest = max(map(len, tree()))
    rows = jnp.asarray([prompt + [0] * (longest - len(prompt)) for prompt in tree()])

    @jax.jit
    def logits(weights, rows):
        decoder = Decoder(spec, weights, Compute())
        return decoder.logits(decoder(rows))

    found = logits(weights, rows)
    return [float(row[len(p) - 1, a] - row[len(p) - 1, b]) for row, p, (a, b) in zip(found, tree(), PAIRS, strict=True)]


@pytest.mark.parametrize("attention", ["xla", "block_sparse"])
@pytest.mark.parametrize("max_seq_len", [64, 256])
def test_packed_prompts_have_the_odds_of_each_alone(spec, weights, alone, attention, max_seq_len):
    """Gemma's window of 16 ends inside the prompts; the shorter rows hold one sequence, the longer ones all."""
    model = place_model(spec, weights, Compute(attention=attention, query_chunk=32))
    found = next_log_odds(model, tree(), PAIRS, max_seq_len=max_seq_len)
    assert found == pytest.approx(alone, abs=2e-5)
    assert np.ptp(found) > 1


@pytest.mark.parametrize("shape", [MeshConfig(data=8, fsdp=1), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_on_a_mesh_too(spec, weights, alone, shape):
    mesh = make_mesh(shape, jax.devices()[:8])
    placed = jax.device_put(weights, weight_shardings(spec, mesh))
    model = place_model(spec, placed, Compute(attention="block_sparse", query_chunk=32), mesh)
    found = next_log_odds(model, tree(), PAIRS, max_seq_len=128)
    assert found == pytest.approx(alone, abs=2e-5)


def test_what_prompts_share_is_computed_once():
    """Of a row; and a prompt that another goes on from costs nothing."""
    prompts = tree()
    packed = _sequences(prompts)
    assert sorted(len(ends) for _, ends in packed) == [1, 1, 2, 3]
    [row] = pack([sequence for sequence, _ in packed], 512, 1)
    # head; the second copy of a prompt; the rest of the two longest; the other; and a token to predict after each.
    assert packed_tokens(row) == 37 + 40 + (60 + 2) + (60 + 3) + 25 + 4
    assert sum(map(len, prompts)) == 550


def test_no_prompts_an_empty_one_and_one_too_long(spec, weights):
    model = place_model(spec, weights, Compute())
    assert next_log_odds(model, [], [], max_seq_len=64) == []
    for prompt, message in (([], "prompt 1 has no tokens"), ([5] * spec.max_position_embeddings, "shorten it")):
        with pytest.raises(JaxguardError, match=message):
            next_log_odds(model, [[5], prompt], PAIRS[:2], max_seq_len=64)


def test_a_cpu_scores_in_float32_whatever_training_rounds(tiny_config, tiny_checkpoint, tmp_path, monkeypatch):
    """Rounded weights would shift the log-odds of all prompts alike. The bound of docs/guards.md, against float64 in torch."""
    torch = pytest.importorskip("torch", reason="torch is the reference")
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(compute, "has_bfloat16_units", lambda: True)
    config = load(str(tiny_config), ["model.compute_dtype=bfloat16", "mesh.data=8"])
    backend = load_backend(tiny_checkpoint, config, EvaluateConfig())
    odds = asyncio.run(backend.log_odds(tree(), PAIRS))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = [theirs(torch.tensor([prompt]), use_cache=False).logits[0, -1] for prompt in tree()]
    expected = [float(row[a] - row[b]) for row, (a, b) in zip(logits, PAIRS, strict=True)]
    assert odds == pytest.approx(expected, abs=1e-5)
    assert precision(config) == "float32"
