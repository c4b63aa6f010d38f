"""Answers of the weights that train: sampled, read, rewarded, and written to disk before anything is trained on them."""

import asyncio
import hashlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from jaxguard.config import Config
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.config.reinforce import ReinforceConfig
from jaxguard.data.encoding import EncodedExample, Encoder
from jaxguard.data.format.answer import verdict_prefix
from jaxguard.data.format.dialogue import Mode, all_answers
from jaxguard.data.policies import Question
from jaxguard.guards.backends.jax import generate
from jaxguard.guards.backends.jax_decoding import Sampling
from jaxguard.guards.backends.jax_model import PrefixCache, place_model
from jaxguard.guards.backends.sglang import open_sglang, swap_weights
from jaxguard.guards.protocol import Completion
from jaxguard.models.hf_io.checkpoints import export_hf
from jaxguard.reinforce.rewards import expected, is_right, length_cost, read_verdict, verdict_reward
from jaxguard.train.reference import score_targets
from jaxguard.train.step import Program
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.store import open_store, read_records, read_settings
from jaxguard.utils.threads import outside_event_loop

logger = logging.getLogger(__name__)

COMPARED_TOKENS = 64
"""Tokens of a server's answers, at least, whose log-probabilities are compared with the training step's."""
MOST_PROBABILITY_ERROR = 1.05
"""Most mean ratio of a token's two probabilities, the larger over the smaller: NeMo-RL warns above 1.02."""


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt, and what it earns. In direct mode, where all verdicts are scored, one without tokens stands for them.

    Attributes:
        prompt: number of the prompt in its step.
        ids: its tokens, with the stop token that ended it.
        logprobs: of these tokens, when they were sampled.
        entropy: mean of the distributions that they were drawn from, in nats; None if it is not known.
        verdict: word of each labelled question, the likeliest where all were scored; None if it has none.
        reasoning: its first so many tokens come before the verdict; all of them where no verdict is scored.
        scored: log-probabilities of the tokens of every possible verdict after these; none where not wanted or not possible.
        trained: whether the step trains on it; dynamic sampling leaves groups out.
    """

    example_id: str
    prompt: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    entropy: float | None
    text: str
    ended: bool
    verdict: dict[Question, str] | None
    right: bool
    reward: float
    reasoning: int
    scored: tuple[tuple[float, ...], ...] = ()
    trained: bool = True


def write_answers(path: Path, step: int, weights: str, answers: Sequence[Answer]) -> None:
    """Write the answers of a step, of weights with that fingerprint; the file appears whole or not at all."""
    partial = path.with_suffix(".partial")
    with suppress(FileNotFoundError):
        partial.unlink()
    with open_store(partial, {"step": step, "weights": weights, "answers": len(answers)}, "") as store:
        for answer in answers:
            store.append(asdict(answer))
    partial.replace(path)


def read_answers(path: Path, weights: str | None = None) -> list[Answer] | None:
    """Read the answers of a step; None if they are not whole on disk, or not of weights with that fingerprint, where given."""
    if not path.is_file():
        return None
    try:
        settings = read_settings(path)
    except JaxguardError as error:
        logger.warning("%s", error)
        return None
    if weights not in (None, settings.get("weights")):
        logger.warning("%s holds answers of other weights: they are sampled again", path)
        return None
    answers = list(read_records(path, Answer))
    return answers if len(answers) == settings.get("answers") else None


def fingerprint(weights: dict[str, Array]) -> str:
    """Hash the bits of all weights, however they are sharded."""
    sums = jax.device_get(_bit_sums(weights))
    return hashlib.sha256(b"".join(sums[path].tobytes() for path in sorted(sums))).hexdigest()[:16]


@jax.jit
def _bit_sums(weights: dict[str, Array]) -> dict[str, UInt32[Array, "2"]]:
    """Sum each weight's bits, plain and multiplied by their place in the last axis, modulo 2^32: exact in any order."""

    def sums(x: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        places = jnp.arange(x.shape[-1], dtype=jnp.uint32)
        return jnp.stack([jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * places, dtype=jnp.uint32)])

    return jax.tree.map(sums, weights)


def prompt_of(example: EncodedExample) -> tuple[int, ...]:
    return tuple(example.tokens[~example.loss_mask].tolist())


def continued(
    example: EncodedExample, path: Sequence[int], ids: Sequence[int], weight: float, logprobs: Sequence[float]
) -> EncodedExample:
    """Return the tokens `path`, continued by `ids`, which are trained on with a weight, given their log-probabilities before."""
    return replace(example.answered(path, ids), weight=weight, reference=np.asarray(logprobs, np.float32))


@dataclass(frozen=True)
class Sampler:
    """Samples and rewards answers by the weights of one step, of which `version` is the fingerprint.

    `source` is the checkpoint that the run began with.
    """

    config: Config
    program: Program
    encoder: Encoder
    weights: dict[str, Array]
    row_multiple: int
    source: Path
    version: str

    def answers(self, prompts: Sequence[EncodedExample], seed: int) -> list[Answer]:
        """Answer prompts until train.batch_size of them have right and wrong answers, which are trained, or all are answered.

        Others are trained where there are no such, where no prompts may be left out, and where all verdicts are scored, which
        teaches in any case. All are returned, in the order of the prompts.
        """
        settings, wanted = self._settings, self.config.train.batch_size
        choose = settings.candidates > 1 and settings.reward.kind == "sampled"
        teaching, others, first = list[list[Answer]](), list[list[Answer]](), 0
        while first < len(prompts) and len(teaching) < wanted:
            numbers = range(first, min(first + wanted - len(teaching), len(prompts)))
            for group in self._groups([(number, prompts[number]) for number in numbers], seed):
                mixed = len({answer.right for answer in group}) > 1
                (teaching if mixed or not choose else others).append(group)
            first = numbers.stop
        left_out = others if teaching else others[wanted:]
        groups = (teaching or others[:wanted]) + [
            [replace(each, trained=False) for each in group] for group in left_out
        ]
        return sorted((answer for group in groups for answer in group), key=lambda answer: answer.prompt)

    @property
    def _settings(self) -> ReinforceConfig:
        return self.config.reinforce or ReinforceConfig()

    def _groups(self, prompts: Sequence[tuple[int, EncodedExample]], seed: int) -> list[list[Answer]]:
        exact = self._settings.reward.kind != "sampled"
        sampled = [each for each in prompts if not (exact and each[1].mode is Mode.DIRECT)]
        completions = iter(self._complete([example for _, example in sampled], seed))
        numbers = {number for number, _ in sampled}
        groups = [
            [self._read(number, example, completion) for completion in next(completions)]
            if number in numbers
            else [Answer(example.example_id, number, (), (), None, "", True, None, False, 0.0, 0)]
            for number, example in prompts
        ]
        if exact:
            groups = list(self._scored([example for _, example in prompts], groups))
        return groups

    def _complete(self, examples: Sequence[EncodedExample], seed: int) -> list[list[Completion]]:
        prompts = [prompt_of(example) for example in examples]
        if not prompts:
            return []
        if self._settings.endpoint is not None:
            completions = outside_event_loop(lambda: asyncio.run(self._ask_server(prompts, seed)))
            self._compare(examples, completions)
            return completions
        settings = self._settings
        sampling = Sampling(1.0, 1.0, settings.max_tokens, (self.encoder.template.end_id,), seed, settings.answers)
        self._model.declare([example.tokens[: example.shared].tolist() for example in examples])
        return generate(self._model, prompts, sampling, rows=settings.batch)

    @cached_property
    def _model(self) -> PrefixCache:
        """The weights in the type that is computed in, and what was computed of policies."""
        program = self.program
        return PrefixCache(place_model(program.spec, self.weights, program.compute, program.mesh))

    async def _ask_server(self, prompts: Sequence[Sequence[int]], seed: int) -> list[list[Completion]]:
        """Have the server load these weights, and sample; JaxguardError: it does not, or answers with others."""
        settings, folder = self._settings, self.config.folder / "rollouts/weights" / self.version
        assert settings.endpoint is not None
        if not folder.is_dir():
            shutil.rmtree(folder.parent, ignore_errors=True)
            export_hf(self.weights, self.source, folder)
        await swap_weights(settings.endpoint, folder, self.version, settings.api_key_env)
        how = EvaluateConfig(temperature=1.0, top_p=1.0, seed=seed, batch=settings.batch)
        server = open_sglang(settings.endpoint, None, how, self.version, settings.api_key_env, logprobs=True)
        async with server as backend:
            stop_ids = (self.encoder.template.end_id,)
            return await backend.sample(prompts, settings.answers, settings.max_tokens, stop_ids)

    def _compare(self, examples: Sequence[EncodedExample], completions: Sequence[Sequence[Completion]]) -> None:
        """Compare log-probabilities of some tokens of a server with the training step's; JaxguardError: they are others."""
        some, sequences, tokens = list[float](), list[EncodedExample](), 0
        for example, own in zip(examples, completions, strict=True):
            if tokens < COMPARED_TOKENS:
                ids, logprobs = own[0].ids, own[0].logprobs
                sequences.append(continued(example, prompt_of(example), ids, 1.0, logprobs))
                some, tokens = [*some, *logprobs], tokens + len(ids)
        scores = self._score(sequences)
        error = float(np.mean(np.exp(np.abs(np.asarray(some) - np.concatenate(scores)))))
        if not error <= MOST_PROBABILITY_ERROR:
            raise JaxguardError(
                f"{self._settings.endpoint} gives tokens other probabilities than the training step, by a factor of {error:.3f} in "
                f"the mean of {tokens}: does it serve the same model, in a type that is precise enough, without quantisation?"
            )

    def _score(self, sequences: Sequence[EncodedExample]) -> list[np.ndarray]:
        size, most = self.config.train.batch_size, self.config.data.max_seq_len
        return score_targets(sequences, self.program, self.weights, size, most, self.row_multiple)

    def _read(self, number: int, example: EncodedExample, completion: Completion) -> Answer:
        """Read an answer that was sampled, and reward its verdict."""
        settings, labels = self._settings, example.answers
        ids = completion.ids
        text = str(self.encoder.tokenizer.decode(list(completion.tokens), clean_up_tokenization_spaces=False))
        entropy = float(np.mean(completion.entropies)) if completion.entropies else None
        verdict = read_verdict(text, completion.stopped, labels, example.mode)
        reward = verdict_reward(verdict, labels, settings.reward) - length_cost(len(ids), settings)
        return Answer(
            example.example_id, number, ids, completion.logprobs, entropy, text, completion.stopped, verdict,
            is_right(verdict, labels), reward, len(ids),
        )  # fmt: skip

    def _scored(self, examples: Sequence[EncodedExample], groups: Sequence[Sequence[Answer]]) -> Iterator[list[Answer]]:
        """Reward the answers of each prompt by all verdicts after their reasoning, where a verdict can follow it."""
        paths = list[tuple[EncodedExample, Sequence[int], list[int]]]()
        for example, group in zip(examples, groups, strict=True):
            for answer in group:
                reasoning = self._reasoning(answer) if answer.ids else 0
                if reasoning is not None:
                    path = (*prompt_of(example), *answer.ids[:reasoning])
                    paths += [(example, path, ids) for ids in self.encoder.verdicts(example.answers)]
        sequences = [continued(example, path, ids, 1.0, ()) for example, path, ids in paths]
        logprobs = iter(tuple(own.tolist()) for own in self._score(sequences))
        settings = self._settings
        for example, group in zip(examples, groups, strict=True):
            labels, scored = example.answers, list[Answer]()
            for answer in group:
                reasoning = self._reasoning(answer) if answer.ids else 0
                if reasoning is None:
                    worst = verdict_reward(None, labels, settings.reward)
                    scored.append(replace(answer, reward=worst - length_cost(len(answer.ids), settings)))
                    continue
                verdicts = all_answers(labels)
                own = tuple(next(logprobs) for _ in verdicts)
                totals = [sum(each) for each in own]
                reward = expected(totals, labels, settings.reward)[0] - length_cost(len(answer.ids), settings)
                answer = replace(answer, reward=reward, scored=own, reasoning=reasoning)
                if not answer.ids:
                    likeliest = dict(verdicts[int(np.argmax(totals))])
                    answer = replace(answer, verdict=likeliest, right=is_right(likeliest, labels))
                scored.append(answer)
            yield scored

    def _reasoning(self, answer: Answer) -> int | None:
        """Return how many of an answer's tokens come before its verdict; None where no token begins with the verdict."""
        prefix = verdict_prefix(answer.text) if answer.verdict is not None else None
        if prefix is None:
            return None
        decode = self.encoder.tokenizer.decode
        for count in range(len(answer.ids), 0, -1):
            text = str(decode(list(answer.ids[:count]), clean_up_tokenization_spaces=False))
            if len(text) <= len(prefix):
                return count if text.strip() == prefix.strip() and text.endswith("\n\n") else None
        return None


def by_prompt(answers: Sequence[Answer]) -> list[list[Answer]]:
    """Return the groups of answers, each to one prompt."""
    return [list(group) for _, group in groupby(answers, lambda answer: answer.prompt)]
