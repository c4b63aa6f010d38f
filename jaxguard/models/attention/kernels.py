"""Which keys a query sees, and kernels that others wrote. Results at padding are finite and meaningless."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxguard.models.sharding import partition

Kernel = Literal["xla", "block_sparse", "flash", "cudnn"]

Query = Float[Array, "B T N H"]
KeyValue = Float[Array, "B T K H"]

ALL = slice(None)


class Layout(NamedTuple):
    """Which keys a query sees in rows of trees in depth-first order.

    A token sees itself and its ancestors: the tokens before it that it continues; in a local layer, those less than `window`
    positions back.

    Attributes:
        ends_BT: the last index in the row of a token that continues this one, its own where none does, as for padding.
        positions_BT: position of each token in its own sequence.
    """

    ends_BT: Int[Array, "B T"]
    positions_BT: Int[Array, "B T"]

    def visible(self, window: int | None, queries: slice | Array, keys: slice | Array) -> Bool[Array, "*B C S"]:
        """Whether the tokens at `queries` see those at `keys`; also of a single row."""
        index_T = jnp.arange(self.ends_BT.shape[-1])
        query_C1, key_S = index_T[queries, None], index_T[keys]
        visible = (key_S <= query_C1) & (query_C1 <= self.ends_BT[..., None, keys])
        if window is not None:
            visible &= self.positions_BT[..., queries, None] - self.positions_BT[..., None, keys] < window
        return visible

    def needed(self, window: int | None, queries: int, keys: int) -> Bool[Array, "*B I J"]:
        """Whether some token of block i may see one of block j, in blocks of so many `queries` and `keys`; also of a single row.

        Exact without a window. With one it goes by the range of positions in a block, and is never wrongly no.
        """
        *rows, tokens = self.ends_BT.shape
        first_I1, first_J = jnp.arange(0, tokens, queries)[:, None], jnp.arange(0, tokens, keys)
        last_1J = jnp.max(self.ends_BT.reshape(*rows, 1, -1, keys), axis=-1)
        needed_IJ: Array = (first_J < first_I1 + queries) & (first_I1 <= last_1J)
        if window is not None:
            position_I1Q = self.positions_BT.reshape(*rows, -1, 1, queries)
            nearest_I1 = jnp.min(position_I1Q, axis=-1, where=position_I1Q >= 0, initial=2**30)
            farthest_1J = jnp.max(self.positions_BT.reshape(*rows, 1, -1, keys), axis=-1)
            # Every token sees itself, padding too.
            needed_IJ &= (nearest_I1 - farthest_1J < window) | (first_I1 < first_J + keys)
        return needed_IJ

    def padded(self, missing: int) -> "Layout":
        """Add so many tokens of padding to each row; also to a single row."""
        *rows, tokens = self.ends_BT.shape
        own = jnp.broadcast_to(jnp.arange(tokens, tokens + missing, dtype=self.ends_BT.dtype), (*rows, missing))
        return Layout(
            jnp.concatenate([self.ends_BT, own], axis=-1),
            jnp.concatenate([self.positions_BT, jnp.full_like(own, -1)], axis=-1),
        )


def cudnn(query: Query, key: KeyValue, value: KeyValue, layout: Layout, window: int | None, scale: float) -> Query:
    """Compute cuDNN's flash attention, in bfloat16, on an NVIDIA GPU: for comparison, its vendor measured it on every one.

    The kernel itself knows causality, and skips blocks for it. The rest is a mask (B T T, bfloat16): cuDNN's packed layout would
    need none, but exists only since Hopper, and knows no trees.
    """

    def attend(query: Array, key: Array, value: Array, layout: Layout) -> Array:
        mask = layout.visible(window, ALL, ALL)[:, None]
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, scale=scale, is_causal=True, implementation="cudnn"
        )

    return per_device(attend, query, key, value, layout)


def per_device(attend: Callable[..., Array], query: Array, key: Array, value: Array, layout: Layout) -> Array:
    """Run a kernel on every device's own rows and heads: the compiler cannot shard a kernel by itself.

    The mesh is that of `jax.set_mesh`. A dimension that its mesh axes do not divide is not sharded.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(query, key, value, layout)
    # Query heads are sharded as the key heads are, so that a group of them stays with its key.
    by_head = partition(("batch", None, "kv_heads", None), key.shape, mesh.shape)
    by_row = partition(("batch", None), layout.ends_BT.shape, mesh.shape)
    run = partial(jax.shard_map, mesh=mesh, in_specs=(by_head, by_head, by_head, by_row), out_specs=by_head)
    # The kernels do not say over which axes their results vary, hence no check.
    mixed: Array = run(attend, check_vma=False)(query, key, value, layout)
    return mixed
