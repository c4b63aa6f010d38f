"""Mode auto: direct answers where guard.json certifies them, reasoning elsewhere."""

import asyncio
import json
from dataclasses import replace

import pytest
from fake_guard import add_points

from jaxguard.config.evaluate import AutoConfig
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.guards.guard import Guard
from jaxguard.guards.modes import AUTO
from jaxguard.guards.operating_points import F1, POINTS, AutoThresholds, write_points
from jaxguard.utils.errors import JaxguardError

TEXTS = ["0.1", "0.2", "0.3", "0.45", "0.6", "0.8", "0.95"]


def certify(run, passes=0.2, blocks=0.8, auto=True, worth=None, **how):
    """Give the run's export a guard.json with a threshold of 0.5 and those of auto."""
    points = add_points(run, thresholds=(0.5, 0.5), **how)
    rates = {"miss_rate": 0.05, "alarm_rate": 0.01, "escalated": 0.1, "limits": AutoConfig()}
    own = AutoThresholds(passes=passes, blocks=blocks, worth=worth, **rates) if auto else None
    weights = json.loads((run / "export" / POINTS).read_text())["weights"]
    write_points(run / "export", weights, [points.model_copy(update={"auto": own})])


@pytest.fixture
def texts(guard):
    """The direct probability is the text; reasoning finds the texts harmful that end in an odd digit."""
    guard.chance = lambda ask, question: float(ask.example.prompt) if ask.mode is Mode.DIRECT else 0.625

    def says(ask):
        word = "harmful" if int(ask.example.prompt[-1]) % 2 else "unharmful"
        verdict = f"Prompt harm: {word}\nResponse harm: {word}"
        return verdict if ask.mode is Mode.DIRECT else f"<think>It ends so.</think>\n\n{verdict}"

    guard.says = says
    return guard


def decided(results):
    return "".join(result.decided_by[0] for result in results)


def test_it_is_direct_or_reasoning_item_by_item(run, texts):
    certify(run)
    with Guard.load(run) as guard:
        auto, direct, reasoning = (guard.check_many(TEXTS, mode) for mode in (AUTO, "direct", "reasoning"))
        assert asyncio.run(guard.acheck(TEXTS[3], mode=AUTO)).harmful
    assert decided(auto) == "ddrrrdd"
    for i, result in enumerate(auto):
        if result.decided_by is Mode.DIRECT:
            assert result == direct[i]
        else:
            first = {"prompt_harm": float(TEXTS[i])}
            assert result == replace(reasoning[i], direct_probabilities=first, seconds=1.0)
            assert result.probabilities == {"prompt_harm": 0.625}
    assert [result.harmful for result in auto] == [False, False, True, True, False, True, True]
    assert [request.example.prompt for request in texts.asks if request.mode is Mode.REASONING][:3] == [
        "0.3",
        "0.45",
        "0.6",
    ]


@pytest.mark.parametrize(
    ("passes", "blocks", "who"),
    [(None, 0.8, "rrrrrdd"), (0.2, None, "ddrrrrr"), (None, None, "rrrrrrr"), (0.5, 0.5, "ddddddd")],
)
def test_a_side_without_a_certificate_reasons(run, texts, passes, blocks, who):
    certify(run, passes, blocks)
    with Guard.load(run, mode=AUTO) as guard:
        assert decided(guard.check_many(TEXTS)) == who
        assert ("prompt_harm: auto always reasons" in guard.warning) == (who == "rrrrrrr")
    asked = [request.mode for request in texts.asks]
    assert asked.count(Mode.DIRECT) == (0 if who == "rrrrrrr" else 7)


def test_a_question_without_thresholds_reasons_and_a_problem_is_never_trusted(run, texts):
    certify(run)
    with Guard.load(run, mode=AUTO) as guard:
        assert "response_harm" in guard.warning
        assert (
            decided(guard.check_many(["0.1", ("0.1", "No."), Example("x", "s", "0.1", policy="Only trains.")])) == "drr"
        )
        texts.cut = True
        assert decided(guard.check_many(["0.1"])) == "r"
        texts.cut, says = False, texts.says
        texts.says = lambda ask: "Rye." if ask.mode is Mode.DIRECT else says(ask)
        assert decided(guard.check_many(["0.1", "0.9"])) == "rr"
        texts.says, texts.chance = says, lambda ask, question: None
        assert decided(guard.check_many(["0.1", "0.9"])) == "rr"


def test_a_direct_verdict_at_another_operating_point_must_agree(run, texts):
    certify(run)
    path = run / "export" / POINTS
    path.write_text(path.read_text().replace('"threshold": 0.5', '"threshold": 0.9'))
    with Guard.load(run, mode=AUTO) as guard:
        assert decided(guard.check_many(["0.1", "0.85", "0.95"])) == "drd"


@pytest.mark.parametrize("worth", [None, "dominates", "inside the noise", "worse"])
def test_it_warns_where_it_was_not_found_to_be_better(run, texts, worth):
    certify(run, worth=worth)
    with Guard.load(run, mode=AUTO) as guard:
        assert ("prompt_harm: auto passes up to 0.2" in guard.warning) == (worth in ("inside the noise", "worse"))
        assert decided(guard.check_many(TEXTS)) == "ddrrrdd", "whoever asks for it gets it"


@pytest.mark.parametrize("how", [None, {"weights": b"other"}, {"policy_digest": "0"}, {"auto": False}])
def test_without_thresholds_for_these_weights_and_policy_it_refuses(run, texts, how):
    if how is not None:
        certify(run, **how)
    with pytest.raises(JaxguardError, match="mode=auto") as error:
        Guard.load(run, mode=AUTO)
    assert "evaluate.validation" in str(error.value)
    with Guard.load(run) as guard:
        assert guard.check("0.2").passes
        with pytest.raises(JaxguardError, match="mode=auto"):
            guard.check("0.2", mode=AUTO)


def test_a_chosen_operating_point_must_be_there_in_both_modes(run, texts):
    certify(run)
    with pytest.raises(JaxguardError, match="reasoning"):
        Guard.load(run, mode=AUTO, operating_point=F1)
    with Guard.load(run, mode=AUTO, operating_point="words") as guard:
        assert decided(guard.check_many(["0.2", "0.1", "0.9"])) == "drd"  # the words of the second disagree
