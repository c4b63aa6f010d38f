"""Compile the run's own training step for hardware that is not attached."""

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from jaxguard.compat import cudnn_attention_on_any_gpu
from jaxguard.config import Config
from jaxguard.config.base import CONFIG_FOLDER, folders, locate
from jaxguard.config.train import ModelConfig
from jaxguard.data.packing import Shape, bucket_size
from jaxguard.models.compute import Compute
from jaxguard.models.sharding import make_mesh, row_multiple
from jaxguard.models.spec import Spec, read_spec
from jaxguard.plan.estimate import RunCost, ideal_sent, step_flops
from jaxguard.plan.hlo import Collective, CompiledProgram, describe
from jaxguard.plan.targets import Cluster, topology
from jaxguard.train.step import build_program
from jaxguard.utils.errors import JaxguardError

STEPS = 1000
"""Length of the learning rate's schedule; it does not change the program's size."""
SHAPES = CONFIG_FOLDER / "shapes"
_NEEDS = re.compile(
    r"Used (\S+) of (\S+) hbm|memory required for HLO temporaries \((\S+)\) exceeds available HBM \((\S+)\)"
)
_ALLOCATION = re.compile(r'Size: ([\d.]+)([BKMG])\n(?:\s*Operator: .*?op_name="([^"[]*).*\n)?\s*Shape: (\w+\[[\d,]*\])')

Buffer = tuple[int, str, str]
"""Bytes of an array, its type and shape, and the operation that makes it."""


class OutOfMemoryError(JaxguardError):
    """The compiler found no schedule that fits. Only a TPU's says so, in many words.

    Attributes:
        largest: the largest arrays, where it had made a schedule and lists them.
    """

    def __init__(self, error: str) -> None:
        numbers = _NEEDS.search(error)
        needs, has = (part for part in numbers.groups() if part) if numbers else (None, None)
        super().__init__(f"it needs {needs}iB of a device's {has}iB" if numbers else error.partition("\n")[0])
        self.largest: Sequence[Buffer] = [
            (int(float(size) * 1024 ** "BKMG".index(unit)), array, describe(source or "?"))
            for size, unit, source, array in _ALLOCATION.findall(error)
        ][:5]


@dataclass(frozen=True)
class Plan:
    """What one device needs for one step.

    Attributes:
        mesh: axis -> devices.
        compute: attention kernel chosen for the target, remat policy and types.
        arguments: bytes of training state and batch; the new state reuses their memory.
        temporaries: bytes of the other arrays that the compiler's schedule holds at once, at its peak.
        peak: bytes of both, and of outputs that reuse no argument's memory.
        largest: the largest arrays that the step makes.
        flops: analytic FLOPs of the step, as of step_flops.
        matmul_flops: FLOPs of one device's matrix products as compiled, without a vendor's attention kernel.
        traffic: bytes that one device reads from and writes to its memory.
        collectives: what the devices exchange, the largest first.
        ideal_sent: bytes that a device must send under this sharding.
        kernels: names of the vendor's kernels -> how often they run.
        seconds: time that compiling took.
        cost: of a run that takes this step at every step.
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
    seconds: float
    cost: RunCost = field(default_factory=RunCost)

    @property
    def usable(self) -> int:
        return self.cluster.usable

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable

    @property
    def sent(self) -> float:
        """Bytes that a device sends."""
        return sum(collective.sent for collective in self.collectives)

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

    Args:
        config: the run; its mesh must fit the cluster's devices.
        spec: shape of the model.
        cluster: what to compile for.
        rows: of the batch, each config.data.max_seq_len long; None for `largest`, or without it one row for each example.
        targets: target positions of a row; None for all of them.
        largest: the largest shape of the run's batches, where its data are available.

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
        rows = rows or bucket_size(config.train.batch_size, multiple)
        shape = Shape(rows, tokens, targets or tokens, config.data.share_prefixes)
    program = build_program(config, spec, mesh, STEPS)
    start = time.perf_counter()
    with jax.set_mesh(mesh), cudnn_attention_on_any_gpu():
        lowered = program.train_step.lower(program.state, program.batch(shape))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise OutOfMemoryError(str(error)) from None
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    hlo, axes = CompiledProgram(compiled.as_text() or "", _branches(spec, shape.tokens)), dict(mesh.shape)
    return Plan(
        name=config.name,
        cluster=cluster,
        shape=shape,
        mesh=axes,
        compute=program.compute,
        arguments=arguments,
        temporaries=temporaries,
        peak=arguments + temporaries + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        largest=[(array.bytes, array.result, array.source) for array in hlo.largest()],
        flops=step_flops(spec, shape, program.compute),
        matmul_flops=hlo.matmul_flops(),
        traffic=hlo.traffic(),
        collectives=hlo.collectives(axes, cluster.linked),
        ideal_sent=ideal_sent(spec, axes, program.compute),
        kernels=hlo.kernels(),
        seconds=seconds,
    )


def _branches(spec: Spec, tokens: int) -> list[float]:
    """Share of the layers that take each branch of the attention: see Decoder._attend."""
    windows = [None if k.window is None or k.window >= tokens else k.window for k in spec.kinds]
    distinct = list(dict.fromkeys(windows))
    counts = Counter(distinct.index(windows[kind]) for kind in spec.layer_kinds)
    return [counts[branch] / spec.num_layers for branch in range(len(distinct))]


def find_spec(model: ModelConfig) -> Spec:
    """Read the model's shape from the checkpoint if it is a local folder, else from the public facts in configs/shapes.

    Raises:
        JaxguardError: neither exists.
    """
    if Path(model.checkpoint).is_dir():
        return read_spec(Path(model.checkpoint))
    folder = locate(SHAPES / model.checkpoint.replace("/", "--"))
    if not folder.is_dir():
        known = sorted({path.name.replace("--", "/") for source in folders(SHAPES) for path in source.glob("*--*")})
        raise JaxguardError(
            f"the shape of model.checkpoint={model.checkpoint} is unknown: use a local folder, "
            f"or put its config.json into {SHAPES / folder.name}/; known: {', '.join(known) or 'none'}"
        )
    return read_spec(folder)
