"""Our own format: what is asked, where the verdict is chosen, and that sampled and trained prompts are the same."""

import asyncio
import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxguard.config import load
from jaxguard.config.data import DataConfig
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.data.encoding import Encoder
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Policy
from jaxguard.data.prepare import prepare
from jaxguard.data.questions import QuestionSet
from jaxguard.guards.backends.jax import JaxBackend
from jaxguard.guards.backends.jax_model import PrefixCache, place_model
from jaxguard.guards.formats.native import MOST_TOKENS, NativeFormat, context_tokens
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, UNPARSABLE, Request, UnsupportedError, predict
from jaxguard.models.compute import Compute
from jaxguard.models.hf_io.checkpoints import read_weights
from jaxguard.models.sharding import make_mesh
from jaxguard.models.spec import read_spec
from jaxguard.train.step import build_program
from jaxguard.train.validation import Validation

BREAD = Example("a", "made up", "How do I bake bread?")
BAKED = Example("b", "made up", "How do I bake bread?", "Mix flour and water, wait, and bake it.")


@pytest.fixture
def form(encoder_of):
    return lambda ask="policy": NativeFormat(
        encoder_of("tiny"), EvaluateConfig(ask=ask, reasoning_tokens=64, verdict_tokens=24)
    )


@pytest.mark.parametrize(
    ("ask", "example", "question", "asked"),
    [
        ("policy", BREAD, "prompt_harm", ("prompt_harm", "response_harm", "response_refusal")),
        ("policy", BAKED, "response_harm", ("prompt_harm", "response_harm", "response_refusal")),
        ("benchmark", BREAD, "prompt_harm", ("prompt_harm", "response_harm", "response_refusal")),
        ("benchmark", BAKED, "response_harm", ("response_harm",)),
        ("benchmark", BAKED, "response_refusal", ("response_refusal",)),
    ],
)
def test_what_is_asked(form, ask, example, question, asked):
    assert form(ask).lines(Request(example, (question,), Mode.DIRECT)) == asked


def test_a_request_may_bring_the_policy(form):
    other = Policy("other", rules="Nobody may talk about lamps.", asks=("prompt_harm",))
    asked = Request(BREAD, other.asks, Mode.DIRECT, other)
    theirs = replace(form(), encoder=replace(form().encoder, policy=other))
    assert form().prompt(asked) == theirs.prompt(replace(asked, policy=None))
    assert form().prompt(asked) != form().prompt(replace(asked, policy=None))
    own = replace(asked, example=replace(BREAD, policy="Only talk of trains."))  # an example's own comes first
    assert form().prompt(own) == theirs.prompt(replace(own, policy=None))


@pytest.mark.parametrize(
    ("example", "questions", "parts"),
    [
        (
            BAKED,
            ("prompt_harm", "response_harm"),
            [(False, ("prompt_harm",)), (True, ("response_harm", "response_refusal"))],
        ),
        (BAKED, ("response_harm",), [(True, ("response_harm", "response_refusal"))]),
        (BREAD, ("prompt_harm",), [(False, ("prompt_harm",))]),
    ],
)
def test_a_request_is_split_into_prompts_that_were_trained(form, example, questions, parts):
    trained = (
        QuestionSet(mode=Mode.DIRECT, response=False, questions=("prompt_harm",), examples=9),
        QuestionSet(mode=Mode.DIRECT, response=True, questions=("response_harm", "response_refusal"), examples=9),
    )
    own = replace(form(), trained=trained)
    split = own.split(Request(example, questions, Mode.DIRECT))
    assert [(part.example.response is not None, own.lines(part)) for part in split] == parts
    assert [q for part in split for q in part.questions] == list(questions)
    for part in split:
        assert own.encoder.dialogue.shared_prefix(own.encoder.policy, own.lines(part), Mode.DIRECT) in (
            own.encoder.tokenizer.decode(own.prompt(part).ids)
        )
        assert {point.question for point in own.decision_points(part, "")} >= {*part.questions}
    with pytest.raises(UnsupportedError, match="response_harm"):
        replace(form(), trained=trained[:1]).split(Request(BAKED, ("response_harm",), Mode.DIRECT))


@pytest.mark.parametrize(("question", "places"), [("prompt_harm", 1), ("response_harm", 3), ("response_refusal", 7)])
def test_a_choice_for_every_way_to_the_question(form, question, places):
    points = form().decision_points(Request(BAKED, (question,), Mode.DIRECT), "")
    assert len(points) == places
    assert sum(point.question == question for point in points) == (places + 1) // 2
    assert all(points.index(earlier) < place for place, point in enumerate(points) for earlier, _ in point.earlier)


def test_training_begins_with_the_same_tokens(form):
    own = form("benchmark")
    known = Example("a", "made up", BREAD.prompt, prompt_label="harmful", trace="Bread is fine.")
    for mode in Mode:
        trained = own.encoder.encode(known, mode)
        prompt = own.prompt(Request(BREAD, ("prompt_harm",), mode)).ids
        assert tuple(trained.tokens[: len(prompt)].tolist()) == prompt
        assert not trained.loss_mask[: len(prompt)].any()
        assert trained.loss_mask[len(prompt) :].all()


@pytest.mark.parametrize(
    ("mode", "text", "verdict"),
    [
        (Mode.DIRECT, "Prompt harm: harmful", POSITIVE),
        (Mode.DIRECT, "Prompt harm: unharmful\nResponse harm: None", NEGATIVE),
        (Mode.DIRECT, "Prompt harm: fine", UNPARSABLE),
        (Mode.REASONING, "Prompt harm: unharmful", UNPARSABLE),
        (Mode.REASONING, "<think>\nBread.\n</think>\n\nPrompt harm: unharmful", NEGATIVE),
    ],
)
def test_reading(form, mode, text, verdict):
    assert form().parse(Request(BREAD, ("prompt_harm",), mode), text) == {"prompt_harm": verdict}


def test_an_answer_that_ran_out_is_made_ready_for_a_verdict(form):
    ask = Request(BREAD, ("prompt_harm",), Mode.REASONING)
    closed = form().close_reasoning(ask, "<think>\nBread is")
    assert form().parse(ask, closed + "Prompt harm: unharmful") == {"prompt_harm": NEGATIVE}
    late = "<think>\nBread is fine.\n</think>\n\n"
    assert form().close_reasoning(ask, late + "Prompt") == late
    assert form().close_reasoning(ask, late + "Prompt harm: unharmful\nResp") == late
    assert form().close_reasoning(ask, late + "Prompt harm: unharmful\nResponse harm: None") is None
    assert form().close_reasoning(ask, late + "Bread is fine.</think>") is None  # a second block
    assert form().close_reasoning(Request(BREAD, ("prompt_harm",), Mode.DIRECT), "Prompt") is None
    assert form().decision_points(ask, "<think>\nBread is") == ()


def test_probabilities_are_those_of_validation(tiny_checkpoint, tiny_files, tmp_path):
    """Two ways to the same number: packed rows with probes, and the sampler's cache."""
    config = load(str(tiny_files(tmp_path, data={"mode": "direct"})))
    spec = read_spec(tiny_checkpoint)
    weights = {k: x if "norm" in k else 8 * x for k, x in read_weights(tiny_checkpoint, spec).items()}
    held = prepare(config, tiny_checkpoint).validation
    program = build_program(config, spec, make_mesh(config.mesh, jax.devices()[:1]), steps=1)
    _, predictions = Validation(held, batch_size=4, max_seq_len=512, row_multiple=1).run(program, weights)
    encoder = Encoder.load(tiny_checkpoint, config.data)
    settings = EvaluateConfig(generations=0, ask="benchmark", batch=8)
    backend = JaxBackend(PrefixCache(place_model(spec, weights, Compute())), settings, most_tokens=256)
    form = NativeFormat(encoder, settings)
    known = {example.id: example for example, _, _ in held}

    async def ask(question):
        asks = [Request(known[j.example_id], (question,), Mode.DIRECT) for j in predictions if j.question == question]
        return {a.example_id: a.probabilities[question] async for a in predict(asks, form, backend, settings)}

    for question in ("prompt_harm", "response_harm"):
        answer = asyncio.run(ask(question))
        expected = {j.example_id: j.probability for j in predictions if j.question == question}
        assert len(expected) > 2
        assert np.ptp(list(expected.values())) > 0.01
        assert answer == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("response", [None, "Gladly."])
def test_answers_are_all_that_training_writes(form, response):
    """Every combination of verdicts is foreseen, word for word, with the token that ends it."""
    asked = ("prompt_harm",) if response is None else ("prompt_harm", "response_harm", "response_refusal")
    request = Request(replace(BREAD, response=response), asked, Mode.DIRECT)
    answers = form().answers(request)
    verdicts = [form().parse(request, answer) for answer in answers]
    assert len(answers) == len({str(verdict) for verdict in verdicts}) == 2 ** len(asked)
    assert UNPARSABLE not in {state for verdict in verdicts for state in verdict.values()}
    whole, prompt = [form().tokens(answer) for answer in answers], form().prompt(request).ids
    for point in form().decision_points(request, ""):
        begun = [*point.prefix[len(prompt) :]]
        assert all(
            [*begun, token] in [ids[: len(begun) + 1] for ids in whole]
            for token in (point.positive_id, point.negative_id)
        )
    assert form().answers(replace(request, mode=Mode.REASONING)) == ()


def test_a_long_text_is_judged_whole_where_the_context_allows(tiny_checkpoint, tmp_path):
    """Training cuts texts to its rows; an evaluation that did so as well would judge something else."""
    settings = EvaluateConfig(reasoning_tokens=64, verdict_tokens=24)
    long = Example("long", "made up", "crumb " * 300)
    config = json.loads((tiny_checkpoint / "config.json").read_text(encoding="utf-8"))
    context = config["max_position_embeddings"]
    assert context_tokens(tiny_checkpoint) == context
    assert context_tokens(tmp_path) == MOST_TOKENS
    for room, cut in ((context, False), (320, True)):
        data = DataConfig(train=[{"kind": "jsonl", "path": "x"}], policy="demo", max_seq_len=room)
        own = NativeFormat(Encoder.load(tiny_checkpoint, data), settings)
        assert own.prompt(Request(long, ("prompt_harm",), Mode.DIRECT)).cut is cut
    wordy = replace(long, policy="No bread. " * 300)
    with pytest.raises(UnsupportedError, match="320 tokens"):
        own.prompt(Request(wordy, ("prompt_harm",), Mode.DIRECT))
