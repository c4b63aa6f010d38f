"""Which keys a query sees, and the fused attention kernels of GPUs and TPUs. Results at padding are finite and meaningless."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Array, Bool, Float, Int

from jaxguard.compat import mark_mask_as_dynamic
from jaxguard.models.sharding import partition

Kernel = Literal["xla", "block_sparse", "cudnn", "splash"]

Query = Float[Array, "B T N H"]
KeyValue = Float[Array, "B T K H"]

LANES = 128
"""Width of a TPU's vector registers: splash attention works on blocks of it."""

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


def cudnn(query: Query, key: KeyValue, value: KeyValue, layout: Layout, window: int | None, scale: float) -> Query:
    """Compute cuDNN's flash attention, in bfloat16, on an NVIDIA GPU.

    The kernel itself knows causality, and skips blocks for it. The rest is a mask (B T T, bfloat16): cuDNN's packed layout would
    need none, but exists only since Hopper, and knows no trees.
    """

    def attend(query: Array, key: Array, value: Array, layout: Layout) -> Array:
        mask = layout.visible(window, ALL, ALL)[:, None]
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, scale=scale, is_causal=True, implementation="cudnn"
        )

    return per_device(attend, query, key, value, layout)


def splash(
    query: Query,
    key: KeyValue,
    value: KeyValue,
    layout: Layout,
    window: int | None,
    scale: float,
    interpret: bool = False,
) -> Query:
    """Compute splash attention on a TPU; with `interpret`, emulate the kernel anywhere, slowly.

    The kernel skips blocks without any visible key, by each row's own mask.
    """

    def attend(query: Array, key: Array, value: Array, layout: Layout) -> Array:
        scaled = (query * scale).astype(query.dtype)
        q_BNTH, k_BKTH, v_BKTH = (x.swapaxes(1, 2) for x in (scaled, key, value))
        heads, tokens = q_BNTH.shape[1:3]
        size = (tokens, tokens)

        def attend_row(row: tuple[Array, Array, Array, Array]) -> Array:
            q_NTH, k_KTH, v_KTH, visible_TT = row
            kernel = _splash_kernel(jnp.broadcast_to(visible_TT, (heads, *size)), tokens, interpret)
            mark_mask_as_dynamic(kernel)
            mixed_NTH: Array = kernel(q_NTH, k_KTH, v_KTH)
            return mixed_NTH

        mixed_BNTH: Array = jax.lax.map(attend_row, (q_BNTH, k_BKTH, v_BKTH, layout.visible(window, ALL, ALL)))
        return mixed_BNTH.swapaxes(1, 2)

    return per_device(attend, query, key, value, layout)


def _splash_kernel(mask: Array, tokens: int, interpret: bool) -> Any:
    """Make the kernel with the largest blocks, up to 512 tokens, that divide a row; they fit on chip for H = 256."""
    block = next(size for size in (512, 256, LANES) if tokens % size == 0)
    names = "q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq"
    blocks: dict[str, Any] = {f"block_{name}": block for name in names}
    sizes = splash_attention.BlockSizes(**blocks)
    return splash_attention.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)


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
