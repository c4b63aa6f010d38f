"""A study from start to end: what it costs, then run by run, stage by stage.

Every stage goes on by itself where it was stopped, and what is done is noted beside its output; so a study that is killed at any
moment and started again goes on, and one that is done does nothing.
"""

import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxguard.cli import PROVENANCE_CHANGED
from jaxguard.config.study import Stage
from jaxguard.study.cost import COMPILED_AFTER, Speed, Work, costs, keep_speed, speed_of, teaching, total
from jaxguard.study.grid import Run, Study
from jaxguard.study.stages import REQUEUE, Stages, begin, command, left, outputs, put_aside, record
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import lock_folder

MEASURED = 3
"""Updates that --measure times."""


@dataclass
class Progress:
    """How far a study is, and how long the rest will take.

    Attributes:
        ahead: seconds that each run that is left was reckoned to take.
    """

    console: Console
    ahead: dict[str, float]
    number: int = 0
    done: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def begin(self, run: Run) -> None:
        """Say which run is next; what the ones before took corrects the reckoning."""
        self.number += 1
        rest = sum(self.ahead.values())
        factor = (time.monotonic() - self.started) / self.done if self.done else 1.0
        title = f"{self.number} of {self.number + len(self.ahead) - 1}: {run.name}; about {clock(rest * factor)} left"
        self.console.rule(Text(title), align="left")

    def end(self, run: Run) -> None:
        self.done += self.ahead.pop(run.name)


def run_study(study: Study, console: Console, measure: bool = False) -> int:
    """Run all that is not done.

    Returns:
        0; 1 when runs failed, the others being done; REQUEUE when it was stopped, to be started again.

    Raises:
        JaxguardError: another process works in the study, or the speed cannot be measured.
    """
    study.folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(study.folder, "study"), Stages(study.folder, lambda text: console.print(Text(text))) as stages:
        if measure and _measure(study, stages) == REQUEUE:
            return REQUEUE
        found = show_cost(study, console)
        code = _prepare(study, stages, console)
        if code:
            return code
        others = {run.name: run for run in study.runs}
        waiting: list[Run] = []
        for run in study.runs:
            # One that reads what is about to be written anew may have to be done anew.
            if left(run, others) or {other.row for other in waiting} & set(run.after):
                waiting.append(run)
        if len(waiting) < len(study.runs):
            console.print(f"{len(study.runs) - len(waiting)} of {len(study.runs)} runs are done")
        progress = Progress(console, {run.name: found[run.name] for run in waiting})
        failed: dict[str, str] = {}
        for run in waiting:
            progress.begin(run)
            code = _run(run, others, stages, console, failed)
            if code == REQUEUE:
                console.print("stopped; start the same command again to go on")
                return REQUEUE
            progress.end(run)
    return _summary(study, failed, console)


def _prepare(study: Study, stages: Stages, console: Console) -> int:
    """Make what is needed first, where it is not there yet."""
    for run in study.prepared:
        for stage in run.stages:
            missing = [path for path in outputs(run, stage) if not path.is_file()]
            if not missing:
                continue
            console.rule(Text(f"{stage}: {run.name}, for want of {missing[0]}"), align="left")
            code = stages.run(command(run, stage))
            if code:
                _complain(console, f"{stage} of {run.name} ended with code {code}; nothing else can begin without it")
                return REQUEUE if code == REQUEUE else 1
    return 0


def _run(run: Run, others: dict[str, Run], stages: Stages, console: Console, failed: dict[str, str]) -> int:
    """Do what is left of a run; a failure is noted in `failed`."""
    lost = [name for name, other in others.items() if other.row in run.after and name in failed]
    if lost:
        failed[run.name] = f"not begun: it reads what {', '.join(lost)} would have written"
        _complain(console, f"{run.name} {failed[run.name]}")
        return 1
    ahead = left(run, others)
    aside = begin(run, others)
    if aside is not None:
        console.print(
            Text(f"{run.name} reads what was made anew; what was made of the old is in {aside}"), soft_wrap=True
        )
    for stage in ahead:
        code = _do(run, stage, stages, console)
        if code == REQUEUE:
            return REQUEUE
        if code:
            failed[run.name] = f"{stage} ended with code {code}"
            _complain(console, f"{run.name}: {failed[run.name]}; the others go on")
            return 1
        absent = [str(path) for path in outputs(run, stage) if not path.is_file()]
        if absent:
            failed[run.name] = f"{stage} ended well but left no {', '.join(absent)}"
            _complain(console, f"{run.name}: {failed[run.name]}")
            return 1
        record(run, stage, others)
    return 0


def _do(run: Run, stage: Stage, stages: Stages, console: Console) -> int:
    """Run a stage; where it refuses to mix its output with that of other inputs, the old is put aside."""
    words = command(run, stage)
    console.print(Text(f"$ python {shlex.join(words)}", style="dim"), soft_wrap=True)
    code = stages.run(words)
    if code != PROVENANCE_CHANGED:
        return code
    aside = put_aside(run, stage)
    console.print(
        Text(f"{run.name}: what {stage} made of other inputs is in {aside} now; it is done anew"), soft_wrap=True
    )
    return stages.run(words)


def _summary(study: Study, failed: dict[str, str], console: Console) -> int:
    console.print(f"{len(study.runs) - len(failed)} of {len(study.runs)} runs are done: {study.folder}", soft_wrap=True)
    for name, why in failed.items():
        _complain(console, f"{name}: {why}")
    if failed:
        console.print("start the same command again to try these once more")
    return 1 if failed else 0


def _complain(console: Console, message: str) -> None:
    console.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def show_cost(study: Study, console: Console) -> dict[str, float]:
    """Print what the study takes, run by run and in all; the seconds of each run."""
    speed = speed_of(study)
    found = costs(study.runs, speed)
    devices = study.fields.cost.devices
    table = Table(title=study.fields.title, title_justify="left", show_footer=True)
    everything, all_seconds = total(found)
    table.add_column("run", f"{len(found)} runs", overflow="fold")
    headings = ("updates", "trained", "judged", "read", "generated", "device-h")
    for heading, foot in zip(headings, _cells(everything, all_seconds, devices), strict=True):
        table.add_column(heading, foot, justify="right", no_wrap=True)
    for run, work, seconds in found:
        table.add_row(Text(run.name + (" *" if work.guessed else "")), *_cells(work, seconds, devices))
    console.print(table)
    console.print("trained, read and generated are tokens; read: prompts, and what the probabilities of verdicts need")
    for text in _taught(study):
        console.print(Text(text), soft_wrap=True)
    if everything.guessed:
        console.print("* how many examples there are is what the study's file or a default says, not counted")
    console.print(Text(_said(speed, study, all_seconds)), soft_wrap=True)
    if study.fields.about:
        console.print(Text(study.fields.about.strip()), soft_wrap=True)
    return {run.name: seconds for run, _, seconds in found}


def _taught(study: Study) -> list[str]:
    """What a teacher would do: no part of the table, whose devices are the student's."""
    runs = [run for run in (*study.prepared, *study.runs) if "distill" in run.stages]
    if not runs:
        return ["no row asks a teacher: traces are taken as they are"]
    found = [(run, teaching(run)) for run in runs]
    return [
        f"{run.name} asks a teacher, which is not in the table: {work.judged:,} examples, "
        f"{_millions(work.read)} tokens read and {_millions(work.generated)} generated if none is asked twice"
        for run, work in found
    ]


def _said(speed: Speed, study: Study, all_seconds: float) -> str:
    cost = study.fields.cost
    return (
        f"{clock(all_seconds)} on {cost.devices} {cost.device}, if nothing of it is done. Assumed: "
        f"{cost.prompt_tokens} tokens a prompt, {cost.trace_tokens} a trace, {cost.answer_tokens} a verdict, and "
        f"{cost.start_seconds} s to start a stage, where a row does not say otherwise. Speed: {speed.said}."
    )


def _cells(work: Work, seconds: float, devices: int) -> Sequence[str]:
    trained, read, generated = map(_millions, (work.trained, work.read, work.generated))
    return (f"{work.updates:,}", trained, f"{work.judged:,}", read, generated, f"{seconds * devices / 3600:,.2f}")


def _millions(tokens: int) -> str:
    return f"{tokens / 1e6:,.1f} M" if tokens >= 1e6 else f"{tokens / 1e3:,.0f} k"


def clock(seconds: float) -> str:
    """A time for people."""
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def show_commands(study: Study, say: Callable[[str], None]) -> None:
    """Every command line that the study consists of."""
    for run in (*study.prepared, *study.runs):
        for stage in run.stages:
            say(f"python {shlex.join(command(run, stage))}")


def _measure(study: Study, stages: Stages) -> int:
    """Time a few updates of the first run that trains, and keep their speed; nothing else of them is kept."""
    run = next((run for run in study.runs if "train" in run.stages), None)
    if run is None:
        raise JaxguardError("--measure: no row of this study trains")
    steps = COMPILED_AFTER + MEASURED
    changes = ("name=measure", f"train.max_steps={steps}", "train.export=false", "data.validation=[]",
               "data.validation_size=0", f"checkpoint.every={steps}")  # fmt: skip
    folder = study.folder / "measure"
    shutil.rmtree(folder, ignore_errors=True)
    code = stages.run(command(replace(run, overrides=(*run.overrides, *changes)), "train"))
    try:
        if code not in (0, REQUEUE):
            raise JaxguardError(f"--measure: training ended with code {code}; see above")
        if code == 0:
            keep_speed(study.folder, folder / "metrics.jsonl")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return code
