"""How a model is computed on a platform: types, attention kernel, rematerialization."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from jaxguard.config.train import ModelConfig
from jaxguard.models.attention import kernels
from jaxguard.models.spec import Spec


@dataclass(frozen=True)
class Compute:
    """How to compute a model, as opposed to what it is. Hashable, so that it can be static under jit.

    Attributes:
        dtype: of activations, of gradients, and of weights while they are computed with.
        attention: "xla", "block_sparse", "cudnn" or "splash".
        remat: what the backward pass recomputes: "full" every layer, "dots" all but matmuls, "none" nothing.
        query_chunk: queries whose scores the kernels "xla" and "block_sparse" hold at once.
        matmul_dtype: what matmuls round both operands to; None multiplies them in the type that they have.
        norm_by_einsum: write RMSNorm as einsums, whose gradients are einsums too. The gradients of elementwise products are sums,
            which XLA computes up to seventy times slower on CPUs.
    """

    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    attention: kernels.Kernel = "xla"
    remat: str = "none"
    query_chunk: int = 512
    matmul_dtype: jnp.dtype | None = None
    norm_by_einsum: bool = False

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
    cpu = device.platform == "cpu"
    capability = getattr(device, "compute_capability", None)
    dtype = jnp.dtype(config.compute_dtype)
    attention = kernels.choose(
        device.platform,
        None if capability is None else float(capability),
        spec.head_dim,
        dtype,
        config.attention,
        max_seq_len,
    )
    matmul_dtype = None
    if cpu and dtype == jnp.bfloat16:
        # CPUs are fast in bfloat16 only at matmuls with float32 sums.
        dtype, matmul_dtype = jnp.dtype(jnp.float32), dtype if has_bfloat16_units() else None
    return Compute(dtype, attention, config.remat, config.query_chunk, matmul_dtype, norm_by_einsum=cpu)


@cache
def has_bfloat16_units() -> bool:
    """Whether this CPU has instructions for bfloat16 matmuls (AVX-512, AMX). Others are faster in float32."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
