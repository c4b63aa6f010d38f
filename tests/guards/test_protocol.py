"""The protocol, with a made-up format and an backend that says what it is told to."""

import asyncio
import math
from dataclasses import dataclass, field, replace

import pytest

from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, UNPARSABLE, Completion, DecisionPoint, Prompt, Request, predict
from jaxguard.utils.errors import JaxguardError

STOP = 0


@dataclass
class Script:
    """An backend that continues a prompt with what `says` holds for it; text is a list of code points."""

    says: dict[str, list[str]] = field(default_factory=dict)
    odds: dict[str, float] = field(default_factory=dict)
    group: int = 2
    workers: int = 1
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    declared: list[str] = field(default_factory=list)
    broken: str = ""

    async def sample(self, prompts, n, max_tokens, stop_ids):
        assert stop_ids == (STOP,)
        await asyncio.sleep(0)
        return [[self._one(text(p), i, max_tokens, n) for i in range(n)] for p in prompts]

    def _one(self, prompt, i, limit, n):
        if prompt == self.broken:
            raise RuntimeError(prompt)
        self.asked.append((prompt, n, limit))
        said = self.says[prompt][i]
        return Completion(tuple(map(ord, said[:limit])), len(said) < limit, STOP if len(said) < limit else None)

    async def declare(self, beginnings):
        self.declared += map(text, beginnings)

    async def log_odds(self, prefixes, pairs):
        assert all(pair == (ord("+"), ord("-")) for pair in pairs)
        return [self.odds[text(p)] for p in prefixes]


@dataclass
class Foreseeing(Script):
    """One that checks drafts, as a backend in this process does."""

    grown: list[str] = field(default_factory=list)

    async def score(self, prefixes, pairs, drafts=(), growing=()):
        assert all(draft.answer[-1] == STOP for draft in drafts)
        greedy = [text(draft.answer[:-1]) == self.says[text(draft.prompt)][0] for draft in drafts]
        self.asked += [("drafts", 1, len(drafts))] if drafts else []
        self.grown += map(text, growing)
        return await self.log_odds(prefixes, pairs), greedy

    def warm_up(self):
        raise AssertionError


def text(ids):
    return "".join(map(chr, ids))


class Signs:
    """Prompts are ids; an answer's last character is the verdict, thoughts end with a full stop."""

    stop_ids = (STOP,)
    verdict_tokens = None

    def split(self, request):
        return (request,)

    def prompt(self, request):
        return Prompt(tuple(map(ord, request.example.id)), cut=request.example.id == "y", shared=1)

    def text(self, ids):
        return text(ids)

    def tokens(self, text):
        return list(map(ord, text))

    def parse(self, request, text):
        verdict = text.rpartition(".")[2] if request.mode is Mode.REASONING else text
        said = verdict.split(" ")[-len(request.questions) :]
        said += [""] * (len(request.questions) - len(said))
        states = {"+": POSITIVE, "-": NEGATIVE}
        return {q: states.get(sign, UNPARSABLE) for q, sign in zip(request.questions, said, strict=True)}

    def close_reasoning(self, request, text):
        return None if "." in text else text + "."

    def decision_points(self, request, text):
        ids = self.prompt(request).ids
        if request.mode is Mode.DIRECT:
            first, last = request.questions[0], request.questions[-1]
            leads = first if first != last else "response_refusal"
            root = DecisionPoint((*ids, ord("a")), ord("+"), ord("-"), leads)
            return [
                root,
                *(DecisionPoint((*ids, ord(c)), ord("+"), ord("-"), last, ((root, c == "b"),)) for c in "bc"),
            ]
        if "." not in text:
            return ()
        prefix = (*ids, *map(ord, text.partition(".")[0]))
        return [DecisionPoint(prefix, ord("+"), ord("-"), question) for question in request.questions]

    def answers(self, request):
        return ["+", "-", "+" * 3] if request.mode is Mode.DIRECT else ()


class OneByOne(Signs):
    """A prompt for each question: the example's id and the question's first letter."""

    def split(self, request):
        return [request.only(question) for question in request.questions]

    def prompt(self, request):
        return Prompt(tuple(map(ord, request.example.id + request.questions[0])))


class Explaining(Signs):
    """Would go on after a verdict of one token."""

    verdict_tokens = 1

    def close_reasoning(self, request, text):
        return None


def ask_all(backend, names, mode, questions=("prompt_harm",), form=None, probabilities=True, **settings):
    async def run():
        requests = [Request(Example(name, "made up", "bread?"), questions, mode) for name in names]
        chosen = EvaluateConfig(**{"reasoning_tokens": 4, "verdict_tokens": 2} | settings)
        predictions = predict(requests, form or Signs(), backend, chosen, probabilities)
        return {prediction.example_id: prediction async for prediction in predictions}

    return asyncio.run(run())


def log_odds(probability):
    return math.log(probability / (1 - probability))


def direct_odds(name, first=0.5, if_positive=0.5, if_negative=0.5):
    pairs = {"a": first, "b": if_positive, "c": if_negative}
    return {name + letter: log_odds(p) for letter, p in pairs.items()}


def test_verdicts_are_those_of_each_generation():
    says = {"x": ["+", "-", "?"], "y": ["-", "-", "-"], "z": ["+", "", "+"]}
    odds = {k: v for name in says for k, v in direct_odds(name).items()}
    found = ask_all(Script(says, odds), says, Mode.DIRECT, generations=3)
    assert found["x"].verdicts["prompt_harm"] == (POSITIVE, NEGATIVE, UNPARSABLE)
    assert found["z"].verdicts["prompt_harm"] == (POSITIVE, UNPARSABLE, POSITIVE)
    assert found["y"].texts == ("-", "-", "-")
    assert found["x"].completion_tokens == 3
    assert found["z"].prompt_tokens == 1
    assert (found["x"].cut, found["y"].cut) == (False, True)


def test_what_was_foreseen_is_not_sampled_and_nothing_is_scored_twice():
    """Drafts of three tokens do not fit into two, and "?" was not foreseen."""
    says = {"x": ["-"], "z": ["?"]}
    odds = {k: v for name in says for k, v in direct_odds(name, 0.2).items()}
    sampled, checked = Script(says, odds), Foreseeing(says, odds)
    found = [
        {name: replace(each, seconds=0.0, wall=0.0, scoring=0.0, wait=0.0) for name, each in answers.items()}
        for answers in (ask_all(one, says, Mode.DIRECT, generations=1, temperature=0) for one in (sampled, checked))
    ]
    assert found[0] == found[1]
    assert found[0]["x"].texts == ("-",)
    assert sampled.asked == [("x", 1, 2), ("z", 1, 2)]
    assert checked.asked == [("drafts", 1, 4), ("z", 1, 2)]


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        (Mode.REASONING, {"temperature": 0, "generations": 1}),
        (Mode.DIRECT, {"temperature": 0, "generations": 2}),
        (Mode.DIRECT, {"temperature": 0.6, "generations": 1}),
    ],
)
def test_samples_are_never_foreseen(mode, settings):
    backend = Foreseeing({"x": ["-.-", "-.+"]}, {"x-": 0.0, **direct_odds("x")})
    ask_all(backend, ["x"], mode, verdict_tokens=4, **settings)
    assert ("x", settings["generations"], 4 + 4 * (mode is Mode.REASONING)) in backend.asked
    assert not any(name == "drafts" for name, _, _ in backend.asked)


def test_the_probability_sums_over_earlier_answers():
    odds = direct_odds("x", first=0.2, if_positive=0.9, if_negative=0.3)
    found = ask_all(Script({"x": ["+"]}, odds), ["x"], Mode.DIRECT, generations=1)
    assert found["x"].probabilities["prompt_harm"] == pytest.approx(0.2 * 0.9 + 0.8 * 0.3)


@pytest.mark.parametrize(("odds", "verdict"), [(5.0, POSITIVE), (-5.0, NEGATIVE), (1e4, POSITIVE), (-1e4, NEGATIVE)])
def test_without_sampling_the_likelier_answer_counts(odds, verdict):
    backend = Script(odds={"xa": 0.0, "xb": odds, "xc": odds})
    found = ask_all(backend, ["x"], Mode.DIRECT, generations=0)
    assert found["x"].verdicts["prompt_harm"] == (verdict,)
    assert not backend.asked
    assert found["x"].texts == ()


def test_no_more_is_sampled_of_a_verdict_that_would_be_explained():
    backend = Script(says={"x": ["-, but"]})
    [answer] = ask_all(backend, ["x"], Mode.DIRECT, form=Explaining(), probabilities=False, generations=1).values()
    assert (answer.verdicts["prompt_harm"], answer.texts) == ((NEGATIVE,), ("-",))
    assert backend.asked == [("x", 1, 1)]


def test_a_thought_that_runs_out_gets_a_forced_verdict():
    says = {"x": ["hm.+", "hmmmmmmm"], "xhmmmmm.": ["-"]}
    odds = {"xhm": log_odds(0.8), "xhmmmmm": log_odds(0.4)}
    backend = Script(says, odds)
    found = ask_all(backend, ["x"], Mode.REASONING, generations=2)["x"]
    assert found.texts == ("hm.+", "hmmmmm.-")
    assert found.verdicts["prompt_harm"] == (POSITIVE, NEGATIVE)
    assert found.forced == 1
    first, second = found.completions  # what was sampled is not the whole of the second one
    assert (text(first.ids[:-1]), first.ids[-1], second) == ("hm.+", STOP, None)
    assert backend.asked == [("x", 2, 6), ("x", 2, 6), ("xhmmmmm.", 1, 2)]
    assert found.probabilities["prompt_harm"] == pytest.approx((0.8 + 0.4) / 2)
    assert found.unscored["prompt_harm"] == 0


def test_a_thought_without_a_place_of_choice_is_counted():
    backend = Script({"x": ["hm.+", "hmmm"]}, {"xhm": log_odds(0.2)})
    backend.says |= {"x": ["hm.+", "lost"]}
    found = ask_all(backend, ["x"], Mode.REASONING, generations=2)["x"]
    assert found.probabilities["prompt_harm"] == pytest.approx(0.2)
    assert found.unscored["prompt_harm"] == 1


@pytest.mark.parametrize("workers", [1, 3])
def test_every_ask_is_answered_once(workers):
    names = [f"example {i}" for i in range(11)]
    says, odds = {name: ["+"] for name in names}, {k: v for n in names for k, v in direct_odds(n).items()}
    found = ask_all(Script(says, odds, workers=workers), names, Mode.DIRECT, generations=1)
    assert sorted(found) == sorted(names)


def test_answers_arrive_before_an_engine_that_never_waits_takes_the_next_group():
    """JAX computes in this very thread: what is judged must be kept before it goes on, or a kill would lose it all."""
    backend, seen = Script(group=2), []

    async def log_odds(prefixes, pairs):
        seen.append("scored")
        return [0.0 for _ in prefixes]

    backend.log_odds = log_odds

    async def run():
        asks = [Request(Example(name, "made up", "bread?"), ("prompt_harm",), Mode.DIRECT) for name in "uvwxyz"]
        async for answer in predict(asks, Signs(), backend, EvaluateConfig(generations=0)):
            seen.append(answer.example_id)  # noqa: PERF401 (in between, others append too)

    asyncio.run(run())
    assert seen == ["scored", "u", "v", "scored", "w", "x", "scored", "y", "z"]


def test_an_error_ends_the_run():
    says = {name: ["+"] for name in "abcdef"}
    odds = {k: v for name in says for k, v in direct_odds(name).items()}
    with pytest.raises(RuntimeError, match="d"):
        ask_all(Script(says, odds, broken="d", group=1, workers=2), says, Mode.DIRECT, generations=1)


BOTH = ("prompt_harm", "response_harm")


def test_one_generation_answers_all_questions():
    backend = Script({"x": ["+ -", "- ?", "+ +"]}, direct_odds("x", first=0.2, if_positive=0.9, if_negative=0.3))
    counted = []
    log_odds = backend.log_odds

    async def count(prefixes, pairs):
        counted.append(len(prefixes))
        return await log_odds(prefixes, pairs)

    backend.log_odds = count
    found = ask_all(backend, ["x"], Mode.DIRECT, BOTH, generations=3, verdict_tokens=4)["x"]
    assert [n for _, n, _ in backend.asked] == [3, 3, 3]
    assert found.verdicts == {
        "prompt_harm": (POSITIVE, NEGATIVE, POSITIVE),
        "response_harm": (NEGATIVE, UNPARSABLE, POSITIVE),
    }
    assert found.probabilities["prompt_harm"] == pytest.approx(0.2)
    assert found.probabilities["response_harm"] == pytest.approx(0.2 * 0.9 + 0.8 * 0.3)
    assert counted == [3]  # what the questions share is computed once


@pytest.mark.parametrize("growing", [False, True])
def test_what_prompts_share_is_declared_and_a_growing_text_is_kept(growing):
    requests = [
        Request(Example(name, "made up", "bread?"), ("prompt_harm",), Mode.DIRECT, growing=growing)
        for name in ("xya", "xza")
    ]
    backend = Foreseeing(odds={key: 0.0 for name in ("xya", "xza") for key in direct_odds(name)})

    async def run():
        return [p async for p in predict(requests, Signs(), backend, EvaluateConfig(generations=0))]

    asyncio.run(run())
    assert backend.declared == ["x", "x"]
    assert backend.grown == (["xya", "xza"] if growing else [])


def test_a_request_waits_for_its_batch():
    backend = Script({"x": ["+"], "z": ["+"]}, group=2)
    found = ask_all(backend, "xz", Mode.DIRECT, probabilities=False, generations=1)
    assert all(each.wait == 2 * each.seconds > 0 for each in found.values())


def test_a_format_with_a_prompt_for_each_question_generates_for_each():
    says = {"xprompt_harm": ["+", "-"], "xresponse_harm": ["-", "?"]}
    odds = {f"x{question}{letter}": 0.0 for question in BOTH for letter in "abc"}
    backend = Script(says, odds)
    found = ask_all(backend, ["x"], Mode.DIRECT, BOTH, OneByOne(), generations=2)["x"]
    assert found.verdicts == {"prompt_harm": (POSITIVE, NEGATIVE), "response_harm": (NEGATIVE, UNPARSABLE)}
    assert found.texts == ("+\n\n-", "-\n\n?")
    assert found.prompt_tokens == sum(map(len, says))
    assert found.completion_tokens == 4
    assert found.probabilities == {question: pytest.approx(0.5) for question in BOTH}


def test_probabilities_may_be_left_out():
    backend = Script({"x": ["+"]})
    found = ask_all(backend, ["x"], Mode.DIRECT, probabilities=False, generations=1)["x"]
    assert (found.verdicts["prompt_harm"], found.probabilities["prompt_harm"]) == ((POSITIVE,), None)


@pytest.mark.parametrize("odds", [math.nan, math.inf, -math.inf])
def test_a_probability_that_is_not_a_number_is_an_error(odds):
    backend = Script(odds=direct_odds("x") | direct_odds("z") | {"za": odds})
    with pytest.raises(JaxguardError, match=r"'z'.*prompt_harm"):
        ask_all(backend, "xz", Mode.DIRECT, generations=0)
