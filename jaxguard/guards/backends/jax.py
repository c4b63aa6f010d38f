"""A Backend that computes in this process with our own decoder, over the training mesh.

What prompts share stays in a jax_model.PrefixCache from call to call, for log-odds (jax_scoring.py) as for generation: each
batch computes the rest of its prompts, which the samples of a prompt share. Generated tokens go into a third cache, so that none is
copied or overwritten. Samples depend on the seed, the prompt's tokens and the sample's number only: neither on the batch nor on the
order of prompts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from jaxguard.config import Config
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.data.packing import bucket_size
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

_NOT_FINITE = -1
"""Stands for a token that cannot be chosen, since the hidden state before it is not finite."""

PREFILLS = 4
"""A batch's prompts are computed in this many parts of similar length, so that one long prompt does not pad all others."""


@dataclass(frozen=True)
class Sampling:
    """How to continue prompts, `n` times each.

    Temperature 0 always takes the likeliest token. `top_p` samples from the smallest set of likeliest tokens whose
    probabilities, after the temperature, sum to this or more. `stop_ids` end a completion without being part of it.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 512
    stop_ids: tuple[int, ...] = ()
    seed: int = 0
    n: int = 1


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
    # Weights that a CPU's products round to bfloat16, as training does for speed, are off alike in all examples: a bias.
    compute = replace(compute, matmul_dtype=None)
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
    rows_at_once = model.row_multiple * math.ceil(size / model.row_multiple / PREFILLS)
    parts, ends = [], []
    with model.running():
        for first in range(0, size, rows_at_once):  # rows without a prompt are done from the start
            suffixes = [prompts[i][prefix.length :] for i in batch[first : first + rows_at_once]]
            tokens, positions, lengths = _rows(suffixes, prefix.length, min(rows_at_once, size - first))
            last = lengths - prefix.length - 1
            parts.append(prefill(model, prefix.caches, *model.put((tokens, positions, last))))
            ends.append(lengths)
        hidden_BD, own = parts[0] if len(parts) == 1 else _joined(parts)
        samples = [(i, sample) for i in batch for sample in range(sampling.n)]
        keys = np.zeros((size * sampling.n, 2), np.uint32)
        for row, (i, sample) in enumerate(samples):
            keys[row] = np.frombuffer(sample_digest(sampling.seed, prompts[i], sample)[:8], np.uint32)
        done = np.arange(len(keys)) >= len(samples)
        stop = model.put(np.asarray(sampling.stop_ids or (-1,), np.int32), whole=True)
        generated_RG = _decode(
            model, (*prefix.caches, own), hidden_BD, *model.put((np.concatenate(ends), keys, done)), stop,
            max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p,
        )  # fmt: skip
    completions: dict[int, list[Completion]] = {}
    for (i, _), tokens_G in zip(samples, np.asarray(generated_RG), strict=False):
        if np.any(tokens_G == _NOT_FINITE):
            raise JaxguardError(
                f"prompt {i}: the model's hidden states are not finite, so its answer means nothing: use another "
                "checkpoint, or model.compute_dtype=float32"
            )
        stops = np.flatnonzero(np.isin(tokens_G, sampling.stop_ids))
        whole = tokens_G[: stops[0] if len(stops) else None].tolist()
        completions.setdefault(i, []).append(Completion(tuple(whole), stopped=bool(len(stops))))
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


class _State(NamedTuple):
    """State of the loop over new tokens: how many are sampled, the tokens, which rows have stopped, keys and values."""

    step: Array
    tokens_RG: Array
    done_R: Array
    key_LRKGH: Array
    value_LRKGH: Array


@partial(jax.jit, static_argnames=("max_tokens", "temperature", "top_p"))
def _decode(
    model: Model,
    seen: tuple[Cache, ...],
    hidden_BD: Float[Array, "B D"],
    lengths_B: Int[Array, "B"],
    keys_R2: UInt32[Array, "R 2"],
    done_R: Array,
    stop_Q: Int[Array, "Q"],
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
) -> Int[Array, "R G"]:
    """New tokens of R = B n rows; ignore what follows a stop token."""
    spec, decoder, rows = model.spec, model.decoder, keys_R2.shape[0]
    lengths_R, hidden_RD = (jnp.repeat(x, rows // x.shape[0], axis=0) for x in (lengths_B, hidden_BD))
    positions_RG = lengths_R[:, None] + jnp.arange(max_tokens)

    def choose(hidden_RD: Array, step: Array | int, tokens_RG: Array, done_R: Array) -> tuple[Array, Array]:
        logits_RV = constrain(decoder.logits(hidden_RD[:, None])[:, 0], "batch", None)
        chosen_R = draw(logits_RV, keys_R2, step, temperature, top_p)
        chosen_R = jnp.where(jnp.isfinite(hidden_RD).all(-1), chosen_R, _NOT_FINITE)
        return tokens_RG.at[:, step].set(chosen_R), done_R | jnp.isin(chosen_R, stop_Q)

    def more(state: _State) -> Array:
        return (state.step < max_tokens) & ~jnp.all(state.done_R)

    def step(state: _State) -> _State:
        """Feed the last token, cache its keys and values, sample the next."""
        last = state.step - 1
        last_R1, position_R1 = (jax.lax.dynamic_slice_in_dim(x, last, 1, 1) for x in (state.tokens_RG, positions_RG))
        written_RG = jnp.where(jnp.arange(max_tokens) < last, positions_RG, FAR)
        new = Cache(state.key_LRKGH, state.value_LRKGH, written_RG)
        hidden_R1D, cache = decoder.cached(last_R1, position_R1, (*seen, new))
        key_LRKGH, value_LRKGH = (
            jax.lax.dynamic_update_slice_in_dim(whole, part, last, axis=3)
            for whole, part in zip(new[:2], cache[:2], strict=True)
        )
        chosen = choose(hidden_R1D[:, 0], state.step, state.tokens_RG, state.done_R)
        return _State(state.step + 1, *chosen, key_LRKGH, value_LRKGH)

    shape = (spec.num_layers, rows, spec.num_kv_heads, max_tokens, spec.head_dim)
    empty = constrain(jnp.zeros(shape, model.compute.dtype), "layers", "batch", "kv_heads", None, "head_dim")
    first = choose(hidden_RD, 0, jnp.zeros((rows, max_tokens), jnp.int32), done_R)
    state = jax.lax.while_loop(more, step, _State(jnp.int32(1), *first, empty, empty))
    return constrain(state.tokens_RG, None, None)


def draw(
    logits_RV: Float[Array, "R V"], keys_R2: UInt32[Array, "R 2"], step: Any, temperature: float, top_p: float
) -> Int[Array, "R"]:
    """Sample a token for each row by its own random stream."""
    if temperature == 0:
        return jnp.argmax(logits_RV, axis=-1).astype(jnp.int32)
    logits_RV = logits_RV / temperature
    if top_p < 1:
        logits_RV = jnp.where(nucleus(jax.nn.softmax(logits_RV, axis=-1), top_p), logits_RV, -jnp.inf)

    def sample(key_2: Array, logits_V: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.wrap_key_data(key_2), step), logits_V)

    return jax.vmap(sample)(keys_R2, logits_RV).astype(jnp.int32)


def nucleus(probability_RV: Float[Array, "R V"], top_p: float) -> Array:
    """Mask the fewest likeliest tokens that together have probability `top_p`, with ties.

    Finds the least probability inside by bisection: a float32 of 0 or more grows with its bits read as an integer, so 31
    sums over the vocabulary find it exactly, faster than sorting does.
    """
    bits_RV = jax.lax.bitcast_convert_type(probability_RV, jnp.int32)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_R1, high_R1 = bounds
        middle_R1 = low_R1 + (high_R1 - low_R1) // 2
        mass_R1 = jnp.sum(jnp.where(bits_RV >= middle_R1, probability_RV, 0), axis=-1, keepdims=True)
        enough_R1 = mass_R1 >= top_p
        return jnp.where(enough_R1, middle_R1, low_R1), jnp.where(enough_R1, high_R1, middle_R1)

    top_R1 = jnp.max(bits_RV, axis=-1, keepdims=True)
    least_R1, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(top_R1), top_R1 + 1))
    inside_RV: Array = bits_RV >= least_R1
    return inside_RV
