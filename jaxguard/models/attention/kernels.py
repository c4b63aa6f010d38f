"""Fused attention kernels of GPUs and TPUs, and which of them a device can run.

Shape letters: B rows, T tokens of a row, N query heads, K key/value heads, H head dimension.

Both kernels mean the same, which `Layout` says. What comes out at padding is finite and means nothing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Array, Bool, Float, Int

from jaxguard.compat import mark_mask_as_dynamic
from jaxguard.models.sharding import partition
from jaxguard.utils.errors import JaxguardError

Kernel = Literal["xla", "block_sparse", "cudnn", "splash"]

LANES = 128
"""Width of a TPU's vector registers: splash attention works on blocks of it."""


class Layout(NamedTuple):
    """Who sees whom in packed rows.

    A token sees the tokens of its own segment, and those of the prefix that the segment continues, that stand at or before
    it in the row and, in a local layer, less than `window` positions back.

    Attributes:
        segments_BT: which segment a token belongs to, 0 for padding.
        positions_BT: place of each token in its own sequence; after a prefix they go on from it.
        prefixes_BT: the segment that a token's segment continues, its own where it continues none; None where no segment
            of the rows continues another.
    """

    segments_BT: Int[Array, "B T"]
    positions_BT: Int[Array, "B T"]
    prefixes_BT: Int[Array, "B T"] | None = None

    def visible(self, window: int | None, queries: slice | Array, keys: slice | Array) -> Bool[Array, "*B C S"]:
        """May the tokens at `queries` see those at `keys`? Of one row, too."""

        def query(x: Array) -> Array:
            return x[..., queries, None]

        def key(x: Array) -> Array:
            return x[..., None, keys]

        seen = query(self.segments_BT) == key(self.segments_BT)
        if self.prefixes_BT is not None:
            seen |= query(self.prefixes_BT) == key(self.segments_BT)
        if window is not None:
            seen &= query(self.positions_BT) - key(self.positions_BT) < window
        places = jnp.arange(self.segments_BT.shape[-1])
        return seen & (key(places) <= query(places))


def choose(
    platform: str,
    compute_capability: float | None,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    requested: str = "auto",
    max_seq_len: int = LANES,
) -> Kernel:
    """The kernel to use on a device: the best one that can work, or the requested one.

    Args:
        platform: JAX's name of it: cpu, gpu, cuda or tpu.
        compute_capability: of an NVIDIA GPU, such as 8.0; None elsewhere.
        head_dim: H.
        dtype: type of queries, keys and values.
        requested: the config's model.attention.
        max_seq_len: T.

    Raises:
        JaxguardError: the requested kernel cannot work there.
    """
    # Best first.
    obstacles: dict[Kernel, str | None] = {
        "cudnn": _cudnn_obstacle(platform, compute_capability, head_dim, dtype, max_seq_len),
        "splash": _splash_obstacle(platform, head_dim, max_seq_len),
        "block_sparse": None if platform == "cpu" else f"it is for CPUs, and this is {platform}",
        "xla": None,
    }
    for name, obstacle in obstacles.items():
        if requested in ("auto", name) and obstacle is None:
            return name
        if requested == name:
            raise JaxguardError(f"model.attention={name} cannot work here: {obstacle}; set model.attention=auto")
    raise JaxguardError(f"model.attention={requested} is unknown; known: auto, {', '.join(obstacles)}")


def _cudnn_obstacle(
    platform: str, capability: float | None, head_dim: int, dtype: jax.typing.DTypeLike, max_seq_len: int
) -> str | None:
    if platform not in ("gpu", "cuda") or capability is None:
        return f"it needs an NVIDIA GPU, and this is {platform}"
    if capability < 8.0:
        return f"it needs compute capability 8.0 (A100) or newer, and this GPU has {capability}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it computes in bfloat16, and model.compute_dtype is {jnp.dtype(dtype).name}"
    # Of the backward pass, by cuDNN's documentation; on Blackwell Transformer Engine keeps to 128, and so do we.
    limit = 256 if 9.0 <= capability < 10.0 else 128
    if head_dim > limit or head_dim % 8:
        return f"on compute capability {capability} heads may have up to {limit} dimensions, in eights, not {head_dim}"
    if max_seq_len % 2:
        return f"a row needs an even number of tokens, not {max_seq_len}"
    return None


def _splash_obstacle(platform: str, head_dim: int, max_seq_len: int) -> str | None:
    if platform != "tpu":
        return f"it needs a TPU, and this is {platform}"
    for what, value in (("dimensions of a head", head_dim), ("tokens of a row", max_seq_len)):
        if value % LANES:
            return f"the {what} must be a multiple of {LANES}, not {value}"
    return None


def cudnn(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    layout: Layout,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Flash attention of cuDNN, in bfloat16, on an NVIDIA GPU.

    Causality is the kernel's own, and so is the window where distance in the row is distance in the sequence, which lets it
    skip blocks; the rest comes as a mask (B T T, bfloat16): cuDNN's packed layout would need none, but it does not exist
    before Hopper.
    """
    row_window = window if layout.prefixes_BT is None else None

    def attend(query: Array, key: Array, value: Array, layout: Layout) -> Array:
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=layout.visible(None if row_window else window, slice(None), slice(None))[:, None],
            scale=scale,
            is_causal=True,
            local_window_size=None if row_window is None else (row_window - 1, 0),
            implementation="cudnn",
        )

    return per_device(attend, query, key, value, layout)


def splash(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    layout: Layout,
    window: int | None,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Splash attention of a TPU; with `interpret`, the same kernel emulated anywhere, slowly.

    The kernel leaves out blocks that nobody sees: by the causal or local mask alone where no segment continues another,
    and by each row's own mask where one does.
    """

    def attend(query: Array, key: Array, value: Array, layout: Layout) -> Array:
        scaled = (query * scale).astype(query.dtype)
        q_BNTH, k_BKTH, v_BKTH = (x.swapaxes(1, 2) for x in (scaled, key, value))
        rows = _whole_rows if layout.prefixes_BT is None else _branching_rows
        return rows(q_BNTH, k_BKTH, v_BKTH, layout, window, interpret).swapaxes(1, 2)

    return per_device(attend, query, key, value, layout)


def _whole_rows(
    q_BNTH: Array, k_BKTH: Array, v_BKTH: Array, layout: Layout, window: int | None, interpret: bool
) -> Array:
    heads, tokens = q_BNTH.shape[1:3]
    one = _causal(tokens) if window is None else _local(tokens, window)
    kernel = _splash_kernel(splash_attention.MultiHeadMask([one] * heads), tokens, interpret)
    segments = splash_attention.SegmentIds(layout.segments_BT, layout.segments_BT)
    return jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, segments)


def _branching_rows(
    q_BNTH: Array, k_BKTH: Array, v_BKTH: Array, layout: Layout, window: int | None, interpret: bool
) -> Array:
    heads, tokens = q_BNTH.shape[1:3]

    def row(row: tuple[Array, Array, Array, Array]) -> Array:
        q_NTH, k_KTH, v_KTH, seen_TT = row
        kernel = _splash_kernel(jnp.broadcast_to(seen_TT, (heads, tokens, tokens)), tokens, interpret)
        mark_mask_as_dynamic(kernel)
        return kernel(q_NTH, k_KTH, v_KTH)

    return jax.lax.map(row, (q_BNTH, k_BKTH, v_BKTH, layout.visible(window, slice(None), slice(None))))


def _splash_kernel(mask: splash_attention.MultiHeadMask | Array, tokens: int, interpret: bool) -> Any:
    return splash_attention.make_splash_mha(
        mask, block_sizes=_block_sizes(tokens), head_shards=1, q_seq_shards=1, interpret=interpret
    )


def _causal(tokens: int) -> splash_attention.CausalMask:
    return splash_attention.CausalMask((tokens, tokens))


def _local(tokens: int, window: int) -> splash_attention.LocalMask:
    return splash_attention.LocalMask((tokens, tokens), window_size=(window - 1, 0), offset=0)


def _block_sizes(tokens: int) -> splash_attention.BlockSizes:
    """The largest blocks, up to 512 tokens, that cut a row evenly; they fit on chip for H = 256."""
    block = next(size for size in (512, 256, LANES) if tokens % size == 0)
    return splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )


def per_device(attend: Callable[..., Array], query: Array, key: Array, value: Array, layout: Layout) -> Array:
    """Run a kernel on every device's own rows and heads: the compiler cannot cut a kernel up by itself.

    The mesh is the one in context (`jax.set_mesh`). A dimension that does not divide by its axes is not cut.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(query, key, value, layout)
    # Query heads are cut as the key heads are, so that a group of them stays with its key.
    by_head = partition(("batch", None, "kv_heads", None), key.shape, mesh.shape)
    by_row = partition(("batch", None), layout.segments_BT.shape, mesh.shape)
    run = partial(jax.shard_map, mesh=mesh, in_specs=(by_head, by_head, by_head, by_row), out_specs=by_head)
    # The kernels do not say over which axes their results vary, hence no check.
    return run(attend, check_vma=False)(query, key, value, layout)
