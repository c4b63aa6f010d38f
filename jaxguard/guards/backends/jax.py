"""A Backend that computes in this process with our own decoder, over the training mesh.

What prompts share stays in a jax_model.PrefixCache from call to call, for log-odds (jax_scoring.py) as for generation: each
batch computes the rest of its prompts, which the samples of a prompt share. Generated tokens go into a third cache, so that none is
copied or overwritten. Samples depend on the seed, the prompt's tokens and the sample's number only: neither on the batch nor on the
order of prompts.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxguard.config import Config
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.data.packing import bucket_size
from jaxguard.guards.backends.jax_decoding import NOT_FINITE, Prompts, Rows, Sampling, decode
from jaxguard.guards.backends.jax_model import (
    LENGTH_MULTIPLE,
    Model,
    Prefix,
    PrefixCache,
    check_prompts,
    place_model,
    prefill,
)
from jaxguard.guards.backends.jax_scoring import score, warm_up
from jaxguard.guards.protocol import Completion, Draft, sample_digest
from jaxguard.models import sharding
from jaxguard.models.attention.attend import FAR
from jaxguard.models.compute import choose_compute
from jaxguard.models.hf_io.checkpoints import read_weights
from jaxguard.models.spec import UnsupportedModelError, read_spec
from jaxguard.utils.errors import JaxguardError

WARM_TOKENS = 1024
"""Tokens of the largest call that a warm-up compiles."""

PARTS = 4
"""Rows are given to prompts of similar length in this many parts, so that one long prompt does not pad all others."""


@dataclass(frozen=True)
class JaxBackend:
    """Implements protocol.LocalBackend; each device scores verdicts in rows of about `most_tokens` tokens together."""

    prefix_cache: PrefixCache
    settings: EvaluateConfig
    most_tokens: int
    workers: int = 1

    @property
    def group(self) -> int:
        return max(1, self.settings.batch // max(1, self.settings.generations))

    async def sample(
        self, prompts: Sequence[Sequence[int]], n: int, max_tokens: int, stop_ids: tuple[int, ...], /
    ) -> list[list[Completion]]:
        settings = self.settings
        sampling = Sampling(settings.temperature, settings.top_p, max_tokens, stop_ids, settings.seed, n)
        return generate(self.prefix_cache, prompts, sampling, rows=settings.batch)

    async def log_odds(self, prefixes: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]], /) -> list[float]:
        return (await self.score(prefixes, pairs))[0]

    async def score(
        self,
        prefixes: Sequence[Sequence[int]],
        pairs: Sequence[tuple[int, int]],
        drafts: Sequence[Draft] = (),
        growing: Sequence[Sequence[int]] = (),
        /,
    ) -> tuple[list[float], list[bool]]:
        return score(self.prefix_cache, prefixes, pairs, drafts, growing, most_tokens=self.most_tokens)

    async def declare(self, beginnings: Sequence[Sequence[int]], /) -> None:
        self.prefix_cache.declare(beginnings)

    def warm_up(self) -> None:
        """Compile what scores few checks at a time, after the prefixes that are cached now."""
        warm_up(self.prefix_cache, min(self.most_tokens, WARM_TOKENS))


def precision(config: Config) -> str:
    """The type that `load_backend` computes in: a CPU in float32, whatever model.compute_dtype says."""
    return "float32" if jax.default_backend() == "cpu" else config.model.compute_dtype


def load_backend(folder: Path, config: Config, settings: EvaluateConfig) -> JaxBackend:
    """Read a checkpoint onto the config's mesh.

    JaxguardError: the checkpoint cannot be read, our decoder lacks its architecture, or the mesh does not fit the devices.
    """
    try:
        spec = read_spec(folder)
    except UnsupportedModelError as error:
        raise JaxguardError(
            f"{error}. JAX cannot compute this guard, SGLang may: set evaluate.backend=sglang, or serve it and give the "
            "guard the server's endpoint"
        ) from None
    mesh = sharding.make_mesh(config.mesh)
    compute = choose_compute(config.model, spec, mesh, config.data.max_seq_len).of_guard()
    weights = read_weights(folder, spec, sharding.weight_shardings(spec, mesh), compute.dtype)
    # A CPU is no faster at more tokens at a time than those whose programs are compiled beforehand.
    most_tokens = WARM_TOKENS if jax.default_backend() == "cpu" else config.data.max_seq_len
    return JaxBackend(PrefixCache(place_model(spec, weights, compute, mesh)), settings, most_tokens)


def generate(
    prefix_cache: PrefixCache, prompts: Sequence[Sequence[int]], sampling: Sampling, *, rows: int = 32
) -> list[list[Completion]]:
    """Sample `sampling.n` completions of each prompt, in the prompts' order, about `rows` of them at the same time.

    JaxguardError: a prompt is empty, or too long for the model, or the model's hidden states are not finite.
    """
    model = prefix_cache.model
    check_prompts(model.spec, prompts, sampling.max_tokens)
    rows = max(1, rows // sampling.n)
    groups = prefix_cache.groups(prompts)
    # A step takes about as long for few rows as for many: small groups are sampled together, their prefixes computed again.
    small = [i for _, group in groups if len(group) < min(rows, len(prompts)) for i in group]
    groups = [(prefix, group) for prefix, group in groups if len(group) >= min(rows, len(prompts))]
    completions: dict[int, Completion] = {}
    for prefix, group in [*groups, *([(Prefix(), small)] if small else [])]:
        prefix_cache.computed += sum(len(prompts[i]) - prefix.length for i in group)
        prefix_cache.reused += prefix.length * len(group)
        order = sorted(group, key=lambda i: -len(prompts[i]))
        completions |= _generate_group(model, prefix, prompts, order, rows, sampling)
    return [[completions[i * sampling.n + sample] for sample in range(sampling.n)] for i in range(len(prompts))]


def sizes(prompts: int, row_multiple: int) -> tuple[int, int]:
    """How many prompts are a part, and how many are sampled together: these, in whole parts."""
    size = bucket_size(math.ceil(prompts / PARTS), row_multiple)
    return size, size * math.ceil(prompts / size)


def _generate_group(
    model: Model, prefix: Prefix, prompts: Sequence[Sequence[int]], order: Sequence[int], rows: int, sampling: Sampling
) -> dict[int, Completion]:
    """Sample completions of these prompts, which have the prefix in common, `rows` prompts at a time, and number them."""
    n, (size, together) = sampling.n, sizes(min(rows, len(order)), model.row_multiple)

    def compute(part: Sequence[int]) -> Prompts:
        tokens, positions, lengths = _rows([prompts[i][prefix.length :] for i in part], prefix.length, size)
        keys, numbers = np.zeros((size * n, 2), np.uint32), np.full(size * n, -1)
        for row, (i, sample) in enumerate(itertools.product(part, range(n))):
            keys[row] = np.frombuffer(sample_digest(sampling.seed, prompts[i], sample)[:8], np.uint32)
            numbers[row] = i * n + sample
        arrays = model.put((tokens, positions, lengths - prefix.length - 1))
        rows = Rows(*model.put((keys, np.repeat(lengths, n), np.zeros(size * n, np.int32))))
        hidden_BD, own = prefill(model, prefix.caches, *arrays)
        return Prompts(hidden_BD, own, rows, numbers)

    parts = [partial(compute, order[first : first + size]) for first in range(0, len(order), size)]
    completions = {}
    with model.running():
        for number, continuation in decode(model, prefix.caches, parts, (size, together), sampling):
            ids, logprobs, entropies = (tuple(x_G.tolist()) for x_G in continuation)
            if NOT_FINITE in ids:
                raise JaxguardError(
                    f"prompt {number // n}: the model's hidden states are not finite, so its answer means nothing: use another "
                    "checkpoint, or model.compute_dtype=float32"
                )
            stop_id = ids[-1] if ids[-1] in sampling.stop_ids else None
            without = ids if stop_id is None else ids[:-1]
            completions[number] = Completion(without, stop_id is not None, stop_id, logprobs, entropies)
    return completions


def _rows(suffixes: Sequence[Sequence[int]], start: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, positions and end position of each row, padded on the right to one of few lengths."""
    width = bucket_size(max(map(len, suffixes), default=1), LENGTH_MULTIPLE)
    tokens, positions = np.zeros((size, width), np.int32), np.full((size, width), FAR, np.int32)
    lengths = np.full(size, start + 1, np.int32)
    for row, suffix in enumerate(suffixes):
        tokens[row, : len(suffix)] = suffix
        positions[row, : len(suffix)] = np.arange(start, start + len(suffix))
        lengths[row] = start + len(suffix)
    return tokens, positions, lengths
