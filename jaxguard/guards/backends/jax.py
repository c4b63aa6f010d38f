"""A Backend that computes in this process with our own decoder, over the training mesh.

What prompts share stays in a jax_model.PrefixCache from call to call, for log-odds (jax_scoring.py) as for generation: each
batch computes the rest of its prompts, which the samples of a prompt share. Generated tokens go into a third cache, so that none is
copied or overwritten. Samples depend on the seed, the prompt's tokens and the sample's number only: neither on the batch nor on the
order of prompts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxguard.config import Config
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.data.packing import bucket_size
from jaxguard.guards.backends.jax_decoding import NOT_FINITE, Rows, Sampling, decode
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
from jaxguard.models.decoder import Cache
from jaxguard.models.hf_io.checkpoints import read_weights
from jaxguard.models.sharding import constrain
from jaxguard.models.spec import UnsupportedModelError, read_spec
from jaxguard.utils.errors import JaxguardError

WARM_TOKENS = 1024
"""Tokens of the largest call that a warm-up compiles."""

PREFILLS = 4
"""A batch's prompts are computed in this many parts of similar length, so that one long prompt does not pad all others."""


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
    compute = choose_compute(config.model, spec, mesh, config.data.max_seq_len)
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
    completions: dict[int, list[Completion]] = {}
    for prefix, group in [*groups, *([(Prefix(), small)] if small else [])]:
        prefix_cache.computed += sum(len(prompts[i]) - prefix.length for i in group)
        prefix_cache.reused += prefix.length * len(group)
        order = sorted(group, key=lambda i: -len(prompts[i]))
        size = bucket_size(min(rows, len(order)), model.row_multiple)
        for batch in (order[start : start + size] for start in range(0, len(order), size)):
            completions |= _generate_batch(model, prefix, prompts, batch, size, sampling)
    return [completions[i] for i in range(len(prompts))]


def _generate_batch(
    model: Model, prefix: Prefix, prompts: Sequence[Sequence[int]], batch: Sequence[int], size: int, sampling: Sampling
) -> dict[int, list[Completion]]:
    """Sample the completions of these prompts, longest first, which have the prefix in common, with `size` prompts' rows."""
    n, rows_at_once = sampling.n, model.row_multiple * math.ceil(size / model.row_multiple / PREFILLS)
    parts, ends = [], []
    with model.running():
        for first in range(0, size, rows_at_once):  # rows without a prompt are done from the start
            suffixes = [prompts[i][prefix.length :] for i in batch[first : first + rows_at_once]]
            tokens, positions, lengths = _rows(suffixes, prefix.length, min(rows_at_once, size - first))
            last = lengths - prefix.length - 1
            parts.append(prefill(model, prefix.caches, *model.put((tokens, positions, last))))
            ends.append(lengths)
        hidden_BD, own = parts[0] if len(parts) == 1 else _joined(parts)
        samples = [(i, sample) for i in batch for sample in range(n)]
        keys = np.zeros((size * n, 2), np.uint32)
        for row, (i, sample) in enumerate(samples):
            keys[row] = np.frombuffer(sample_digest(sampling.seed, prompts[i], sample)[:8], np.uint32)
        rows = Rows(keys, np.repeat(np.concatenate(ends), n), np.arange(size * n) >= len(samples))
        new = decode(model, prefix.caches, own, hidden_BD, rows, sampling)
    completions: dict[int, list[Completion]] = {i: [] for i in batch}
    for (i, _), tokens_G, logprobs_G, entropies_G in zip(samples, *new, strict=False):
        stops = np.flatnonzero(np.isin(tokens_G, sampling.stop_ids))
        count = stops[0] + 1 if len(stops) else sampling.max_tokens
        if np.any(tokens_G[:count] == NOT_FINITE):
            raise JaxguardError(
                f"prompt {i}: the model's hidden states are not finite, so its answer means nothing: use another "
                "checkpoint, or model.compute_dtype=float32"
            )
        ids, logprobs, entropies = (tuple(x_G[:count].tolist()) for x_G in (tokens_G, logprobs_G, entropies_G))
        stop_id = ids[-1] if len(stops) else None
        without = ids if stop_id is None else ids[:-1]
        completions[i].append(Completion(without, stop_id is not None, stop_id, logprobs, entropies))
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


@jax.jit
def _joined(parts: Sequence[tuple[Float[Array, "_ D"], Cache]]) -> tuple[Float[Array, "B D"], Cache]:
    """Join the parts of a batch; the first part has the longest rows, and others are padded to them."""
    longest = parts[0][1].positions_AS.shape[1]

    def whole(arrays: Sequence[Array], rows: int, tokens: int, padding: int) -> Array:
        padded = []
        for x in arrays:
            more = [(0, longest - x.shape[tokens] if axis == tokens else 0) for axis in range(x.ndim)]
            padded.append(jnp.pad(x, more, constant_values=padding))
        return jnp.concatenate(padded, axis=rows)

    hidden, caches = zip(*parts, strict=True)
    keys, values, positions = zip(*caches, strict=True)
    axes = "layers", "batch", "kv_heads", None, "head_dim"
    key_LBKSH, value_LBKSH = (constrain(whole(x, 1, 3, 0), *axes) for x in (keys, values))
    joined = Cache(key_LBKSH, value_LBKSH, constrain(whole(positions, 0, 1, FAR), "batch", None))
    return constrain(jnp.concatenate(hidden), "batch", None), joined
