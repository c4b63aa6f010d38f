"""Measure how a run's training step scales over the devices that are here, beside what its plan predicts."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import jax
import numpy as np

from jaxguard.config import Source, load
from jaxguard.config.hardware import Target, read_hardware
from jaxguard.data.packing import Batch, Shape
from jaxguard.models.devices import explain_memory, find_devices
from jaxguard.models.sharding import batch_sharding, make_mesh, row_multiple, shard_batch
from jaxguard.models.weights import initialize
from jaxguard.plan.compile import Plan, estimate, find_spec, read_plan
from jaxguard.plan.run import plan_json
from jaxguard.plan.targets import Cluster
from jaxguard.report import Table
from jaxguard.train.step import build_program
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import nearest

WARMUP_STEPS = 2
"""Steps that are not timed."""


@dataclass(frozen=True)
class Measurement:
    """The steps on some of the devices: seconds of each that is timed, the loss of the last, and the plan of the same program."""

    plan: Plan
    seconds: Sequence[float]
    loss: float

    @property
    def devices(self) -> int:
        return self.plan.cluster.devices

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.plan.shape.rows * self.plan.shape.tokens

    @property
    def speeds(self) -> dict[str, float]:
        """Tokens per second, measured and predicted."""
        return {"measured": self.tokens / median(self.seconds), "predicted": self.tokens / estimate(self.plan)["step"]}

    @property
    def mfu(self) -> dict[str, float]:
        """Share of the devices' peak that the model's own FLOPs are, measured and predicted."""
        guess = estimate(self.plan)
        return {"measured": guess["mfu"] * guess["step"] / median(self.seconds), "predicted": guess["mfu"]}


@dataclass(frozen=True)
class ScalingReport:
    """Measurements of growing numbers of devices."""

    name: str
    measurements: Sequence[Measurement]

    def efficiency(self, measurement: Measurement, kind: str) -> float:
        """Tokens of a device and second, relative to the fewest devices; `kind` is measured or predicted."""
        first = self.measurements[0]
        return measurement.speeds[kind] / measurement.devices / (first.speeds[kind] / first.devices)

    def table(self) -> Table:
        """A row for each number of devices."""
        figures = ("tokens/s", "MFU", "efficiency")
        columns = ("devices", "rows", "step, s", *figures, *(f"predicted {figure}" for figure in figures), "loss")
        table = Table(
            columns, title=f"Steps of {self.name}, predicted for {self.measurements[0].plan.cluster.target.title}"
        )
        for m in self.measurements:
            cells = [
                text
                for kind in ("measured", "predicted")
                for text in (f"{m.speeds[kind]:,.0f}", f"{m.mfu[kind]:.0%}", f"{self.efficiency(m, kind):.0%}")
            ]
            table.add(m.devices, m.plan.shape.rows, f"{median(m.seconds):.3g}", *cells, f"{m.loss:.6f}")
        return table

    def to_json(self) -> list[dict[str, Any]]:
        """Measurements as data: the plan's, the seconds of each step, and what follows from both."""
        return [
            plan_json(m.plan)
            | {"seconds": list(m.seconds), "loss": m.loss, "mfu": m.mfu, "tokens_per_second": m.speeds}
            | {"efficiency": {kind: self.efficiency(m, kind) for kind in m.speeds}}
            for m in self.measurements
        ]


def measure(
    config: Source,
    sizes: Sequence[int] = (),
    *,
    rows: int | None = None,
    weak: bool = False,
    steps: int = 10,
    target: str | None = None,
    on_start: Callable[[str], object] = lambda _: None,
) -> ScalingReport:
    """Run the same steps on growing numbers of this machine's devices, from random weights on random tokens.

    Args:
        config: the run; of its mesh, fsdp takes all devices that data and tensor leave.
        sizes: numbers of devices; default: 1, 2, 4 … all.
        rows: of a batch, every token a target; default: train.batch_size. The same batch on any number of devices, so the losses
            must be equal.
        weak: give `rows` to the fewest devices, and more in proportion to more devices.
        steps: that are timed.
        target: whose data sheet predicts; default: the one that has these devices.
        on_start: called with a message before each number of devices.

    Raises:
        JaxguardError: sizes or rows that cannot be, an unknown target, memory that is not enough.
    """
    base, devices = load(config), find_devices()
    if jax.process_count() > 1:
        raise JaxguardError("measuring takes the devices of one process; on a cluster compare runs of training instead")
    sizes = sorted(sizes) or [2**n for n in range(len(devices).bit_length())]
    if sizes[-1] > len(devices):
        raise JaxguardError(f"--devices {sizes[-1]}: there are {len(devices)} ({devices[0].device_kind}); use fewer")
    name, sheet = find_target(target, devices[0].device_kind)
    spec, measurements = find_spec(base.model), []
    for size in sizes:
        on_start(f"{base.name} on {size} devices …")
        count = (rows or base.train.batch_size) * (size // sizes[0] if weak else 1)
        fitted = load(base, [f"train.batch_size={count}", "mesh.fsdp=-1", "train.objective.kind=sft"], stage="plan")
        mesh, shape = make_mesh(fitted.mesh, devices[:size]), Shape(count, base.data.max_seq_len, base.data.max_seq_len)
        if count % (multiple := row_multiple(fitted, mesh)):
            raise JaxguardError(f"{count} rows cannot be divided over {size} devices: use a multiple of {multiple}")
        program = build_program(fitted, spec, mesh, steps + WARMUP_STEPS)
        batch = shard_batch(random_batch(shape, spec.vocab_size), batch_sharding(mesh))
        seconds = []
        advice = "use fewer --rows, start with more devices (--devices), or set model.remat=full"
        with jax.set_mesh(mesh), explain_memory(advice):
            compiled = program.train_step.lower(program.state, batch).compile()
            shardings = {path: x.sharding for path, x in program.state["weights"].items()}
            draw = jax.jit(partial(initialize, spec), out_shardings=shardings)
            state = program.initialize(draw(jax.random.key(base.seed)))
            for _ in range(WARMUP_STEPS + steps):
                start = time.perf_counter()
                state, metrics = jax.block_until_ready(compiled(state, batch))
                seconds.append(time.perf_counter() - start)
        del state
        cluster = Cluster(f"{name}:{size}", sheet, (1, size) if sheet.gpu else (size,))
        plan = read_plan(base.name, cluster, program, shape, compiled)
        measurements.append(Measurement(plan, seconds[WARMUP_STEPS:], float(metrics.loss)))
    return ScalingReport(base.name, measurements)


def find_target(name: str | None, device_kind: str) -> tuple[str, Target]:
    """The target of this name, or by default of these devices, and its name; JaxguardError where there is none."""
    targets = read_hardware().targets
    names = [name] if name else [each for each, t in targets.items() if re.search(t.device_kind, device_kind)]
    if not names:
        raise JaxguardError(
            f"no target describes {device_kind}: name the one to predict by, with --target {next(iter(targets))}"
        )
    if names[0] not in targets:
        raise JaxguardError(f"target {name!r} is unknown: {nearest(names[0], targets)}known: {', '.join(targets)}")
    return names[0], targets[names[0]]


def random_batch(shape: Shape, vocabulary: int) -> Batch:
    """Full rows of one random sequence each, every token a target; the same for the same shape."""
    random = np.random.default_rng(0)
    tokens = random.integers(vocabulary, size=(shape.rows, shape.tokens + 1), dtype=np.int32)
    index = np.broadcast_to(np.arange(shape.tokens, dtype=np.int32), (shape.rows, shape.tokens))
    ones = np.ones((shape.rows, shape.targets), np.float32)
    return Batch(tokens[:, :-1], index, np.full_like(index, shape.tokens - 1), index, tokens[:, 1:], ones)
