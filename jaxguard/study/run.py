"""Run a study, run by run and stage by stage, and record what is done beside its output.

A stage resumes by itself, and refuses output of other settings or data. So a study resumes after a kill at any moment.
"""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from jaxguard.config import NO_EFFECT, READS, ROUNDING, Config, read_by
from jaxguard.config.base import CONFIG_FOLDER, find_yaml
from jaxguard.config.data import BuildConfig
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.config.study import Stage
from jaxguard.data.files import file_digest, weights_digest
from jaxguard.data.inputs import input_paths, missing_inputs
from jaxguard.data.policies import load_policy
from jaxguard.study.grid import Run, Study, words
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import lock_folder, write_atomically
from jaxguard.utils.parse import read_json
from jaxguard.utils.secrets import mask

REQUEUE = 75
"""Exit code of a stage, or a study, that was stopped with its state saved."""
ENTRY = ("-m", "jaxguard")
RECORD = "stages.json"
"""In a run's folder: stage -> the fingerprint that it was begun with, and whether it is done."""
SCORING: Final = tuple(
    f"evaluate.{name}" for name in ("guards", "benchmarks", "validation", "auto", "limit", "generations", "resamples")
)
"""Settings of an evaluation that `mine` has no use for."""
SERVERS: Final = tuple(
    f"distill.{who}.{name}"
    for who in ("teacher", "judge")
    for name in ("endpoints", "api_key_env", "concurrency", "timeout", "tries")
)
"""How the models of a distillation are reached."""
PROGRAMS = ".programs"
"""In a study's folder: what its stages have compiled, which those of the same shapes need not compile again."""


FILES: Mapping[Stage, Callable[[Config], list[str]]] = {
    "distill": lambda c: [
        "traces.jsonl",
        *(f"traces_{budget}.jsonl" for budget in (c.distill.budgets if c.distill else ())),
    ],
    "build": lambda c: [f"dataset/{each.name}/all.parquet" for each in (c.build or BuildConfig()).sets],
    "mine": lambda _: ["mine/hard.jsonl"],
    "pairs": lambda _: ["mine/pairs.jsonl"],
    "train": lambda c: ["export/jaxguard.json"] if c.train.export else [],
    "reinforce": lambda c: ["export/jaxguard.json"] if c.train.export else [],
    "evaluate": lambda _: ["evaluate/results.json"],
}
"""Stage -> the files of the run's folder that it has when it is finished."""


def command(run: Run, stage: Stage) -> list[str]:
    """Return a stage's command line, without the interpreter."""
    return [*ENTRY, *words(stage).split(), "--config", run.base, *read_by(words(stage), run.overrides)]


def fingerprint(run: Run, stage: Stage) -> str:
    """Hash what a stage's result depends on: config, input files and folders, earlier stages, and the rows that it follows."""
    stages = [each for each in run.row.stages[: run.row.stages.index(stage)] if each != "evaluate"] + [stage]
    config, fields = run.config, {field for each in stages for field in READS[words(each)]}
    exclude = fields_tree((*NO_EFFECT, *ROUNDING, *SERVERS, *(() if stage == "evaluate" else SCORING)))
    followed = [parent for parent in run.parents if not parent.prepared]
    # What these rows make is known by their fingerprints, and other folders by what is in them.
    made = [other.folder for other in (run, *followed)]
    paths = {path for each in stages for path in run.inputs(each)}
    paths = {path for path in paths if path.is_file() or not any(map(path.is_relative_to, made))}
    tree = {
        "stages": stages,
        "config": config.model_dump(mode="json", include=fields, exclude=exclude),
        "policy": load_policy(config.data.policy).digest,
        "files": {
            str(path): _contents(path) for path in {*paths, *(yaml_files(config) if stage == "evaluate" else ())}
        },
        "rows": [fingerprint(other, each) for other in followed for each in other.row.stages if each != "evaluate"],
    }
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def fields_tree(fields: Iterable[str]) -> dict[str, Any]:
    """Turn dotted fields, and schemas that end in a dot, into what pydantic takes for `exclude`."""
    tree: dict[str, Any] = {}
    for field in sorted(fields, key=len, reverse=True):  # so that a schema takes the place of its fields
        *schemas, name = field.strip(".").split(".")
        branch = tree
        for schema in schemas:
            branch = branch.setdefault(schema, {})
        branch[name] = True
    return tree


def yaml_files(config: Config) -> Iterator[Path]:
    """Yield the files of an evaluation's benchmarks and guard formats, but for what is built in."""
    settings = config.evaluate or EvaluateConfig()
    names = [(each.name, "benchmarks") for each in settings.benchmarks] + [
        (each.format, "guards") for each in settings.guards
    ]
    for name, folder in names:
        with suppress(JaxguardError):
            yield find_yaml(name, CONFIG_FOLDER / folder, "file")


def _contents(path: Path) -> str | None:
    """Hash a file, the weights in a folder or those that a run exported, or else all of its files; None: there is nothing."""
    if weights := path.is_dir() and (weights_digest(path) or weights_digest(path / "export")):
        return weights
    paths = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    return hashlib.sha256("".join(map(file_digest, paths)).encode()).hexdigest() if path.exists() else None


@dataclass(frozen=True)
class Progress:
    """The fingerprint that a stage was begun with, and whether it is done."""

    fingerprint: str
    done: bool


def read_record(run: Run) -> dict[str, Progress]:
    path = run.folder / RECORD
    return read_json(path, dict[str, Progress]) if path.is_file() else {}


def note(run: Run, stage: Stage, progress: Progress) -> None:
    """Record that a stage begins or is done."""
    record = read_record(run) | {stage: progress}
    run.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        run.folder / RECORD, json.dumps({name: asdict(each) for name, each in record.items()}, indent=2) + "\n"
    )


def pending(run: Run) -> list[Stage]:
    """Return the stages from the first one not done with this config and these files; prepared output is used as it is."""
    record = read_record(run)
    for i, stage in enumerate(run.row.stages):
        done = run.prepared or record.get(stage) == Progress(fingerprint(run, stage), done=True)
        if not done or not all((run.folder / name).is_file() for name in FILES[stage](run.config)):
            return list(run.row.stages[i:])
    return []


def check_study(study: Study) -> None:
    """Raise a JaxguardError that names, once, every input of a run that is not there and that no run of the study makes."""
    runs = (*study.prepared, *study.runs)
    problems: dict[str, list[str]] = {}
    for run in runs:
        for stage in pending(run):
            paths = input_paths(run.config, words(stage))
            for name, problem in missing_inputs(run.config, words(stage)).items():
                if not any(Path(paths.get(name, "")).is_relative_to(other.folder) for other in runs):
                    problems.setdefault(f"{name}: {problem}", []).append(run.name)
    if problems:
        names = {problem: list(dict.fromkeys(names)) for problem, names in problems.items()}
        lines = [f"{problem} (read by {', '.join(names[problem])})" for problem in problems]
        raise JaxguardError("\n".join(["the study cannot run:", *lines]))


class _Process:
    """Runs one command at a time; a signal stops it and all that would follow."""

    stopped = False
    _current: subprocess.Popen[bytes] | None = None

    def __init__(self, programs: Path) -> None:
        cache = {"JAX_COMPILATION_CACHE_DIR": str(programs), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self._environment = cache | os.environ

    def stop(self, *_: object) -> None:
        self.stopped = True
        if self._current is not None:
            self._current.send_signal(signal.SIGTERM)  # does nothing if it has ended

    def run(self, words: list[str]) -> int:
        """Run a command of this interpreter and return its exit code."""
        self._current = subprocess.Popen([sys.executable, *words], env=self._environment)  # noqa: S603 (our commands)
        if self.stopped:  # before there was a process to stop
            self.stop()
        code = self._current.wait()
        self.stopped = self.stopped or code == REQUEUE
        return code


def run_study(study: Study, log: Callable[[str], object]) -> int:
    """Run every stage that is not done; a run that fails keeps only those from running that read its output.

    Returns 0 if all runs are done, 1 if some failed, REQUEUE if it was stopped. JaxguardError: another process works in the study,
    or an input is missing.
    """
    check_study(study)
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        stack.enter_context(lock_folder(study.folder, "study"))
        process = _Process(study.folder / PROGRAMS)
        for signum in (signal.SIGTERM, signal.SIGINT):
            stack.callback(signal.signal, signum, signal.signal(signum, process.stop))
        waiting = [run for run in (*study.prepared, *study.runs) if pending(run)]
        for run in (run for run in study.prepared if run not in waiting):
            if read_record(run).get(last := run.row.stages[-1]) != Progress(fingerprint(run, last), done=True):
                log(
                    f"note: {run.folder} was made with other settings than this study's, and is used as it is; move it away to "
                    "make it anew"
                )
        log(f"{len(study.runs) - sum(not run.prepared for run in waiting)} of {len(study.runs)} runs are done")
        for number, run in enumerate(waiting, 1):
            log(f"{number} of {len(waiting)}: {run.name}")
            parents = [parent.name for parent in run.parents if parent.name in failed]
            failure = (
                f"not begun: it reads the output of {', '.join(parents)}"
                if parents
                else _run(run, study.definition.keep_checkpoints, process, log)
            )
            if process.stopped:
                log("stopped; run the same command again to resume")
                return REQUEUE
            if failure:
                log(f"error: {run.name}: {failure}")
                failed[run.name] = failure
    for name, failure in failed.items():
        log(f"error: {name}: {failure}")
    log(f"{sum(not pending(run) for run in study.runs)} of {len(study.runs)} runs are done: {study.folder}")
    return 1 if failed else 0


def _run(run: Run, keep_checkpoints: bool, process: _Process, log: Callable[[str], object]) -> str:
    """Run the pending stages of a run; return why it failed, or ""."""
    for stage in pending(run):
        begun = Progress(fingerprint(run, stage), done=False)  # of the files as they are now
        note(run, stage, begun)
        words = command(run, stage)
        log(f"$ python {mask(shlex.join(words))}")
        code = process.run(words)
        if process.stopped:
            return ""
        if code:
            return f"{stage} ended with code {code}; its message above says why"
        note(run, stage, replace(begun, done=True))
    if not keep_checkpoints and not run.prepared:
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    return ""
