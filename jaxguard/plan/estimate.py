"""What a step must compute and communicate, the time that it takes by a target's data sheet, and what a whole run comes to.

Letters as in models/: T tokens of a row, V D L N K H F of the model's spec.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jaxguard.config import Config
from jaxguard.config.hardware import Target
from jaxguard.data.packing import Schedule, Shape, total_steps
from jaxguard.data.prepare import prepare
from jaxguard.models.compute import Compute
from jaxguard.models.sharding import mesh_axes, partition
from jaxguard.models.spec import Spec
from jaxguard.models.weights import table
from jaxguard.plan.hlo import Collective

if TYPE_CHECKING:
    from jaxguard.plan.compile import Plan

ATTENTION_BACKWARD = 2.5
"""Products of attention's backward pass over those of its forward pass: the scores again, and four of their size (Dao,
FlashAttention-2, 2023, section 4.1). Attention in plain XLA does the same."""
ASSUMPTIONS = (
    "matrix products at the data sheet's dense peak; memory and links at the data sheet's rates; nothing overlaps. We assume "
    "that two errors cancel out: products never reach their peak, and communication hides behind them. The bound is the "
    "longest of the three alone"
)
MOST_SHAPES = 4


def step_flops(spec: Spec, shape: Shape, compute: Compute) -> dict[str, float]:
    """FLOPs of the matrix products of one step, all devices together, padding included.

    A forward pass, a backward pass of twice that, and what is computed again in between: full remat computes a layer's products
    once more, but for the last one where nothing needs its result (no norm follows it). The head's logits are always computed
    again (train/loss.py).

    Returns:
        layers: projections and MLPs; attention: scores and weighted sums, as the chosen kernel computes them; head: logits of the
        target positions; model: those of all three without recomputation, which MFU counts.
    """
    D, F, H, N, K, L = spec.d_model, spec.mlp_dim, spec.head_dim, spec.num_heads, spec.num_kv_heads, spec.num_layers
    tokens = shape.rows * shape.tokens
    last = D * F
    layer = D * H * (2 * N + 2 * K) + 3 * D * F
    again = {"full": layer if spec.post_norm else layer - last, "dots": 0, "none": 0}[compute.remat]
    layers = 2.0 * L * tokens * (3 * layer + again)

    # (query, key) pairs that the kernel may multiply, without the blocks that causality or the window empties. With shared
    # prefixes a window is a mask: it leaves nothing out.
    chunk = compute.query_chunk if compute.attention in ("xla", "block_sparse") else 128
    pairs = 0
    for window in (None if shape.shared else spec.kinds[kind].window for kind in spec.layer_kinds):
        for start in range(0, shape.tokens, chunk):
            stop = min(start + chunk, shape.tokens)
            first = 0 if window is None or window >= shape.tokens else max(0, start - window + 1)
            pairs += shape.rows * (stop - start) * (stop - first)
    forward = 4.0 * N * H * pairs
    repeats = 1 + (compute.remat != "none") + ATTENTION_BACKWARD

    head = 2.0 * spec.vocab_size * D * shape.rows * shape.targets
    model = 3 * (2.0 * L * tokens * layer + forward + head)
    return {"layers": layers, "attention": forward * repeats, "head": 4 * head, "model": model}


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


def estimate(plan: "Plan") -> dict[str, float]:
    """Estimate the seconds of one compiled step; see ASSUMPTIONS.

    Returns:
        compute: of the matrix products; memory: to read and write it; network: of the collectives; mfu: share of the devices'
        peak FLOPs that the model's own are, without recomputation and padding; step: if nothing overlaps; bound: if all does.
    """
    target = plan.cluster.target
    peak = target.flops.get(plan.compute.dtype.name) or target.flops["bfloat16"]
    compute = plan.compiled_flops / peak
    memory = plan.traffic / target.bandwidth
    network = sum(collective.sent / rate(target, collective) for collective in plan.collectives)
    step, bound = compute + memory + network, max(compute, memory, network)
    mfu = plan.flops["model"] / (plan.cluster.devices * peak * step)
    return {"compute": compute, "memory": memory, "network": network, "mfu": mfu, "step": step, "bound": bound}


def rate(target: Target, collective: Collective) -> float:
    """Bytes/s at which a device sends its part: over links, or over the network cards of all its linked peers together."""
    if collective.near == collective.group:
        return target.link
    return min(target.link, target.network * collective.near)


@dataclass(frozen=True)
class RunCost:
    """A whole run.

    Attributes:
        steps: how many; None where they depend on data that are not available.
        price: dollars for a device and hour.
        shapes: of batches, each a program to compile -> how many steps have it; empty where the data are not available.
    """

    steps: int | None = None
    price: float | None = None
    shapes: Mapping[Shape, int] = field(default_factory=dict)

    def hours(self, seconds: float) -> float | None:
        """Time of the run, at so many seconds a step."""
        return None if self.steps is None else self.steps * seconds / 3600

    def dollars(self, seconds: float, devices: int) -> float | None:
        """Price of the run on all devices, at so many seconds a step."""
        hours = self.hours(seconds)
        return None if hours is None or self.price is None else hours * devices * self.price

    def describe(self, seconds: float, devices: int) -> str:
        """Steps, hours and dollars in words."""
        hours, dollars = self.hours(seconds), self.dollars(seconds, devices)
        if hours is None:
            return "unknown: set data.subset or train.max_steps"
        price = "" if dollars is None else f", ${dollars:,.2f}"
        return f"{self.steps:,} steps, {hours:,.2f} h, {hours * devices:,.1f} device-hours{price}"

    @property
    def largest(self) -> Shape | None:
        """The shape that needs most memory, and so decides whether the run fits; None where the data are not available."""
        return max(self.shapes, key=lambda s: (s.rows * s.tokens, s.targets), default=None)

    @property
    def programs(self) -> str:
        """Number and shapes of the programs, in words; a run may have dozens."""
        names = [
            f"{shape.rows} rows of {shape.tokens:,} tokens, {shape.targets:,} targets ({count:,} steps)"
            for shape, count in Counter(self.shapes).most_common(MOST_SHAPES)
        ]
        more = [f"{len(self.shapes) - MOST_SHAPES} more"] if len(self.shapes) > MOST_SHAPES else []
        return (
            f"{len(self.shapes)}: {'; '.join([*names, *more])}"
            if names
            else "unknown until tokenizer and data are local"
        )


def run_cost(config: Config, devices: int, price: float | None = None) -> RunCost:
    """Count a run's steps, and batch shapes where tokenizer and data are local files, on a mesh of so many devices.

    Raises:
        JaxguardError: the data are local, but cannot be trained on.
    """
    train, data, checkpoint = config.train, config.data, Path(config.model.checkpoint)
    paths = [source.path and Path(source.path) for source in (*data.train, *data.validation)]
    if (checkpoint / "tokenizer.json").is_file() and all(path and path.exists() for path in paths):
        examples = prepare(config, checkpoint).train
        steps = total_steps(len(examples), train.batch_size, train.epochs, train.max_steps)
        multiple = max(1, devices // config.mesh.tensor) * train.accumulation
        schedule = Schedule(examples, train.batch_size, steps, data.max_seq_len, multiple, config.seed)
        return RunCost(steps, price, Counter(schedule.shape(step) for step in range(steps)))
    if data.subset is None:
        return RunCost(train.max_steps, price)
    return RunCost(total_steps(data.subset, train.batch_size, train.epochs, train.max_steps), price)
