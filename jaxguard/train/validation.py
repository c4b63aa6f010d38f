"""Held-out loss, and verdict F1 and AUPRC from the probabilities of the verdict words: no sampling needed.

For each question the model's odds are those of the first token in which its two answers differ. Earlier lines of the
verdict are summed over all their answers, so no label leaks into a later line. In reasoning mode the reference trace is
given: that measures how the model concludes from a good trace, and is an upper bound of what it will do with its own.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, f1_score

from jaxguard.data.encoding import EncodedExample
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import CHOICES, Mode
from jaxguard.data.packing import Batch, assemble, bucketed, pack
from jaxguard.data.policies import Question
from jaxguard.models.mesh import batch_sharding, shard_batch
from jaxguard.train.step import Program

THRESHOLD = 0.5
HARM = ("prompt_harm", "response_harm")


@dataclass(frozen=True)
class Judgement:
    """One question about one held-out example.

    Attributes:
        example_id, mode, question: what was asked.
        positive: the label: harmful, or refusal.
        probability: of the positive answer, by the model.
    """

    example_id: str
    mode: Mode
    question: Question
    positive: bool
    probability: float


@dataclass(frozen=True)
class Scored:
    """What one sequence tells: its loss, and the probability of the positive answer at each of its probes."""

    loss: float
    targets: int
    probabilities: tuple[float, ...]


Held = tuple[Example, Mode, tuple[EncodedExample, ...]]


@dataclass(frozen=True)
class Validation:
    """Held-out examples, packed for a program.

    Attributes:
        held: example, mode, and its sequences: the labelled one first (see Encoder.branches).
        batch_size, max_seq_len, row_multiple: as in training.
    """

    held: Sequence[Held]
    batch_size: int
    max_seq_len: int
    row_multiple: int

    def run(self, program: Program, weights: dict[str, Any]) -> tuple[dict[str, float], list[Judgement]]:
        """Metrics by name, and every single judgement."""
        scored = dict(self._score(program, weights))
        losses: dict[Mode, list[Scored]] = defaultdict(list)
        judgements: list[Judgement] = []
        for example, mode, branches in self.held:
            found = [scored[id(branch)] for branch in branches]
            losses[mode].append(found[0])
            judgements += _judge(example, mode, branches, found)
        metrics = {"validation/loss": _mean_loss([s for group in losses.values() for s in group])}
        for mode, group in losses.items():
            metrics[f"validation/{mode}/loss"] = _mean_loss(group)
            metrics |= {
                f"validation/{mode}/{name}": x for name, x in summary([j for j in judgements if j.mode == mode]).items()
            }
        return metrics, judgements

    def _score(self, program: Program, weights: dict[str, Any]) -> Iterator[tuple[int, Scored]]:
        """Identity of each sequence -> what it scored."""
        sequences = [branch for _, _, branches in self.held for branch in branches]
        for start in range(0, len(sequences), self.batch_size):
            rows = pack(sequences[start : start + self.batch_size], self.max_seq_len, self.row_multiple)
            batch = assemble(rows, bucketed(rows, self.max_seq_len, self.row_multiple))
            ids_BMQ = np.stack([batch.target_ids_BM, *_choices(rows, batch)], axis=-1)
            placed = shard_batch((batch, ids_BMQ), batch_sharding(program.mesh))
            yield from _unpack(rows, np.asarray(program.score(weights, *placed)))


def _choices(rows: Sequence[Sequence[EncodedExample]], batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Positive and negative token at each probe's target, 0 elsewhere."""
    positive, negative = np.zeros_like(batch.target_ids_BM), np.zeros_like(batch.target_ids_BM)
    for r, sequence, first in _targets(rows):
        for probe, m in zip(sequence.probes, _probe_targets(sequence), strict=True):
            positive[r, first + m], negative[r, first + m] = probe.positive_id, probe.negative_id
    return positive, negative


def _targets(rows: Sequence[Sequence[EncodedExample]]) -> Iterator[tuple[int, EncodedExample, int]]:
    """Row, sequence, and place of its first target among the row's."""
    for r, row in enumerate(rows):
        first = 0
        for sequence in row:
            yield r, sequence, first
            first += int(sequence.target.sum())


def _probe_targets(sequence: EncodedExample) -> list[int]:
    """Place of each probe among the sequence's targets."""
    return [int(sequence.target[: probe.position].sum()) for probe in sequence.probes]


def _unpack(rows: Sequence[Sequence[EncodedExample]], logprobs_BMQ: np.ndarray) -> Iterator[tuple[int, Scored]]:
    for r, sequence, first in _targets(rows):
        count = int(sequence.target.sum())
        target, positive, negative = logprobs_BMQ[r, first : first + count].astype(np.float64).T
        probabilities = [1 / (1 + np.exp(negative[m] - positive[m])) for m in _probe_targets(sequence)]
        yield id(sequence), Scored(float(-target.sum()), count, tuple(float(p) for p in probabilities))


def _judge(
    example: Example, mode: Mode, branches: Sequence[EncodedExample], scored: Sequence[Scored]
) -> Iterator[Judgement]:
    """P(question positive) = sum over the earlier answers of P(earlier answers) P(positive | earlier answers)."""
    marginal: dict[Question, float] = defaultdict(float)
    seen = set()
    for branch, found in zip(branches, scored, strict=True):
        given = dict(branch.answers)
        path: tuple[str, ...] = ()
        weight = 1.0
        for probe, probability in zip(branch.probes, found.probabilities, strict=True):
            if (path, probe.question) not in seen:
                seen.add((path, probe.question))
                marginal[probe.question] += weight * probability
            answer = given[probe.question]
            weight *= probability if answer == CHOICES[probe.question][0] else 1 - probability
            path = (*path, answer)
    gold = dict(branches[0].answers)
    for question, probability in marginal.items():
        yield Judgement(example.id, mode, question, gold[question] == CHOICES[question][0], probability)


def _mean_loss(scored: Sequence[Scored]) -> float:
    return sum(s.loss for s in scored) / sum(s.targets for s in scored)


def summary(judgements: Sequence[Judgement]) -> dict[str, float]:
    """F1 of the positive class at 0.5, and AUPRC, for each question and for both harm questions together.

    A question whose held-out labels are all alike has no AUPRC.
    """
    metrics: dict[str, float] = {}
    groups: dict[str, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        groups[judgement.question].append(judgement)
        if judgement.question in HARM:
            groups["harm"].append(judgement)
    for name, group in groups.items():
        labels, found = np.array([j.positive for j in group]), np.array([j.probability for j in group])
        metrics[f"{name}_f1"] = float(f1_score(labels, found > THRESHOLD, zero_division=0.0))
        if labels.any() and not labels.all():
            metrics[f"{name}_auprc"] = float(average_precision_score(labels, found))
    return metrics
