"""Fused attention kernels of GPUs and TPUs, and which of them a device can run.

Both compute attention by a `Layout`. Results at padding are finite and meaningless.
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
    """Which keys a query sees in packed rows.

    A token sees the tokens of its own segment, and of the prefix that the segment continues, which are at or before it in the
    row and, in a local layer, less than `window` positions back.

    Attributes:
        segments_BT: the segment that a token belongs to, 0 for padding.
        positions_BT: position of each token in its own sequence, which continue those of a prefix.
        prefixes_BT: the segment that a token's segment continues, else its own; None where no segment continues another.
    """

    segments_BT: Int[Array, "B T"]
    positions_BT: Int[Array, "B T"]
    prefixes_BT: Int[Array, "B T"] | None = None

    def visible(self, window: int | None, queries: slice | Array, keys: slice | Array) -> Bool[Array, "*B C S"]:
        """Whether the tokens at `queries` see those at `keys`; also of a single row."""

        def query(x: Array) -> Array:
            return x[..., queries, None]

        def key(x: Array) -> Array:
            return x[..., None, keys]

        visible = query(self.segments_BT) == key(self.segments_BT)
        if self.prefixes_BT is not None:
            visible |= query(self.prefixes_BT) == key(self.segments_BT)
        if window is not None:
            visible &= query(self.positions_BT) - key(self.positions_BT) < window
        columns = jnp.arange(self.segments_BT.shape[-1])
        return visible & (key(columns) <= query(columns))


def choose(
    platform: str,
    compute_capability: float | None,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    requested: str = "auto",
    max_seq_len: int = LANES,
) -> Kernel:
    """Choose the best kernel that a device can run, or check the requested one.

    Args:
        platform: JAX's name of the device's platform: cpu, gpu, cuda or tpu.
        compute_capability: of an NVIDIA GPU, such as 8.0; None elsewhere.
        head_dim: H.
        dtype: type of queries, keys and values.
        requested: the config's model.attention.
        max_seq_len: T.

    Raises:
        JaxguardError: the device cannot run the requested kernel.
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
            raise JaxguardError(f"model.attention={name} cannot run here: {obstacle}; set model.attention=auto")
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
    # The backward pass's limit in cuDNN's documentation; on Blackwell Transformer Engine stays at 128, and so do we.
    limit = 256 if 9.0 <= capability < 10.0 else 128
    if head_dim > limit or head_dim % 8:
        return f"on compute capability {capability} head_dim may be up to {limit}, a multiple of 8, not {head_dim}"
    if max_seq_len % 2:
        return f"max_seq_len must be even, not {max_seq_len}"
    return None


def _splash_obstacle(platform: str, head_dim: int, max_seq_len: int) -> str | None:
    if platform != "tpu":
        return f"it needs a TPU, and this is {platform}"
    for name, value in (("head_dim", head_dim), ("max_seq_len", max_seq_len)):
        if value % LANES:
            return f"{name} must be a multiple of {LANES}, not {value}"
    return None


def cudnn(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    layout: Layout,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Compute cuDNN's flash attention, in bfloat16, on an NVIDIA GPU.

    The kernel itself knows causality, and the window where distance in the row is distance in the sequence, and skips blocks
    for them. The rest is a mask (B T T, bfloat16): cuDNN's packed layout would need none, but exists only since Hopper.
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
    """Compute splash attention on a TPU; with `interpret`, emulate the kernel anywhere, slowly.

    The kernel skips blocks without any visible key: by the causal or local mask alone where no segment continues another, else
    by each row's own mask.
    """

    def attend(query: Array, key: Array, value: Array, layout: Layout) -> Array:
        scaled = (query * scale).astype(query.dtype)
        q_BNTH, k_BKTH, v_BKTH = (x.swapaxes(1, 2) for x in (scaled, key, value))
        rows = _static_rows if layout.prefixes_BT is None else _dynamic_rows
        return rows(q_BNTH, k_BKTH, v_BKTH, layout, window, interpret).swapaxes(1, 2)

    return per_device(attend, query, key, value, layout)


def _static_rows(
    q_BNTH: Array, k_BKTH: Array, v_BKTH: Array, layout: Layout, window: int | None, interpret: bool
) -> Array:
    heads, tokens = q_BNTH.shape[1:3]
    size = (tokens, tokens)
    causal, local = splash_attention.CausalMask, splash_attention.LocalMask
    mask = causal(size) if window is None else local(size, window_size=(window - 1, 0), offset=0)
    kernel = _splash_kernel(splash_attention.MultiHeadMask([mask] * heads), tokens, interpret)
    segments = splash_attention.SegmentIds(layout.segments_BT, layout.segments_BT)
    mixed_BNTH: Array = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, segments)
    return mixed_BNTH


def _dynamic_rows(
    q_BNTH: Array, k_BKTH: Array, v_BKTH: Array, layout: Layout, window: int | None, interpret: bool
) -> Array:
    heads, tokens = q_BNTH.shape[1:3]

    def attend_row(row: tuple[Array, Array, Array, Array]) -> Array:
        q_NTH, k_KTH, v_KTH, visible_TT = row
        kernel = _splash_kernel(jnp.broadcast_to(visible_TT, (heads, tokens, tokens)), tokens, interpret)
        mark_mask_as_dynamic(kernel)
        mixed_NTH: Array = kernel(q_NTH, k_KTH, v_KTH)
        return mixed_NTH

    visible_BTT = layout.visible(window, slice(None), slice(None))
    mixed_BNTH: Array = jax.lax.map(attend_row, (q_BNTH, k_BKTH, v_BKTH, visible_BTT))
    return mixed_BNTH


def _splash_kernel(mask: splash_attention.MultiHeadMask | Array, tokens: int, interpret: bool) -> Any:
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
    by_row = partition(("batch", None), layout.segments_BT.shape, mesh.shape)
    run = partial(jax.shard_map, mesh=mesh, in_specs=(by_head, by_head, by_head, by_row), out_specs=by_head)
    # The kernels do not say over which axes their results vary, hence no check.
    mixed: Array = run(attend, check_vma=False)(query, key, value, layout)
    return mixed
