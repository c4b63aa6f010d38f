"""A decoder that computes prompts in this process, and a cache of the keys and values of what prompts share."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from jaxguard.data.encoding import common_length
from jaxguard.data.packing import bucket_size
from jaxguard.models import sharding
from jaxguard.models.attention.attend import FAR
from jaxguard.models.compute import Compute
from jaxguard.models.decoder import Cache, Decoder
from jaxguard.models.sharding import constrain
from jaxguard.models.spec import Spec
from jaxguard.models.weights import table
from jaxguard.utils.errors import JaxguardError

LENGTH_MULTIPLE: Final = 32
"""Tokens that lengths are rounded up by, more where they are long, since each is compiled."""
CACHE_BYTES: Final = 2**30
"""Most bytes of keys and values in a PrefixCache: 23,000 tokens of SmolLM2-135M in float32, 8,000 of Llama-3.1-8B in
bfloat16."""
MIN_PREFIX: Final = 32
"""Least tokens of a prefix: prompts with different ones are computed apart."""


MIN_SIZE: Final = 64
"""Least space of a cached sequence, in tokens."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Model:
    """A decoder ready to generate, made by `place_model`: a pytree of its weights."""

    weights: dict[str, Array]
    spec: Spec = field(metadata={"static": True})
    compute: Compute = field(metadata={"static": True})
    mesh: Mesh | None = field(metadata={"static": True})

    @property
    def decoder(self) -> Decoder:
        return Decoder(self.spec, self.weights, self.compute)

    def put(self, tree: Any, *, whole: bool = False) -> Any:
        """Put arrays on the devices: rows over data and fsdp, or everything on each."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return sharding.shard_batch(
            tree, sharding.replicated(self.mesh) if whole else sharding.batch_sharding(self.mesh)
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        """The mesh and the precision of matmuls as the context's, while programs run."""
        with nullcontext() if self.mesh is None else jax.set_mesh(self.mesh), self.compute.matmuls():
            yield

    @property
    def row_multiple(self) -> int:
        return 1 if self.mesh is None else sharding.batch_shards(self.mesh)


def place_model(spec: Spec, weights: Mapping[str, Array], compute: Compute, mesh: Mesh | None = None) -> Model:
    """Cast to the type that is multiplied and gather over fsdp, once instead of at each token; tensor stays sharded.

    The weights are anywhere on the mesh; without one, on the default device. A CPU's are transposed to what it multiplies fastest.
    """
    cpu = jax.default_backend() == "cpu"
    compute = compute.of_inference(cpu)
    placed = {}
    for entry in table(spec):
        weight, axes = weights[entry.path], entry.axes
        if "norm" not in axes:
            weight = weight.astype(compute.operand_dtype)
        if cpu and entry.stacked:
            weight, axes = weight.transpose(entry.hf_order), tuple(axes[i] for i in entry.hf_order)
        if mesh is not None:
            spread = sharding.partition(axes, weight.shape, mesh.shape, without=sharding.FSDP)
            weight = jax.device_put(weight, NamedSharding(mesh, spread))
        placed[entry.path] = weight
    return Model(placed, spec, compute, mesh)


def check_prompts(spec: Spec, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    """Refuse prompts that are empty, or leave no room for the new tokens."""
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise JaxguardError(f"prompt {i} has no tokens")
        if len(prompt) + max_tokens > spec.max_position_embeddings:
            raise JaxguardError(
                f"prompt {i} has {len(prompt)} tokens, which with max_tokens={max_tokens} is more than the model's context of "
                f"{spec.max_position_embeddings}: shorten it, or lower max_tokens"
            )


@jax.jit
def prefill(
    model: Model,
    seen: tuple[Cache, ...],
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    last_B: Int[Array, "B"] | None,
) -> tuple[Float[Array, "B D"] | None, Cache]:
    """Hidden state of each row's last token, and the rows' cache."""
    hidden_BTD, cache = model.decoder.cached(tokens_BT, positions_BT, seen)
    return None if last_B is None else jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0], cache


@dataclass(frozen=True, eq=False)
class _Entry:
    """A sequence with its keys and values, which serves prompts that have at least its first `least` tokens."""

    tokens: np.ndarray
    cache: Cache
    least: int


@dataclass(frozen=True)
class Prefix:
    """The first `length` tokens of a prompt, with their cache; () if they are none. `least`: as of the entry that it is from."""

    length: int = 0
    caches: tuple[Cache, ...] = ()
    least: int = 0


@dataclass
class PrefixCache:
    """Keys and values of sequences with which prompts begin; the least recently used go first.

    For one thread. What is cached changes results by rounding only.

    Attributes:
        most_bytes: bound of all keys and values together.
        computed: tokens computed so far, without padding; for a scorer and a sampler to count up.
        reused: tokens of prompts that were not computed, since they were cached.
    """

    model: Model
    most_bytes: int = CACHE_BYTES
    computed: int = 0
    reused: int = 0
    _entries: list[_Entry] = field(default_factory=list)

    def declare(self, beginnings: Sequence[Sequence[int]]) -> None:
        """Compute the beginnings of prompts to come, unless they are cached; see protocol.Backend."""
        for beginning in dict.fromkeys(map(tuple, beginnings)):
            if len(beginning) >= MIN_PREFIX:
                self._compute(np.asarray(beginning, np.int32))

    def groups(self, prompts: Sequence[Sequence[int]]) -> list[tuple[Prefix, list[int]]]:
        """Which prompts continue the same prefix, the longest that is cached and leaves at least one token."""
        groups: dict[tuple[int, int], tuple[Prefix, list[int]]] = {}
        for i, prompt in enumerate(prompts):
            entry, common = self._use(np.asarray(prompt, np.int32)[:-1])
            if (id(entry), common) not in groups:
                groups[id(entry), common] = (Prefix() if entry is None else self._prefix(entry, common)), []
            groups[id(entry), common][1].append(i)
        return list(groups.values())

    def keep(self, tokens: Sequence[int], prefix: Prefix, computed: Cache, row: int, indices: Sequence[int]) -> None:
        """Cache a text that grows: `prefix`, and what was just computed behind it, at these indices of a row.

        What is cached of the same text already is replaced, unless it has much more.
        """
        new, start, least = np.asarray(tokens, np.int32), prefix.length, prefix.least or MIN_PREFIX
        # Powers of two: programs are compiled for each size, and keys of padding cost little.
        size = max(MIN_SIZE, 1 << (len(new) - 1).bit_length())
        if len(new) <= least or size * self._token_bytes > self.most_bytes:
            return
        space = sum(cache.positions_AS.shape[1] for cache in prefix.caches)
        slots_S = np.zeros(size, np.int32)
        slots_S[: len(new)] = [*range(start), *(space + index for index in indices)]
        with self.model.running():
            arrays = self.model.put((slots_S, _positions(len(new), size)), whole=True)
            cache = _gathered(prefix.caches, computed, row, *arrays)
        self._entries = [
            entry
            for entry in self._entries
            if entry.least == len(entry.tokens) or common_length(entry.tokens, new) + MIN_PREFIX <= len(entry.tokens)
        ]
        self._append(_Entry(new, cache, least))

    def distinct(self) -> list[Prefix]:
        """A prefix of each shape that programs are compiled for; an empty one where nothing is cached."""
        caches = {entry.cache.positions_AS.shape[1]: entry.cache for entry in self._entries}
        return [Prefix(0, (cache,)) for cache in caches.values()] or [Prefix()]

    @property
    def tokens(self) -> int:
        """Tokens that are cached."""
        return sum(len(entry.tokens) for entry in self._entries)

    @property
    def bytes(self) -> int:
        """Of all keys and values, padding included."""
        arrays = (array for entry in self._entries for array in entry.cache[:2])
        return sum(int(array.nbytes) for array in arrays)

    @property
    def _token_bytes(self) -> int:
        spec = self.model.spec
        return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * self.model.compute.operand_dtype.itemsize

    def _use(self, tokens: np.ndarray) -> tuple[_Entry | None, int]:
        """The entry that has most tokens in common with these, and how many; now the most recently used.

        A part of a text must have MIN_PREFIX more than what is whole, or each text that grows would split what others share.
        """
        serving = list[tuple[int, int, int]]()
        for i, entry in enumerate(self._entries):
            common = common_length(entry.tokens, tokens)
            if common >= entry.least:
                serving.append((common if common == len(entry.tokens) else common - MIN_PREFIX, i, common))
        if not serving:
            return None, 0
        _, i, common = max(serving)
        self._entries.append(self._entries.pop(i))
        return self._entries[-1], common

    def _prefix(self, entry: _Entry, length: int) -> Prefix:
        """The first tokens of an entry; later ones get a position that no token sees."""
        cache = entry.cache
        if length < len(entry.tokens):
            positions_1S = self.model.put(_positions(length, cache.positions_AS.shape[1]), whole=True)
            cache = cache._replace(positions_AS=positions_1S)
        return Prefix(length, (cache,), entry.least)

    def _compute(self, tokens: np.ndarray) -> None:
        """Compute a beginning, unless it is cached.

        All of it: after what it has in common with another its bits would depend on what was declared before.
        """
        width = bucket_size(len(tokens), LENGTH_MULTIPLE)
        if self._use(tokens)[1] == len(tokens) or width * self._token_bytes > self.most_bytes:
            return
        tokens_1T = np.zeros((1, width), np.int32)
        tokens_1T[0, : len(tokens)] = tokens
        with self.model.running():
            arrays = self.model.put((tokens_1T, _positions(len(tokens), width)), whole=True)
            _, cache = prefill(self.model, (), *arrays, None)
        self.computed += len(tokens)
        self._append(_Entry(tokens, cache, len(tokens)))

    def _append(self, entry: _Entry) -> None:
        self._entries.append(entry)
        while self.bytes > self.most_bytes:
            self._entries.pop(0)


def _positions(count: int, size: int) -> np.ndarray:
    """Positions [1, size] of so many tokens, then of padding."""
    slots = np.arange(size, dtype=np.int32)
    return np.where(slots < count, slots, np.int32(FAR))[None]


@jax.jit
def _gathered(
    seen: tuple[Cache, ...],
    computed: Cache,
    row: Int[Array, ""] | int,
    slots_S: Int[Array, "S"],
    positions_1S: Int[Array, "1 S"],
) -> Cache:
    """The tokens at these slots of caches and of a row behind them, at these positions."""

    def gathered(*parts: Array) -> Array:
        *earlier, of_rows = parts
        own = jax.lax.dynamic_slice_in_dim(of_rows, row, 1, axis=1)
        taken = jnp.take(jnp.concatenate([*earlier, own], axis=3), slots_S, axis=3)
        return constrain(taken, "layers", "batch", "kv_heads", None, "head_dim")

    keys, values = zip(*(cache[:2] for cache in (*seen, computed)), strict=True)
    return Cache(gathered(*keys), gathered(*values), positions_1S)
