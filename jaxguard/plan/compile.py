"""The run's own training step, compiled for a target that is not here."""

import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxguard.config import CONFIG_FOLDER, Config
from jaxguard.data.batches import Shape
from jaxguard.errors import JaxguardError
from jaxguard.models.spec import Spec, read_spec
from jaxguard.plan.targets import find_target, topology
from jaxguard.sections import ModelConfig
from jaxguard.train.sharding import make_mesh, row_multiple
from jaxguard.train.step import build_program

SHAPES = CONFIG_FOLDER / "shapes"
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Plan:
    """What one device would need for one update.

    Attributes:
        target: as asked for, such as a100-80gb:8.
        shape: rows, tokens and targets of the batch.
        mesh: axis -> devices.
        attention: kernel chosen for the target.
        arguments: bytes of training state and batch; the new state takes their place.
        temporaries: bytes that the compiler's schedule holds at once besides, at its peak.
        peak: bytes of both, and of outputs that take no argument's place.
        usable: bytes that a program may fill.
        collectives: kind -> how often it stands in the program; one in a loop counts once.
        kernels: names of the vendor's kernels in the program -> how often.
        seconds: that compiling took.
    """

    target: str
    shape: Shape
    mesh: dict[str, int]
    attention: str
    arguments: int
    temporaries: int
    peak: int
    usable: int
    collectives: dict[str, int]
    kernels: dict[str, int]
    seconds: float

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable


def compile_step(
    config: Config, spec: Spec, target: str, rows: int, targets: int | None = None, steps: int = 1000
) -> Plan:
    """Compile one update of `config` for `target`.

    Args:
        config: the run; its mesh must fit the target's devices.
        spec: shape of the model.
        target: accelerator and number of them, such as a100-80gb:8.
        rows: of the batch, each config.data.row_tokens long.
        targets: target positions of a row; None for the most there can be.
        steps: length of the schedule; it does not change the program's size.

    Raises:
        JaxguardError: unknown target, no compiler for it, a mesh that does not fit it, rows that its devices cannot
            share.
    """
    kind, _ = find_target(target)
    mesh = make_mesh(config.mesh, topology(target))
    multiple = row_multiple(config, mesh)
    if rows % multiple:
        raise JaxguardError(
            f"{rows} rows cannot be shared out: the mesh and train.accumulation need multiples of {multiple}"
        )
    tokens = config.data.row_tokens
    shape = Shape(rows, tokens, targets or tokens)
    program = build_program(config, spec, mesh, steps)
    with jax.set_mesh(mesh), _any_gpu():
        start = time.perf_counter()
        compiled = program.update.lower(program.state, program.batch(shape)).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return Plan(
        target=target,
        shape=shape,
        mesh=dict(mesh.shape),
        attention=program.compute.attention,
        arguments=arguments,
        temporaries=temporaries,
        peak=arguments + temporaries + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        usable=int(kind.memory * kind.usable),
        collectives=_count(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text),
        kernels=_count(r'custom_call_target="([^"]+)"', text),
        seconds=time.perf_counter() - start,
    )


def find_spec(model: ModelConfig, shapes: Path = SHAPES) -> Spec:
    """The model's shape, from the checkpoint if it is a folder here, else from the public facts in configs/shapes.

    Raises:
        JaxguardError: neither is there.
    """
    if Path(model.checkpoint).is_dir():
        return read_spec(Path(model.checkpoint))
    folder = shapes / model.checkpoint.replace("/", "--")
    if not folder.is_dir():
        known = ", ".join(sorted(path.name.replace("--", "/") for path in shapes.glob("*--*"))) or "none"
        raise JaxguardError(
            f"the shape of model.checkpoint={model.checkpoint} is not known here: give a folder, "
            f"or put its config.json into {folder}/; known: {known}"
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


def _count(pattern: str, text: str) -> dict[str, int]:
    return dict(Counter(re.findall(pattern, text)))
