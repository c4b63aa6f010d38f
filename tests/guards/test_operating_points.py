"""guard.json: what it holds, where it applies, and the verdicts at its thresholds."""

import json

import pytest
from fake_guard import SETTINGS, add_points

from jaxguard.config.evaluate import AutoConfig, EvaluateConfig
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Policy
from jaxguard.guards.guard import Guard
from jaxguard.guards.operating_points import POINTS, WORDS, Asked, AutoThresholds, Platt, read_points, write_points
from jaxguard.utils.errors import JaxguardError


def check(run, *texts, **options):
    with Guard.load(run, **options) as guard:
        return guard, guard.check(*texts)


def text(run):
    return (run / "export" / POINTS).read_text()


def test_points_are_read_as_they_were_written(run):
    auto = AutoThresholds(passes=0.1, blocks=None, miss_rate=0.05, alarm_rate=0.3, escalated=0.2, limits=AutoConfig())
    points = add_points(run).model_copy(update={"platt": Platt(0.5, -1.25), "auto": auto})
    write_points(run, "a", [points])
    assert read_points(run, "a") == ({points.asked: points}, "")
    assert points.threshold("0.05") == 0.3
    assert points.threshold("0.01") is points.threshold("0.2") is None


def test_points_of_other_questions_stay_and_those_of_other_weights_go(run):
    points = add_points(run)
    other = points.model_copy(update={"asked": points.asked.model_copy(update={"mode": Mode.REASONING})})
    newer = points.model_copy(update={"negatives": 41})
    for each in (points, other, newer):
        write_points(run, "a", [each])
    assert read_points(run, "a")[0] == {points.asked: newer, other.asked: other}
    write_points(run, "b", [points])
    assert read_points(run, "b")[0] == {points.asked: points}


def test_reasoning_is_asked_alike_if_it_is_sampled_alike():
    policy = Policy("short", rules="No bread.")
    for mode, alike in ((Mode.DIRECT, True), (Mode.REASONING, False)):
        first, second = (Asked.of(policy, "prompt_harm", mode, each) for each in (SETTINGS, EvaluateConfig()))
        assert (first == second) == alike
    assert first != Asked.of(Policy("short", rules="No rye."), "prompt_harm", Mode.REASONING, SETTINGS)


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ('"format": 1', '"format": 2', "format"),
        ('"threshold": 0.3', '"threshold": 1.3', "threshold"),
        ('"threshold": 0.3', '"threshold": NaN', "threshold"),
        ('"negatives": 40', '"negatives": -1', "negatives"),
        ('"mode": "direct"', '"mode": "dirct"', "mode"),
        ('"platt": null', '"platt": {"slope": 1.0}', "platt"),
        ('"precision"', '"precison"', "precison"),
    ],
)
def test_a_malformed_file_is_refused(run, guard, old, new, field):
    add_points(run)
    changed = text(run).replace(old, new)
    assert changed != text(run)
    (run / "export" / POINTS).write_text(changed)
    with pytest.raises(JaxguardError, match=field) as error:
        check(run, "bread?")
    assert POINTS in str(error.value)
    assert not guard.opened


def test_a_truncated_file_and_one_with_twice_the_same_is_refused(run, guard):
    add_points(run)
    whole = json.loads(text(run))
    for broken in (text(run)[:-20], "", "[]", json.dumps(whole | {"sets": whole["sets"] * 2})):
        (run / "export" / POINTS).write_text(broken)
        with pytest.raises(JaxguardError, match=POINTS):
            check(run, "bread?")


@pytest.mark.parametrize(
    ("chosen", "thresholds", "name", "word", "threshold"),
    [
        (None, (0.2, 0.3), "f1", "harmful", 0.2),
        (None, (0.25, 0.3), "f1", "unharmful", 0.25),
        (0.05, (0.2, 0.3), "0.05", "unharmful", 0.3),
        ("0.05", (0.3, 0.2), "0.05", "harmful", 0.2),
        (WORDS, (0.2, 0.3), WORDS, "unharmful", None),
    ],
)
def test_the_probability_decides_above_the_threshold(run, guard, chosen, thresholds, name, word, threshold):
    """The guard says 0.25 for prompts, and the word unharmful; for responses the file has no threshold."""
    add_points(run, thresholds=thresholds)
    _, result = check(run, "bread?", "No.", operating_point=chosen)
    assert (result.operating_point, result.verdict.prompt_harm, result.passes) == (name, word, word == "unharmful")
    assert result.thresholds == {"prompt_harm": threshold, "response_harm": None}
    assert result.verdict.response_harm == "unharmful"


def test_probabilities_are_calibrated(run, guard):
    points = add_points(run)
    write_points(
        run / "export", json.loads(text(run))["weights"], [points.model_copy(update={"platt": Platt(2.0, 0.0)})]
    )
    _, result = check(run, "bread?")
    assert result.probabilities == {"prompt_harm": pytest.approx(0.1)}  # odds of 1 : 3, squared
    assert result.verdict.prompt_harm == "unharmful"


def test_an_unparsable_answer_does_not_pass_whatever_its_probability(run, guard):
    add_points(run, thresholds=(0.9, 0.9))
    guard.says = lambda ask: "I would rather not say."
    _, result = check(run, "bread?", operating_point="f1")
    assert (result.passes, result.harmful, result.operating_point) == (False, True, WORDS)
    assert result.thresholds == {"prompt_harm": None}


def test_a_missing_probability_does_not_pass_a_threshold(run, guard):
    add_points(run)
    guard.chances = dict.fromkeys(("prompt_harm", "response_harm"))
    _, result = check(run, "bread?")
    assert (result.passes, result.harmful) == (False, True)
    assert "prompt_harm" in result.problems[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": b"other"}, "other weights"),
        ({"policy_digest": "0"}, "no threshold"),
        ({"mode": Mode.REASONING}, "no threshold"),
        ({"ask": "benchmark"}, "no threshold"),
    ],
)
def test_points_that_do_not_fit_are_noted_or_an_error_if_they_were_chosen(run, guard, changes, words):
    add_points(run, **changes)
    loaded, result = check(run, "bread?")
    assert words in loaded.warning
    assert (result.operating_point, result.verdict.prompt_harm) == (WORDS, "unharmful")
    assert result.probabilities == {"prompt_harm": 0.25}
    with pytest.raises(JaxguardError, match=POINTS):
        check(run, "bread?", operating_point="f1")


def test_a_name_that_is_not_there_lists_those_that_are(run, guard):
    with pytest.raises(JaxguardError, match=POINTS):
        check(run, "bread?", operating_point="f1")
    add_points(run)
    for name in ("0.01", "f2"):
        with pytest.raises(JaxguardError, match=name) as error:
            check(run, "bread?", operating_point=name)
        assert "f1, 0.05" in str(error.value)
    assert not guard.opened


def test_a_mode_without_the_chosen_point_is_an_error(run, guard):
    add_points(run)
    with Guard.load(run, operating_point="f1") as loaded, pytest.raises(JaxguardError, match="reasoning"):
        loaded.check("bread?", mode="reasoning")
    with Guard.load(run) as loaded:
        guard.says = lambda ask: "<think>Bread.</think>Prompt harm: unharmful"
        assert loaded.check("bread?", mode="reasoning").operating_point == WORDS


def test_an_example_with_its_own_policy_is_judged_by_words(run, guard):
    add_points(run)
    with Guard.load(run, operating_point="f1") as loaded:
        own, short = loaded.check_many([Example("1", "s", "a", policy="Only talk of trains."), Example("2", "s", "a")])
    assert (own.operating_point, own.verdict.prompt_harm) == (WORDS, "unharmful")
    assert (short.operating_point, short.verdict.prompt_harm) == ("f1", "harmful")


def test_without_a_file_nothing_is_said(run, guard):
    loaded, result = check(run, "bread?")
    assert (loaded.warning, result.operating_point, result.thresholds) == ("", WORDS, {"prompt_harm": None})
