"""Count what one step must compute and communicate: the bounds that a compiled program is compared with.

Letters as in models/: T tokens of a row, V D L N K H F of the model's spec.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxguard.data.packing import Shape
from jaxguard.models.compute import Compute
from jaxguard.models.sharding import mesh_axes, partition
from jaxguard.models.spec import Spec
from jaxguard.models.weights import table

ATTENTION_BACKWARD = 2.5
"""Products of attention's backward pass over those of its forward pass: the scores again, and four of their size (Dao,
FlashAttention-2, 2023, section 4.1). Attention in plain XLA does the same."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of the matrix products of one step, all devices together, padding included.

    Attributes:
        layers: projections and MLPs.
        attention: scores and weighted sums, as the chosen kernel computes them.
        head: logits of the target positions.
        model: those of all three without recomputation, which MFU counts.
    """

    layers: float
    attention: float
    head: float
    model: float

    @property
    def total(self) -> float:
        return self.layers + self.attention + self.head


def step_flops(spec: Spec, shape: Shape, compute: Compute) -> Flops:
    """FLOPs of one step: a forward pass, a backward pass of twice that, and what is computed again in between.

    Full remat computes a layer's products once more, but for the last one where nothing needs its result (no norm follows
    it). The head's logits are always computed again (train/loss.py).
    """
    D, F, H, N, K, L = spec.d_model, spec.mlp_dim, spec.head_dim, spec.num_heads, spec.num_kv_heads, spec.num_layers
    tokens = shape.rows * shape.tokens
    last = D * F
    layer = D * H * (2 * N + 2 * K) + 3 * D * F
    again = {"full": layer if spec.post_norm else layer - last, "dots": 0, "none": 0}[compute.remat]
    layers = 2.0 * L * tokens * (3 * layer + again)

    # With shared prefixes a window is a mask: it leaves nothing out.
    windows = (None if shape.shared else spec.kinds[kind].window for kind in spec.layer_kinds)
    pairs = shape.rows * sum(_pairs(shape.tokens, window, compute) for window in windows)
    forward = 4.0 * N * H * pairs
    repeats = 1 + (compute.remat != "none") + ATTENTION_BACKWARD

    head = 2.0 * spec.vocab_size * D * shape.rows * shape.targets
    model = 3 * (2.0 * L * tokens * layer + forward + head)
    return Flops(layers, forward * repeats, 4 * head, model)


def _pairs(tokens: int, window: int | None, compute: Compute) -> int:
    """(query, key) pairs of one row that the kernel may multiply: without the blocks that causality or the window empties."""
    chunk = compute.query_chunk if compute.attention in ("xla", "block_sparse") else 128
    pairs = 0
    for start in range(0, tokens, chunk):
        stop = min(start + chunk, tokens)
        first = 0 if window is None or window >= tokens else max(0, start - window + 1)
        pairs += (stop - start) * (stop - first)
    return pairs


def ideal_sent(spec: Spec, mesh: Mapping[str, int], compute: Compute) -> float:
    """Bytes that a device must send in one step under this sharding, in the compute type.

    fsdp: every weight is gathered for the forward pass and, where layers are recomputed, once more; its gradient is summed
    by a reduce-scatter (Rajbhandari et al., ZeRO, 2020, section 7). data: the gradient, sharded by then, is all-reduced.
    Activations that `tensor` exchanges are not included.
    """
    passes = 2 + (compute.remat == "full")
    total = 0.0
    for weight in table(spec):
        sharding = partition(weight.axes, weight.shape(spec), mesh)
        names = {name for entry in sharding for name in mesh_axes(entry)}
        fsdp = mesh["fsdp"] if "fsdp" in names else 1
        size = compute.dtype.itemsize * math.prod(weight.shape(spec)) / (mesh["tensor"] if "tensor" in names else 1)
        total += size * passes * (fsdp - 1) / fsdp
        total += size / fsdp * 2 * (mesh["data"] - 1) / mesh["data"]
    return total
