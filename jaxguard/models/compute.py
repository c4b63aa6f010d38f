"""How a model is computed: types, attention kernel, recomputation."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from jaxguard.config.train import ModelConfig
from jaxguard.models.attention import kernels
from jaxguard.models.einsum import has_bfloat16_units
from jaxguard.models.spec import Spec


@dataclass(frozen=True)
class Compute:
    """How to compute, as opposed to what. Hashable, so that it can be static under jit.

    Attributes:
        dtype: of activations, of gradients, and of weights while they are computed with.
        attention: "xla", "block_sparse", "cudnn" or "splash".
        remat: what the backward pass recomputes: "full" every layer, "dots" all but matmuls, "none" nothing.
        query_chunk: queries whose scores attention in XLA holds at once: "xla", "block_sparse".
        matmul_dtype: what matmuls round their matmul_dtype to, whatever type weights then have; None multiplies them as they are.
    """

    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    attention: str = "xla"
    remat: str = "none"
    query_chunk: int = 512
    matmul_dtype: jnp.dtype | None = None

    def cast(self, weight: Array) -> Array:
        """A weight as `einsum` is to get it."""
        return weight.astype(self.dtype) if self.matmul_dtype is None else weight


REFERENCE = Compute()
"""Float32 in plain XLA: the slow and exact way."""


def choose_compute(config: ModelConfig, spec: Spec, mesh: Mesh, max_seq_len: int) -> Compute:
    """The config's wishes, with attention chosen for the mesh's devices."""
    device = mesh.devices.flat[0]
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
    if device.platform == "cpu" and dtype == jnp.bfloat16:
        # All that a CPU may do fast in bfloat16 is to multiply matrices, with sums in float32.
        dtype, matmul_dtype = jnp.dtype(jnp.float32), dtype if has_bfloat16_units() else None
    return Compute(dtype, attention, config.remat, config.query_chunk, matmul_dtype)
