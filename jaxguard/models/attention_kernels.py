"""Fused attention kernels of GPUs and TPUs, and which of them a device can run.

Shape letters: B rows, T tokens of a row, N query heads, K key/value heads, H head dimension.

Both kernels mean the same: a token attends to the tokens of its own segment that do not come after it in the row
and, where there is a window, to no more than `window` of them, itself included. Segment 0 is padding; what comes out
at padding is finite and means nothing.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Array, Float, Int

from jaxguard.errors import JaxguardError
from jaxguard.models.axes import partition

Kernel = Literal["xla", "cudnn", "splash"]

LANES = 128
"""Width of a TPU's vector registers: splash attention works on blocks of it."""


def choose(
    platform: str,
    compute_capability: float | None,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    requested: str = "auto",
    row_tokens: int = LANES,
) -> Kernel:
    """The kernel to use on a device: the best one that can work, or the requested one.

    Args:
        platform: JAX's name of it: cpu, gpu, cuda or tpu.
        compute_capability: of an NVIDIA GPU, such as 8.0; None elsewhere.
        head_dim: H.
        dtype: type of queries, keys and values.
        requested: the config's model.attention.
        row_tokens: T.

    Raises:
        JaxguardError: the requested kernel cannot work there.
    """
    # Best first.
    obstacles: dict[Kernel, str | None] = {
        "cudnn": _cudnn_obstacle(platform, compute_capability, head_dim, dtype, row_tokens),
        "splash": _splash_obstacle(platform, head_dim, row_tokens),
        "xla": None,
    }
    for name, obstacle in obstacles.items():
        if requested in ("auto", name) and obstacle is None:
            return name
        if requested == name:
            raise JaxguardError(f"model.attention={name} cannot work here: {obstacle}; set model.attention=auto")
    raise JaxguardError(f"model.attention={requested} is unknown; known: auto, {', '.join(obstacles)}")


def _cudnn_obstacle(
    platform: str, capability: float | None, head_dim: int, dtype: jax.typing.DTypeLike, row_tokens: int
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
    if row_tokens % 2:
        return f"a row needs an even number of tokens, not {row_tokens}"
    return None


def _splash_obstacle(platform: str, head_dim: int, row_tokens: int) -> str | None:
    if platform != "tpu":
        return f"it needs a TPU, and this is {platform}"
    for what, value in (("dimensions of a head", head_dim), ("tokens of a row", row_tokens)):
        if value % LANES:
            return f"the {what} must be a multiple of {LANES}, not {value}"
    return None


def cudnn(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Flash attention of cuDNN, in bfloat16, on an NVIDIA GPU.

    Causality and the window are the kernel's own, which lets it skip blocks; only the segments come as a mask
    (B T T, bfloat16): cuDNN's packed layout would need no mask, but it does not exist before Hopper.
    """

    def attend(query: Array, key: Array, value: Array, segments: Array) -> Array:
        same = segments[:, None, :, None] == segments[:, None, None, :]
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=same,
            scale=scale,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )

    return _per_device(attend, query, key, value, segments)


def splash(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    window: int | None,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Splash attention of a TPU; with `interpret`, the same kernel emulated anywhere, slowly."""

    def attend(query: Array, key: Array, value: Array, segments: Array) -> Array:
        tokens, heads = query.shape[1:3]
        one = _causal(tokens) if window is None else _local(tokens, window)
        kernel = splash_attention.make_splash_mha(
            splash_attention.MultiHeadMask([one] * heads),
            block_sizes=_block_sizes(tokens),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        scaled = (query * scale).astype(query.dtype)
        q_BNTH, k_BKTH, v_BKTH = (x.swapaxes(1, 2) for x in (scaled, key, value))
        out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, splash_attention.SegmentIds(segments, segments))
        return out_BNTH.swapaxes(1, 2)

    return _per_device(attend, query, key, value, segments)


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


def _per_device(attend: Callable[..., Array], query: Array, key: Array, value: Array, segments: Array) -> Array:
    """Run a kernel on every device's own rows and heads: the compiler cannot cut a kernel up by itself.

    The mesh is the one in context (`jax.set_mesh`). A dimension that does not divide by its axes is not cut.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(query, key, value, segments)
    # Query heads are cut as the key heads are, so that a group of them stays with its key.
    by_head = partition(("batch", None, "kv_heads", None), key.shape, mesh.shape)
    by_row = partition(("batch", None), segments.shape, mesh.shape)
    run = partial(jax.shard_map, mesh=mesh, in_specs=(by_head, by_head, by_head, by_row), out_specs=by_head)
    # The kernels do not say over which axes their results vary, hence no check.
    return run(attend, check_vma=False)(query, key, value, segments)
