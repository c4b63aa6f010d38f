"""A decoder that computes prompts in this process, and the keys and values that it keeps of what prompts share."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from jaxguard.data.packing import bucket_size
from jaxguard.guards.protocol import common_length
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
"""Most bytes of keys and values that a PrefixCache keeps: 23,000 tokens of SmolLM2-135M in float32, 8,000 of Llama-3.1-8B in
bfloat16."""
MIN_PREFIX: Final = 32
"""Least tokens of a prefix: prompts with different ones are computed apart."""


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
    """What is kept of one sequence: of a beginning, or of one that is `grown` and continues a beginning of so many tokens."""

    tokens: np.ndarray
    cache: Cache
    grown: int = 0


@dataclass(frozen=True)
class Prefix:
    """The first `length` tokens of a prompt, with the cache of a sequence that begins with them; () if they are none."""

    length: int = 0
    caches: tuple[Cache, ...] = ()


@dataclass
class PrefixCache:
    """Keys and values of sequences with which prompts begin; the least recently used go first.

    A sequence serves every prompt that shares its beginning, up to where they differ: later tokens get the position FAR, which no
    token sees. For one thread. What is kept changes results by rounding only.

    Attributes:
        most_bytes: bound of all keys and values together.
        computed: tokens computed so far, without padding; for a scorer and a sampler to count up.
        reused: tokens of prompts that were not computed, since they were kept.
    """

    model: Model
    most_bytes: int = CACHE_BYTES
    computed: int = 0
    reused: int = 0
    _entries: list[_Entry] = field(default_factory=list)

    def declare(self, beginnings: Sequence[Sequence[int]]) -> None:
        """Compute and keep the beginnings of prompts to come, unless they are kept; see protocol.Backend."""
        for beginning in dict.fromkeys(map(tuple, beginnings)):
            if len(beginning) >= MIN_PREFIX:
                self._keep(np.asarray(beginning, np.int32))

    def groups(self, prompts: Sequence[Sequence[int]]) -> list[tuple[Prefix, list[int]]]:
        """Which prompts continue the same prefix, the longest that is kept, but at most all of a prompt but its last token."""
        groups: dict[tuple[int, int], tuple[Prefix, list[int]]] = {}
        known: dict[tuple[int, ...], tuple[_Entry | None, int]] = {}
        most = max((len(entry.tokens) for entry in self._entries), default=0)
        for i, prompt in enumerate(prompts):
            begins = tuple(prompt[:-1][:most])
            if begins not in known:
                known[begins] = self._longest(np.asarray(begins, np.int32))
            entry, length = known[begins]
            key = id(entry), length
            if key not in groups:
                caches = () if entry is None else (self._masked(entry, length),)
                groups[key] = Prefix(length, caches), []
            groups[key][1].append(i)
        return list(groups.values())

    def distinct(self) -> list[Prefix]:
        """A prefix of each shape that programs are compiled for; an empty one where nothing is kept."""
        entries = {entry.cache.positions_AS.shape[1]: entry for entry in self._entries}
        return [Prefix(0, (self._masked(entry, 0),)) for entry in entries.values()] or [Prefix()]

    @property
    def tokens(self) -> int:
        """Tokens that are kept."""
        return sum(len(entry.tokens) for entry in self._entries)

    @property
    def bytes(self) -> int:
        """Of all keys and values, padding included."""
        arrays = (array for entry in self._entries for array in entry.cache[:2])
        return sum(int(array.nbytes) for array in arrays)

    def _longest(self, tokens: np.ndarray) -> tuple[_Entry | None, int]:
        ranked = [(common_length(entry.tokens, tokens), -len(entry.tokens), i) for i, entry in enumerate(self._entries)]
        length, _, i = max(ranked, default=(0, 0, 0))
        if length < MIN_PREFIX:
            return None, 0
        entry = self._entries.pop(i)
        self._entries.append(entry)
        return entry, length

    def _masked(self, entry: _Entry, length: int) -> Cache:
        slots = np.arange(entry.cache.positions_AS.shape[1], dtype=np.int32)
        return entry.cache._replace(
            positions_AS=self.model.put(np.where(slots < length, slots, FAR)[None].astype(np.int32), whole=True)
        )

    def _keep(self, tokens: np.ndarray) -> None:
        """Compute a sequence, after what is kept only where it continues the whole of a beginning.

        Else the bits of what is kept would depend on what was declared before.
        """
        entry, start = self._longest(tokens)
        spec, size = self.model.spec, bucket_size(len(tokens), LENGTH_MULTIPLE)
        token_bytes = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * self.model.compute.dtype.itemsize
        if start == len(tokens) or size * token_bytes > self.most_bytes:
            return
        if entry is not None and start < (entry.grown or len(entry.tokens)):
            entry, start = None, 0
        width = bucket_size(len(tokens) - start, LENGTH_MULTIPLE)
        padded_1T, positions_1T = np.zeros((1, width), np.int32), np.full((1, width), FAR, np.int32)
        padded_1T[0, : len(tokens) - start] = tokens[start:]
        positions_1T[0, : len(tokens) - start] = np.arange(start, len(tokens))
        seen = () if entry is None else (self._masked(entry, start),)
        with self.model.running():
            _, cache = prefill(self.model, seen, *self.model.put((padded_1T, positions_1T), whole=True), None)
            if entry is not None:
                cache = _joined(entry.cache, cache, start, size=size)
        self.computed += len(tokens) - start
        grown = 0
        if entry is not None:
            grown = entry.grown or start
            if entry.grown and start + MIN_PREFIX > len(entry.tokens):
                self._entries.pop()  # a text that grows is kept once; what stood behind it is not worth more
        self._entries.append(_Entry(tokens, cache, grown))
        while self.bytes > self.most_bytes:
            self._entries.pop(0)


@partial(jax.jit, static_argnames="size")
def _joined(first: Cache, second: Cache, start: Int[Array, ""] | int, *, size: int) -> Cache:
    """The first `start` tokens of one cache and those of another behind them, in one of this size."""

    def joined(x: Array, y: Array) -> Array:
        most = max(size, x.shape[3]) + y.shape[3]  # an update must fit, or XLA shifts it
        x = jnp.pad(x, [(0, most - x.shape[3]) if axis == 3 else (0, 0) for axis in range(5)])
        return jax.lax.dynamic_update_slice_in_dim(x, y, start, axis=3)[:, :, :, :size]

    key_LAKSH, value_LAKSH = (
        constrain(joined(*pair), "layers", "batch", "kv_heads", None, "head_dim")
        for pair in zip(first[:2], second[:2], strict=True)
    )
    return Cache(key_LAKSH, value_LAKSH, jnp.full((1, size), FAR))
