"""The SGLang backend against real servers, beside transformers and our own sampler: `make test-sglang`."""

import asyncio
import dataclasses
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is the reference, and makes the weights")
import torch
import transformers
from safetensors.torch import save_file

import sglang_server
from jaxguard.config.evaluate import EvaluateConfig, ServerConfig
from jaxguard.data.format.template import load_tokenizer, token_ids
from jaxguard.guards.backends.jax import generate
from jaxguard.guards.backends.jax_decoding import Sampling
from jaxguard.guards.backends.jax_model import PrefixCache, place_model
from jaxguard.guards.backends.openai import open_openai
from jaxguard.guards.backends.sglang import open_sglang, serve, swap_weights
from jaxguard.guards.protocol import Completion
from jaxguard.models.compute import Compute
from jaxguard.models.decoder import Decoder
from jaxguard.models.hf_io.checkpoints import read_weights
from jaxguard.models.spec import read_spec
from jaxguard.utils.errors import JaxguardError

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.skipif(not sglang_server.PYTHON.is_file(), reason="no SGLang: run `make sglang-cpu`"),
]
END = 4  # of the tiny tokenizer's turns, where SGLang stops in any case
NEW = 24
GREEDY = EvaluateConfig(temperature=0)
SMOLLM2 = sglang_server.ROOT / "runs" / "demo" / "base"
TEXTS = ("Mix flour, water, salt and yeast, then", "The capital of France is Paris. The Eiffel Tower was built in")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sglang")


@pytest.fixture(scope="module")
def checkpoint(folder, tiny_tokenizer_folder, write_llama_config, write_gemma3_config):
    """checkpoint(name, seed): tiny, and so random that the likeliest token differs from place to place."""

    def make(name, seed=0):
        path = folder / f"{name}{seed}"
        if not path.exists():
            shutil.copytree(tiny_tokenizer_folder, path)
            (write_llama_config if name == "llama" else write_gemma3_config)(path)
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(path))
            with torch.no_grad():
                for part, weight in model.named_parameters():
                    weight.normal_(0, 0.3 if "norm" in part else 0.12)
            weights = {part: weight.detach().clone() for part, weight in model.named_parameters()}
            save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return make


@pytest.fixture(scope="module")
def gemma(folder, checkpoint):
    with sglang_server.serve(checkpoint("gemma"), "gemma", folder / "gemma.log", threads=1) as server:
        yield server.url


@pytest.fixture(scope="module")
def llama(folder, checkpoint):
    """As an evaluation starts it."""
    settings = ServerConfig(python=str(sglang_server.CPU_PYTHON), arguments=sglang_server.CPU_ARGUMENTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with serve(checkpoint("llama"), "llama", folder / "llama.log", settings) as url:
            yield url


def prompts(lengths=(70, 41, 90), shared=37):
    """Random ones that begin alike: past Gemma's window of 16 and Llama's original context of 64, or into it."""
    random = np.random.default_rng(0)
    prefix = random.integers(5, 400, shared).tolist()
    return [prefix + random.integers(5, 400, length - shared).tolist() for length in lengths]


def with_engine(url, use, settings=GREEDY, **how):
    async def run():
        async with open_sglang(url, how.pop("model", None), settings, **how) as backend:
            return await use(backend)

    return asyncio.run(run())


def draw(url, given, n=1, max_tokens=NEW, stop_ids=(END,), **how):
    return with_engine(url, lambda backend: backend.sample(given, n, max_tokens, stop_ids), **how)


def ours(path, given, max_tokens=NEW, stop_ids=(END,)):
    spec = read_spec(path)
    model = place_model(spec, read_weights(path, spec), Compute(query_chunk=16))
    return generate(PrefixCache(model), given, Sampling(temperature=0, max_tokens=max_tokens, stop_ids=stop_ids))


def theirs(path, given, max_tokens=NEW, stop=END):
    """transformers, one prompt at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    model.generation_config.eos_token_id = stop
    rows = []
    for prompt in given:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens, pad_token_id=0
            )
        tokens = tuple(out[0, len(prompt) :].tolist())
        stopped = tokens[-1] == stop
        rows.append([Completion(tokens[:-1] if stopped else tokens, stopped)])
    return rows


def check_greedy(path, found, given):
    assert found == ours(path, given) == theirs(path, given)
    assert len({token for [one] in found for token in one.tokens}) > 10


def check_odds(path, url, given):
    pairs = [(100 + i, 300 + i) for i in range(len(given))]
    found = with_engine(url, lambda backend: backend.log_odds(given, pairs), settings=EvaluateConfig(temperature=0.6))
    spec = read_spec(path)
    decoder = Decoder(spec, read_weights(path, spec), Compute(query_chunk=16))
    width = max(map(len, given))
    logits = decoder.logits(decoder(jnp.asarray([prompt + [0] * (width - len(prompt)) for prompt in given])))
    last = np.asarray(logits)[np.arange(len(given)), [len(prompt) - 1 for prompt in given]]
    expected = [row[positive] - row[negative] for row, (positive, negative) in zip(last, pairs, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.ptp(found) > 0.1


def test_gemma_past_its_window(gemma, checkpoint):
    check_greedy(checkpoint("gemma"), draw(gemma, prompts()), prompts())


def test_llama(llama, checkpoint):
    check_greedy(checkpoint("llama"), draw(llama, prompts(), model="llama"), prompts())


def test_log_odds_of_gemma(gemma, checkpoint):
    check_odds(checkpoint("gemma"), gemma, prompts())


def test_log_odds_of_llama(llama, checkpoint):
    check_odds(checkpoint("llama"), llama, prompts())


def test_its_openai_api_gives_the_same(llama, checkpoint):
    tokenizer = load_tokenizer(checkpoint("llama"), chat=False)
    pairs = [tuple(token_ids(tokenizer, letter)[0] for letter in letters) for letters in ("ab", "cd", "ef")]

    async def use(backend):
        sampled = await backend.sample(prompts(), 1, NEW, (END,))
        texts = [(tokenizer.decode(one.tokens), one.stopped) for [one] in sampled]
        return texts, await backend.log_odds(prompts(), pairs)

    async def both():
        async with open_sglang(llama, None, GREEDY) as native, open_openai(llama, None, GREEDY, tokenizer) as openai:
            assert openai.likeliest == 100
            whole = dataclasses.replace(openai, likeliest=len(tokenizer))  # of random weights any token is likely
            return await use(native), await use(whole)

    (texts, odds), (their_texts, their_odds) = asyncio.run(both())
    assert their_texts == texts
    np.testing.assert_allclose(their_odds, odds, rtol=0, atol=1e-4)


def test_stop_tokens_end_an_answer_and_are_no_part_of_it(llama, checkpoint):
    whole = [one.tokens for [one] in draw(llama, prompts())]
    stops = (whole[0][5], whole[1][0], END)
    found = draw(llama, prompts(), stop_ids=stops)
    assert found == ours(checkpoint("llama"), prompts(), stop_ids=stops)
    assert found[1] == [Completion((), stopped=True)]
    [[last]] = draw(llama, prompts()[:1], max_tokens=6, stop_ids=stops)  # in the last place that there is
    assert last == Completion(whole[0][: whole[0].index(stops[0])], stopped=True)


def test_several_samples_come_of_one_request(gemma):
    hot = EvaluateConfig(temperature=1, top_p=0.95)
    found = draw(gemma, prompts(), n=4, settings=hot)
    assert [len(answers) for answers in found] == [4] * 3
    assert all(len(set(answers)) == 4 for answers in found)

    async def seeded(backend):  # of the same form as where seeds count, which is on GPUs only
        return await dataclasses.replace(backend, seeded=True).sample(prompts()[:2], 3, 5, (END,))

    found = with_engine(gemma, seeded, settings=hot)
    assert [len(answers) for answers in found] == [3] * 2


def test_what_is_too_long_is_refused_in_the_servers_words(gemma):
    with pytest.raises(JaxguardError, match=r"refuses /generate.*4096"):
        draw(gemma, [[5] * 5000])
    with pytest.raises(JaxguardError, match=r"serves .*, not 'other'"):
        draw(gemma, [[5]], model="other")


def test_weights_are_swapped_without_a_restart(gemma, checkpoint):
    first, second = checkpoint("gemma"), checkpoint("gemma", 1)

    async def across(backend):
        before = await backend.sample(prompts(), 1, NEW, (END,))
        await swap_weights(gemma, second, "second")
        with pytest.raises(JaxguardError, match="answered with weights 'second', not 'default'"):
            await backend.sample(prompts(), 1, NEW, (END,))
        return before

    before = with_engine(gemma, across, version="default")
    try:
        after = draw(gemma, prompts(), version="second")
        assert after == ours(second, prompts())
        assert after != before
        with pytest.raises(JaxguardError, match=r"would again: status 400: .*nowhere"):
            asyncio.run(swap_weights(gemma, Path("nowhere"), "third"))
    finally:
        asyncio.run(swap_weights(gemma, first, "default"))
    assert draw(gemma, prompts(), version="default") == before


@pytest.mark.skipif(not (SMOLLM2 / "model.safetensors").is_file(), reason=f"no {SMOLLM2}: run `make demo`")
def test_smollm2(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(SMOLLM2)
    given = [tokenizer(text).input_ids for text in TEXTS]
    end = tokenizer.eos_token_id
    with sglang_server.serve(SMOLLM2, "smollm2", folder / "smollm2.log", threads=1) as server:
        found = draw(server.url, given, max_tokens=32, stop_ids=(end,))
    assert found == ours(SMOLLM2, given, 32, (end,)) == theirs(SMOLLM2, given, 32, end)
