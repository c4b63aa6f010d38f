"""Batches of answers that the training model samples, as train.loop.Batches.

What a step samples is a function of the seed, the step and the weights, so a run that was killed ends with the same bits. The
answers are in rollouts/STEP.jsonl, with a fingerprint of the weights that gave them.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import jax
import numpy as np
from jaxtyping import Array

from jaxguard.config import Config
from jaxguard.config.reinforce import ReinforceConfig
from jaxguard.data.encoding import EncodedExample, Encoder
from jaxguard.data.format.dialogue import ABSENT, CHOICES
from jaxguard.data.packing import Batch, Schedule, assemble, bucketed, pack
from jaxguard.data.policies import Question
from jaxguard.data.prepare import Prepared
from jaxguard.reinforce.rewards import EPSILON, advantages, expected
from jaxguard.reinforce.sampling import (
    Answer,
    Sampler,
    by_prompt,
    continued,
    fingerprint,
    prompt_of,
    read_answers,
    write_answers,
)
from jaxguard.train.step import Program
from jaxguard.utils.errors import JaxguardError


@dataclass
class Rollouts:
    """The batches of a run, of train.batch_size prompts each; `order` is that of their candidates."""

    config: Config
    data: Prepared
    program: Program
    encoder: Encoder
    order: Schedule
    row_multiple: int
    source: Path
    _logged: dict[int, dict[str, float]] = field(default_factory=dict)
    _same: Counter[Question] = field(default_factory=Counter)
    """Steps in a row in which all verdicts on a question were the same, though labels differ."""

    @classmethod
    def open(
        cls, config: Config, source: Path, data: Prepared, program: Program, steps: int, row_multiple: int, /
    ) -> Self:
        """Open the rollouts of a run; JaxguardError: several processes would have to sample."""
        if jax.process_count() > 1:
            raise JaxguardError("answers are sampled by one process: run it on one host, with all of its devices")
        order = Schedule.of(config, data.train, steps, row_multiple)
        candidates = (config.reinforce or ReinforceConfig()).candidates
        order = replace(order, batch_size=order.batch_size * candidates)
        return cls(config, data, program, Encoder.load(source, config.data), order, row_multiple, source)

    @property
    def steps(self) -> int:
        return self.order.steps

    def examples(self, step: int, /) -> list[int]:
        return self.order.examples(step)

    def logged(self, step: int, /) -> dict[str, float]:
        return self._logged.pop(step, {})

    def read(self, start: int, _: int, weights: Callable[[], dict[str, Array]], /) -> Iterator[Batch]:
        """Sample, or read what was sampled, and make the batches. JaxguardError: answers are lost, or the policy collapsed."""
        every = self._settings.updates
        for step in range(max(0, start - (self._settings.collapse_steps or 0)), start):
            self._count_same(step, read_answers(self._path(step)) or [])
        for step in range(start, self.steps):
            if step % every == 0:
                self._sample(range(step, min(step + every, self.steps)), weights())
            answers = read_answers(self._path(step))
            if answers is None:
                raise JaxguardError(
                    f"{self._path(step)} is lost or damaged, and the weights of step {step - step % every}, which sampled it, are "
                    "gone: restore it, or start a new run under another name"
                )
            self._logged[step] = self._summary(step, answers)
            self._stop_if_collapsed(step, answers)
            yield self._batch(step, answers)

    @property
    def _settings(self) -> ReinforceConfig:
        return self.config.reinforce or ReinforceConfig()

    def _path(self, step: int) -> Path:
        return self.config.folder / "rollouts" / f"{step:06d}.jsonl"

    def _prompts(self, step: int) -> list[EncodedExample]:
        return [self.data.train[i] for i in self.examples(step)]

    def _sample(self, steps: range, weights: dict[str, Array]) -> None:
        """Write the answers to the prompts of some steps, but for those that these weights gave already."""
        version = fingerprint(weights)
        sampler = Sampler(self.config, self.program, self.encoder, weights, self.row_multiple, self.source, version)
        for step in steps:
            if read_answers(self._path(step), version) is None:
                answers = sampler.answers(self._prompts(step), seed=self.config.seed * 2**32 + step)
                write_answers(self._path(step), step, version, answers)

    def _batch(self, step: int, answers: Sequence[Answer]) -> Batch:
        most = self.config.data.max_seq_len
        sequences = [each for group, own in self._sequences(step, answers) if group[0].trained for each in own]
        rows = pack(sequences, most, self.row_multiple, self.config.data.share_prefixes)
        return assemble(rows, bucketed(rows, most, self.row_multiple))

    def _sequences(self, step: int, answers: Sequence[Answer]) -> Iterator[tuple[list[Answer], list[EncodedExample]]]:
        """Yield the answers to each prompt, and what they would train."""
        prompts = self._prompts(step)
        for group in by_prompt(answers):
            yield group, list(self._weighted(prompts[group[0].prompt], group))

    def _weighted(self, example: EncodedExample, group: Sequence[Answer]) -> Iterator[EncodedExample]:
        """Yield what a step trains on of the answers to a prompt: their tokens, or their reasoning and all verdicts after it.

        Where verdicts are scored, all weights together give an unbiased estimate of the gradient of the prompt's expected reward:
        those of verdicts are its derivative by their log-probabilities, those of reasoning the reward less that of the others.
        """
        settings, prompt = self._settings, prompt_of(example)
        exact = settings.reward.kind != "sampled"
        if exact:
            settings = settings.model_copy(update={"scale": "none", "baseline": "leave_one_out"})
        gains = advantages([answer.reward for answer in group], settings) if len(group) > 1 else np.zeros(1)
        share = 1 / len(group) if exact else 1.0
        for answer, gain in zip(group, gains.tolist(), strict=True):
            reasoning = answer.ids[: answer.reasoning]
            if reasoning:
                yield continued(example, prompt, reasoning, share * gain, answer.logprobs[: answer.reasoning])
            if answer.scored:
                totals = [sum(each) for each in answer.scored]
                slopes = expected(totals, example.answers, settings.reward)[1]
                path, texts = (*prompt, *reasoning), self.encoder.verdicts(example.answers)
                for ids, slope, logprobs in zip(texts, slopes.tolist(), answer.scored, strict=True):
                    yield continued(example, path, ids, share * slope, logprobs)

    def _summary(self, step: int, answers: Sequence[Answer]) -> dict[str, float]:
        """What is logged of a step's answers; false-positive and false-negative rates are those of all labelled questions."""
        weights = [[abs(each.weight) for each in own] for _, own in self._sequences(step, answers)]
        summary = {
            "reward": float(np.mean([answer.reward for answer in answers])),
            "right": float(np.mean([answer.right for answer in answers])),
            "no_verdict": float(np.mean([answer.verdict is None for answer in answers])),
            "groups": float(len(weights)),
            "groups_with_signal": float(np.mean([max(own, default=0.0) > EPSILON for own in weights])),
            "answer_tokens": float(np.mean([len(answer.ids) for answer in answers])),
        }
        if entropies := [answer.entropy for answer in answers if answer.entropy is not None]:
            summary["entropy"] = float(np.mean(entropies))
        wrong: dict[str, list[bool]] = {"false_positive_rate": [], "false_negative_rate": []}
        for answer, question, word in self._labelled(step, answers):
            positive = CHOICES[question][0]
            name = "false_negative_rate" if word == positive else "false_positive_rate"
            wrong[name].append(answer.verdict is None or answer.verdict[question] != word)
        summary |= {name: float(np.mean(own)) for name, own in wrong.items() if own}
        return {f"rollouts/{name}": value for name, value in summary.items()}

    def _labelled(self, step: int, answers: Sequence[Answer]) -> Iterator[tuple[Answer, Question, str]]:
        prompts = self._prompts(step)
        for answer in answers:
            for question, word in prompts[answer.prompt].answers:
                if word != ABSENT:
                    yield answer, question, word

    def _count_same(self, step: int, answers: Sequence[Answer]) -> dict[Question, set[str]]:
        """Count a step for each question on which all answers said the same; return what they said on each."""
        said, labels = defaultdict[Question, set[str]](set), defaultdict[Question, set[str]](set)
        for answer, question, word in self._labelled(step, answers):
            labels[question].add(word)
            said[question].add("no verdict" if answer.verdict is None else answer.verdict[question])
        same = [question for question in said if len(said[question]) == 1 and len(labels[question]) > 1]
        self._same = Counter({question: self._same[question] + 1 for question in same})
        return said

    def _stop_if_collapsed(self, step: int, answers: Sequence[Answer]) -> None:
        said, most = self._count_same(step, answers), self._settings.collapse_steps
        for question, steps in self._same.items():
            if most is not None and steps >= most:
                raise JaxguardError(
                    f"step {step}: in {most} steps in a row every answer said {said[question].pop()!r} on {question}, though "
                    "labels differ: the policy has collapsed. Lower optimizer.learning_rate, balance "
                    "reinforce.reward.false_positive and false_negative, or begin from an earlier checkpoint; "
                    "reinforce.collapse_steps=null goes on"
                )
