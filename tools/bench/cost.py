"""`make bench-cost`: time a step as batch, policy, examples, vocabulary and model grow, and compare with lower bounds.

Some of SmolLM2-135M's layers, with random weights and tokens, on this machine's CPU. One quantity is changed at
a time, the others stay as `Case` has them. The bound is the FLOPs of the products that a step needs, at the rate at which
this machine multiplies one layer's matrix: no recomputation, no padding, every policy once (what MFU counts). The second
bound is that of trainers that compute the policy once for each example.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from demo import fetch_weights
from jaxguard.config import Config
from jaxguard.data.encoding import EncodedExample
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.packing import assemble, bucketed, pack
from jaxguard.models.sharding import batch_sharding, make_mesh, shard_batch
from jaxguard.models.spec import Spec, read_spec
from jaxguard.models.weights import initialize
from jaxguard.report.figures import save_figure, style
from jaxguard.train.step import Program, build_program, training_flops
from jaxguard.utils.errors import JaxguardError
from workloads import Job, ours

MODEL = Path("build/bench/base")
TARGETS = 12
STEPS = 3


@dataclass(frozen=True)
class Case:
    """The contents of a step.

    Attributes:
        examples: of a batch.
        policy: tokens of their shared prefix.
        own: other tokens of an example, the last of which are its targets.
        vocabulary: size of the vocabulary.
        layers: of the model.
    """

    examples: int = 32
    policy: int = 384
    own: int = 64
    vocabulary: int = 16_384
    layers: int = 6


AXES: dict[str, tuple[int, ...]] = {
    "examples": (8, 16, 32, 64),
    "policy": (96, 192, 384, 768),
    "own": (32, 64, 128, 256),
    "vocabulary": (8_192, 16_384, 49_152, 131_072),
    "layers": (3, 6, 12, 24),
}


@dataclass(frozen=True)
class Cost:
    """Seconds of one step: measured, and the bounds with the policy computed once and once for each example."""

    case: Case
    measured: float
    bound: float
    repeated: float


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", choices=list(AXES), action="append", help="default: all")
    parser.add_argument("--figure", type=Path, default=Path("build/bench/cost.svg"), help="file of the curves")
    chosen = parser.parse_args(arguments)
    console = Console(highlight=False)
    try:
        fetch_weights(MODEL)
    except JaxguardError as error:
        console.print(f"[bold red]error:[/] {error}")
        return 2
    spec = read_spec(MODEL)
    rate = _rate(spec)
    console.print(f"products: {rate / 1e9:.0f} GFLOP/s")
    costs: dict[Case, Cost] = {}
    for axis in chosen.axis or AXES:
        for case in _cases(axis):
            costs[case] = costs.get(case) or _cost(case, spec, rate)
        console.print(_table(axis, [costs[case] for case in _cases(axis)]))
    chosen.figure.parent.mkdir(parents=True, exist_ok=True)
    save_figure(_figure(chosen.axis or list(AXES), costs), chosen.figure)
    console.print(f"curves: {chosen.figure}")
    return 0


def _cases(axis: str) -> Iterator[Case]:
    return (replace(Case(), **{axis: value}) for value in AXES[axis])


def _program(spec: Spec) -> tuple[Config, Program]:
    """The training benchmark's settings, and their program for this model on one device."""
    config = ours(Job("direct", str(MODEL), "unused", "unused", "shared", "unused"))
    return config, build_program(config, spec, make_mesh(config.mesh, jax.devices()[:1]), STEPS + 1)


def _rate(spec: Spec) -> float:
    """FLOP/s of a product with a layer's matrix, in the type of the training step."""
    tokens, compute = 4096, _program(spec)[1].compute
    matmul_dtype = compute.matmul_dtype or compute.dtype
    hidden_TD = jax.random.normal(jax.random.key(0), (tokens, spec.d_model), matmul_dtype)
    weight_DF = jax.random.normal(jax.random.key(1), (spec.d_model, spec.mlp_dim), matmul_dtype)
    multiply = jax.jit(lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32))
    seconds = _seconds(lambda: multiply(hidden_TD, weight_DF), 20)
    return 2 * tokens * spec.d_model * spec.mlp_dim / min(seconds)


def _seconds(work: Callable[[], object], times: int) -> list[float]:
    """Seconds of each call but the first, which compiles."""
    seconds = []
    for _ in range(times + 1):
        started = time.perf_counter()
        jax.block_until_ready(work())
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def _cost(case: Case, shape: Spec, rate: float) -> Cost:
    spec = replace(
        shape, vocab_size=case.vocabulary, num_layers=case.layers, layer_kinds=shape.layer_kinds[: case.layers]
    )
    config, program = _program(spec)
    rows = pack(_examples(case), config.data.max_seq_len, 1)
    batch = assemble(rows, bucketed(rows, config.data.max_seq_len, 1))
    sharded = shard_batch(batch, batch_sharding(program.mesh))
    state = program.initialize(initialize(spec, jax.random.key(0)))

    def step() -> object:
        nonlocal state
        with jax.set_mesh(program.mesh):
            state, metrics = program.train_step(state, sharded)
        return metrics

    positions = np.tile(np.arange(case.policy + case.own), case.examples)
    flops = (training_flops(spec, each, case.examples * TARGETS) for each in (batch.valid_positions, positions))
    return Cost(case, median(_seconds(step, STEPS)), *(each / rate for each in flops))


def _examples(case: Case) -> list[EncodedExample]:
    random = np.random.default_rng(0)
    policy = random.integers(0, case.vocabulary, case.policy).astype(np.int32)
    own = random.integers(0, case.vocabulary, (case.examples, case.own)).astype(np.int32)
    target = np.arange(case.policy + case.own) >= case.policy + case.own - TARGETS
    return [
        EncodedExample(str(i), Mode.DIRECT, np.concatenate([policy, own[i]]), target, (), (), False, len(policy))
        for i in range(case.examples)
    ]


def _table(axis: str, costs: Sequence[Cost]) -> Table:
    result = Table(axis, title=f"a step over {axis}", title_justify="left")
    for heading in ("seconds", "bound", "bound / seconds", "bound, a policy for each example"):
        result.add_column(heading, justify="right")
    for cost in costs:
        share = cost.bound / cost.measured
        seconds = (f"{cost.measured:.2f}", f"{cost.bound:.2f}", f"{share:.0%}", f"{cost.repeated:.2f}")
        result.add_row(f"{asdict(cost.case)[axis]:,}", *seconds)
    return result


@style()
def _figure(axes: Sequence[str], costs: dict[Case, Cost]) -> Figure:
    drawing = Figure(figsize=(3.6 * len(axes), 3.4))
    for axis, panel in zip(axes, drawing.subplots(1, len(axes), sharey=True, squeeze=False).flat, strict=True):
        _draw(panel, axis, [costs[case] for case in _cases(axis)])
    drawing.axes[0].set_ylabel("seconds of a step")
    drawing.axes[0].legend(fontsize=8)
    return drawing


def _draw(panel: Axes, axis: str, costs: Sequence[Cost]) -> None:
    values = AXES[axis]
    panel.plot(values, [cost.measured for cost in costs], marker="o", label="measured")
    panel.plot(values, [cost.bound for cost in costs], "k--", label="bound")
    panel.plot(values, [cost.repeated for cost in costs], "k:", label="bound, a policy for each example")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(values, [f"{value:,}" for value in values])
    panel.set_xlabel({"own": "tokens of an example", "policy": "tokens of the policy"}.get(axis, axis))
    panel.grid(alpha=0.3)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
