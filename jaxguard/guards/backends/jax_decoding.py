"""New tokens of a batch of rows, one after the other, with their log-probabilities.

What is cached of the prompts is shared: by all rows, or by the samples of a prompt. The rows' own keys and values are written in
place. Where all samples of some prompts have stopped, the next prompts take their rows; when none is left, rows that have stopped
leave as soon as half of them have.
"""

from collections.abc import Callable, Iterator, Sequence
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
SLOTS: Final = 64
"""Space for new tokens is a multiple of this: each size is compiled, and attention takes it whole."""
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
    """Of each row the key of its random numbers, the tokens of its prompt, and how many were sampled since."""

    keys_R2: Any
    lengths_R: Any
    counts_R: Any


class Prompts(NamedTuple):
    """Prompts that were computed: the hidden states at their ends, what is cached of each, and the rows that continue them."""

    hidden_BD: Any
    own: Cache
    rows: Rows
    numbers_R: np.ndarray | None  # of the rows' continuations; -1 is a row that nobody asked for


class Continuation(NamedTuple):
    """Tokens with their log-probabilities and the entropies of what they were drawn from, at temperature 1 and without top-p."""

    tokens: Any
    logprobs: Any
    entropies: Any


def decode(
    model: Model,
    shared: Sequence[Cache],
    parts: Sequence[Callable[[], Prompts]],
    sizes: tuple[int, int],
    sampling: Sampling,
) -> Iterator[tuple[int, Continuation]]:
    """Continue prompts, `sampling.n` times each, and yield every continuation [G] with its number, as it ends.

    What is cached as `shared` comes before all prompts. These are computed part by part, the longest first, each when there is
    room for it. `sizes`: the prompts of a part, and how many go on at the same time, a multiple of it.
    """
    (size, together), waiting = sizes, list(parts[::-1])
    running = _Running(model, shared, together, sampling)
    while True:
        while waiting and np.count_nonzero(~running.busy_B) >= size:
            running.place(waiting.pop()())
        if not waiting:
            running.leave()
        yield from running.step()
        if not waiting and not running.busy_B.any():
            return


class _Running:
    """Rows that go on together: on the devices what is cached of them, here the number of each one's continuation, -1 for none.

    A step writes the keys and values of all rows' tokens into the same slot. A row that began later has nothing before its own.
    """

    def __init__(self, model: Model, shared: Sequence[Cache], prompts: int, sampling: Sampling) -> None:
        self.model, self.sampling, self.n = model, sampling, sampling.n
        rows, stages = prompts * self.n, _stages(model)
        self.stages = [
            (stage, [_decoding_cache(*_of_stage(x[:2], i, len(stages)), x.positions_AS, size=_used(x)) for x in shared])
            for i, stage in enumerate(stages)
        ]
        # In `new`, each token is written in place, which XLA on a CPU does in float32 alone.
        sizes = (prompts, model.compute.operand_dtype), (rows, model.compute.dtype)
        self.own, self.new = ([_empty(stage, *size) for stage in stages] for size in sizes)
        self.hidden_RD = model.put(np.zeros((rows, model.spec.d_model), model.compute.dtype))
        self.rows = Rows(*model.put((np.zeros((rows, 2), np.uint32), *np.zeros((2, rows), np.int32))))
        self.numbers_R, self.counts_R = np.full(rows, -1), np.zeros(rows, np.int32)
        self.widths_B = np.zeros(prompts, np.int32)  # space in `own` that a prompt needs
        self.slots = 0  # written in `new`
        shape = rows, sampling.max_tokens
        self.outputs = Continuation(*(np.zeros(shape, dtype) for dtype in (np.int32, np.float32, np.float32)))

    @property
    def busy_B(self) -> np.ndarray:
        """Which prompts have a row that has not stopped."""
        busy_B: np.ndarray = np.any(self.numbers_R.reshape(-1, self.n) >= 0, axis=1)
        return busy_B

    def place(self, prompts: Prompts) -> None:
        """Let prompts go on in the rows of others that have stopped."""
        index_B = np.flatnonzero(~self.busy_B)[: len(prompts.hidden_BD)]
        index_R = (index_B[:, None] * self.n + np.arange(self.n)).reshape(-1)
        self.numbers_R[index_R], self.counts_R[index_R] = prompts.numbers_R, 0
        self.widths_B[index_B] = prompts.own.positions_AS.shape[1]
        self.own = _moved(self.own, 0, self.widths_B[self.busy_B].max())
        indices = self.model.put((index_B.astype(np.int32), index_R.astype(np.int32)), whole=True)
        device = self.own, self.new, self.hidden_RD, self.rows
        self.own, self.new, self.hidden_RD, self.rows = _placed(*device, prompts._replace(numbers_R=None), *indices)

    def leave(self) -> None:
        """Go on without the rows that have stopped, where these are half of them."""
        if (kept := _kept(self.numbers_R >= 0, self.n, self.model.row_multiple)) is None:
            return
        index_B, index_R, self.n = kept
        indices = self.model.put((index_B, index_R), whole=True)
        device = self.own, self.new, self.hidden_RD, self.rows
        self.own, self.new, self.hidden_RD, self.rows = _taken(*device, *indices)
        self.numbers_R = np.where(index_R < 0, -1, self.numbers_R[index_R])
        self.counts_R, *outputs = (x[index_R] for x in (self.counts_R, *self.outputs))
        self.outputs = Continuation(*outputs)

    def step(self) -> Iterator[tuple[int, Continuation]]:
        """Sample a token of each row, yield what has ended, and compute the token."""
        sampling, running_R = self.sampling, self.numbers_R >= 0
        if self.slots == self.new[0].positions_AS.shape[1]:
            self._make_room()
        choose = partial(_choose, temperature=sampling.temperature, top_p=sampling.top_p)
        sampled, self.rows = choose(self.model, self.hidden_RD, self.rows)
        for output, values in zip(self.outputs, sampled, strict=True):
            output[running_R, self.counts_R[running_R]] = np.asarray(values)[running_R]
        self.counts_R += running_R
        stopped_R = np.isin(np.asarray(sampled.tokens), sampling.stop_ids) | (self.counts_R == sampling.max_tokens)
        for row in np.flatnonzero(running_R & stopped_R):
            yield int(self.numbers_R[row]), Continuation(*(x[row, : self.counts_R[row]].copy() for x in self.outputs))
        self.numbers_R = np.where(stopped_R, -1, self.numbers_R)
        if np.all(self.numbers_R < 0):
            return
        x, ropes, positions = _embedded(self.model, sampled.tokens, self.rows)
        appended = []
        for (stage, shared), own, new in zip(self.stages, self.own, self.new, strict=True):
            x, token = _append(stage, x, ropes, positions, (*shared, own, new))
            appended.append(token)
        self.new, self.slots = _written(self.new, appended, self.slots), self.slots + 1
        self.hidden_RD = _normed(self.model, x)

    def _make_room(self) -> None:
        """Keep the slots of rows that go on, and make room for half as many more, if these rows can fill it."""
        counts_R, most = self.counts_R[self.numbers_R >= 0], self.sampling.max_tokens
        oldest, youngest = int(counts_R.max()), int(counts_R.min())
        size = min(oldest + max(SLOTS, oldest) // 2, oldest + most - youngest, most + SLOTS)
        self.new = _moved(self.new, self.slots - oldest, bucket_size(size, SLOTS))
        self.slots = oldest


def sample_token(
    model: Model, own: DecodingCache, new: DecodingCache, hidden_RD: Float[Array, "R D"], rows: Rows, slot: Any
) -> tuple[Continuation, Float[Array, "R D"], DecodingCache, Rows]:
    """Sample a token of each row and compute it, as `decode` does again and again: here one program, for the planner to compile."""
    sampled, rows = _choose(model, hidden_RD, rows, temperature=1.0, top_p=1.0)
    x, ropes, positions = _embedded(model, sampled.tokens, rows)
    x, token = _append(model, x, ropes, positions, (own, new))
    (new,) = _written([new], [token], slot)
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


@partial(jax.jit, donate_argnums=(0, 1, 2, 3))
def _placed(
    own: Sequence[DecodingCache],
    new: Sequence[DecodingCache],
    hidden_RD: Array,
    rows: Rows,
    prompts: Prompts,
    index_B: Array,
    index_R: Array,
) -> tuple[list[DecodingCache], list[DecodingCache], Array, Rows]:
    """Put prompts in the places with these indices, and clear what their rows have of others."""
    layers, width = own[0].key_LAKHS.shape[0], prompts.own.positions_AS.shape[1]

    def placed(i: int, cache: DecodingCache) -> DecodingCache:
        key_LAKSH, value_LAKSH = (x[i * layers : (i + 1) * layers] for x in prompts.own[:2])
        key_LAKHS = cache.key_LAKHS.at[:, index_B, :, :, :width].set(jnp.swapaxes(key_LAKSH, 3, 4))
        value_LAKSH = cache.value_LAKSH.at[:, index_B, :, :width].set(value_LAKSH)
        positions_AS = cache.positions_AS.at[index_B].set(FAR).at[index_B, :width].set(prompts.own.positions_AS)
        return _constrained(DecodingCache(key_LAKHS, value_LAKSH, positions_AS))

    hidden_RD = hidden_RD.at[index_R].set(jnp.repeat(prompts.hidden_BD, len(index_R) // len(index_B), axis=0))
    return (
        [placed(i, cache) for i, cache in enumerate(own)],
        [_constrained(cache._replace(positions_AS=cache.positions_AS.at[index_R].set(FAR))) for cache in new],
        _rows_constrained(hidden_RD),
        Rows(*(_rows_constrained(x.at[index_R].set(y)) for x, y in zip(rows, prompts.rows, strict=True))),
    )


@jax.jit
def _taken(
    own: Sequence[DecodingCache],
    new: Sequence[DecodingCache],
    hidden_RD: Array,
    rows: Rows,
    index_B: Array,
    index_R: Array,
) -> tuple[list[DecodingCache], list[DecodingCache], Array, Rows]:
    """What there is of these prompts and rows; -1 stands for any."""

    def taken(cache: DecodingCache, index: Array) -> DecodingCache:
        key_LAKHS, value_LAKSH = (jnp.take(x, index, axis=1, mode="wrap") for x in cache[:2])
        return _constrained(DecodingCache(key_LAKHS, value_LAKSH, cache.positions_AS[index]))

    hidden_RD, *of_rows = (_rows_constrained(x[index_R]) for x in (hidden_RD, *rows))
    own, new = ([taken(cache, index) for cache in caches] for caches, index in ((own, index_B), (new, index_R)))
    return own, new, hidden_RD, Rows(*of_rows)


def _rows_constrained(x: Array) -> Array:
    return constrain(x, "batch", *[None] * (x.ndim - 1))


def _used(cache: Cache) -> int:
    """Space that is used of a cache: keys of padding cost time at every token, and most at sizes that are powers of two."""
    return bucket_size(int(np.sum(np.asarray(cache.positions_AS) < FAR, axis=1).max()), LENGTH_MULTIPLE)


@partial(jax.jit, static_argnames="size")
def _decoding_cache(key_LAKSH: Array, value_LAKSH: Array, positions_AS: Array, *, size: int) -> DecodingCache:
    key_LAKHS = jnp.swapaxes(key_LAKSH[:, :, :, :size], 3, 4)
    return _constrained(DecodingCache(key_LAKHS, value_LAKSH[:, :, :, :size], positions_AS[:, :size]))


@partial(jax.jit, static_argnames=("count", "dtype"))
def _empty(stage: Model, count: int, dtype: jnp.dtype) -> DecodingCache:
    """A cache without space."""
    spec = stage.spec
    leading = spec.num_layers, count, spec.num_kv_heads
    arrays = jnp.zeros((*leading, spec.head_dim, 0), dtype), jnp.zeros((*leading, 0, spec.head_dim), dtype)
    return _constrained(DecodingCache(*arrays, jnp.zeros((count, 0), jnp.int32)))


def _moved(caches: Sequence[DecodingCache], first: int, size: int) -> list[DecodingCache]:
    """Space for `size` tokens, which has what is cached from the slot `first` on."""
    if (first, size) == (0, caches[0].positions_AS.shape[1]):
        return list(caches)
    return [_moved_cache(cache, first, size=int(size)) for cache in caches]


@partial(jax.jit, static_argnames="size")
def _moved_cache(cache: DecodingCache, first: Int[Array, ""] | int, *, size: int) -> DecodingCache:
    def moved(x: Array, axis: int, padding: int) -> Array:
        more = [(0, size if i == axis else 0) for i in range(x.ndim)]
        return jax.lax.dynamic_slice_in_dim(jnp.pad(x, more, constant_values=padding), first, size, axis)

    return _constrained(DecodingCache(*map(moved, cache, (4, 3, 1), (0, 0, FAR))))


def _constrained(cache: DecodingCache) -> DecodingCache:
    key_LAKHS, value_LAKSH = (constrain(x, "layers", "batch", "kv_heads", None, None) for x in cache[:2])
    return DecodingCache(key_LAKHS, value_LAKSH, constrain(cache.positions_AS, "batch", None))


@jax.jit
def _embedded(model: Model, tokens_R: Int[Array, "R"], rows: Rows) -> tuple[Activations, Any, Int[Array, "R"]]:
    """Tokens that were just sampled, as `Decoder.append` takes them, and their positions."""
    positions_R = rows.lengths_R + rows.counts_R - 1
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
    model: Model, hidden_RD: Float[Array, "R D"], rows: Rows, *, temperature: float, top_p: float
) -> tuple[Continuation, Rows]:
    """Sample a token of each row, after its hidden state."""
    logits_VR = constrain(model.decoder.next_logits(hidden_RD), None, "batch")
    tokens_R = draw(logits_VR, rows.keys_R2, rows.counts_R, temperature, top_p)
    relative_VR = logits_VR - jnp.max(logits_VR, axis=0)
    weights_VR = jnp.exp(relative_VR)
    total_R = jnp.sum(weights_VR, axis=0)
    entropies_R = jnp.log(total_R) - jnp.sum(weights_VR * relative_VR, axis=0) / total_R
    logprobs_R = jnp.take_along_axis(relative_VR, tokens_R[None], axis=0)[0] - jnp.log(total_R)
    tokens_R = jnp.where(jnp.isfinite(hidden_RD).all(axis=-1), tokens_R, NOT_FINITE)
    sampled = Continuation(*(constrain(x_R, None) for x_R in (tokens_R, logprobs_R, entropies_R)))
    return sampled, rows._replace(counts_R=_rows_constrained(rows.counts_R + 1))


def draw(
    logits_VR: Float[Array, "V R"], keys_R2: UInt32[Array, "R 2"], counts_R: Any, temperature: float, top_p: float
) -> Int[Array, "R"]:
    """Sample a token of each row by its own random numbers, others for each count.

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
    keys_R = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys_R2), counts_R)

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
