"""The run's own training step, compiled for a target that is not here."""

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxguard.config import Config
from jaxguard.config.lookup import CONFIG_FOLDER, folders, locate
from jaxguard.config.train import ModelConfig
from jaxguard.data.packing import Shape, bucket_size
from jaxguard.models.compute import Compute
from jaxguard.models.mesh import make_mesh, row_multiple
from jaxguard.models.spec import Spec, read_spec
from jaxguard.plan.analytic import Flops, ideal_sent, step_flops
from jaxguard.plan.program import Collective, Compiled, place
from jaxguard.plan.targets import Cluster, topology
from jaxguard.train.step import Program, build_program
from jaxguard.utils.errors import JaxguardError

SHAPES = CONFIG_FOLDER / "shapes"
_NEEDS = re.compile(
    r"Used (\S+) of (\S+) hbm|memory required for HLO temporaries \((\S+)\) exceeds available HBM \((\S+)\)"
)
_ALLOCATION = re.compile(r'Size: ([\d.]+)([BKMG])\n(?:\s*Operator: .*?op_name="([^"[]*).*\n)?\s*Shape: (\w+\[[\d,]*\])')


class OutOfMemoryError(JaxguardError):
    """The compiler found no schedule that fits.

    Attributes:
        largest: the largest arrays of the schedule that it gave up, as Plan has them; none where it does not tell.
    """

    def __init__(self, message: str, largest: Sequence[tuple[int, str, str]] = ()) -> None:
        super().__init__(message)
        self.largest = largest


@dataclass(frozen=True)
class Plan:
    """What one device needs for one update.

    Attributes:
        name: of the run.
        cluster: what it was compiled for.
        shape: rows, tokens and targets of the batch.
        mesh: axis -> devices.
        compute: attention kernel chosen for the target, remat policy and types.
        arguments: bytes of training state and batch; the new state takes their place.
        temporaries: bytes that the compiler's schedule holds at once besides, at its peak.
        peak: bytes of both, and of outputs that take no argument's place.
        largest: the largest arrays that it makes, (bytes, type and sides, where they come from).
        flops: FLOPs of the update by count, all devices together.
        matmul_flops: FLOPs of one device's matrix products as compiled; a vendor's attention kernel is not in it.
        traffic: bytes that one device reads from and writes to its memory.
        collectives: what the devices exchange, the largest first.
        ideal_sent: bytes that a device must send under this sharding.
        kernels: names of the vendor's kernels -> how often they run.
        seconds: that compiling took.
    """

    name: str
    cluster: Cluster
    shape: Shape
    mesh: dict[str, int]
    compute: Compute
    arguments: int
    temporaries: int
    peak: int
    largest: list[tuple[int, str, str]]
    flops: Flops
    matmul_flops: float
    traffic: float
    collectives: list[Collective]
    ideal_sent: float
    kernels: dict[str, float]
    seconds: float

    @property
    def usable(self) -> int:
        """Bytes that a program may fill."""
        return int(self.cluster.target.memory * self.cluster.target.usable)

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable

    @property
    def sent(self) -> float:
        """Bytes that a device sends."""
        return sum(one.sent for one in self.collectives)

    @property
    def kernel_flops(self) -> float:
        """FLOPs of one device's attention kernels, by count, where the program does not show them."""
        return 0.0 if self.compute.attention == "xla" else self.flops.attention / self.cluster.devices


def compile_step(
    config: Config,
    spec: Spec,
    cluster: Cluster,
    rows: int | None,
    targets: int | None = None,
    largest: Shape | None = None,
    steps: int = 1000,
) -> Plan:
    """Compile one update of `config` for `cluster`.

    Args:
        config: the run; its mesh must fit the cluster's devices.
        spec: shape of the model.
        cluster: what to compile for.
        rows: of the batch, each config.data.max_seq_len long; None for `largest`, or without it one of each example.
        targets: target positions of a row; None for the most there can be.
        largest: the largest shape of the run's batches, where its data are at hand.
        steps: length of the schedule; it does not change the program's size.

    Raises:
        JaxguardError: no compiler for it, a mesh that does not fit it, rows that its devices cannot share, more targets
            than a row has tokens, an attention kernel that cannot work there.
        OutOfMemoryError: the compiler finds no schedule that fits, which only a TPU's says.
    """
    mesh = make_mesh(config.mesh, topology(cluster))
    shape = _shape(config, row_multiple(config, mesh), rows, targets)
    if rows is None and largest is not None:
        shape = largest if targets is None else largest._replace(targets=targets)
    program = build_program(config, spec, mesh, steps)
    start = time.perf_counter()
    compiled = _compile(program, shape)
    seconds = time.perf_counter() - start
    memory, found = compiled.memory_analysis(), Compiled(compiled.as_text(), _branches(spec, shape.tokens))
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    axes = dict(mesh.shape)
    return Plan(
        name=config.name,
        cluster=cluster,
        shape=shape,
        mesh=axes,
        compute=program.compute,
        arguments=arguments,
        temporaries=temporaries,
        peak=arguments + temporaries + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        largest=[(one.bytes, one.shown, place(one.source)) for one in found.largest()],
        flops=step_flops(spec, shape, program.compute),
        matmul_flops=found.matmul_flops,
        traffic=found.traffic,
        collectives=found.collectives(axes, cluster.linked),
        ideal_sent=ideal_sent(spec, axes, program.compute),
        kernels=dict(found.kernels),
        seconds=seconds,
    )


def _shape(config: Config, multiple: int, rows: int | None, targets: int | None) -> Shape:
    tokens = config.data.max_seq_len
    if rows is None:
        rows = bucket_size(config.train.batch_size, multiple)
    elif rows % multiple:
        raise JaxguardError(
            f"--rows {rows} cannot be shared out: mesh.data × mesh.fsdp × train.accumulation needs multiples of {multiple}; "
            f"say --rows {bucket_size(rows, multiple)}, or change the mesh"
        )
    if targets is not None and targets > tokens:
        raise JaxguardError(f"--targets {targets} is more than a row has: data.max_seq_len={tokens}; say fewer")
    return Shape(rows, tokens, targets or tokens, config.data.share_prefixes)


def _compile(program: Program, shape: Shape) -> Any:
    with jax.set_mesh(program.mesh), _any_gpu():
        lowered = program.train_step.lower(program.state, program.batch(shape))
        try:
            return lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise out_of_memory(str(error)) from None


def _branches(spec: Spec, tokens: int) -> list[float]:
    """How often each branch of the layers' attention runs, of one layer's run: see Decoder._attend."""
    windows = [None if k.window is None or k.window >= tokens else k.window for k in spec.kinds]
    distinct = list(dict.fromkeys(windows))
    counts = Counter(distinct.index(windows[kind]) for kind in spec.layer_kinds)
    return [counts[branch] / spec.num_layers for branch in range(len(distinct))]


def find_spec(model: ModelConfig, shapes: Path = SHAPES) -> Spec:
    """The model's shape, from the checkpoint if it is a folder here, else from the public facts in configs/shapes.

    Raises:
        JaxguardError: neither is there.
    """
    if Path(model.checkpoint).is_dir():
        return read_spec(Path(model.checkpoint))
    folder = locate(shapes / model.checkpoint.replace("/", "--"))
    if not folder.is_dir():
        known = sorted({path.name.replace("--", "/") for source in folders(shapes) for path in source.glob("*--*")})
        raise JaxguardError(
            f"the shape of model.checkpoint={model.checkpoint} is not known here: give a folder, "
            f"or put its config.json into {shapes / folder.name}/; known: {', '.join(known) or 'none'}"
        )
    return read_spec(folder)


@contextmanager
def _any_gpu() -> Iterator[None]:
    """Lower cuDNN attention although the GPU of this host is another one, or there is none.

    JAX asks the local GPU's compute capability before it lowers the kernel, and there is no public way to make it ask
    the target. Whether the target can run the kernel was decided by models/attention_kernels.choose.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    asks_local_gpu = cudnn.check_compute_capability
    cudnn.check_compute_capability = lambda _: True
    try:
        yield
    finally:
        cudnn.check_compute_capability = asks_local_gpu


def out_of_memory(said: str) -> OutOfMemoryError:
    """What a TPU's compiler says when it refuses, in few words: it names arrays only where it had made a schedule."""
    numbers = _NEEDS.search(said)
    needs, has = (part for part in numbers.groups() if part) if numbers else (None, None)
    message = f"it needs {needs}iB of a device's {has}iB" if numbers else said.partition("\n")[0]
    largest = [
        (int(float(size) * 1024 ** "BKMG".index(unit)), array, place(source or "?"))
        for size, unit, source, array in _ALLOCATION.findall(said)
    ]
    return OutOfMemoryError(message, largest[:5])
