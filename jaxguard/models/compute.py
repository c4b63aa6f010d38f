"""How a model is computed on a platform: types, attention kernel, rematerialization."""

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from jaxguard.config.train import ModelConfig
from jaxguard.models.attention.flash import Tiling, choose_tiling, memory_on_chip
from jaxguard.models.attention.kernels import Kernel
from jaxguard.models.spec import Spec
from jaxguard.utils.errors import JaxguardError


@dataclass(frozen=True)
class Compute:
    """How to compute a model, as opposed to what it is. Hashable, so that it can be static under jit."""

    dtype: jnp.dtype = jnp.dtype(jnp.float32)  # of activations, gradients, and weights while they are computed with
    attention: Kernel = "xla"
    remat: str = "none"  # what the backward pass recomputes: "full" every layer, "dots" all but matmuls
    query_chunk: int = 512  # queries whose scores the kernels "xla" and "block_sparse" hold at once
    matmul_dtype: jnp.dtype | None = None  # what matmuls round both operands to; None: the type that they have
    # Compute the sums of RMSNorm as matmuls: see models/norm.py.
    norm_by_einsum: bool = False
    # The backward pass finds the logits in memory. For a large vocabulary they are gigabytes, which accelerators cannot spare.
    keep_logits: bool = False
    # Of float32 matmuls: GPUs would compute them in TF32. None is the platform's own: float32 on CPUs, bfloat16 on TPUs.
    precision: str | None = None
    # Activations are [D, B, T], and the layers' matrices have what they sum over last, as jax_model.place_model stores them: for
    # few tokens a CPU is up to twice as fast. Not for training.
    features_first: bool = False
    tiling: Tiling | None = None  # of the kernel "flash"

    @property
    def operand_dtype(self) -> jnp.dtype:
        """The type of what matmuls take, in which weights, keys and values are stored where nothing is trained."""
        return self.matmul_dtype or self.dtype

    def of_inference(self, cpu: bool) -> "Compute":
        """Return how the same is computed where nothing is trained: nothing is kept for a backward pass."""
        return replace(self, remat="none", norm_by_einsum=False, features_first=cpu)

    def of_guard(self) -> "Compute":
        """Return how a guard judges: matmuls round nothing.

        Weights that a CPU's matmuls round, as training does for speed, are off alike in all examples: a bias.
        """
        return replace(self, matmul_dtype=None)

    def matmuls(self) -> AbstractContextManager[Any]:
        """The context to trace programs in, so that their matmuls have this precision."""
        return jax.default_matmul_precision(self.precision) if self.precision else nullcontext()

    def cast(self, weight: Array) -> Array:
        """Cast a weight for `project`, which rounds it by itself where there is a matmul_dtype."""
        return weight.astype(self.dtype) if self.matmul_dtype is None else weight


REFERENCE = Compute()
"""Float32 in plain XLA: slow and exact."""


def choose_compute(config: ModelConfig, spec: Spec, mesh: Mesh, max_seq_len: int) -> Compute:
    """Choose what the mesh's devices can do of what the config asks for.

    Raises:
        JaxguardError: the requested attention kernel cannot run on these devices.
    """
    device = mesh.devices.flat[0]
    platform, cpu = device.platform, device.platform == "cpu"
    generation = re.search(r"TPU ?v?(\d+)", device.device_kind)
    capability = float(getattr(device, "compute_capability", None) or (generation[1] if generation else 0))
    dtype, group = jnp.dtype(config.compute_dtype), spec.num_heads // spec.num_kv_heads
    attention = choose_kernel(config.attention, platform, capability, spec.head_dim, group, dtype, max_seq_len)
    tiling = choose_tiling(platform, capability, spec.head_dim) if attention == "flash" else None
    matmul_dtype = None
    if cpu and dtype == jnp.bfloat16:
        # CPUs are fast in bfloat16 only at matmuls with float32 sums.
        dtype, matmul_dtype = jnp.dtype(jnp.float32), dtype if has_bfloat16_units() else None
    # XLA for TPUs takes minutes to compile two layers with "highest".
    precision = "highest" if dtype == jnp.float32 and platform == "gpu" else None
    keep_logits = cpu and config.remat != "full"
    arithmetic = matmul_dtype, cpu, keep_logits, precision
    return Compute(dtype, attention, config.remat, config.query_chunk, *arithmetic, tiling=tiling)


def choose_kernel(
    requested: str,
    platform: str,
    compute_capability: float,
    head_dim: int,
    group: int,
    dtype: jnp.dtype,
    max_seq_len: int,
) -> Kernel:
    """Choose the best attention kernel that a device can run, or check the one that model.attention requests.

    `platform` is JAX's name of the device's: cpu, gpu, cuda or tpu; `compute_capability` an NVIDIA GPU's, a TPU's generation, and 0
    elsewhere; `group` the query heads of a key head.

    Raises:
        JaxguardError: the device cannot run the requested kernel.
    """
    gpu, tpu = platform in ("gpu", "cuda") and compute_capability > 0, platform == "tpu"
    too_old = f"it needs compute capability 8.0 (A100) or newer, and this GPU has {compute_capability}"
    in_bfloat16 = f"it computes in bfloat16, and model.compute_dtype is {dtype.name}"
    widths = (128, 256) if tpu else (64, 128, 256)
    needs, has = memory_on_chip(max_seq_len, group, head_dim), 2**20 * (16 if compute_capability < 5 else 64)
    # The backward pass's limit in cuDNN's documentation; on Blackwell Transformer Engine stays at 128, and so do we.
    limit = 256 if 9.0 <= compute_capability < 10.0 else 128
    conditions: dict[Kernel, dict[str, bool]] = {  # best first: each with what prevents it
        "flash": {
            f"it needs an NVIDIA GPU or a TPU, and this is {platform}": not (gpu or tpu),
            too_old: gpu and compute_capability < 8,
            in_bfloat16: dtype != jnp.bfloat16,
            f"head_dim must be one of {', '.join(map(str, widths))}, not {head_dim}": head_dim not in widths,
            f"rows of max_seq_len={max_seq_len} need {needs / 2**20:.0f} MiB of the chip's {has / 2**20:.0f}": (
                tpu and needs > has
            ),
        },
        "cudnn": {
            f"it needs an NVIDIA GPU, and this is {platform}": not gpu,
            too_old: compute_capability < 8,
            in_bfloat16: dtype != jnp.bfloat16,
            f"on compute capability {compute_capability} head_dim may be up to {limit}, a multiple of 8, not {head_dim}": (
                head_dim > limit or head_dim % 8 > 0
            ),
            f"max_seq_len must be even, not {max_seq_len}": max_seq_len % 2 > 0,
        },
        "block_sparse": {f"it is for CPUs, and this is {platform}": platform != "cpu"},
        "xla": {},
    }
    for name, obstacles in conditions.items():
        obstacle = next((text for text, applies in obstacles.items() if applies), None)
        if requested in ("auto", name) and obstacle is None:
            return name
        if requested == name:
            raise JaxguardError(f"model.attention={name} cannot run here: {obstacle}; set model.attention=auto")
    raise AssertionError(requested)


@cache
def has_bfloat16_units() -> bool:
    """Whether this CPU has instructions for bfloat16 matmuls (AVX-512, AMX). Others are faster in float32."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
