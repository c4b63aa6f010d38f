"""A decoder that computes prompts in this process, and a cache of the keys and values of what prompts share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
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
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]


def place_model(spec: Spec, weights: Mapping[str, Array], compute: Compute, mesh: Mesh | None = None) -> Model:
    """Cast to the compute type and gather over fsdp, once instead of at each token; tensor stays sharded.

    The weights are anywhere on the mesh; without one, on the default device.
    """
    placed = {}
    for entry in table(spec):
        weight = weights[entry.path]
        if "norm" not in entry.axes:
            weight = weight.astype(compute.matmul_dtype or compute.dtype)
        if mesh is not None:
            spread = sharding.partition(entry.axes, weight.shape, mesh.shape, without="fsdp")
            weight = jax.device_put(weight, NamedSharding(mesh, spread))
        placed[entry.path] = weight
    return Model(placed, spec, replace(compute, remat="none"), mesh)


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
    """A sequence with its keys and values. `grown`: it continues a beginning of so many tokens; 0 if it is a beginning."""

    tokens: np.ndarray
    cache: Cache
    grown: int = 0


@dataclass(frozen=True)
class Prefix:
    """The first `length` tokens of a prompt, with their cache; () if they are none."""

    length: int = 0
    caches: tuple[Cache, ...] = ()


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
                self._add(np.asarray(beginning, np.int32))

    def groups(self, prompts: Sequence[Sequence[int]]) -> list[tuple[Prefix, list[int]]]:
        """Which prompts continue the same prefix, the longest that is cached and leaves at least one token."""
        groups: dict[int, tuple[Prefix, list[int]]] = {}
        for i, prompt in enumerate(prompts):
            tokens = np.asarray(prompt, np.int32)
            entry = self._use(tokens[:-1], lambda entry, common: common == len(entry.tokens))
            prefix = Prefix() if entry is None else Prefix(len(entry.tokens), (entry.cache,))
            groups.setdefault(id(entry), (prefix, []))[1].append(i)
        return list(groups.values())

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

    def _use(self, tokens: np.ndarray, serves: Callable[[_Entry, int], bool]) -> _Entry | None:
        """The entry that has most tokens in common with these, of those that serve; now the most recently used."""
        common = [common_length(entry.tokens, tokens) for entry in self._entries]
        serving = [(c, i) for i, (entry, c) in enumerate(zip(self._entries, common, strict=True)) if serves(entry, c)]
        if not serving:
            return None
        self._entries.append(self._entries.pop(max(serving)[1]))
        return self._entries[-1]

    def _add(self, tokens: np.ndarray) -> None:
        """Compute a sequence, after a beginning that it continues, or what it has in common with one that has grown from that.

        Were it computed after the common part of another beginning, its bits would depend on what was declared before.
        """
        # Powers of two: programs are compiled for each size, and keys of padding cost little.
        spec, size = self.model.spec, max(MIN_SIZE, 1 << (len(tokens) - 1).bit_length())
        token_bytes = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * self.model.compute.dtype.itemsize
        if size * token_bytes > self.most_bytes:
            return
        entry = self._use(tokens, lambda entry, common: common >= (entry.grown or len(entry.tokens)))
        start = 0 if entry is None else common_length(entry.tokens, tokens)
        if start == len(tokens):
            return
        width = bucket_size(len(tokens) - start, LENGTH_MULTIPLE)
        own_1T, positions_1T = np.zeros((1, width), np.int32), _positions(start, len(tokens), width)
        own_1T[0, : len(tokens) - start] = tokens[start:]
        seen: tuple[Cache, ...] = ()
        if entry is not None:  # later tokens of the entry get a position that no token sees
            seen_1S = self.model.put(_positions(0, start, entry.cache.positions_AS.shape[1]), whole=True)
            seen = (entry.cache._replace(positions_AS=seen_1S),)
        own, positions, all_positions = self.model.put(
            (own_1T, positions_1T, _positions(0, len(tokens), size)), whole=True
        )
        with self.model.running():
            _, cache = prefill(self.model, seen, own, positions, None)
            if entry is not None:
                cache = _joined(entry.cache, cache, start, all_positions)
        self.computed += len(tokens) - start
        if entry is not None and entry.grown and start + MIN_PREFIX > len(entry.tokens):
            self._entries.pop()  # a text that grows is cached once; what stood behind it is not worth more
        self._entries.append(_Entry(tokens, cache, 0 if entry is None else entry.grown or start))
        while self.bytes > self.most_bytes:
            self._entries.pop(0)


def _positions(start: int, stop: int, size: int) -> np.ndarray:
    """Positions [1, size] of the tokens from `start` to `stop`, then of padding."""
    slots = np.arange(start, start + size, dtype=np.int32)
    return np.where(slots < stop, slots, np.int32(FAR))[None]


@jax.jit
def _joined(first: Cache, second: Cache, start: Int[Array, ""] | int, positions_1S: Int[Array, "1 S"]) -> Cache:
    """The first `start` tokens of one cache and those of another behind them, at these positions."""
    size = positions_1S.shape[1]

    def joined(x: Array, y: Array) -> Array:
        most = max(size, x.shape[3]) + y.shape[3]  # an update must fit, or XLA shifts it
        x = jnp.pad(x, [(0, most - x.shape[3]) if axis == 3 else (0, 0) for axis in range(5)])
        return jax.lax.dynamic_update_slice_in_dim(x, y, start, axis=3)[:, :, :, :size]

    key_LAKSH, value_LAKSH = (
        constrain(joined(*pair), "layers", "batch", "kv_heads", None, "head_dim")
        for pair in zip(first[:2], second[:2], strict=True)
    )
    return Cache(key_LAKSH, value_LAKSH, positions_1S)
