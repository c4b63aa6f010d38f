"""Rewards are pure functions of what an answer says; no answer earns more than an honest one of the same verdict."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxguard.config.reinforce import ReinforceConfig, RewardConfig
from jaxguard.data.format.dialogue import ABSENT, CHOICES, Mode, all_answers, written
from jaxguard.reinforce.rewards import (
    advantages,
    expected,
    is_right,
    length_cost,
    read_verdict,
    verdict_reward,
)

LABELS = [
    (("prompt_harm", "harmful"),),
    (("prompt_harm", "unharmful"), ("response_harm", "unharmful"), ("response_refusal", "refusal")),
    (("prompt_harm", "harmful"), ("response_harm", ABSENT)),
]
COSTS = [
    RewardConfig(),
    RewardConfig(false_positive=0.5, false_negative=2, response_weight=3),
    RewardConfig(false_positive=0),
]


def earned(text: str, labels, settings: RewardConfig, mode: Mode = Mode.DIRECT, ended: bool = True) -> float:
    return verdict_reward(read_verdict(text, ended, labels, mode), labels, settings)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("settings", COSTS)
def test_the_right_verdict_earns_1_and_each_error_its_cost(labels, settings):
    assert earned(written(labels), labels, settings) == 1
    for verdict in all_answers(labels)[1:]:
        wrong = {q for q, word in verdict if dict(labels)[q] != word}
        weights = {
            q: settings.prompt_weight if q == "prompt_harm" else settings.response_weight
            for q, word in labels
            if word != ABSENT
        }
        costs = {
            q: settings.false_negative if dict(labels)[q] == CHOICES[q][0] else settings.false_positive for q in weights
        }
        reward = sum(w * (-costs[q] if q in wrong else 1) for q, w in weights.items()) / sum(weights.values())
        assert earned(written(verdict), labels, settings) == pytest.approx(reward)
        assert not is_right(dict(verdict), labels)


def test_an_answer_that_did_not_end_has_no_verdict():
    labels = LABELS[0]
    assert read_verdict(written(labels), False, labels, Mode.DIRECT) is None
    assert earned(written(labels), labels, RewardConfig(), ended=False) == -1


RIGHT, WRONG = "Prompt harm: harmful", "Prompt harm: unharmful"
FORGED = st.lists(
    st.sampled_from(
        [
            RIGHT, WRONG, "prompt harm : HARMFUL", f"> {RIGHT}", f"`{RIGHT}`", f"~~{WRONG}~~", f"{WRONG} or harmful",
            "Prompt harm:",
            "Prompt harm: harmful, unharmful", "<think>", "</think>", "<think>\nno\n</think>", "/think", "/no_think", "<|im_end|>",
            "<|im_start|>assistant", "Response harm: harmful", "Prompt harm\\: harmful", "Human user:", "reward: 1", "None", "",
            "Prompt harm: None", "P\u200brompt harm: harmful", "Prompt harm\uff1a harmful", "\u041frompt harm: harmful", "\n",
        ]
    ),
    max_size=6,
)  # fmt: skip


@given(FORGED, st.sampled_from(list(Mode)), st.sampled_from(["\n", " ", "\n\n"]), st.booleans())
def test_no_forged_answer_earns_more_than_its_one_verdict(parts, mode, separator, ended):
    """It is right under one label at most, and only if it ended; else it earns what a wrong one does. tests/fuzz has more."""
    text = separator.join(parts)
    rewards = [earned(text, (("prompt_harm", word),), RewardConfig(), mode, ended) for word in CHOICES["prompt_harm"]]
    assert sorted(rewards) in ([-1, -1], [-1, 1])
    assert ended or max(rewards) == -1


@given(st.integers(0, 200), st.integers(1, 100))
def test_length_is_a_budget_and_never_a_bonus(tokens, budget):
    config = ReinforceConfig(max_tokens=200, reward=RewardConfig(length_budget=budget, length_penalty=0.5))
    assert length_cost(tokens, config) == pytest.approx(0.5 * max(0, tokens - budget) / (200 - budget))
    assert length_cost(tokens, ReinforceConfig(max_tokens=200)) == 0


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=9))
def test_advantages(rewards):
    n = len(rewards)
    mean, std = np.mean(rewards), np.std(rewards, ddof=1)
    centred = advantages(rewards, ReinforceConfig(scale="none"))
    assert centred == pytest.approx(np.asarray(rewards) - mean, abs=1e-12)
    assert advantages(rewards, ReinforceConfig()) == pytest.approx(centred / (std + 1e-4), abs=1e-9)
    others = [(sum(rewards) - x) / (n - 1) for x in rewards]
    alone = advantages(rewards, ReinforceConfig(baseline="leave_one_out", scale="none"))
    assert alone == pytest.approx(np.asarray(rewards) - others, abs=1e-9)


def test_equal_rewards_have_no_advantage():
    for baseline, scale in product(("mean", "leave_one_out"), ("group", "none")):
        assert not advantages([0.3] * 8, ReinforceConfig(baseline=baseline, scale=scale)).any()


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("settings", COSTS)
@pytest.mark.parametrize("kind", ["probability", "log_odds"])
def test_the_expected_reward_and_its_derivative(labels, settings, kind):
    settings = settings.model_copy(update={"kind": kind})
    verdicts = all_answers(labels)
    assert verdicts[0] == labels
    assert len(set(verdicts)) == len(verdicts) == 2 ** sum(word != ABSENT for _, word in labels)
    logprobs = np.random.default_rng(0).normal(-3, 0.7, len(verdicts))
    reward, slopes = expected(logprobs, labels, settings)
    p = np.exp(logprobs)
    if kind == "probability":
        none = verdict_reward(None, labels, settings)
        assert reward == pytest.approx(
            sum(own * verdict_reward(dict(verdict), labels, settings) for own, verdict in zip(p, verdicts, strict=True))
            + (1 - p.sum()) * none
        )
    else:
        assert reward == pytest.approx(math.log(p[0] / p[1:].sum()))
    for i, slope in enumerate(slopes):
        step = 1e-6 * (np.arange(len(p)) == i)
        ends = [expected(logprobs + sign * step, labels, settings)[0] for sign in (1, -1)]
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-6)


def test_log_odds_are_bounded():
    settings = RewardConfig(kind="log_odds")
    for logprobs, bound in (([-0.001, -60.0], 10), ([-60.0, -0.001], -10)):
        reward, slopes = expected(logprobs, LABELS[0], settings)
        assert reward == bound
        assert not slopes.any()


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("settings", COSTS)
@pytest.mark.parametrize("kind", ["probability", "log_odds"])
def test_reasoning_that_no_verdict_can_follow_earns_no_more_than_any_other(labels, settings, kind):
    settings = settings.model_copy(update={"kind": kind})
    worst = verdict_reward(None, labels, settings)
    for wrong in range(len(all_answers(labels))):  # sure of this verdict
        logprobs = np.where(np.arange(len(all_answers(labels))) == wrong, -1e-4, -40.0)
        assert worst <= expected(logprobs, labels, settings)[0]
