"""Run a study, run by run and stage by stage.

A stage resumes by itself, and what is done is recorded beside its output: a study that was killed at any moment resumes when it
is started again, and a finished one does nothing.
"""

import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from jaxguard.cli import PROVENANCE_CHANGED
from jaxguard.config.study import Stage
from jaxguard.study.cost import WARMUP_STEPS, clock, estimate, save_speed
from jaxguard.study.grid import Run, Study
from jaxguard.study.stages import (
    REQUEUE,
    StageRunner,
    begun_with_other_inputs,
    command,
    missing,
    note,
    pending,
    put_aside,
)
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import lock_folder

MEASURED_STEPS = 3
Log = Callable[[str], None]


@dataclass
class StudyResult:
    """How a study ended.

    Attributes:
        failed: run, or prepared run -> why it failed.
        stopped: it was asked to stop; the same command resumes it.
    """

    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


def run_study(study: Study, log: Log) -> StudyResult:
    """Run every stage that is not done; a run that fails does not keep others from running.

    Raises:
        JaxguardError: another process works in the study.
    """
    result = StudyResult()
    study.folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(study.folder, "study"), StageRunner(study.folder, log) as runner:
        if not _prepare(study, runner, log, result):
            return result
        waiting = [run for run in study.runs if pending(run)]
        log(f"{len(study.runs) - len(waiting)} of {len(study.runs)} runs are done")
        seconds = {run.name: seconds for run, _, seconds in estimate(study)}
        left, done, started = sum(seconds[run.name] for run in waiting), 0.0, time.monotonic()
        for number, run in enumerate(waiting, 1):
            # What the runs before took corrects the estimate.
            correction = (time.monotonic() - started) / done if done else 1.0
            log(f"{number} of {len(waiting)}: {run.name}; about {clock(left * correction)} left")
            parents = [parent.name for parent in run.parents if parent.name in result.failed]
            failure = f"not begun: it reads the output of {', '.join(parents)}" if parents else _run(run, runner, log)
            if runner.stopped:
                result.stopped = True
                return result
            if failure:
                result.failed[run.name] = failure
                log(f"error: {run.name}: {failure}")
            left, done = left - seconds[run.name], done + seconds[run.name]
    return result


def _prepare(study: Study, runner: StageRunner, log: Log, result: StudyResult) -> bool:
    """Make the prepared runs whose output is missing; return whether the study can continue."""
    for run in study.prepared:
        for stage in run.stages:
            if not missing(run, stage):
                continue
            log(f"{stage}: {run.name}, to make {missing(run, stage)[0]}")
            code = runner.run(command(run, stage))
            if code:
                result.failed[run.name] = f"{stage} ended with code {code}; no run can begin without it"
                result.stopped = code == REQUEUE
                return False
    return True


def _run(run: Run, runner: StageRunner, log: Log) -> str:
    """Run the pending stages of a run; why it failed, or ""."""
    for stage in pending(run):
        if begun_with_other_inputs(run, stage):
            log(f"{run.name}: {stage} reads output that was made again; its old output is in {put_aside(run, stage)}")
        note(run, stage, done=False)
        words = command(run, stage)
        log(f"$ python {shlex.join(words)}")
        code = runner.run(words)
        if code == PROVENANCE_CHANGED:
            log(f"{run.name}: the old output of {stage}, of other inputs, is in {put_aside(run, stage)}")
            code = runner.run(words)
        if code == REQUEUE:
            runner.stopped = True
            return ""
        if code:
            return f"{stage} ended with code {code}"
        if absent := missing(run, stage):
            return f"{stage} ended with code 0, but did not write {', '.join(map(str, absent))}"
        note(run, stage, done=True)
    return ""


def commands(study: Study) -> list[str]:
    """Return every command line of a study."""
    runs = (*study.prepared, *study.runs)
    return [f"python {shlex.join(command(run, stage))}" for run in runs for stage in run.stages]


def measure_speed(study: Study, log: Log) -> bool:
    """Time a few steps of the first run that trains, for the study's cost; False if it was stopped.

    Raises:
        JaxguardError: no run trains, or it fails.
    """
    run: Run | None = next((run for run in study.runs if "train" in run.stages), None)
    if run is None:
        raise JaxguardError("--measure: no row of this study trains")
    stage: Stage = "train"
    steps, folder = WARMUP_STEPS + MEASURED_STEPS, study.folder / "measure"
    changes = ("name=measure", f"train.max_steps={steps}", "train.export=false", "data.validation=[]",
               "data.validation_size=0", f"checkpoint.every={steps}")  # fmt: skip
    study.folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(study.folder, "study"), StageRunner(study.folder, log) as runner:
        shutil.rmtree(folder, ignore_errors=True)
        code = runner.run(command(replace(run, overrides=(*run.overrides, *changes)), stage))
        try:
            if code not in (0, REQUEUE):
                raise JaxguardError(f"--measure: training ended with code {code}; see above")
            if code == 0:
                save_speed(study.folder, folder / "metrics.jsonl")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return code == 0
