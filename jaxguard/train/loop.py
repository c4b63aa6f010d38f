"""A run from start to end: prepare, start or resume, train, validate, save, export.

A step is a pure function of the state and its batch, and which examples are in the batch is a pure function of the seed and
the step. So a run that is interrupted at any moment and resumed ends with the same bits as one that was not.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array

from jaxguard.config import Config
from jaxguard.config.hardware import peak_flops
from jaxguard.data.encoded_cache import EncodedCache
from jaxguard.data.files import weights_digest
from jaxguard.data.guard_files import is_complete
from jaxguard.data.inputs import check_inputs
from jaxguard.data.packing import Batch, Schedule, total_steps
from jaxguard.data.policies import load_policy
from jaxguard.data.prepare import Prepared, prepare
from jaxguard.data.questions import cautions
from jaxguard.models.devices import explain_memory, training_remedy
from jaxguard.models.hf_io.checkpoints import companions, read_weights
from jaxguard.models.sharding import batch_sharding, make_mesh, row_multiple, shard_batch
from jaxguard.models.spec import read_spec
from jaxguard.train.checkpoints import Checkpoints, open_checkpoints
from jaxguard.train.curves import draw_curves
from jaxguard.train.export import export
from jaxguard.train.hosts import StopFlag, compare_hosts, graceful_stop, start_hosts
from jaxguard.train.logging import RunLog, check_trackers, distinct, read_metrics
from jaxguard.train.reference import with_reference
from jaxguard.train.run_folder import Resume, begin_run, open_run
from jaxguard.train.startup import WIDTH, list_weights, summarize
from jaxguard.train.step import Metrics, Program, State, build_program, training_flops
from jaxguard.train.validation import Validation
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically
from jaxguard.utils.hub import fetch
from jaxguard.utils.terminal import Console

logger = logging.getLogger(__name__)

PROFILED_STEPS = 3


@dataclass(frozen=True)
class TrainedRun:
    """The result of a call of `train`: a run that is finished, or was stopped with its state saved.

    `before` and `after` are validation metrics by name, of the base model and of the newest validation; empty on other processes
    than the first, and where nothing is held out.
    """

    config: Config
    step: int  # completed steps, of `steps`
    steps: int
    stopped_by: str | None  # the signal that stopped the run, None where it is finished
    folder: Path
    before: dict[str, float]
    after: dict[str, float]
    export: Path | None = None  # the Hugging Face checkpoint, None before the end and where train.export is false
    curves: Path | None = None  # the picture of the curves, None before the end
    changed_fraction: float | None = None  # of the exported numbers; None where this call exported nothing

    @property
    def finished(self) -> bool:
        return self.stopped_by is None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, one per step and one per validation."""
        return read_metrics(self.folder / "metrics.jsonl")


@runtime_checkable
class Batches(Protocol):
    """The batches of a run, a function of the seed, the step and, where answers are sampled, of the weights at that step."""

    @property
    def steps(self) -> int: ...

    def examples(self, step: int, /) -> list[int]:
        """Return the indices of a step's training examples."""
        ...

    def read(self, start: int, prefetch: int, weights: Callable[[], dict[str, Array]], /) -> Iterator[Batch]:
        """Iterate over the batches of steps start, start + 1, …; `weights` returns those at the step of the next one."""
        ...

    def logged(self, step: int, /) -> dict[str, float]:
        """Return what else to log of the batch of a step."""
        ...


OpenBatches: TypeAlias = Callable[[Config, Path, Prepared, Program, int, int], Batches]
"""Makes the batches of a run of so many steps, in a multiple of so many rows, from its checkpoint and data; see `supervised`."""


@dataclass
class Run:
    """Everything that the loop needs, opened; `restored` is (step, state) of the checkpoint from which it resumes."""

    config: Config
    source: Path
    folder: Path
    data: Prepared
    program: Program
    schedule: Batches
    validation: Validation
    checkpoints: Checkpoints
    stop: StopFlag
    restored: tuple[int, State] | None
    log: RunLog
    exported: bool
    """Whether it is finished; its checkpoints may be deleted then."""


def supervised(config: Config, _: Path, data: Prepared, __: Program, steps: int, row_multiple: int, /) -> Schedule:
    """Return the batches of fixed examples."""
    return Schedule.of(config, data.train, steps, row_multiple)


def train(config: Config, resume: Resume = "auto", open_batches: OpenBatches = supervised) -> TrainedRun:
    """Train as `config` says, and export. Returns early, with the state saved, when a signal asks for it.

    Raises:
        JaxguardError: anything that the user can correct.
    """
    start_hosts(config.mesh)
    check(config, samples=open_batches is not supervised)
    with explain_memory(training_remedy(config)), open_everything(config, resume, open_batches) as run:
        done: tuple[int, State] = (run.schedule.steps, {})
        step, state = done if run.exported else train_until_stopped(run, *start_state(run))
        first, folder = jax.process_index() == 0, run.folder
        records = read_metrics(folder / "metrics.jsonl") if first else []
        validations = [record for record in records if "validation/loss" in record] or [{}]
        before, after = (
            {name.removeprefix("validation/"): x for name, x in record.items() if name.startswith("validation/")}
            for record in (validations[0], validations[-1])
        )
        result = TrainedRun(config, step, run.schedule.steps, None, config.folder, before, after)
        if step < run.schedule.steps:
            return replace(result, stopped_by=run.stop.signal_name or "signal")
        if run.exported:
            result = replace(result, export=folder / "export")
        elif config.train.export:
            metrics = {"before": distinct(before), "after": distinct(after)}
            report = export(
                state["weights"], folder / "export", source=run.source, config=config, data=run.data, metrics=metrics
            )
            changed = None if report is None else report.changed_fraction
            result = replace(result, export=folder / "export", changed_fraction=changed)
        if first and draw_curves(folder / "metrics.jsonl", folder / "curves.png", config.name):
            result = replace(result, curves=folder / "curves.png")
        return result


def check(config: Config, *, samples: bool = False) -> None:
    """Check what costs nothing to check: objective, policy, paths, trackers and, where this process is the only one, the mesh.

    `samples`: whether the answers that are trained on are sampled.
    """
    kind = config.train.objective.kind
    if config.train.objective.is_sampled != samples:
        command, other = ("train", "set train.objective.kind=grpo") if samples else ("reinforce", "choose another kind")
        raise JaxguardError(
            f"train.objective.kind={kind} trains on {'fixed' if samples else 'sampled'} answers: run `jaxguard {command}` with "
            f"this config, or {other}"
        )
    check_inputs(config, "reinforce" if samples else "train")
    check_trackers(config.log)
    if config.mesh.hosts == "single":
        row_multiple(config, make_mesh(config.mesh))


@contextmanager
def open_everything(config: Config, resume: Resume, open_batches: OpenBatches) -> Iterator[Run]:
    """Open the run folder, read the data, define the jitted functions, begin the run's records; close everything at the end."""
    with ExitStack() as stack:
        mesh = make_mesh(config.mesh)
        multiple = row_multiple(config, mesh)
        folder = stack.enter_context(open_run(config, resume))
        source = fetch(config.model.checkpoint, config.model.revision)
        spec = read_spec(source)
        companions(source)  # what cannot be exported is not trained
        cache = EncodedCache(folder / "encoded")
        data = prepare(config, source, cache)
        compare_hosts(config, source, data.manifest)
        batch_size, max_seq_len = config.train.batch_size, config.data.max_seq_len
        steps = total_steps(len(data.train), batch_size, config.train.epochs, config.train.max_steps)
        stack.enter_context(jax.set_mesh(mesh))
        program = build_program(config, spec, mesh, steps)
        begin_run(folder, config, data.manifest | {"weights": starting_weights(source)}, program.compute.attention)
        if jax.process_index() == 0:
            cache.write()
            console = Console()
            write_atomically(folder / "weights.txt", list_weights(spec, program.state["weights"]))
            summarize(console, folder, config, data, program, steps)
            for text in cautions(data.trained_together, load_policy(config.data.policy)):
                console.print(f"note: {text}", width=min(WIDTH, console.width))
        checkpoints = stack.enter_context(open_checkpoints(folder / "checkpoints", config.checkpoint, spec.fingerprint))
        stop = stack.enter_context(graceful_stop())
        restored = checkpoints.restore(program.state)
        exported = restored is None and is_complete(folder / "export")
        done = restored[0] if restored else steps if exported else None
        log = stack.enter_context(RunLog(folder, config, steps, done))
        if config.train.objective.is_preference:
            data = data._replace(train=with_reference(
                data.train, program, source, partial(base_weights, source, program), folder / "reference",
                batch_size=batch_size, max_seq_len=max_seq_len, row_multiple=multiple,
            ))  # fmt: skip
        schedule = open_batches(config, source, data, program, steps, multiple)
        validation = Validation(data.validation, batch_size, max_seq_len, multiple)
        yield Run(
            config, source, folder, data, program, schedule, validation, checkpoints, stop, restored, log, exported
        )


def start_state(run: Run) -> tuple[int, State]:
    """Return completed steps and state, from the newest valid checkpoint or from the base weights."""
    if run.restored is not None:
        step, state = run.restored
        run.log.print(f"resuming from the checkpoint of step {step} of {run.schedule.steps}")
    else:
        step, state = 0, run.program.initialize(base_weights(run.source, run.program))
    validate_if_due(run, step, state)
    return step, state


def starting_weights(source: Path) -> str:
    """Return the digest of a checkpoint's weights, which one process reads and tells the others."""
    digest = weights_digest(source) if jax.process_index() == 0 else None
    told = multihost_utils.broadcast_one_to_all(np.frombuffer(bytes.fromhex(digest or "00" * 32), np.uint8))
    return bytes(np.asarray(told)).hex()


def base_weights(source: Path, program: Program) -> dict[str, Array]:
    """Read the checkpoint that a run starts from, as its state is sharded."""
    return read_weights(source, program.spec, {path: x.sharding for path, x in program.state["weights"].items()})


def train_until_stopped(run: Run, step: int, state: State) -> tuple[int, State]:
    """Train to the end of the schedule, or to the end of the step during which the run was asked to stop.

    The metrics of a step are fetched while the next one runs, except where validation or a checkpoint needs them first: so the
    device never waits for the log.
    """
    if run.stop.should_stop(step):
        return step, state
    steps, sharding = run.schedule.steps, batch_sharding(run.program.mesh)
    pending: tuple[int, Batch, Metrics] | None = None
    clock, compiled = time.perf_counter(), set[tuple[tuple[int, ...], ...]]()

    def weights() -> dict[str, Array]:
        newest: dict[str, Array] = state["weights"]
        return newest

    with profiler(run.folder / "profile", run.config.log.profile_step, steps) as profile:
        for batch in run.schedule.read(step, run.config.data.prefetch, weights):
            profile(step)
            sharded = shard_batch(batch, sharding)
            with jax.transfer_guard("disallow"):
                state, metrics = run.program.train_step(state, sharded)
            shape = tuple(x.shape for x in jax.tree.leaves(batch))
            if shape not in compiled:
                compiled.add(shape)
                run.log.skip()
            if pending is not None:
                clock = log_step(run, *pending, clock)
            step += 1
            pending = step, batch, metrics
            stopped = run.stop.should_stop(step)
            save = stopped or step == steps or step % run.config.checkpoint.every == 0
            if save or evaluation_due(run, step):
                log_step(run, *pending, clock)
                pending = None
                # Who stops a run may not wait for a validation: it is made after the save, or when the run resumes.
                loss = None if stopped else validate_if_due(run, step, state)
                if save:
                    run.checkpoints.save(step, state, loss)
                clock = time.perf_counter()  # the next step's time begins here
            if stopped:
                break
    run.checkpoints.wait()
    if step == steps:
        validate_if_due(run, step, state)
    return step, state


def log_step(run: Run, step: int, batch: Batch, metrics: Metrics, since: float) -> float:
    """Wait for a step and log it, with the seconds since the time `since`; return the time when it was done.

    Raises:
        JaxguardError: its loss or gradient is not finite.
    """
    scalars = jax.device_get(metrics)._asdict()
    values = {name: float(x) for name, x in (scalars.pop("logged") | scalars).items()} | run.schedule.logged(step - 1)
    now = time.perf_counter()
    if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
        ids = [run.data.train[i].example_id for i in run.schedule.examples(step - 1)]
        raise JaxguardError(
            f"step {step}: loss {values['loss']}, gradient norm {values['gradient_norm']}; the run stops before it saves them. "
            f"Its examples: {', '.join(ids)}. Lower optimizer.learning_rate or look at these examples; the last checkpoint "
            "is good"
        )
    mesh, positions, seconds = run.program.mesh, batch.valid_positions, now - since
    speed = {
        "seconds": seconds,
        "tokens_per_second": len(positions) / seconds,
        "examples_per_second": run.config.train.batch_size / seconds,
        "padding": 1 - len(positions) / batch.tokens_BT.size,
    }
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    if peak is not None:
        flops = training_flops(run.program.spec, positions, batch.num_targets)
        speed["mfu"] = flops / seconds / (peak * mesh.size)
    run.log.log(step, values, speed)
    return now


def evaluation_due(run: Run, step: int) -> bool:
    """Whether to validate after this step; every 0 steps is before the first and after the last step only."""
    steps = run.schedule.steps
    return bool(run.validation.held_out) and (step == steps or step % (run.config.train.evaluate_every or steps) == 0)


def validate_if_due(run: Run, step: int, state: State) -> float | None:
    """Score the held-out examples, save and log the result, and return the loss; None where that is not due, or was done."""
    if not evaluation_due(run, step) or run.log.validated == step:
        return None
    metrics, predictions = run.validation.run(run.program, state["weights"])
    if jax.process_index() == 0:
        lines = [json.dumps(asdict(prediction)) + "\n" for prediction in predictions]
        write_atomically(run.folder / f"validation_predictions/{step}.jsonl", "".join(lines))
    loss = metrics["validation/loss"]
    run.checkpoints.rank(step, loss)
    run.log.log(step, metrics)
    return loss


@contextmanager
def profiler(folder: Path, first: int | None, steps: int) -> Iterator[Callable[[int], None]]:
    """Yield what to call before each step: it traces PROFILED_STEPS steps from `first` on, as many of them as a run still does."""
    wanted = range(0) if first is None else range(first, first + PROFILED_STEPS)
    if first is not None and first >= steps:
        logger.warning("log.profile_step=%d: the run has %d steps, so none is profiled", first, steps)
    with ExitStack() as trace:
        tracing = False

        def before(step: int) -> None:
            nonlocal tracing
            if step not in wanted:
                trace.close()
            elif not tracing:
                tracing = True
                trace.enter_context(jax.profiler.trace(str(folder)))

        yield before
