"""The SGLang backend against servers that break, lie and refuse."""

import asyncio
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from faulty_sglang import LOG_PROBABILITIES, STOP, places, sample, serve
from tenacity import wait_none

from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.guards.backends.sglang import open_sglang, swap_weights
from jaxguard.guards.protocol import Completion
from jaxguard.utils import client
from jaxguard.utils.errors import JaxguardError

SETTINGS = EvaluateConfig(temperature=0.7, top_p=0.9, batch=3, seed=5)
GOOD = Completion((7, 8, 9), stopped=True)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Nobody waits between tries."""
    monkeypatch.setattr(client, "BACKOFF", wait_none())
    monkeypatch.delenv(client.API_KEY, raising=False)


def good(i):
    return ""


def with_backend(script, use, model="guard", suffix="", version=None, settings=SETTINGS, **how):
    """What `use` makes of an open backend, and the server that it asked."""

    async def run():
        async with (
            serve(script, **how) as server,
            open_sglang(server.url + suffix, model, settings, version) as backend,
        ):
            return await use(backend), server

    return asyncio.run(run())


def draw(script, prompts=((5, 6),), n=1, max_tokens=8, **how):
    return with_backend(script, lambda backend: backend.sample(prompts, n, max_tokens, (STOP,)), **how)


def score(script, pairs=((7, 9),), **how):
    return with_backend(script, lambda backend: backend.log_odds([(5, 6)] * len(pairs), pairs), **how)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_a_prompt_and_its_samples_are_one_request(suffix):
    result, server = draw(good, [np.array([5, 6])], n=4, suffix=suffix)
    assert result == [[GOOD] * 4]
    [request] = server.requests
    assert request["input_ids"] == [5, 6]
    assert request["sampling_params"] == {
        "n": 4, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 8, "stop_token_ids": [STOP], "skip_special_tokens": False,
    }  # fmt: skip


def test_log_odds_are_those_at_temperature_1():
    result, server = score(good, [(7, 9), (9, 7)])
    assert result == [LOG_PROBABILITIES[0] - LOG_PROBABILITIES[1]] * 2
    assert sorted(request["token_ids_logprob"] for request in server.requests) == [[7, 9], [9, 7]]
    for request in server.requests:
        assert request["return_logprob"] is True
        assert request["sampling_params"] == {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 1}


def test_prompts_go_out_together_but_no_more_than_batch():
    result, server = draw(good, [(5, i) for i in range(20)])
    assert result == [[GOOD]] * 20
    assert server.busiest == SETTINGS.batch


def test_batch_sizes():
    async def use(backend):
        return backend.group, backend.workers

    assert with_backend(good, use)[0] == (1, SETTINGS.batch)


def test_a_server_whose_draws_depend_on_a_seed_alone_gets_one_for_each_sample():
    result, server = draw(good, [(5, 6), (5, 7)], n=3, deterministic=True)
    assert result == [[GOOD] * 3] * 2
    seeds = {p["sampling_seed"] for request in server.requests for p in request["sampling_params"]}
    assert len(seeds) == 6
    assert [request["input_ids"] for request in server.requests] == [[[5, 6]] * 3, [[5, 7]] * 3]
    again = draw(good, [(5, 6), (5, 7)], n=3, deterministic=True)[1]
    assert again.requests == server.requests
    other = draw(good, n=3, deterministic=True, settings=SETTINGS.model_copy(update={"seed": 6}))[1]
    assert not seeds & {p["sampling_seed"] for p in other.requests[0]["sampling_params"]}


def test_a_server_that_does_not_say_how_it_draws_gets_no_seeds():
    _, server = draw(good, n=3, deterministic=None)
    assert server.requests[0]["sampling_params"]["n"] == 3


ENDS = {
    "stop": (sample(), (7, 8, 9), True),
    "stop in the last place": (sample([7] * 7 + [STOP], {"type": "length", "length": 8}), (7,) * 7, True),
    "stop at once": (sample([STOP]), (), True),
    "an end of the model's own": (sample([7, 2], {"type": "stop", "matched": 2}), (7,), True),
    "more after the stop token": (sample([7, STOP, 9]), (7,), True),
    "the limit": (sample([7] * 8, {"type": "length", "length": 8}), (7,) * 8, False),
}


@pytest.mark.parametrize("case", ENDS)
def test_ends(case):
    reply, tokens, stopped = ENDS[case]
    [[completion]], _ = draw(lambda i: json.dumps(reply))
    assert completion == Completion(tokens, stopped)
    assert completion.ids == tuple(reply["output_ids"][: len(tokens) + stopped])


LIES = {
    "no answers": [],
    "two answers": [sample(), sample()],
    "text": "yes",
    "null": None,
    "a number": 3,
    "no ids": {"meta_info": sample()["meta_info"]},
    "no meta_info": {"output_ids": [7]},
    "ids are null": sample(None),
    "ids are text": sample(["7"]),
    "ids are truths": sample([True]),
    "ids are lists": sample([[7]]),
    "too many ids": sample([7] * 9, {"type": "length", "length": 9}),
    "an end that is not there": sample([7, 8], {"type": "stop", "matched": 9}),
    "not a number": sample([7], {"type": "stop", "matched": "NaN happened"}),
    "aborted": sample([7], {"type": "abort", "message": "aborted"}),
    "no reason": sample([7], "stop"),
}
FAULTS = ["408", "429", "500", "502", "503", "reset", "cut", "html", "fewer", *map(json.dumps, LIES.values())]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[:40])
def test_transient_failures_are_retried(fault):
    result, server = draw(lambda i: fault if i < 2 else "")
    assert result == [[GOOD]]
    assert len(server.requests) == 3


def test_a_timeout_is_tried_again(monkeypatch):
    monkeypatch.setattr(client, "SECONDS", 0.2)
    result, server = draw(lambda i: "slow" if i < 1 else "")
    assert result == [[GOOD]]
    assert len(server.requests) == 2


def test_retries_end():
    with pytest.raises(JaxguardError, match=rf"{client.TRIES}.*503.*words of 503"):
        draw(lambda i: "503")


REFUSALS = {"400": "/generate.*words of 400", "422": "words of 422", "301": "301"}
REFUSALS |= {"401": "JAXGUARD_API_KEY.*words of 401", "403": "JAXGUARD_API_KEY", "404": "/generate"}


@pytest.mark.parametrize("status", REFUSALS)
def test_refusals_are_errors_at_once(status):
    asked = []
    with pytest.raises(JaxguardError, match=REFUSALS[status]):
        draw(lambda i: asked.append(i) or status)
    assert asked == [0]


def test_the_first_error_ends_the_other_requests():
    with pytest.raises(JaxguardError, match="words of 400"):
        draw(lambda i: "400" if i == 1 else "slow", [(5, i) for i in range(9)])


def test_an_answer_that_the_server_had_no_room_for_is_an_error_at_once():
    asked = []
    reply = json.dumps(sample([7] * 5, {"type": "length", "length": 5}))
    with pytest.raises(JaxguardError, match=r"5.*8.*--max-total-tokens"):
        draw(lambda i: asked.append(i) or reply)
    assert asked == [0]


def scored(values, ids=(7, 9)):
    reply = sample([7], {"type": "length", "length": 1})
    reply["meta_info"] |= places(ids, values)
    return json.dumps(reply)


def meta(**change):
    reply = json.loads(scored((-1, -2)))
    reply["meta_info"] |= change
    return json.dumps(reply)


@pytest.mark.parametrize(
    "fault",
    [
        scored((math.nan, -2)),
        scored((None, -2)),
        scored((0.5, -2)),
        scored((math.inf, -2)),
        scored(("x", -2)),
        scored((-1, -2), (9, 7)),
        scored((-1,), (7,)),
        scored((-1, -2, -3), (7, 9, 11)),
        meta(output_token_ids_logprobs=[]),
        meta(output_token_ids_logprobs=None),
        meta(output_token_ids_logprobs=[[[-1, 7], [-2, 9]]] * 2),
        json.dumps(sample()),
        json.dumps([json.loads(scored((-1, -2)))] * 2),
        "503",
    ],
)
def test_wrong_probabilities_are_asked_for_again(fault):
    result, server = score(lambda i: fault if i < 1 else "")
    assert result == [1.5]
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ((-math.inf, -2), -math.inf, -1e20),
        ((-2, -math.inf), 1e20, math.inf),
        ((-1, -1), 0, 0),
    ],
)
def test_impossible_tokens_are_no_crash(values, low, high):
    [odds] = score(lambda i: scored(values))[0]
    assert low <= odds <= high


@pytest.mark.parametrize("values", [(-math.inf, -math.inf), (-3.4e38, -3.4e38)])
def test_a_server_that_gives_neither_token_a_probability(values):
    with pytest.raises(JaxguardError, match=r"http://.*neither.*7, 9"):
        score(lambda i: scored(values))


def test_the_key_is_sent(monkeypatch):
    monkeypatch.setenv(client.API_KEY, "secret")
    assert draw(good)[1].authorizations == {"Bearer secret"}
    monkeypatch.delenv(client.API_KEY)
    assert draw(good)[1].authorizations == {""}


def test_another_model_is_named():
    with pytest.raises(JaxguardError, match=r"guard.*'other'.*model"):
        draw(good, model="other")
    assert draw(good, model=None)[0] == [[GOOD]]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "127.0.0.1:30000", "http://127.0.0.1:x", "ftp://127.0.0.1"])
def test_an_unreachable_server(url):
    async def run():
        async with open_sglang(url, "guard", SETTINGS):
            pass

    with pytest.raises(JaxguardError, match=re.escape(url)):
        asyncio.run(run())


def test_a_proxy_does_not_stand_between_this_machine_and_itself(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert draw(good)[0] == [[GOOD]]


def test_every_answer_must_carry_the_version():
    result, _ = with_backend(good, lambda e: e.sample([[5]], 2, 8, (STOP,)), version="default")
    assert result == [[GOOD] * 2]
    for use in (lambda e: e.sample([[5]], 2, 8, (STOP,)), lambda e: e.log_odds([[5]], [(7, 9)])):
        with pytest.raises(JaxguardError, match=r"'default'.*'7'"):
            with_backend(good, use, version="7")
    mixed = sample()
    mixed["meta_info"]["weight_versions"].append({"version": "older", "start": 0, "end": 1})
    with pytest.raises(JaxguardError, match=r"'default'.*'older'.*'default'"):
        with_backend(lambda i: json.dumps(mixed), lambda e: e.sample([[5]], 1, 8, (STOP,)), version="default")
    del mixed["meta_info"]["weight_versions"], mixed["meta_info"]["weight_version"]
    with pytest.raises(JaxguardError, match=r"None.*'default'"):
        with_backend(lambda i: json.dumps(mixed), lambda e: e.sample([[5]], 1, 8, (STOP,)), version="default")


def swap(folder="there", **how):
    async def run():
        async with serve(good, **how) as server:
            await swap_weights(server.url + "/v1", Path(folder), "step-8")
            return server

    return asyncio.run(run())


def test_weights_are_swapped_and_seen_to_be():
    server = swap()
    assert server.version == "step-8"
    assert len(server.requests) == 1


def test_a_swap_that_failed_is_an_error():
    with pytest.raises(JaxguardError, match=r"/update_weights_from_disk.*no such folder"):
        swap("nowhere")
    with pytest.raises(JaxguardError, match=r"'default'.*'step-8'"):
        swap(swaps=False)
