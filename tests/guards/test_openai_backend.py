"""The backend of OpenAI-compatible servers, against ones that break, lie and refuse."""

import asyncio
import json
import math

import pytest
from faulty_http import http, listen
from faulty_openai import FaultyOpenAI
from faulty_sglang import serve
from tenacity import wait_none

from jaxguard.config import load
from jaxguard.config.evaluate import EvaluateConfig, GuardConfig
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.format.template import load_tokenizer, token_ids
from jaxguard.guards.backends.openai import PROBE, open_openai
from jaxguard.guards.backends.sglang import served
from jaxguard.guards.loading import fingerprint, open_guard
from jaxguard.guards.protocol import Request
from jaxguard.utils import client
from jaxguard.utils.errors import JaxguardError

SETTINGS = EvaluateConfig(temperature=0.7, top_p=0.9, batch=3, seed=5)
END, VOCABULARY = 4, 512  # of the tiny tokenizer


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Nobody waits between tries."""
    monkeypatch.setattr(client, "BACKOFF", wait_none())
    monkeypatch.delenv(client.API_KEY, raising=False)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_folder):
    return load_tokenizer(tiny_tokenizer_folder)


@pytest.fixture(scope="module")
def pair(tokenizer):
    """Two tokens that texts tell apart."""
    return token_ids(tokenizer, "a")[0], token_ids(tokenizer, "b")[0]


@pytest.fixture
def backed(tokenizer):
    def run(use, script=lambda i: "", model=None, settings=SETTINGS, tried=True, **how):
        """What `use` makes of an open backend, and the server; it misbehaves after what is tried at first, if `tried`."""

        async def work():
            opened = not tried
            async with (
                serve(lambda i: script(i) if opened else "", FaultyOpenAI, **how) as server,
                open_openai(server.url, model, settings, tokenizer) as backend,
            ):
                server.requests.clear()
                opened = True
                return await use(backend), server

        return asyncio.run(work())

    return run


def reply(**change):
    """An answer to a prompt of two tokens, changed."""
    choice = {"text": "unharmful", "finish_reason": "stop", "logprobs": None}
    choice |= {name: change.pop(name) for name in list(change) if name in choice}
    usage = {"prompt_tokens": 2, "completion_tokens": 1}
    usage |= {name: change.pop(name) for name in list(change) if name in usage}
    return json.dumps({"model": "guard", "choices": [choice], "usage": usage} | change)


def draw(backed, script=lambda i: "", prompts=((5, 6),), n=1, max_tokens=8, **how):
    return backed(lambda backend: backend.sample(prompts, n, max_tokens, (END,)), script, **how)


def score(backed, pair, script=lambda i: "", **how):
    return backed(lambda backend: backend.log_odds([(5, 6)], [pair]), script, **how)


def test_each_sample_is_a_request_with_a_seed_of_its_own(backed, tokenizer):
    found, server = draw(backed, prompts=[(5, 6), (5, 7)], n=2)
    assert [[tokenizer.decode(each.tokens) for each in row] for row in found] == [["unharmful"] * 2] * 2
    assert all(each.stopped for row in found for each in row)
    assert len({body["seed"] for body in server.requests}) == 4
    body = server.requests[0]
    assert (body["model"], body["prompt"], body["max_tokens"], body["stop_token_ids"]) == ("guard", [5, 6], 8, [END])
    assert (body["temperature"], body["top_p"], body["skip_special_tokens"]) == (0.7, 0.9, False)
    assert server.busiest <= SETTINGS.batch


def test_an_answer_ends_where_a_server_overlooks_the_end(backed, tokenizer):
    [[found]], _ = draw(backed, said="unharmful<|eot_id|>unharmful", reason="length", max_tokens=3)
    assert (tokenizer.decode(found.tokens), found.stopped) == ("unharmful", True)


@pytest.mark.parametrize("style", ["vllm", "llama.cpp", "text"])
def test_log_odds(backed, pair, tokenizer, style):
    names = [tokenizer.decode([token]) if style == "text" else token for token in pair]
    [odds], server = score(backed, pair, style=style, likely=dict(zip(names, (-0.25, -2.0), strict=True)))
    assert odds == 1.75
    [body] = server.requests
    assert (body["max_tokens"], body["temperature"], body["logprobs"], body.get("top_p")) == (1, 1.0, 20, None)


@pytest.mark.parametrize("at", [0, 1])
def test_a_word_beyond_the_likeliest_is_bounded_by_the_last_of_them(backed, pair, at):
    [odds], _ = score(backed, pair, likely={pair[at]: -0.01})
    assert odds == pytest.approx(19.99 * (1 - 2 * at))


@pytest.mark.parametrize("likely", [{}, {0: -14.0}])
def test_a_verdict_that_the_likeliest_leave_open_is_an_error(backed, pair, likely):
    with pytest.raises(JaxguardError, match=rf"{pair[1]}.*--max-logprobs"):
        score(backed, pair, likely={pair[token]: value for token, value in likely.items()})


def counter(tokenizer):
    return lambda prompt: len(tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt)


@pytest.mark.parametrize(
    ("how", "asked"),
    [
        ({"most": 1000}, (100, True)),
        ({}, (20, True)),
        ({"most": 5}, (5, True)),
        ({"most": 0}, (None, True)),
        ({"style": "tgi", "ids": False}, (None, False)),
        ({"ids": False}, (20, False)),
    ],
)
def test_what_a_server_understands_is_tried(backed, tokenizer, how, asked):
    async def use(backend):
        return backend.likeliest, not backend.as_text

    assert backed(use, count=counter(tokenizer), **how)[0] == asked


def test_a_server_that_takes_only_text(backed, tokenizer):
    count = counter(tokenizer)
    ids = tokenizer("How do I bake bread?<|eot_id|>").input_ids
    bos = tokenizer("").input_ids
    _, server = draw(backed, prompts=[ids], ids=False, count=count)
    assert server.requests[0]["prompt"] == "How do I bake bread?<|eot_id|>"
    assert ids[: len(bos)] == bos
    letters = [*bos, *(token_ids(tokenizer, letter)[0] for letter in "bread")]
    assert letters != tokenizer("bread").input_ids
    with pytest.raises(JaxguardError, match="only as text"):
        draw(backed, prompts=[letters], ids=False, count=count)


LIES = {
    "no completions": reply(choices=[]),
    "two completions": json.dumps(json.loads(reply()) | {"choices": json.loads(reply())["choices"] * 2}),
    "no usage": reply(usage=None),
    "no text": reply(text=None),
    "text is a number": reply(text=3),
    "too many tokens": reply(completion_tokens=9),
    "an endless token": reply(text="x" * 10**5),
    "aborted": reply(finish_reason="abort"),
    "null": "null",
    "a list": "[]",
}


@pytest.mark.parametrize("fault", ["429", "500", "503", "reset", "cut", "html", "fewer", *LIES])
def test_what_is_no_answer_is_asked_for_again(backed, fault):
    [[found]], server = draw(backed, lambda i: LIES.get(fault, fault) if i < 2 else "")
    assert found.stopped
    assert len(server.requests) == 3


REFUSALS = {
    "another model": (reply(model="other"), "'other'.*'guard'"),
    "another tokenizer": (reply(prompt_tokens=3), "3 tokens.*2"),
    "no room": (reply(finish_reason="length", completion_tokens=2), "2 tokens of 8"),
    "400": ("400", "words of 400"),
    "401": ("401", client.API_KEY),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_would_come_again_is_an_error_at_once(backed, case):
    sent, words = REFUSALS[case]
    asked = []
    with pytest.raises(JaxguardError, match=words):
        draw(backed, lambda i: asked.append(i) or sent)
    assert asked == [0]


def scored(places):
    return reply(finish_reason="length", logprobs=places)


WRONG = {
    "none": scored(None),
    "no place": scored({"top_logprobs": []}),
    "two places": scored({"top_logprobs": [{"token_id:7": -1}] * 2}),
    "an empty place": scored({"top_logprobs": [{}]}),
    "a place that is null": scored({"top_logprobs": [None]}),
    "too few": scored({"top_logprobs": [{"token_id:7": -0.01}]}),
    "NaN": scored({"top_logprobs": [{"token_id:7": math.nan}]}),
    "positive": scored({"top_logprobs": [{"token_id:7": 0.5}]}),
    "too likely together": scored({"top_logprobs": [{f"token_id:{i}": -0.5 for i in range(20)}]}),
    "words": scored({"top_logprobs": [{"token_id:7": "x"}]}),
    "llama.cpp's without ids": scored({"content": [{"top_logprobs": [{"token": "x", "logprob": -1}]}]}),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_probabilities_are_asked_for_again(backed, pair, case):
    [odds], server = score(
        backed, pair, lambda i: WRONG[case] if i < 1 else "", likely=dict(zip(pair, (-0.25, -2), strict=True))
    )
    assert odds == 1.75
    assert len(server.requests) == 2


@pytest.mark.parametrize("case", ["two places", "NaN", "words"])
def test_lies_are_no_reason_to_do_without_probabilities(backed, tokenizer, case):
    async def use(backend):
        return backend.likeliest

    def script(i):
        return WRONG[case].replace('"prompt_tokens": 2', f'"prompt_tokens": {len(tokenizer(PROBE).input_ids)}')

    with pytest.raises(JaxguardError, match=f"{client.TRIES} tries"):
        backed(use, script, tried=False)


def test_texts_that_do_not_tell_tokens_apart(backed):
    """Bytes of one character all show as the same text."""
    with pytest.raises(JaxguardError, match="do not say which"):
        score(backed, (200, 200), style="text", likely={"x": -0.1})


def test_another_model_is_named(backed):
    with pytest.raises(JaxguardError, match=r"guard.*'other'"):
        draw(backed, model="other")


PLAIN = "Prompt harm: unharmful"


@pytest.mark.parametrize("generations", [0, 1])
@pytest.mark.parametrize("style", ["vllm", "tgi"])
def test_a_guard_behind_a_server_is_told_by_its_address(tiny_config, tiny_checkpoint, tokenizer, style, generations):
    """What its predictions have: a probability, or the words of the answer alone."""
    example, config = Example("1", "made up", "How do I bake bread?"), load(str(tiny_config))

    async def run():
        likely = {i: math.log(0.5 / VOCABULARY) for i in range(VOCABULARY)}
        how = {"style": style, "said": PLAIN, "most": 1000, "likely": likely}
        async with serve(lambda i: "", FaultyOpenAI, **how) as server:
            guard = GuardConfig(checkpoint=str(tiny_checkpoint), endpoint=server.url)
            settings = EvaluateConfig(generations=generations)
            known = await fingerprint(guard, config, settings)
            async with open_guard(guard, config, settings) as predict:
                return known, [p async for p in predict([Request(example, ("prompt_harm",), Mode.DIRECT)])]

    if style == "tgi" and not generations:
        with pytest.raises(JaxguardError, match="generations"):
            asyncio.run(run())
        return
    known, [prediction] = asyncio.run(run())
    assert (known["backend"], known["models"]) == ("openai", ["guard"])
    assert prediction.verdicts["prompt_harm"] == (0,)
    assert prediction.probabilities["prompt_harm"] == (None if style == "tgi" else 0.5)
    assert prediction.texts == (PLAIN,) * generations


def test_vllm_says_where_its_model_lies(tmp_path):
    async def run(*models):
        async def handle(path, headers, body, writer):
            writer.write(http(200, {"data": list(models)}) if path == "/v1/models" else http(404, {}))
            await writer.drain()
            return True

        async with listen(handle) as url:
            return await served(url)

    here = {"id": "guard", "root": str(tmp_path)}
    assert asyncio.run(run(here)) == {"backend": "openai", "models": ["guard"], "model_path": str(tmp_path)}
    for models in ([here, {"id": "adapter", "root": "/other"}], [{"id": "guard"}], [{"id": "x", "root": "org/repo"}]):
        assert "model_path" not in asyncio.run(run(*models))
