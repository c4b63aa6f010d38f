"""Log-odds of prompts that share what is computed, against those of each prompt alone."""

import asyncio

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxguard.config import load
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.config.train import MeshConfig
from jaxguard.guards.backends.jax import generate, load_backend, precision
from jaxguard.guards.backends.jax_decoding import Sampling
from jaxguard.guards.backends.jax_model import PrefixCache, place_model
from jaxguard.guards.backends.jax_scoring import _arrays, _calls, _packed, _Tree, _trees, score, shapes
from jaxguard.guards.protocol import Draft
from jaxguard.models import compute
from jaxguard.models.compute import Compute
from jaxguard.models.decoder import Decoder
from jaxguard.models.sharding import make_mesh, weight_shardings
from jaxguard.models.spec import read_spec
from jaxguard.models.weights import initialize
from jaxguard.utils.errors import JaxguardError

LONGEST, GROWN = 200, 33
OWN = 1 + 25 + 64
"""Tokens of the tree after what all begin with, where a prompt of one token more is a tree of its own."""
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


def reference(spec, weights, prompts, pairs):
    """Log-odds of prompts, each in a row of its own, by the forward pass of training."""
    rows = jnp.asarray([[*prompt, *[0] * (LONGEST - len(prompt))] for prompt in prompts])

    @jax.jit
    def logits(weights, rows):
        decoder = Decoder(spec, weights, Compute())
        return decoder.logits(decoder(rows))

    of_all = logits(weights, rows)
    return [
        float(row[len(p) - 1, a] - row[len(p) - 1, b]) for row, p, (a, b) in zip(of_all, prompts, pairs, strict=True)
    ]


@pytest.fixture(scope="module")
def alone(spec, weights):
    return reference(spec, weights, tree(), PAIRS)


@pytest.mark.parametrize("most_tokens", [pytest.param(64, marks=pytest.mark.slow), 256])
def test_prompts_have_the_odds_of_each_alone(spec, weights, alone, most_tokens):
    """Gemma's window of 16 ends inside the prompts. In a row, what they share is computed once; if declared, once at all."""
    prefix_cache, computed = PrefixCache(place_model(spec, weights, Compute(query_chunk=32))), []
    for _ in range(3):
        odds = next_log_odds(prefix_cache, tree(), PAIRS, most_tokens=most_tokens)
        assert odds == pytest.approx(alone, abs=2e-5)
        assert np.ptp(odds) > 1
        prefix_cache.declare([tree()[0][:37]])
        computed.append(prefix_cache.computed - sum(computed))
    together = 37 + OWN - 1 if most_tokens == 256 else computed[0] - 37
    assert computed == [together + 37, OWN, OWN]


def test_a_draft_is_greedy_if_every_token_is_the_likeliest(spec, weights):
    """Beside the log-odds; for drafts of a prompt that begin alike, and for one of a prompt that begins as another draft does."""
    prefix_cache, prompt = PrefixCache(place_model(spec, weights, Compute(query_chunk=32))), tuple(tree()[0])
    [[completion]] = generate(prefix_cache, [prompt], Sampling(temperature=0, max_tokens=5))
    answer, continued = completion.tokens, Draft(prompt + completion.tokens[:2], completion.tokens[2:])
    others = [Draft(prompt, (*answer[:end], 7, *answer[end + 1 :])) for end in range(5)]
    drafts = [others[0], Draft(prompt, answer), *others[1:], continued]
    odds, greedy = score(prefix_cache, [prompt], PAIRS[:1], drafts, most_tokens=256)
    assert greedy == [False, True, *[False] * 4, True]
    assert odds == pytest.approx(next_log_odds(prefix_cache, [prompt], PAIRS[:1], most_tokens=256), abs=2e-5)
    prefix_cache.declare([prompt + answer[:3]])  # a text that was asked about before
    assert score(prefix_cache, [], [], drafts, most_tokens=256) == ([], [False, True, *[False] * 4, True])


@pytest.mark.parametrize("shape", [MeshConfig(data=8, fsdp=1), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_on_a_mesh_too(spec, weights, alone, shape):
    mesh = make_mesh(shape, jax.devices()[:8])
    placed = jax.device_put(weights, weight_shardings(spec, mesh))
    prefix_cache = PrefixCache(place_model(spec, placed, Compute(attention="block_sparse", query_chunk=32), mesh))
    prefix_cache.declare([tree()[0][:37]])
    draft = Draft(tuple(tree()[0]), (7, 8))
    assert score(prefix_cache, tree(), PAIRS, [draft], most_tokens=128) == (pytest.approx(alone, abs=2e-5), [False])
    assert prefix_cache.reused > 0


def random_prompts(random, heads, texts):
    """Prompts of a few checks: a policy, a text or the beginning of one, and branches of an answer."""
    prompts = []
    for _ in range(random.integers(1, 4)):
        head, text = heads[random.integers(len(heads))], texts[random.integers(len(texts))]
        text = text[: random.integers(1, len(text) + 1)] if random.random() < 0.5 else text
        branches = [random.integers(5, 7, random.integers(0, 9)).tolist() for _ in range(random.integers(1, 4))]
        prompts += [[*head, *text, *branch] for branch in branches]
    return prompts


def next_log_odds(prefix_cache, prompts, pairs, **how):
    return score(prefix_cache, prompts, pairs, (), **how)[0]


def test_a_token_sees_its_own_prompt_alone():
    """Of trees of any size in a row, at the positions that it has in the prompt; and every prompt is there once."""
    for seed in range(100):
        random = np.random.default_rng(seed)
        heads, texts = ([random.integers(5, 400, n).tolist() for n in sizes] for sizes in ((60, 60), (1, 20, 45, 90)))
        prompts = [prompt for _ in range(3) for prompt in random_prompts(random, heads, texts)]
        pairs = [(i, i + 1) for i in range(len(prompts))]
        suffixes = {i: np.asarray(prompt) for i, prompt in enumerate(prompts)}
        asked = {i: int(random.integers(len(prompt))) for i, prompt in enumerate(prompts)}
        trees = _trees(suffixes, asked, 0, int(random.integers(30, 400)))
        scored = []
        for rows, (count, length) in _calls(_packed(trees), 256, 1):
            (tokens, positions, ends, index, own_pairs), targets, _ = _arrays(rows, count, length, pairs)
            for r, own in enumerate(targets):
                for i, slots in own.items():
                    assert len(slots) == len(prompts[i]) - asked[i]
                    for end, slot in enumerate(slots, asked[i] + 1):
                        last = index[r, slot]
                        sees = (np.arange(length) <= last) & (last <= ends[r])
                        assert tokens[r][sees].tolist() == prompts[i][:end]
                        assert positions[r][sees].tolist() == [*range(end)]
                        assert tuple(own_pairs[r, slot]) == pairs[i]
                scored += own
        assert sorted(scored) == [*range(len(prompts))]


def test_a_text_longer_than_a_tree_is_computed_once():
    """With the branches of its answer; another text that begins as it does has a tree of its own."""
    text = list(range(300))
    sequences = [[*text, *branch] for branch in ([1], [1, 2], [1, 3], [4] * 20)] + [[*text[:200], *range(400, 500)]]
    suffixes = {i: np.asarray(sequence) for i, sequence in enumerate(sequences)}
    trees = _trees(suffixes, {i: len(sequence) - 1 for i, sequence in suffixes.items()}, 0, 128)
    assert sorted(len(tree.tokens) for tree in trees) in ([300, 323], [423])


def test_policies_that_begin_alike_are_computed_alone(spec, weights):
    """Their bits would otherwise depend on which came first, and those of a stopped evaluation on where it stopped."""
    prefix_cache = PrefixCache(place_model(spec, weights, Compute(query_chunk=32)))
    prefix_cache.declare([tree()[2][:40], [*tree()[2][:36], 9, 9, 9, 9]])
    assert prefix_cache.computed == prefix_cache.tokens == 80


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [6, 60])
def test_odds_depend_neither_on_the_batch_nor_on_what_is_cached(spec, weights, rounds):
    """Policies that begin alike, texts that are there twice, grow or begin others, in a cache that drops some of them."""
    random = np.random.default_rng(rounds)
    head = random.integers(5, 400, 60).tolist()
    heads = [head, head[:45] + random.integers(5, 400, 20).tolist(), random.integers(5, 400, 40).tolist()]
    texts = [random.integers(5, 400, n).tolist() for n in (1, 20, 45, 90)]
    model = place_model(spec, weights, Compute(query_chunk=32))
    token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 4
    prefix_cache = PrefixCache(model, most_bytes=200 * token)
    prompts, pairs, odds = [], [], []
    for _ in range(rounds):
        own = random_prompts(random, heads, texts)
        begin = own[0][: random.integers(20, len(own[0]) + 1)]
        prefix_cache.declare([heads[random.integers(3)], *([begin] if random.random() < 0.5 else [])])
        assert prefix_cache.bytes <= prefix_cache.most_bytes
        prompts += own
        pairs += random.integers(5, 400, (len(own), 2)).tolist()
        odds += next_log_odds(prefix_cache, own, pairs[-len(own) :], most_tokens=128)
    assert prefix_cache.reused > 0
    assert odds == pytest.approx(reference(spec, weights, prompts, pairs), abs=2e-5)
    again = next_log_odds(PrefixCache(model), prompts, pairs, most_tokens=512)
    assert odds == pytest.approx(again, abs=1e-5)


def test_a_growing_text_costs_its_new_tokens_and_is_cached_once(spec, weights):
    prefix_cache = PrefixCache(place_model(spec, weights, Compute(query_chunk=32)))
    text, end = np.random.default_rng(1).integers(10, 400, 60 + 3 * GROWN).tolist(), [9, 8, 7]
    prompts, odds = [[*text[: 60 + i * GROWN], *end, 6, 5] for i in range(1, 4)], []
    prefix_cache.declare([text[:60]])
    for prompt in prompts:
        before = prefix_cache.computed
        odds += next_log_odds(prefix_cache, [prompt], PAIRS[:1], growing=[prompt[:-2]], most_tokens=128)
        assert prefix_cache.computed - before == GROWN + len(end) + 2
        assert prefix_cache.tokens == 60 + len(prompt) - 2
    assert odds == pytest.approx(reference(spec, weights, prompts, PAIRS[:1] * len(prompts)), abs=2e-5)
    before = prefix_cache.computed
    next_log_odds(prefix_cache, [[*text[:60], 9]], PAIRS[:1], most_tokens=128)  # what others share is not split
    assert prefix_cache.computed - before == 1


def test_texts_that_grow_are_kept_from_rows_of_several(spec, weights):
    """Whatever shares their batch, with branches and drafts; and where a text is shorter than it was, too."""
    prefix_cache, random = PrefixCache(place_model(spec, weights, Compute(query_chunk=32))), np.random.default_rng(2)
    head, *texts = (random.integers(10, 400, n).tolist() for n in (40, 120, 90, 100))
    prefix_cache.declare([head])
    for length in (80, 60, 120):
        grown = [[*head, *text[:length]] for text in texts]
        prompts = [[*text, *branch] for text in grown for branch in ([7], [8, 9])]
        pairs = [(i + 5, i + 6) for i in range(len(prompts))]
        drafts = [Draft(tuple(text), (5, 6)) for text in grown]
        odds, greedy = score(prefix_cache, prompts, pairs, drafts, grown, most_tokens=512)
        assert odds == pytest.approx(reference(spec, weights, prompts, pairs), abs=2e-5)
        assert greedy == [False] * 3
    assert prefix_cache.reused > 3 * 60


def test_what_is_used_least_goes_first(spec, weights):
    """There is room for two; what is larger than both is not cached."""
    model = place_model(spec, weights, Compute(query_chunk=32))
    one, other, third = (np.random.default_rng(i).integers(5, 400, 40).tolist() for i in range(3))
    prefix_cache = PrefixCache(model)
    prefix_cache.declare([one])
    prefix_cache = PrefixCache(model, most_bytes=2 * prefix_cache.bytes)
    prefix_cache.declare([one, other])
    next_log_odds(prefix_cache, [[*one, 7]], PAIRS[:1], most_tokens=64)
    prefix_cache.declare([third])
    before = prefix_cache.computed
    next_log_odds(prefix_cache, [[*one, 7], [*third, 7], [*other, 7]], PAIRS[:3], most_tokens=64)
    assert prefix_cache.computed - before == 1 + 1 + 41
    prefix_cache.declare([[5] * 500])
    assert prefix_cache.tokens == len(one) + len(third)


def test_no_prompts_an_empty_one_and_one_too_long(spec, weights):
    prefix_cache = PrefixCache(place_model(spec, weights, Compute()))
    assert next_log_odds(prefix_cache, [], [], most_tokens=64) == []
    for prompt, message in (([], "prompt 1 has no tokens"), ([5] * spec.max_position_embeddings, "shorten it")):
        with pytest.raises(JaxguardError, match=message):
            next_log_odds(prefix_cache, [[5], prompt], PAIRS[:2], most_tokens=64)


@pytest.mark.parametrize("row_multiple", [1, 4])
@pytest.mark.parametrize("most_tokens", [200, 1024, 3000])
def test_calls_have_few_shapes(row_multiple, most_tokens):
    random = np.random.default_rng(0)
    known = shapes(most_tokens, row_multiple)
    assert len(known) == len(set(known)) <= 48
    for _ in range(100):
        lengths = random.integers(1, min(most_tokens, random.integers(2, 3001)), random.integers(1, 40))
        trees = [_Tree(tokens=[0] * int(n), targets={i: [0]}) for i, n in enumerate(lengths)]
        calls = list(_calls(_packed(trees), most_tokens, row_multiple))
        assert sorted(i for rows, _ in calls for row in rows for tree in row for i in tree.targets) == [
            *range(len(trees))
        ]
        for rows, (count, length) in calls:
            assert (count, length) in known
            assert len(rows) <= count < len(rows) + row_multiple
            assert max(sum(len(tree.tokens) for tree in row) for row in rows) <= length


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
