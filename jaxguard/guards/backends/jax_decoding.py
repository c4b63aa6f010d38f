"""New tokens of a batch of rows, one after the other, with their log-probabilities.

What is cached of the prompts is shared: by all rows, or by the samples of a prompt. The rows' own keys and values grow in blocks
and are written in place. Rows that have stopped leave as soon as half of them have.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxguard.data.packing import bucket_size
from jaxguard.guards.backends.jax_model import LENGTH_MULTIPLE, Model
from jaxguard.models.attention.attend import FAR
from jaxguard.models.decoder import Activations, Cache, DecodingCache
from jaxguard.models.sharding import constrain
from jaxguard.models.weights import LAYER

NOT_FINITE: Final = -1
"""Stands for a token that cannot be chosen, since the hidden state before it is not finite."""
SLOTS: Final = 128
"""Space for new tokens at first, which doubles when it is used up: each size is compiled, and attention takes it whole."""
MIN_ROWS: Final = 4
"""For fewer rows a step takes as long, since it reads all weights."""
BLOCKS: Final = 512
"""Most blocks of the vocabulary that a token is drawn from in two steps."""


@dataclass(frozen=True)
class Sampling:
    """How to continue prompts, `n` times each.

    Temperature 0 always takes the likeliest token. `top_p` samples from the smallest set of likeliest tokens whose
    probabilities, after the temperature, sum to this or more, with ties. `stop_ids` end a completion.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 512
    stop_ids: tuple[int, ...] = ()
    seed: int = 0
    n: int = 1


class Rows(NamedTuple):
    """Of each row the key of its random numbers, the tokens of its prompt, and whether it has stopped."""

    keys_R2: Any
    lengths_R: Any
    done_R: Any


class Continuations(NamedTuple):
    """Tokens with their log-probabilities and the entropies of what they were drawn from, at temperature 1 and without top-p."""

    tokens: Any
    logprobs: Any
    entropies: Any


def decode(
    model: Model, shared: Sequence[Cache], own: Cache, hidden_BD: Float[Array, "B D"], rows: Rows, sampling: Sampling
) -> Continuations:
    """Sample R = B n continuations [R G]; ignore what follows a stop token.

    The prompts end in these hidden states; what is cached of them is `shared` by all, or `own` to each of the B.
    """
    count, most, n = len(rows.done_R), sampling.max_tokens, sampling.n
    outputs = Continuations(*(np.zeros((count, most), dtype) for dtype in (np.int32, np.float32, np.float32)))
    targets = np.where(rows.done_R, -1, np.arange(count))  # row of the batch -> row of the outputs
    stop_Q = model.put(np.asarray(sampling.stop_ids or (-1,), np.int32), whole=True)
    stages = _stages(model)
    *shared_by_stage, own_by_stage = (
        [
            _decoding_cache(*_of_stage(cache[:2], i, len(stages)), cache.positions_AS, size=size)
            for i in range(len(stages))
        ]
        for cache, size in (*((cache, _used(cache)) for cache in shared), (own, own.positions_AS.shape[1]))
    )
    slots = min(most, SLOTS)
    new_by_stage = [_empty(stage, count, slots) for stage in stages]
    rows = Rows(*model.put(tuple(rows)))
    choose = partial(_choose, temperature=sampling.temperature, top_p=sampling.top_p)
    for step in range(most):
        sampled, rows = choose(model, hidden_BD, rows, step, stop_Q)
        running = targets >= 0
        for output, values in zip(outputs, sampled, strict=True):
            output[targets[running], step] = np.asarray(values)[running]
        targets = np.where(np.asarray(rows.done_R), -1, targets)
        if step == most - 1 or np.all(targets < 0):
            break
        if kept := _kept(targets >= 0, n, model.row_multiple):
            index_B, index_R, n = kept
            targets = np.where(index_R < 0, -1, targets[index_R])
            indices = model.put((index_B, index_R), whole=True)
            tokens, rows = _taken_rows(sampled.tokens, rows, indices[1])
            own_by_stage, new_by_stage = map(
                list,
                zip(*(_taken(*each, *indices) for each in zip(own_by_stage, new_by_stage, strict=True)), strict=True),
            )
        else:
            tokens = sampled.tokens
        if step == slots:
            slots = min(most, 2 * slots)
            new_by_stage = [_grown(new, slots=slots) for new in new_by_stage]
        x, ropes, positions = _embedded(model, tokens, rows.lengths_R, step)
        appended = []
        for stage, *caches in zip(stages, *shared_by_stage, own_by_stage, new_by_stage, strict=True):
            x, one = _append(stage, x, ropes, positions, caches)
            appended.append(one)
        new_by_stage = _written(new_by_stage, appended, step)
        hidden_BD = _normed(model, x)
    return outputs


def sample_token(
    model: Model,
    own: DecodingCache,
    new: DecodingCache,
    hidden_BD: Float[Array, "B D"],
    rows: Rows,
    step: Any,
    stop_Q: Any,
) -> tuple[Continuations, Float[Array, "R D"], DecodingCache, Rows]:
    """Sample a token of each row and compute it, as `decode` does again and again: here one program, for the planner to compile."""
    sampled, rows = _choose(model, hidden_BD, rows, step, stop_Q, temperature=1.0, top_p=1.0)
    x, ropes, positions = _embedded(model, sampled.tokens, rows.lengths_R, step)
    x, token = _append(model, x, ropes, positions, (own, new))
    (new,) = _written([new], [token], step)
    return sampled, _normed(model, x), new, rows


def _stages(model: Model) -> list[Model]:
    """The model in parts that are programs of their own, one after the other: on a single CPU device the layers, else all in one.

    A program for several layers has a CPU copy each one's weights and caches before it multiplies them. These are not copied.
    """
    spec = model.spec
    if jax.default_backend() != "cpu" or len(model.weights["embed"].sharding.device_set) > 1:
        return [model]
    rest = {path: weight for path, weight in model.weights.items() if not path.startswith(LAYER)}
    layers = {path: weight for path, weight in model.weights.items() if path.startswith(LAYER)}
    return [
        replace(
            model,
            weights=rest | _of_stage(layers, i, spec.num_layers),
            spec=replace(spec, num_layers=1, layer_kinds=(kind,)),
        )
        for i, kind in enumerate(spec.layer_kinds)
    ]


def _of_stage(tree: Any, stage: int, stages: int) -> Any:
    """What is stacked over layers in a tree, for one of the stages; on a CPU JAX puts no copy but a view."""
    if stages == 1:
        return tree
    return jax.tree.map(lambda x: jax.device_put(np.asarray(x)[stage : stage + 1]), tree)


def _kept(running_R: np.ndarray, n: int, row_multiple: int) -> tuple[np.ndarray, np.ndarray, int] | None:
    """Which prompts and rows to go on with when that halves the rows, -1 for none, and rows of a prompt; else None.

    Either all rows of the prompts that have a running one, or the running ones alone, each with a copy of its prompt.
    """

    def fitting(count: int, most: int, least: int) -> int:
        half = row_multiple * -(-most // (2 * row_multiple))
        return fitting(count, half, least) if max(count, least) <= half < most else most

    prompts, rows = np.flatnonzero(running_R.reshape(-1, n).any(axis=1)), np.flatnonzero(running_R)
    of_prompts = fitting(len(prompts), len(running_R) // n, -(-MIN_ROWS // n))
    of_rows = fitting(len(rows), len(running_R), MIN_ROWS)
    if min(of_prompts * n, of_rows) == len(running_R):
        return None
    if of_prompts * n <= of_rows:
        index_B = np.append(prompts, np.full(of_prompts - len(prompts), -1))
        index_R = np.where(index_B[:, None] < 0, -1, index_B[:, None] * n + np.arange(n)).reshape(-1)
        return index_B.astype(np.int32), index_R.astype(np.int32), n
    index_R = np.append(rows, np.full(of_rows - len(rows), -1))
    return np.where(index_R < 0, -1, index_R // n).astype(np.int32), index_R.astype(np.int32), 1


@jax.jit
def _taken_rows(tokens_R: Array, rows: Rows, index_R: Array) -> tuple[Array, Rows]:
    """The rows with these indices; -1 stands for one that has stopped."""
    tokens_R, keys_R2, lengths_R, done_R = (
        constrain(x[index_R], "batch", *[None] * (x.ndim - 1)) for x in (tokens_R, *rows)
    )
    return tokens_R, Rows(keys_R2, lengths_R, done_R | (index_R < 0))


@jax.jit
def _taken(
    own: DecodingCache, new: DecodingCache, index_B: Array, index_R: Array
) -> tuple[DecodingCache, DecodingCache]:
    """What is cached of these prompts and rows; -1 stands for anything."""

    def taken(cache: DecodingCache, index: Array) -> DecodingCache:
        key_LAKHS, value_LAKSH = (jnp.take(x, index, axis=1, mode="wrap") for x in cache[:2])
        return _constrained(DecodingCache(key_LAKHS, value_LAKSH, cache.positions_AS[index]))

    return taken(own, index_B), taken(new, index_R)


def _used(cache: Cache) -> int:
    """Space that is used of a cache: keys of padding cost time at every token, and most at sizes that are powers of two."""
    return bucket_size(int(np.sum(np.asarray(cache.positions_AS) < FAR, axis=1).max()), LENGTH_MULTIPLE)


@partial(jax.jit, static_argnames="size")
def _decoding_cache(key_LAKSH: Array, value_LAKSH: Array, positions_AS: Array, *, size: int) -> DecodingCache:
    key_LAKHS = jnp.swapaxes(key_LAKSH[:, :, :, :size], 3, 4)
    return _constrained(DecodingCache(key_LAKHS, value_LAKSH[:, :, :, :size], positions_AS[:, :size]))


@partial(jax.jit, static_argnames=("rows", "slots"))
def _empty(stage: Model, rows: int, slots: int) -> DecodingCache:
    """Space for the keys and the values of new tokens."""
    spec, dtype = stage.spec, stage.compute.dtype
    leading = spec.num_layers, rows, spec.num_kv_heads
    arrays = jnp.zeros((*leading, spec.head_dim, slots), dtype), jnp.zeros((*leading, slots, spec.head_dim), dtype)
    return _constrained(DecodingCache(*arrays, jnp.full((rows, slots), FAR)))


@partial(jax.jit, static_argnames="slots")
def _grown(new: DecodingCache, *, slots: int) -> DecodingCache:
    def padded(x: Array, axis: int, value: int) -> Array:
        more = [(0, slots - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(x, more, constant_values=value)

    key_LAKHS, value_LAKSH, positions_AS = new
    return _constrained(DecodingCache(padded(key_LAKHS, 4, 0), padded(value_LAKSH, 3, 0), padded(positions_AS, 1, FAR)))


def _constrained(cache: DecodingCache) -> DecodingCache:
    key_LAKHS, value_LAKSH = (constrain(x, "layers", "batch", "kv_heads", None, None) for x in cache[:2])
    return DecodingCache(key_LAKHS, value_LAKSH, constrain(cache.positions_AS, "batch", None))


@jax.jit
def _embedded(
    model: Model, tokens_R: Int[Array, "R"], lengths_R: Int[Array, "R"], step: Int[Array, ""] | int
) -> tuple[Activations, Any, Int[Array, "R"]]:
    """New tokens as `Decoder.append` takes them, and their positions."""
    positions_R = lengths_R + step
    return model.decoder.embedded(tokens_R[:, None]), model.decoder.ropes(positions_R[:, None]), positions_R


@jax.jit
def _append(
    stage: Model,
    x_R1D: Activations,
    ropes: tuple[Array, Array],
    positions_R: Int[Array, "R"],
    caches: Sequence[DecodingCache],
) -> tuple[Activations, DecodingCache]:
    """Run a stage's layers on a new token of each row, and return the token's own keys and values, too."""
    return stage.decoder.append(x_R1D, ropes, positions_R, caches)


@partial(jax.jit, donate_argnames="caches")
def _written(
    caches: Sequence[DecodingCache], tokens: Sequence[DecodingCache], slot: Int[Array, ""] | int
) -> list[DecodingCache]:
    """Write the keys and values of a token into a slot of each stage's cache: in place, as long as nothing else is done here."""

    def write(whole: Array, part: Array, axis: int) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, part, slot, axis)

    return [
        _constrained(DecodingCache(*map(write, cache, token, (4, 3, 1))))
        for cache, token in zip(caches, tokens, strict=True)
    ]


@jax.jit
def _normed(model: Model, x_R1D: Activations) -> Float[Array, "R D"]:
    return model.decoder.normed(x_R1D)[:, 0]


@partial(jax.jit, static_argnames=("temperature", "top_p"))
def _choose(
    model: Model,
    hidden_BD: Float[Array, "B D"],
    rows: Rows,
    step: Int[Array, ""] | int,
    stop_Q: Int[Array, "Q"],
    *,
    temperature: float,
    top_p: float,
) -> tuple[Continuations, Rows]:
    """Sample a token of each row, R/B of them after each hidden state."""
    hidden_RD = jnp.repeat(hidden_BD, len(rows.done_R) // len(hidden_BD), axis=0)
    logits_VR = constrain(model.decoder.next_logits(hidden_RD), None, "batch")
    tokens_R = draw(logits_VR, rows.keys_R2, step, temperature, top_p)
    relative_VR = logits_VR - jnp.max(logits_VR, axis=0)
    weights_VR = jnp.exp(relative_VR)
    total_R = jnp.sum(weights_VR, axis=0)
    entropies_R = jnp.log(total_R) - jnp.sum(weights_VR * relative_VR, axis=0) / total_R
    logprobs_R = jnp.take_along_axis(relative_VR, tokens_R[None], axis=0)[0] - jnp.log(total_R)
    tokens_R = jnp.where(jnp.isfinite(hidden_RD).all(axis=-1), tokens_R, NOT_FINITE)
    done_R = rows.done_R | jnp.isin(tokens_R, stop_Q)
    sampled = Continuations(*(constrain(x_R, None) for x_R in (tokens_R, logprobs_R, entropies_R)))
    return sampled, rows._replace(done_R=constrain(done_R, None))


def draw(
    logits_VR: Float[Array, "V R"], keys_R2: UInt32[Array, "R 2"], step: Any, temperature: float, top_p: float
) -> Int[Array, "R"]:
    """Sample a token of each row by its own random numbers.

    A token is among the likeliest that have probability `top_p` iff those that are likelier have less. So a token is drawn from
    all, and drawn again while it is not: only from the likelier ones, since no other can be. That takes two or three sums over
    the vocabulary, and no sorting.
    """
    most_R = jnp.max(logits_VR, axis=0)
    tokens_V = jnp.arange(len(logits_VR), dtype=jnp.int32)
    if temperature == 0:  # faster than argmax
        return jnp.min(jnp.where(logits_VR == most_R, tokens_V[:, None], len(logits_VR) - 1), axis=0)
    blocks = max(count for count in range(1, BLOCKS + 1) if len(logits_VR) % count == 0)
    weights_CVR = jnp.exp((logits_VR - most_R) / temperature).reshape(blocks, -1, logits_VR.shape[1])
    keys_R = jax.vmap(lambda key_2: jax.random.fold_in(jax.random.wrap_key_data(key_2), step))(keys_R2)

    def above(least_R: Array) -> Float[Array, "C R"]:
        """Sum the weights above these, by blocks of the vocabulary."""
        return jnp.sum(jnp.where(weights_CVR > least_R, weights_CVR, 0), axis=1)

    def sample(key: Array, weights_N: Array) -> Array:
        return jax.random.categorical(key, jnp.log(weights_N))

    def attempt(attempts: Any, least_R: Array, sums_CR: Array) -> tuple[Array, Array]:
        """Sample tokens above these weights: first the block, then one of the block's."""
        keys_2R = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, attempts)), out_axes=1)(keys_R)
        block_R = jax.vmap(sample, in_axes=(0, 1))(keys_2R[0], sums_CR)
        weights_VR = jnp.take_along_axis(weights_CVR, block_R[None, None], axis=0)[0]
        token_R = jax.vmap(sample, in_axes=(0, 1))(keys_2R[1], jnp.where(weights_VR > least_R, weights_VR, 0))
        weight_R = jnp.take_along_axis(weights_VR, token_R[None], axis=0)[0]
        return (block_R * weights_CVR.shape[1] + token_R).astype(jnp.int32), weight_R

    nothing_R = jnp.zeros_like(most_R)
    sums_CR = above(nothing_R)
    token_R, weight_R = attempt(0, nothing_R, sums_CR)
    if top_p >= 1:
        return token_R
    enough_R = top_p * jnp.sum(sums_CR, axis=0)

    def outside(state: Any) -> Bool[Array, "R"]:
        likelier_R = jnp.sum(state[-1], axis=0)
        return (likelier_R >= enough_R) & (likelier_R > 0)  # weights that are not finite are above none

    def again(state: Any) -> Any:
        attempts, token_R, weight_R, sums_CR = state
        other_R, other_weight_R = attempt(attempts, weight_R, sums_CR)
        token_R = jnp.where(outside(state), other_R, token_R)
        weight_R = jnp.where(outside(state), other_weight_R, weight_R)
        return attempts + 1, token_R, weight_R, above(weight_R)

    first: Any = 1, token_R, weight_R, above(weight_R)
    chosen_R: Array = jax.lax.while_loop(lambda state: jnp.any(outside(state)), again, first)[1]
    return chosen_R
