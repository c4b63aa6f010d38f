"""Held-out loss, F1 and AUPRC, from the probabilities of the verdict tokens: nothing is sampled.

For each question, the two answers are compared at the first token in which they differ. Earlier answers are summed over all
their values, so that no label leaks into a later answer. In reasoning mode the reference trace is part of the input: the
result measures how the model concludes from a good trace, an upper bound for its own traces.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Array
from sklearn.metrics import average_precision_score, f1_score

from jaxguard.data.encoding import EncodedExample
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import CHOICES, Mode
from jaxguard.data.packing import assemble, bucketed, pack, target_spans
from jaxguard.data.policies import Question
from jaxguard.models.sharding import batch_sharding, shard_batch
from jaxguard.train.step import Program
from jaxguard.utils.errors import JaxguardError

THRESHOLD = 0.5
HARM = ("prompt_harm", "response_harm")


@dataclass(frozen=True)
class ValidationPrediction:
    """The label of one question about one held-out example, and the model's probability of the positive: harmful, or refusal."""

    example_id: str
    mode: Mode
    question: Question
    positive: bool
    probability: float


class Score(NamedTuple):
    """Sum of the negative log-likelihoods of an example's targets, their number, and P(positive answer) at each of its probes."""

    loss: float
    targets: int
    probabilities: list[float]


HeldOut = tuple[Example, Mode, tuple[EncodedExample, ...]]
"""Example, mode, and its encoded branches, the labelled one first: see Encoder.branches."""


@dataclass(frozen=True)
class Validation:
    """The held-out examples, and how they are batched: as in training."""

    held_out: Sequence[HeldOut]
    batch_size: int
    max_seq_len: int
    row_multiple: int

    def run(self, program: Program, weights: dict[str, Array]) -> tuple[dict[str, float], list[ValidationPrediction]]:
        """Compute the metrics by name, and the prediction for every question of every example."""
        scores = self._scores(program, weights)
        labelled: dict[Mode, list[Score]] = defaultdict(list)
        predictions: list[ValidationPrediction] = []
        for example, mode, branches in self.held_out:
            labelled[mode].append(scores[id(branches[0])])
            predictions += _predict(example, mode, branches, [scores[id(branch)] for branch in branches])
        adversarial = {example.id: example.adversarial for example, _, _ in self.held_out}
        metrics = {"validation/loss": _mean_loss([score for group in labelled.values() for score in group])}
        for mode, group in labelled.items():
            metrics[f"validation/{mode}/loss"] = _mean_loss(group)
            of_mode = summary([prediction for prediction in predictions if prediction.mode == mode], adversarial)
            metrics |= {f"validation/{mode}/{name}": value for name, value in of_mode.items()}
        return metrics, predictions

    def _scores(self, program: Program, weights: dict[str, Array]) -> dict[int, Score]:
        """Score every branch, by its id()."""
        scores = {}
        branches = [branch for _, _, branches in self.held_out for branch in branches]
        for start in range(0, len(branches), self.batch_size):
            rows = pack(branches[start : start + self.batch_size], self.max_seq_len, self.row_multiple)
            batch = assemble(rows, bucketed(rows, self.max_seq_len, self.row_multiple))
            # The targets, and at each probe's target the positive and the negative answer.
            ids_BMQ = np.stack([batch.target_ids_BM, *np.zeros((2, *batch.target_ids_BM.shape), np.int32)], axis=-1)
            located = []
            for row, packed in enumerate(rows):
                for example, span in target_spans(packed):
                    probes = [span.start + int(example.loss_mask[: probe.position].sum()) for probe in example.probes]
                    for probe, target in zip(example.probes, probes, strict=True):
                        ids_BMQ[row, target, 1:] = probe.positive_id, probe.negative_id
                    located.append((example, row, span, probes))
            sharded = shard_batch((batch, ids_BMQ), batch_sharding(program.mesh))
            logprobs_BMQ = np.asarray(program.score(weights, *sharded)).astype(np.float64)
            for example, row, targets, probes in located:
                loss = float(-logprobs_BMQ[row, targets, 0].sum())
                positive, negative = logprobs_BMQ[row, probes, 1:].T
                probabilities = (1 / (1 + np.exp(negative - positive))).tolist()
                if not np.isfinite([loss, *probabilities]).all():
                    raise JaxguardError(
                        f"validation example {example.example_id!r}: its loss and probabilities are not finite: the weights "
                        "diverged; lower optimizer.learning_rate"
                    )
                scores[id(example)] = Score(loss, targets.stop - targets.start, probabilities)
        return scores


def _predict(
    example: Example, mode: Mode, branches: Sequence[EncodedExample], scores: Sequence[Score]
) -> Iterator[ValidationPrediction]:
    """P(question positive) = sum over the earlier answers of P(earlier answers) P(positive | earlier answers)."""
    marginal: dict[Question, float] = defaultdict(float)
    counted = set()
    for branch, score in zip(branches, scores, strict=True):
        answers = dict(branch.answers)
        path: tuple[str, ...] = ()
        weight = 1.0
        for probe, probability in zip(branch.probes, score.probabilities, strict=True):
            if (path, probe.question) not in counted:
                counted.add((path, probe.question))
                marginal[probe.question] += weight * probability
            answer = answers[probe.question]
            weight *= probability if answer == CHOICES[probe.question][0] else 1 - probability
            path = (*path, answer)
    labels = dict(branches[0].answers)
    for question, probability in marginal.items():
        yield ValidationPrediction(example.id, mode, question, labels[question] == CHOICES[question][0], probability)


def _mean_loss(scores: Sequence[Score]) -> float:
    return sum(score.loss for score in scores) / sum(score.targets for score in scores)


def summary(
    predictions: Sequence[ValidationPrediction], adversarial: Mapping[str, bool | None] = MappingProxyType({})
) -> dict[str, float]:
    """F1 of the positive class at THRESHOLD, and AUPRC, of each question and of both harm questions together.

    The latter also apart for adversarial and other (vanilla) prompts, where `adversarial` says of an example's id which it is.
    AUPRC is left out where all labels are equal.
    """
    metrics: dict[str, float] = {}
    groups: dict[str, list[ValidationPrediction]] = defaultdict(list)
    for prediction in predictions:
        groups[prediction.question].append(prediction)
        if prediction.question in HARM:
            groups["harm"].append(prediction)
            if (flag := adversarial.get(prediction.example_id)) is not None:
                groups["adversarial_harm" if flag else "vanilla_harm"].append(prediction)
    for name, group in groups.items():
        labels = np.array([prediction.positive for prediction in group])
        probabilities = np.array([prediction.probability for prediction in group])
        metrics[f"{name}_f1"] = float(f1_score(labels, probabilities > THRESHOLD, zero_division=0.0))
        if labels.any() and not labels.all():
            metrics[f"{name}_auprc"] = float(average_precision_score(labels, probabilities))
    return metrics
