"""The stages as functions: what `jaxguard STAGE` runs, called from Python.

`config` is a name, a path, the tree that a file holds, or a Config; `overrides` are texts such as "train.epochs=1", or dotted
field -> value. A mistake raises JaxguardError.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxguard.config import Overrides, Source, load
from jaxguard.utils.threads import outside_event_loop

if TYPE_CHECKING:
    from jaxguard.data.build import BuildResult
    from jaxguard.distill.run import Distillation
    from jaxguard.evaluate.scores.results import Evaluation
    from jaxguard.mine.run import MineResult
    from jaxguard.plan.run import PlanReport
    from jaxguard.train.loop import TrainedRun
    from jaxguard.train.run_folder import Resume

# What a stage needs is imported in its function: JAX takes seconds, and clients of servers are extras.


def build_data(config: Source, overrides: Overrides = ()) -> "BuildResult":
    """Write the training sets of a config into files, with a manifest and a card."""
    from jaxguard.data.build import build

    return build(load(config, overrides, stage="data build"))


def distill(config: Source, overrides: Overrides = ()) -> "Distillation":
    """Get a reasoning trace from a teacher for every training example."""
    from jaxguard.distill.run import distill as run

    return outside_event_loop(lambda: run(load(config, overrides, stage="distill")))


def train(config: Source, overrides: Overrides = (), resume: "Resume" = "auto") -> "TrainedRun":
    """Fine-tune a guard and export it; `resume` is as on the command line."""
    from jaxguard.train.loop import train as run

    return run(load(config, overrides, stage="train"), resume)


def evaluate(config: Source, overrides: Overrides = ()) -> "Evaluation":
    """Score guards on benchmarks, by default the run's own export; the result's `tables` are DataFrames."""
    from jaxguard.evaluate.run import evaluate as run

    return outside_event_loop(lambda: run(load(config, overrides, stage="evaluate")))


def mine(config: Source, overrides: Overrides = ()) -> "MineResult":
    """Find the training examples that a trained guard gets right only sometimes."""
    from jaxguard.mine.run import mine as run

    return outside_event_loop(lambda: run(load(config, overrides, stage="mine")))


def reinforce(config: Source, overrides: Overrides = (), resume: "Resume" = "auto") -> "TrainedRun":
    """Train a guard on its own answers, by their rewards, and export it; `resume` is as on the command line."""
    from jaxguard.reinforce.run import reinforce as run

    return run(load(config, overrides, stage="reinforce"), resume)


def plan(
    config: Source,
    targets: str | Sequence[str],
    overrides: Overrides = (),
    *,
    compare: Sequence[Sequence[str]] = (),
    rows: int | None = None,
    target_tokens: int | None = None,
    price: float | None = None,
) -> "PlanReport":
    """Compile a run's step for each target, such as a100-80gb:8; further arguments as in jaxguard.plan.run.plan."""
    from jaxguard.plan.run import plan as run

    resolved = load(config, overrides, stage="plan")
    return run(resolved, targets, compare=compare, rows=rows, target_tokens=target_tokens, price=price)
