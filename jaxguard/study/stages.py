"""The stages of a run: their commands, their outputs, which of them are done, and how to run one."""

import fcntl
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from itertools import count
from pathlib import Path
from types import FrameType
from typing import IO, Any, Self

from jaxguard.config import READS, read_by
from jaxguard.config.data import BuildConfig
from jaxguard.config.study import Stage
from jaxguard.data.files import file_digest
from jaxguard.study.grid import Run
from jaxguard.utils.files import write_atomically

REQUEUE = 75
"""Exit code of a stage that was stopped with its state saved."""
COMMANDS: Mapping[Stage, tuple[str, ...]] = {
    "distill": ("-m", "jaxguard.distill"),
    "build": ("-m", "jaxguard.data", "build"),
    "mine": ("-m", "jaxguard.mine"),
    "train": ("-m", "jaxguard.train"),
    "evaluate": ("-m", "jaxguard.evaluate"),
}
_READERS: Mapping[Stage, str] = {"build": "data build"}
"""Keys of READS that differ from the stage's name."""
RECORD = "stages.json"
"""In a run's folder: stage -> the fingerprint that it was begun with, and whether it is done."""
_FOLDERS: Mapping[Stage, str] = {"distill": "traces*", "build": "dataset", "mine": "mine", "evaluate": "evaluate"}
"""What a stage writes in a run's folder; everything else belongs to training."""


def command(run: Run, stage: Stage) -> list[str]:
    """Return a stage's command line, without the interpreter."""
    return [*COMMANDS[stage], "--config", run.base, *read_by(_READERS.get(stage, stage), run.overrides)]


def outputs(run: Run, stage: Stage) -> list[Path]:
    """Return the files that exist when a stage is done."""
    config, folder = run.config, run.folder
    match stage:
        case "distill":
            budgets = config.distill.budgets if config.distill else ()
            return [folder / "traces.jsonl", *(folder / f"traces_{budget}.jsonl" for budget in budgets)]
        case "build":
            return [folder / "dataset" / each.name / "all.parquet" for each in (config.build or BuildConfig()).sets]
        case "mine":
            return [folder / "mine/hard.jsonl"]
        case "train":
            return [folder / "export/jaxguard.json"] if config.train.export else []
        case "evaluate":
            return [folder / "evaluate/results.json"]


def missing(run: Run, stage: Stage) -> list[Path]:
    return [path for path in outputs(run, stage) if not path.is_file()]


def fingerprint(run: Run, stage: Stage) -> str:
    """Hash what a stage's result depends on: its config, its input files, and the stages whose output it reads."""
    own = run.config.model_dump(mode="json", include=set(READS[_READERS.get(stage, stage)]) - {"log"})
    return _sha256([stage, own, _files(run, stage), upstream(run, stage)])


def upstream(run: Run, stage: Stage) -> str:
    """Hash the stages whose output a stage reads: earlier ones of its run, and all of its parents, but evaluations."""
    before = [(run, each) for each in run.stages[: run.stages.index(stage)]]
    before += [(parent, each) for parent in run.parents for each in parent.stages]
    return _sha256([fingerprint(other, each) for other, each in before if each != "evaluate"])


def _files(run: Run, stage: Stage) -> dict[str, str]:
    """Hash the files that a stage reads, except those that its parents write."""
    written = [parent.folder for parent in run.parents]
    files = [path for path in run.inputs(stage) if path.is_file() and not any(map(path.is_relative_to, written))]
    return {str(path): _file_digest(path, path.stat().st_mtime_ns) for path in sorted(files)}


@cache
def _file_digest(path: Path, _changed: int) -> str:
    return file_digest(path)


def _sha256(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def read_record(run: Run) -> dict[str, Any]:
    try:
        record = json.loads((run.folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def note(run: Run, stage: Stage, done: bool) -> None:
    """Record that a stage begins or is done."""
    entry = {"fingerprint": fingerprint(run, stage), "upstream": upstream(run, stage), "done": done}
    run.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(run.folder / RECORD, json.dumps(read_record(run) | {stage: entry}, indent=2) + "\n")


def pending(run: Run) -> list[Stage]:
    """Return the stages from the first on that is not done with this config and these files."""
    record = read_record(run)
    for i, stage in enumerate(run.stages):
        entry = record.get(stage)
        done = isinstance(entry, dict) and entry.get("done") and entry.get("fingerprint") == fingerprint(run, stage)
        if missing(run, stage) or not done:
            return list(run.stages[i:])
    return []


def begun_with_other_inputs(run: Run, stage: Stage) -> bool:
    """Whether a stage's output was begun from other output of the stages before it.

    Stages compare their own config and data themselves, but a training cannot tell that its base was trained again.
    """
    entry = read_record(run).get(stage)
    return isinstance(entry, dict) and entry.get("upstream") != upstream(run, stage) and bool(_output(run, stage))


def put_aside(run: Run, stage: Stage) -> Path:
    """Move a stage's output, for a training everything that depends on it, to RUN.old-1 or the next free number."""
    folder = run.folder
    aside = next(path for n in count(1) if not (path := folder.with_name(f"{folder.name}.old-{n}")).exists())
    output = _output(run, stage)
    aside.mkdir()
    for path in output:
        path.rename(aside / path.name)
    return aside


def _output(run: Run, stage: Stage) -> set[Path]:
    """What a stage wrote into the run's folder, for a training also what depends on it."""
    before = run.stages[: run.stages.index(stage)]
    earlier = {path for each in before if each in _FOLDERS for path in run.folder.glob(_FOLDERS[each])}
    return set(run.folder.glob(_FOLDERS.get(stage, "*"))) - earlier - {run.folder / RECORD}


class StageRunner:
    """Run one stage at a time as a process, and pass SIGTERM and Ctrl-C on to it.

    A stage survives a kill -9 of the study. It inherits the lock of a file, so that a new study waits for it.

    Attributes:
        stopped: the study was asked to stop.
    """

    def __init__(self, folder: Path, log: Callable[[str], None]) -> None:
        self.stopped = False
        self._path, self._log = folder / ".stage", log
        self._lock: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._handlers = {n: signal.signal(n, self._on_signal) for n in (signal.SIGTERM, signal.SIGINT)}
        self._lock = self._path.open("a+")
        waiting = False
        while not self.stopped:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    self._log("a stage of a study that was killed is still running; waiting for it")
                waiting = True
                time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._lock is not None:
            self._lock.close()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def run(self, words: list[str]) -> int:
        """Run a command of this interpreter; return its exit code, or REQUEUE if it was stopped."""
        assert self._lock is not None
        if self.stopped:
            return REQUEUE
        self._process = subprocess.Popen([sys.executable, *words], pass_fds=(self._lock.fileno(),))  # noqa: S603 (our commands)
        if self.stopped:  # between the check above and the start
            self._process.send_signal(signal.SIGTERM)
        code = self._process.wait()
        self._process = None
        return REQUEUE if code and self.stopped else code
