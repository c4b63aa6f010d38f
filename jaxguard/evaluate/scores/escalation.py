"""What reasoning is worth where the direct answer is uncertain: ways to combine a guard's two modes, from their predictions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import binom
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.data.format.dialogue import Mode
from jaxguard.evaluate.scores import metrics
from jaxguard.evaluate.scores.cascade import escalated
from jaxguard.evaluate.scores.metrics import Votes
from jaxguard.evaluate.scores.results import Arm, Cascade, Cell
from jaxguard.evaluate.scores.scoring import PointsOf, PredictedExamples
from jaxguard.guards.operating_points import F1, OperatingPoints, Worth, log_odds
from jaxguard.utils import statistics

SHARES: Final = tuple(np.linspace(0, 1, 21).tolist())
"""Of examples that are reasoned about, along a curve."""
FOLDS: Final = 5
"""For the learned value of reasoning: each fold is scored by a model of the others."""
MARGIN: Final = 0.005
"""F1 that a cascade which dominates may lose to reasoning."""

Mask = Bool[np.ndarray, "N"]


@dataclass(frozen=True, eq=False)
class Modes:
    """Both modes of a guard on a benchmark: votes, bool[N, 1] in direct mode, and generated tokens, float[N]."""

    direct: Votes
    reasoning: Votes
    direct_tokens: Float[np.ndarray, "N"]
    reasoning_tokens: Float[np.ndarray, "N"]
    seconds: float | None
    """Mean time of a direct answer, divided by that of a reasoned one."""

    def votes(self, mask: Mask) -> Votes:
        """The votes where the examples of `mask` are reasoned about."""
        first, second, chosen = self.direct, self.reasoning, mask[:, None]
        parsed = np.where(chosen, second.parsed, first.parsed)
        return Votes(first.labels, np.where(chosen, second.votes, first.votes), parsed)

    def f1(self, mask: Mask) -> float:
        """Mean F1 of the generations; NaN if undefined."""
        return float(statistics.f1_draws(self.direct.labels, self.votes(mask).votes, 0, 0)[0].mean())

    def costs(self, mask: Mask | float) -> tuple[float | None, float | None]:
        """Mean time and tokens, divided by those of reasoning; a number is the share of examples that are drawn."""
        total = float(self.reasoning_tokens.sum())
        if isinstance(mask, float) or not total:
            reasoned = float(np.mean(mask))
        else:
            reasoned = float(self.reasoning_tokens[mask].sum()) / total
        always = not isinstance(mask, float) and bool(mask.all())  # without a direct answer before
        seconds = None if self.seconds is None else reasoned + (0 if always else self.seconds)
        return seconds, reasoned + (0 if always else float(self.direct_tokens.sum()) / total) if total else None

    def random_f1(self, share: float, weights: Float[np.ndarray, "N"]) -> float:
        """The exact expectation of F1, mean over generations, if each example is reasoned about with probability `share`.

        Then the numbers of true and of false positives are independent, and each is a constant plus two binomial variables.
        """
        labels, first = self.direct.labels, self.direct.votes[:, 0]
        expected = []
        for second in self.reasoning.votes.T:
            both, lost, gained = (weights * rows for rows in (first & second, first & ~second, ~first & second))
            (tp, p_tp), (fp, p_fp) = (
                _positives(int(both[own].sum()), int(lost[own].sum()), int(gained[own].sum()), share)
                for own in (labels, ~labels)
            )
            below = tp[:, None] + fp + weights[labels].sum()
            f1 = np.divide(2 * tp[:, None], below, out=np.full(below.shape, np.nan), where=below > 0)
            expected.append(p_tp @ f1 @ p_fp)
        return float(np.mean(expected))


def _positives(both: int, lost: int, gained: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of positive verdicts and their probabilities: `lost` are so in direct mode only, `gained` in reasoning only."""
    left = binom.pmf(np.arange(lost + 1), lost, 1 - share)
    won = binom.pmf(np.arange(gained + 1), gained, share)
    return both + np.arange(lost + gained + 1), np.convolve(left, won)


def compare_modes(
    predictions: Sequence[PredictedExamples], cells: Sequence[Cell], settings: EvaluateConfig, points: PointsOf
) -> Iterator[Cascade]:
    """Compare ways to combine the modes of each guard, on every benchmark for which both gave predictions.

    A direct answer counts by its probability: above the threshold of the best F1 in guard.json, without that above a half. A
    reasoned one counts by its words, of each generation by itself; a single one by its threshold where there is one, as in `check`.
    """
    of = {(each.guard, each.mode, each.label): each for each in predictions if each.benchmark}
    cell_of = {(cell.guard, cell.mode, cell.benchmark): cell for cell in cells}
    for (guard, mode, label), direct in of.items():
        reasoning = of.get((guard, Mode.REASONING, label))
        if mode is Mode.DIRECT and reasoning is not None and not np.isnan(direct.probabilities).all():
            chosen = points.get((guard, mode, direct.question)), points.get((guard, Mode.REASONING, direct.question))
            both = [cell_of[guard, str(each), label] for each in (mode, Mode.REASONING)]
            yield _cascade(direct, reasoning, both, chosen, settings)


def judge_auto(
    predictions: Sequence[PredictedExamples], points: Sequence[OperatingPoints], settings: EvaluateConfig
) -> list[OperatingPoints]:
    """Say of each question's thresholds of mode `auto` what they are worth on a guard's validation examples, which chose them."""
    of = {(each.mode, each.question): each for each in predictions}
    own = {(each.asked.mode, each.asked.question): each for each in points}
    judged = []
    for each in points:
        question, auto = each.asked.question, each.auto
        reasoning = of.get((Mode.REASONING, question))
        if auto is not None and auto.direct and reasoning is not None:
            both = _combine(
                of[Mode.DIRECT, question], reasoning, (each, own.get((Mode.REASONING, question))), settings, None
            )
            worth = _verdict(_arms(both.modes, both.mask, None, settings))
            each = each.model_copy(update={"auto": auto.model_copy(update={"worth": worth})})
        judged.append(each)
    return judged


class _Combined(NamedTuple):
    """Both modes, which examples `auto` reasons about, and direct answers' log-odds with their distance from the threshold."""

    modes: Modes
    mask: Mask
    odds: Float[np.ndarray, "N"]
    distance: Float[np.ndarray, "N"]


def _combine(
    direct: PredictedExamples,
    reasoning: PredictedExamples,
    points: tuple[OperatingPoints | None, OperatingPoints | None],
    settings: EvaluateConfig,
    seconds: float | None,
) -> _Combined:
    """Points are those of direct, then of reasoning mode; `seconds` is as in Modes."""
    own, other = points
    chosen, limit = (None if each is None else each.threshold(F1) for each in points)
    threshold, platt = (0.5, None) if own is None or chosen is None else (chosen, own.platt)
    first, second = direct.votes_at(direct.filled(settings, platt), threshold, settings), reasoning.votes(settings)
    if settings.generations == 1 and other is not None and limit is not None:
        second = reasoning.votes_at(reasoning.filled(settings, other.platt), limit, settings)
    own_tokens, other_tokens = (
        np.array([float(x.completion_tokens) for x in each.predictions]) for each in (direct, reasoning)
    )
    probabilities = direct.probabilities if platt is None else platt(direct.probabilities)
    odds, auto = log_odds(probabilities), None if own is None else own.auto
    distance = np.nan_to_num(np.abs(odds - log_odds(np.array([threshold]))), nan=-1.0)
    unclear = None if auto is None else escalated(probabilities, auto.passes, auto.blocks)
    mask = _lowest(distance, settings.auto.budget) if unclear is None else unclear
    return _Combined(Modes(first, second, own_tokens, other_tokens, seconds), mask, odds, distance)


def _cascade(
    direct: PredictedExamples,
    reasoning: PredictedExamples,
    cells: Sequence[Cell],
    points: tuple[OperatingPoints | None, OperatingPoints | None],
    settings: EvaluateConfig,
) -> Cascade:
    """Cells and points are those of direct, then of reasoning mode."""
    seconds = [cell.cost.seconds + cell.cost.scoring for cell in cells]
    ratio = seconds[0] / seconds[1] if seconds[1] > 0 else None
    modes, mask, odds, distance = _combine(direct, reasoning, points, settings, ratio)
    length = np.log1p([len(x.prompt) + len(x.response or "") for x in direct.examples])
    value = _value(np.stack([np.nan_to_num(odds), distance, length], axis=1), modes, settings.seed)
    arms = _arms(modes, mask, value, settings)
    ranks = {"cascade": distance} | ({} if value is None else {"value": -value})
    curve = {name: [modes.f1(_lowest(rank, share)) for share in SHARES] for name, rank in ranks.items()}
    curve["random"] = [modes.random_f1(share, np.ones(len(mask))) for share in SHARES]
    defined = {name: tuple(None if np.isnan(f1) else f1 for f1 in values) for name, values in curve.items()}
    own = points[0]
    certified = "" if own is None or own.auto is None else str(own.auto)
    return Cascade(direct.guard, direct.label, cells[0].heading, certified, arms, defined, _verdict(arms))


def _arms(modes: Modes, mask: Mask, value: Float[np.ndarray, "N"] | None, settings: EvaluateConfig) -> dict[str, Arm]:
    labels, seed, resamples, share = modes.direct.labels, settings.seed, settings.resamples, float(mask.mean())
    masks = {"direct": np.zeros_like(mask), "reasoning": np.ones_like(mask), "cascade": mask}
    masks |= {} if value is None else {"value": _lowest(-value, share)}
    cascade, arms = modes.votes(mask), dict[str, Arm]()
    weights = (settings.auto.prevalence, 1 - settings.auto.prevalence)
    for name, chosen in masks.items():
        votes = modes.votes(chosen)
        f1 = metrics.average_f1([votes], [1.0], seed, resamples)
        less = metrics.f1_difference([cascade], [votes], (1.0,), seed, resamples)
        by_class = [float(chosen[rows].mean()) if rows.any() else 0.0 for rows in (labels, ~labels)]
        traffic = float(np.dot(by_class, weights))
        arms[name] = Arm(f1, float(chosen.mean()), traffic, *modes.costs(chosen), None if name == "cascade" else less)
    # The same draws as above.
    expected = modes.random_f1(share, np.ones(len(labels)))
    drawn = np.array([modes.random_f1(share, each) for each in statistics.draws(len(labels), (seed, 0), resamples)])
    each_f1, f1_drawn = statistics.f1_draws(labels, cascade.votes, (seed, 0), resamples)
    less = metrics.difference(each_f1.mean(keepdims=True) - expected, f1_drawn.mean(axis=1) - drawn)
    arms["random"] = Arm(statistics.estimate(np.array([expected]), drawn), share, share, *modes.costs(share), less)
    return arms


def _verdict(arms: Mapping[str, Arm]) -> Worth:
    """It dominates if it is better than direct mode and than chance, and as good as reasoning but for MARGIN."""

    def ends(name: str) -> tuple[float, float]:
        less = arms[name].less
        return (-1, 1) if less is None or less.low is None or less.high is None else (less.low, less.high)

    others, (low, high) = [ends("direct"), ends("random")], ends("reasoning")
    if high < -MARGIN or any(end < 0 for _, end in others):
        return "worse"
    return "dominates" if low > -MARGIN and all(end > 0 for end, _ in others) else "inside the noise"


def _value(features: Float[np.ndarray, "N d"], modes: Modes, seed: int) -> Float[np.ndarray, "N"] | None:
    """The chance that reasoning is right where the direct answer is wrong, cross-fitted; None where that is too rare, or the rule.

    Features: log-odds, their distance from the threshold, and the logarithm of the characters.
    """
    target = ~modes.direct.right[:, 0] & (modes.reasoning.right.mean(axis=1) > 0.5)
    if min(target.sum(), (~target).sum()) < FOLDS:
        return None
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    model = LogisticRegression(max_iter=1000)
    fitted: np.ndarray = cross_val_predict(model, features, target, cv=folds, method="predict_proba")
    return fitted[:, 1]


def _lowest(ranks: Float[np.ndarray, "N"], share: float) -> Mask:
    """The examples of the lowest ranks, up to a share of all."""
    mask = np.zeros(len(ranks), bool)
    mask[np.argsort(ranks, kind="stable")[: round(share * len(ranks))]] = True
    return mask
