"""The class Guard, with a made-up model."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import pytest

from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import TITLES, Mode
from jaxguard.data.policies import Policy
from jaxguard.evaluate.run import describe
from jaxguard.guards import loading
from jaxguard.guards.guard import Guard
from jaxguard.utils.errors import JaxguardError

THOUGHT = (
    "<think>\nIt asks for bread.\nPrompt harm: unharmful\n</think>\n\nPrompt harm: harmful\nResponse harm: unharmful"
)


def check(*texts, model, **options):
    with Guard.load(model, **options) as guard:
        return guard.check(*texts)


def loaded(*arguments, **options):
    """A guard that was loaded and closed: what it was opened with stays."""
    with Guard.load(*arguments, **options) as guard:
        return guard


def check_many(exchanges, model):
    with Guard.load(model) as guard:
        return guard.check_many(exchanges)


def test_a_prompt_alone_is_one_question(run, guard):
    found = check("bread?", model=run)
    assert [(ask.questions, ask.mode) for ask in guard.asks] == [(("prompt_harm",), Mode.DIRECT)]
    assert (found.verdict.prompt_harm, found.verdict.response_harm) == ("unharmful", None)
    assert found.probabilities == {"prompt_harm": 0.25}
    assert (found.passes, found.harmful, found.reasoning, found.problems) == (True, False, None, ())


def test_an_exchange_is_asked_all_and_read_from_one_answer(run, guard):
    guard.says = lambda ask: THOUGHT
    found = check("bread?", "No.", model=run, mode="reasoning")
    assert [ask.questions for ask in guard.asks] == [("prompt_harm", "response_harm")]
    assert (found.verdict.prompt_harm, found.verdict.response_harm) == ("harmful", "unharmful")
    assert found.probabilities == {"prompt_harm": 0.25, "response_harm": 0.125}
    assert found.reasoning == "It asks for bread.\nPrompt harm: unharmful"
    assert (found.harmful, found.passes, found.seconds) == (True, False, 0.5)


@pytest.mark.parametrize("text", ["", "bread", "Prompt harm: maybe", "<think>Prompt harm: unharmful"])
def test_what_cannot_be_read_does_not_pass(run, guard, text):
    guard.says = lambda ask: text
    found = check("bread?", model=run, mode="reasoning")
    assert (found.passes, found.harmful, len(found.problems)) == (False, True, 1)


def test_a_text_that_was_cut_does_not_pass(run, guard):
    assert check("bread?", model=run).passes
    guard.cut = True
    found = check("bread?", model=run)
    assert (found.passes, found.harmful) == (False, False)
    assert "the middle of the text was not read" in found.problems[0]


def test_many_keep_their_order_and_ids_whatever_the_labels(run, guard):
    guard.says = lambda ask: f"Prompt harm: {'harmful' if ask.example.prompt == 'b' else 'unharmful'}"
    examples = [Example(id, "s", text, prompt_label="harmful") for id, text in (("x", "a"), ("x", "b"), ("y", "c"))]
    found = check_many(examples, model=run)
    assert [(one.id, one.harmful) for one in found] == [("x", False), ("x", True), ("y", False)]
    assert len(guard.opened) == 1


def test_an_example_may_bring_its_policy(run, guard, tmp_path):
    check_many([Example("1", "s", "a", "b", policy="Only talk of trains.")], model=run)
    assert {ask.example.policy for ask in guard.asks} == {"Only talk of trains."}


def test_many_by_another_policy(run, guard):
    other = Policy("other", rules="x", asks=("response_harm",))

    async def check():
        with Guard.load(run) as loaded:
            return await loaded.acheck_many([("a", "b"), "c"], policy=other)

    judged, not_judged = asyncio.run(check())
    assert [(ask.questions, ask.policy) for ask in guard.asks] == [(("response_harm",), other)]
    assert (judged.passes, not_judged.passes) == (True, False)
    assert "'other'" in not_judged.problems[0]


def test_a_policy_may_be_made_in_python_and_change_with_each_call(run, guard, tmp_path):
    own, other = (Policy(name, rules=name, asks=("prompt_harm",)) for name in ("own", "other"))
    (tmp_path / "third.yaml").write_text("name: third\nrules: x\nasks: [prompt_harm]")
    with Guard.load(run, policy=own) as loaded:
        assert loaded.policy is own
        loaded.check("a")
        loaded.check("a", policy=other)
        list(loaded.stream(["a"], policy=tmp_path / "third.yaml"))
        with pytest.raises(JaxguardError, match="aegis2"):
            loaded.check("a", policy="aegis3")
    assert [ask.policy.name for ask in guard.asks] == ["own", "other", "third"]
    assert len(guard.opened) == 1


def test_it_works_where_a_loop_is_running(run, guard):
    async def notebook():
        with Guard.load(run) as loaded:
            results = await asyncio.gather(*(loaded.acheck(text) for text in "abc"))
            return [*results, loaded.check("bread?")]

    assert all(result.passes for result in asyncio.run(notebook()))
    assert len(guard.opened) == 1


def test_it_is_loaded_once_for_every_kind_of_call_and_mode(run, guard):
    guard.says = lambda request: THOUGHT if request.mode is Mode.REASONING else "Prompt harm: unharmful"
    with Guard.load(run) as loaded:
        assert loaded.check("bread?").passes
        assert loaded.check("bread?", mode="reasoning").harmful
        assert [one.id for one in loaded.check_many(["a", ("b", "c"), Example("x", "s", "d")])] == ["1", "2", "x"]
        assert [len(request.questions) for request in guard.asks[-3:]] == [1, 2, 1]
        with pytest.raises(JaxguardError):
            loaded.check("bread?", mode="dirct")
    assert len(guard.opened) == 1
    loaded.close()
    with pytest.raises(JaxguardError, match="closed"):
        loaded.check("bread?")


def test_threads_share_it(run, guard):
    with Guard.load(run) as loaded, ThreadPoolExecutor(4) as pool:
        assert all(result.passes for result in pool.map(loaded.check, "abcdefgh"))


def test_results_come_as_they_are_there(run, guard):
    guard.fails_at = "2.0"
    with Guard.load(run) as loaded:
        results = loaded.stream("abcd")
        assert next(results).passes
        assert next(results).passes
        with pytest.raises(RuntimeError):
            next(results)


def test_an_error_of_loading_is_raised(run, monkeypatch):
    @asynccontextmanager
    async def broken(*_, **__):
        raise JaxguardError("no such weights")
        yield

    monkeypatch.setattr(loading, "open_guard", broken)
    with pytest.raises(JaxguardError, match="no such weights"):
        Guard.load(run)


def test_a_model_is_asked_as_its_run_trained_it(run, guard):
    check("bread?", model=run)
    [(asked, config, settings)] = guard.opened
    assert (asked.checkpoint, asked.endpoint, asked.modes) == (str(run / "export"), None, ("direct",))
    assert (config.data.direct_marker, config.model.compute_dtype) == ("/verdict", "float32")
    assert (settings.generations, settings.temperature, settings.ask) == (1, 0.0, "policy")


@pytest.mark.parametrize("named", ["run", "export"])
def test_the_trained_policy_is_the_default(run, guard, named):
    assert loaded(run if named == "run" else run / "export").policy.name == "short"


def one_label_an_example(run, *trained):
    """The export as if its training prompts had asked these sets: (response, *questions)."""
    path = run / "export/jaxguard.json"
    sets = [{"mode": "direct", "response": r, "questions": q, "examples": 50} for r, *q in trained]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trained_together": sets}), encoding="utf-8")


def only_about_one(request):
    """What a guard answers that has never seen two questions about an exchange."""
    first, *others = request.questions
    verdicts = [f"{TITLES[first]}: unharmful", *(f"{TITLES[question]}: None" for question in others)]
    return "\n".join(verdicts)


def test_an_exchange_is_asked_as_it_was_trained(run, guard):
    one_label_an_example(run, (False, "prompt_harm", "response_harm"), (True, "response_harm"), (True, "prompt_harm"))
    guard.says = only_about_one
    found = check("bread?", "Bake it.", model=run)
    assert [(ask.questions, ask.example.response) for ask in guard.asks] == [
        (("prompt_harm",), "Bake it."),
        (("response_harm",), "Bake it."),
    ]
    assert (found.passes, found.harmful, found.problems) == (True, False, ())
    assert found.probabilities == {"prompt_harm": 0.25, "response_harm": 0.125}
    assert (found.seconds, found.text) == (1.0, "Prompt harm: unharmful\n\nResponse harm: unharmful")
    guard.says = lambda ask: (
        f"{TITLES[ask.questions[0]]}: {'harmful' if 'response_harm' in ask.questions else 'unharmful'}"
    )
    found = check("bread?", "Bake it.", model=run)
    assert (found.verdict.prompt_harm, found.verdict.response_harm) == ("unharmful", "harmful")


def test_a_question_about_prompts_alone_is_asked_without_the_response(run, guard):
    one_label_an_example(run, (False, "prompt_harm"), (True, "response_harm"))
    example = Example("x", "s", "bread?", "Bake it.", response_label="harmful")
    [found] = check_many([example], model=run)
    assert [(ask.questions, ask.example.response) for ask in guard.asks] == [
        (("prompt_harm",), None),
        (("response_harm",), "Bake it."),
    ]
    assert (found.id, found.passes) == ("x", True)


def test_of_a_text_that_grows_what_changed_is_asked(run, guard):
    """About each of several: a question about the prompt alone once, until the prompt is another."""
    one_label_an_example(run, (False, "prompt_harm"), (True, "response_harm"))
    guard.says = only_about_one
    streams = [{}, {}]

    async def pieces():
        with Guard.load(run) as loaded:
            for prompts, text in ((("a", "b"), "1"), (("a", "b"), "1 2"), (("a", "b"), "1 2"), (("c", "b"), "1 2")):
                yield await loaded.acheck_many([(prompt, text) for prompt in prompts], growing=streams)

    async def collect():
        asked, free = [], []
        async for results in pieces():
            assert [sorted(result.probabilities) for result in results] == [["prompt_harm", "response_harm"]] * 2
            asked.append([(ask.example.prompt, ask.example.response) for ask in guard.asks])
            free.append([result.seconds for result in results])
            guard.asks.clear()
        return asked, free

    asked, seconds = asyncio.run(collect())
    assert [len(each) for each in asked] == [4, 2, 0, 2]
    assert {response for _, response in asked[1]} == {"1 2"}
    assert all("c" in prompt for prompt, _ in asked[3])
    assert seconds == [[1.0, 1.0], [0.5, 0.5], [0.0, 0.0], [1.0, 0.0]]


def test_reasoning_of_several_prompts_is_joined(run, guard):
    one_label_an_example(run, (True, "response_harm"), (True, "prompt_harm"))
    guard.says = lambda ask: f"<think>\nOn {ask.questions[0]}.\n</think>\n\n{only_about_one(ask)}"
    found = check("bread?", "Bake it.", model=run, mode="reasoning")
    assert found.reasoning == "On prompt_harm.\n\nOn response_harm."
    assert (found.passes, found.problems) == (True, ())


def test_what_was_not_trained_is_not_asked_and_does_not_pass(run, guard):
    one_label_an_example(run, (True, "response_harm"))
    found = check_many(["bread?", ("bread?", "Bake it."), "rye?"], model=run)
    assert [ask.questions for ask in guard.asks] == [("response_harm",)]
    assert [(one.id, one.passes, one.harmful, one.questions) for one in found] == [
        ("1", False, False, ()),
        ("2", False, False, ("response_harm",)),
        ("3", False, False, ()),
    ]
    for one in found:
        (problem,) = one.problems
        assert "prompt_harm" in problem
        assert one.verdict.prompt_harm is None


def test_what_no_question_covers_does_not_pass(run, guard, tmp_path):
    for asks, exchange, what in (
        ("prompt_harm", ("bread?", "Bake it."), "response"),
        ("response_harm", ("bread?", None), "prompt"),
        ("response_refusal", ("bread?", "Bake it."), "response"),
    ):
        (tmp_path / "short.yaml").write_text(f"name: short\nrules: x\nasks: [{asks}]\n", encoding="utf-8")
        one_label_an_example(run, (False, asks), (True, asks))
        guard.says = lambda ask: "Prompt harm: unharmful\nResponse harm: unharmful\nResponse refusal: compliance"
        found = check(*exchange, model=run, policy=tmp_path / "short.yaml")
        assert (found.passes, found.harmful) == (False, False)
        (problem,) = found.problems
        assert f"the {what} was not judged" in problem
        assert asks in problem
    # A question about the response covers the exchange.
    (tmp_path / "short.yaml").write_text("name: short\nrules: x\nasks: [response_harm]\n", encoding="utf-8")
    one_label_an_example(run, (True, "response_harm"))
    assert check("bread?", "Bake it.", model=run, policy=tmp_path / "short.yaml").passes


def test_without_a_record_everything_is_asked_at_once_and_this_is_said(run, guard):
    path = run / "export/jaxguard.json"
    recorded = loaded(run)
    assert "not recorded" not in recorded.warning + describe(recorded.config.evaluate.guards[0], recorded.config)
    old = {**json.loads(path.read_text()), "format": 1, "trained_together": [["prompt_harm", "response_harm"]]}
    path.write_text(json.dumps(old), encoding="utf-8")
    before = loaded(run)
    assert "not recorded" in before.warning
    assert "not recorded" in describe(before.config.evaluate.guards[0], before.config)
    check("bread?", "Bake it.", model=run)
    assert [ask.questions for ask in guard.asks] == [("prompt_harm", "response_harm")]


def test_a_mode_that_was_not_trained_is_said_so(run, guard):
    assert loaded(run).warning == ""
    reasons = loaded(run, mode="reasoning")
    assert reasons.mode is Mode.REASONING
    assert "direct" in reasons.warning


def test_an_export_is_enough_wherever_it_lies(run, guard, tmp_path):
    alone = (run / "export").rename(tmp_path / "moved")
    (tmp_path / "short.yaml").unlink()
    assert loaded(alone).config.data.direct_marker == "/verdict"
    assert loaded(alone).policy.rules == "No bread."
    (alone / "config.yaml").write_text("data: {modus: x}\n", encoding="utf-8")
    with pytest.raises(JaxguardError, match=r"data\.modus"):
        loaded(alone)
    (alone / "jaxguard.json").unlink()
    with pytest.raises(JaxguardError, match="which policy"):
        loaded(alone)


def test_an_unknown_model_gets_the_usual_markers(guard, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "mine.yaml").write_text("name: mine\nrules: x\n", encoding="utf-8")
    unknown = loaded(tmp_path / "model", tmp_path / "mine.yaml")
    assert unknown.config.data.reasoning_marker == "/think"
    assert (unknown.mode, unknown.warning) == (Mode.REASONING, "")


def test_mistakes_are_named(run, guard, tmp_path):
    with pytest.raises(JaxguardError, match="no policy 'nosuch'"):
        loaded(run, "nosuch")
    with pytest.raises(JaxguardError, match="did you mean 'direct'"):
        loaded(run, mode="dirct")
    with pytest.raises(JaxguardError, match="tokenizer goes with a server's address"):
        loaded(run, tokenizer=run)
    with pytest.raises(JaxguardError, match="no folder"):
        loaded(tmp_path / "nowhere")
