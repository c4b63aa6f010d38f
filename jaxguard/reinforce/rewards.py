"""Rewards and advantages: pure functions of what an answer says. Only jaxguard.data reads an answer, and it fails closed.

An answer without a verdict, with two, or with one inside its reasoning earns what the worst verdict does, never more.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxguard.config.reinforce import ReinforceConfig, RewardConfig
from jaxguard.data.format.answer import parse
from jaxguard.data.format.dialogue import ABSENT, CHOICES, Answers, Mode, all_answers
from jaxguard.data.policies import Question

EPSILON = 1e-4
"""Added to a group's standard deviation, as in TRL: rewards that differ by less are the same."""
MOST_LOG_ODDS = 10.0
"""Bound of the reward `log_odds`, and minus that of reasoning that no verdict can follow."""

Verdict = Mapping[Question, str]


def read_verdict(text: str, ended: bool, labels: Answers, mode: Mode) -> dict[Question, str] | None:
    """Return the word of each labelled question; None if the answer did not end by itself, or has not exactly these verdicts."""
    asks = [question for question, _ in labels]
    verdict = parse(text, asks, mode, ABSENT not in dict(labels).values())
    return None if verdict.problems or not ended else {q: getattr(verdict, q) or ABSENT for q in asks}


def verdict_reward(verdict: Verdict | None, labels: Answers, settings: RewardConfig) -> float:
    """Return 1 if every verdict is right; for each wrong one its share is minus its cost. None, no verdict, costs the most."""
    if verdict is None:
        return -MOST_LOG_ODDS if settings.kind == "log_odds" else -max(settings.false_positive, settings.false_negative)
    total = weights = 0.0
    for question, word in labels:
        if word == ABSENT:
            continue
        weight = settings.prompt_weight if question == "prompt_harm" else settings.response_weight
        positive = CHOICES[question][0]
        cost = settings.false_negative if word == positive else settings.false_positive
        total += weight * (1 if verdict[question] == word else -cost)
        weights += weight
    return total / weights


def is_right(verdict: Verdict | None, labels: Answers) -> bool:
    return verdict is not None and all(verdict[q] == word for q, word in labels if word != ABSENT)


def length_cost(tokens: int, config: ReinforceConfig) -> float:
    """Return what an answer's length costs: nothing up to the budget, then linearly more (DAPO's soft overlong punishment)."""
    budget, most = config.reward.length_budget, config.max_tokens
    return 0.0 if budget is None else config.reward.length_penalty * max(0, tokens - budget) / (most - budget)


def advantages(rewards: Sequence[float], config: ReinforceConfig) -> np.ndarray:
    """Return each reward less its group's baseline, divided as `scale` says, float64 [n]; n is at least 2."""
    x = np.asarray(rewards, np.float64)
    centred = x - x.mean()
    if config.baseline == "leave_one_out":
        centred *= len(x) / (len(x) - 1)
    return centred / (x.std(ddof=1) + EPSILON) if config.scale == "group" else centred


def expected(logprobs: Sequence[float], labels: Answers, settings: RewardConfig) -> tuple[float, np.ndarray]:
    """Return the reward of all verdicts together, given the log-probability of each, and its derivative by each of these.

    `logprobs` are in the order of `all_answers`. probability: the mean of `verdict_reward`, where what is no verdict counts as
    that. log_odds: log P(right) - log P(wrong), bounded; the derivative is 0 beyond.
    """
    p = np.exp(np.asarray(logprobs, np.float64))
    verdicts = all_answers(labels)
    if settings.kind == "probability":
        none = verdict_reward(None, labels, settings)
        gains = np.asarray([verdict_reward(dict(verdict), labels, settings) - none for verdict in verdicts])
        return float(none + p @ gains), p * gains
    wrong = np.logaddexp.reduce(np.asarray(logprobs[1:], np.float64))
    odds = float(logprobs[0] - wrong)
    if abs(odds) >= MOST_LOG_ODDS:
        return float(np.clip(odds, -MOST_LOG_ODDS, MOST_LOG_ODDS)), np.zeros(len(p))
    return odds, np.asarray([1.0, *-np.exp(np.asarray(logprobs[1:]) - wrong)])
