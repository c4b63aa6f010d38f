"""Compile the run's own training step for hardware that is not attached, and estimate its time by a roofline.

Letters as in models/: T tokens of a row, V D L N K H F of the model's spec.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from jaxguard.compat import cudnn_attention_on_any_gpu
from jaxguard.config import Config, load
from jaxguard.config.base import CONFIG_FOLDER, folders, locate
from jaxguard.config.hardware import Target
from jaxguard.config.reinforce import ReinforceConfig
from jaxguard.config.train import ModelConfig
from jaxguard.data.packing import PAIR_MULTIPLE, Shape, bucket_size, target_space
from jaxguard.models.compute import Compute
from jaxguard.models.sharding import FSDP, make_mesh, mesh_axes, partition, row_multiple
from jaxguard.models.spec import Spec, read_spec
from jaxguard.models.weights import table
from jaxguard.plan.hlo import Collective, CompiledProgram, describe
from jaxguard.plan.run_cost import RunCost, skipped_blocks
from jaxguard.plan.targets import Cluster, topology
from jaxguard.train.step import Program, build_program
from jaxguard.utils.errors import JaxguardError

ATTENTION_BACKWARD = 2.5
"""Products of attention's backward pass over those of its forward pass: the scores again, and four of their size (Dao,
FlashAttention-2, 2023, section 4.1). Attention in plain XLA does the same."""
SHAPES = CONFIG_FOLDER / "shapes"
_NEEDS = re.compile(r"Used (\S+) of (\S+) hbm|for HLO temporaries \((\S+)\) exceeds available HBM \((\S+)\)")
_ALLOCATION = re.compile(r'Size: ([\d.]+)([BKMG])\n(?:\s*Operator: .*?op_name="([^"[]*).*\n)?\s*Shape: (\w+\[[\d,]*\])')

Buffer = tuple[int, str, str]
"""Bytes of an array, its type and shape, and the operation that makes it."""


class OutOfMemoryError(JaxguardError):
    """No schedule of the compiler fits: only a TPU's says so, and lists the `largest` arrays where it had made a schedule."""

    def __init__(self, error: str) -> None:
        numbers = _NEEDS.search(error)
        needs, has = (part for part in numbers.groups() if part) if numbers else (None, None)
        super().__init__(f"it needs {needs}iB of a device's {has}iB" if numbers else error.partition("\n")[0])
        self.largest: Sequence[Buffer] = [
            (int(float(size) * 1024 ** "BKMG".index(unit)), array, describe(source or "?"))
            for size, unit, source, array in _ALLOCATION.findall(error)
        ][:5]


@dataclass(frozen=True)
class Sampling:
    """What one device needs to sample the answers of a step, if all prompts and answers are as long as they may be.

    Attributes:
        answers: to this many `prompts`, at the same time; then again, in so many `batches`.
        prompt_tokens, tokens: of a prompt, and of an answer.
        state: bytes of the training state, which stays.
        weights: bytes of the weights in the compute type, gathered over fsdp.
        caches: bytes of keys and values.
        peak: bytes of all, and of what a token needs besides.
        seconds: of products, memory and network, one after another.
    """

    prompts: int
    answers: int
    batches: int
    prompt_tokens: int
    tokens: int
    state: int
    weights: int
    caches: int
    peak: int
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Plan:
    """What one device needs for one step.

    Attributes:
        mesh: axis -> devices.
        compute: attention kernel chosen for the target, remat policy and types.
        arguments: bytes of training state and batch; the new state reuses their memory.
        temporaries: bytes of the other arrays that the compiler's schedule holds at once, at its peak.
        peak: bytes of both, and of outputs that reuse no argument's memory.
        flops: analytic FLOPs of the step, as of step_flops.
        matmul_flops: FLOPs of one device's matrix products as compiled, without a vendor's attention kernel.
        traffic: bytes that one device reads from and writes to its memory.
        ideal_sent: bytes that a device must send under this sharding.
        kernels: names of fused kernels -> how often they run.
        attention_traffic: bytes of the traffic that attention itself causes, without its projections.
        windows: of its layers, in tokens; None for all.
        sampling: of the answers that the step trains on; None where none are, or where its compiler refuses.
    """

    name: str
    cluster: Cluster
    shape: Shape
    mesh: dict[str, int]
    compute: Compute
    arguments: int
    temporaries: int
    peak: int
    largest: Sequence[Buffer]
    flops: dict[str, float]
    matmul_flops: float
    traffic: float
    collectives: list[Collective]
    ideal_sent: float
    kernels: dict[str, float]
    attention_traffic: float = 0.0
    windows: Sequence[int | None] = ()
    sampling: Sampling | None = None
    cost: RunCost = field(default_factory=RunCost)

    @property
    def usable(self) -> int:
        return self.cluster.usable

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable

    @property
    def seconds(self) -> float:
        """Of a step, with what is sampled for it."""
        return estimate(self)["step"] + (sum(self.sampling.seconds.values()) if self.sampling else 0)

    @property
    def sent(self) -> float:
        """Bytes that a device sends."""
        return sum(collective.sent for collective in self.collectives)

    @property
    def skipped(self) -> float | None:
        """Share of the blocks of causal attention that trees and windows leave out of the forward pass; None if unknown."""
        compute = self.compute
        chunk = compute.query_chunk
        tile = compute.tiling.forward[:2] if compute.tiling else (chunk, chunk)
        if compute.attention not in ("flash", "block_sparse"):
            return 0.0
        return skipped_blocks(self.cost.layouts, self.windows, *tile) if self.cost.layouts else None

    @property
    def hidden(self) -> float:
        """Bytes of these that are sent while the device multiplies matrices: see Collective.hidden."""
        return sum(collective.sent * collective.hidden / collective.count for collective in self.collectives)

    @property
    def compiled_flops(self) -> float:
        """FLOPs of one device; of its attention kernels the analytic ones, where the program does not show them."""
        hidden = 0.0 if self.compute.attention == "xla" else self.flops["attention"] / self.cluster.devices
        return self.matmul_flops + hidden


def compile_step(
    config: Config,
    spec: Spec,
    cluster: Cluster,
    rows: int | None,
    targets: int | None = None,
    largest: Shape | None = None,
) -> Plan:
    """Compile one training step of `config` for `cluster`.

    The batch has `rows` rows of config.data.max_seq_len tokens with `targets` target positions each, None for all; without rows it
    has the shape `largest`, that of the run's largest batch where its data are available, or else one row for each example.

    Raises:
        JaxguardError: no compiler for the cluster, a mesh that does not fit it, rows that its devices cannot share, more
            targets than a row has tokens, an attention kernel that cannot run there.
        OutOfMemoryError: the compiler finds no schedule that fits, which only a TPU's reports.
    """
    mesh, tokens = make_mesh(config.mesh, topology(cluster)), config.data.max_seq_len
    multiple = row_multiple(config, mesh)
    if rows is not None and rows % multiple:
        raise JaxguardError(
            f"--rows {rows} cannot be divided evenly: mesh.data × mesh.fsdp × train.accumulation needs multiples of {multiple}; "
            f"use --rows {bucket_size(rows, multiple)}, or change the mesh"
        )
    if targets is not None and targets > tokens:
        raise JaxguardError(f"--targets {targets} is more than a row has: data.max_seq_len={tokens}; use fewer")
    if rows is None and largest is not None:
        shape = largest if targets is None else largest._replace(targets=targets)
    else:
        shape = _full_rows(config, rows, targets, multiple)
    program = build_program(config, spec, mesh, steps=1000)  # their number does not change the program's size
    with jax.set_mesh(mesh), cudnn_attention_on_any_gpu():
        lowered = program.train_step.lower(program.state, program.batch(shape))
        compiled = compile_lowered(lowered)
    return read_plan(config.name, cluster, program, shape, compiled)


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compile; OutOfMemoryError: no schedule fits."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemoryError(str(error)) from None


def _full_rows(config: Config, rows: int | None, targets: int | None, multiple: int) -> Shape:
    """The shape of a batch of full rows: one for each answer, or so many that share the answers evenly.

    An answer that is supervised may be all of its row; one that is sampled has reinforce.max_tokens.
    """
    tokens, objective = config.data.max_seq_len, config.train.objective
    settings = config.reinforce or ReinforceConfig()
    answers = config.train.batch_size * (settings.answers if objective.is_sampled else 1)
    rows = rows or bucket_size(answers, multiple)
    share = -(-answers // rows)  # of an answer, or of a pair of them
    if objective.is_sampled and targets is None:
        targets = min(tokens, target_space(share * settings.max_tokens))
    return Shape(rows, tokens, targets or tokens, 0 if objective.kind == "sft" else bucket_size(share, PAIR_MULTIPLE))


def read_plan(name: str, cluster: Cluster, program: Program, shape: Shape, compiled: jax.stages.Compiled) -> Plan:
    """Read a plan from a compiled step on batches of this shape."""
    memory: Any = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    spec, mesh = program.spec, dict(program.mesh.shape)
    hlo = CompiledProgram(compiled.as_text() or "", _branches(spec, shape.tokens))
    return Plan(
        name=name,
        cluster=cluster,
        shape=shape,
        mesh=mesh,
        compute=program.compute,
        arguments=arguments,
        temporaries=temporaries,
        peak=arguments + temporaries + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        largest=[(array.bytes, array.result, array.source) for array in hlo.largest()],
        flops=step_flops(spec, shape, program.compute),
        matmul_flops=hlo.matmul_flops(),
        traffic=hlo.traffic(),
        collectives=hlo.collectives(mesh, cluster.linked),
        ideal_sent=ideal_sent(spec, mesh, program.compute),
        kernels=hlo.kernels(),
        attention_traffic=hlo.traffic("attend"),
        windows=[spec.kinds[kind].window for kind in spec.layer_kinds],
    )


def _branches(spec: Spec, tokens: int) -> list[float]:
    """Share of the layers that take each branch of the attention: see Decoder._attend."""
    windows = [None if k.window is None or k.window >= tokens else k.window for k in spec.kinds]
    distinct = list(dict.fromkeys(windows))
    counts = Counter(distinct.index(windows[kind]) for kind in spec.layer_kinds)
    return [counts[branch] / spec.num_layers for branch in range(len(distinct))]


def find_spec(model: ModelConfig) -> Spec:
    """Read the model's shape from a local checkpoint, or else from configs/shapes; JaxguardError if neither exists.

    The export of a run that is still to come has the shape of what the run starts from.
    """
    if Path(model.checkpoint).is_dir():
        return read_spec(Path(model.checkpoint))
    parts = Path(model.checkpoint).parts
    if parts[-1] == "export" and locate(CONFIG_FOLDER / f"{parts[-2]}.yaml").is_file():
        return find_spec(load(parts[-2]).model)
    folder = locate(SHAPES / model.checkpoint.replace("/", "--"))
    if not folder.is_dir():
        known = sorted({path.name.replace("--", "/") for source in folders(SHAPES) for path in source.glob("*--*")})
        raise JaxguardError(
            f"the shape of model.checkpoint={model.checkpoint} is unknown: use a local folder, "
            f"or put its config.json into {SHAPES / folder.name}/; known: {', '.join(known) or 'none'}"
        )
    return read_spec(folder)


def step_flops(spec: Spec, shape: Shape, compute: Compute) -> dict[str, float]:
    """FLOPs of the matrix products of one step, all devices together, padding included.

    A forward pass, a backward pass of twice that, and what is computed again in between: full remat computes a layer's products
    once more, but for the last one where nothing needs its result (no norm follows it). The head's logits are always computed
    again (train/objectives.py).

    Returns:
        layers: projections and MLPs; attention: scores and weighted sums, as the chosen kernel computes them; head: logits of the
        target positions; model: those of all three without recomputation, which MFU counts.
    """
    D, F, H, N, K, L = spec.d_model, spec.mlp_dim, spec.head_dim, spec.num_heads, spec.num_kv_heads, spec.num_layers
    tokens = shape.rows * shape.tokens
    layer = D * H * (2 * N + 2 * K) + 3 * D * F
    again = {"full": layer if spec.post_norm else layer - D * F, "dots": 0, "none": 0}[compute.remat]
    layers = 2.0 * L * tokens * (3 * layer + again)

    # (query, key) pairs in blocks of the kernel's size that causality does not empty. Which ones trees and windows empty depends on
    # the data: nothing else is left out, but that of the model's own count, each row is one sequence.
    chunk = compute.query_chunk if compute.attention in ("xla", "block_sparse") else 128

    def pairs(window: int | None) -> int:
        starts = range(0, shape.tokens, chunk)
        stops = [min(start + chunk, shape.tokens) for start in starts]
        first = [max(0, start - (window or stop) + 1) for start, stop in zip(starts, stops, strict=True)]
        return shape.rows * sum((b - a) * (b - c) for a, b, c in zip(starts, stops, first, strict=True))

    forward = 4.0 * N * H * L * pairs(None)
    needed = 4.0 * N * H * sum(pairs(spec.kinds[kind].window) for kind in spec.layer_kinds)
    repeats = 1 + (compute.remat != "none") + ATTENTION_BACKWARD

    head = 2.0 * spec.vocab_size * D * shape.rows * shape.targets
    model = 3 * (2.0 * L * tokens * layer + needed + head)
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
        fsdp = math.prod(mesh[name] for name in FSDP if name in names)
        size = compute.dtype.itemsize * math.prod(weight.shape(spec)) / (mesh["tensor"] if "tensor" in names else 1)
        total += size * passes * (fsdp - 1) / fsdp
        total += size / fsdp * 2 * (mesh["data"] - 1) / mesh["data"]
    return total


def estimate(plan: Plan) -> dict[str, float]:
    """Estimate the seconds of one compiled step by the roofline of its target's data sheet.

    Returns:
        compute: of the matrix products; memory: to read and write it; network: of the collectives; mfu: share of the devices'
        peak FLOPs that the model's own are, without recomputation and padding; step: if nothing overlaps; bound: if all does.
    """
    target, dtype = plan.cluster.target, plan.compute.dtype.name
    times = roofline(target, dtype, plan.compiled_flops, plan.traffic, plan.collectives)
    step = sum(times.values())
    mfu = plan.flops["model"] / (plan.cluster.devices * peak_flops(target, dtype) * step)
    return {**times, "mfu": mfu, "step": step, "bound": max(times.values())}


def roofline(
    target: Target, dtype: str, flops: float, traffic: float, collectives: Iterable[Collective]
) -> dict[str, float]:
    """Seconds of a device's products, of the traffic with its memory, and of its collectives."""
    network = sum(collective.sent / rate(target, collective) for collective in collectives)
    return {"compute": flops / peak_flops(target, dtype), "memory": traffic / target.bandwidth, "network": network}


def peak_flops(target: Target, dtype: str) -> float:
    return target.flops.get(dtype) or target.flops["bfloat16"]


def rate(target: Target, collective: Collective) -> float:
    """Bytes/s at which a device sends its part: over links, or over the network cards of all its linked peers together."""
    if collective.near == collective.group:
        return target.link
    return min(target.link, target.network * collective.near)
