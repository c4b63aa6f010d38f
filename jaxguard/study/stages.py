"""The stages of a run as commands, what of them is done, and how one is run so that a kill at any moment harms nothing."""

import fcntl
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from itertools import count
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

from jaxguard.config import read_by
from jaxguard.config.data import BuildConfig
from jaxguard.config.study import Stage
from jaxguard.data.files import file_digest
from jaxguard.study.grid import Run
from jaxguard.utils.files import write_atomically

REQUEUE = 75
"""What a stage that was stopped with its state saved ends with."""
DOORS: Mapping[Stage, tuple[str, ...]] = {
    "distill": ("-m", "jaxguard.distill"),
    "build": ("-m", "jaxguard.data", "build"),
    "mine": ("-m", "jaxguard.mine"),
    "train": ("-m", "jaxguard.train"),
    "evaluate": ("-m", "jaxguard.evaluate"),
}
RECORD = "stages.json"
READ = "read"
"""In it: a hash of the earlier runs' work that a run was begun with."""
_FOREIGN: Mapping[Stage, set[str]] = {
    "distill": {"build", "evaluate", "mine", "train", "optimizer", "mesh", "checkpoint", "log"},
    "build": {"distill", "evaluate", "mine", "train", "optimizer", "mesh", "checkpoint", "log"},
    "train": {"distill", "build", "evaluate", "mine", "log"},
    "mine": {"distill", "build", "log"},
    "evaluate": {"distill", "build", "mine", "log"},
}
"""Sections of the config that a stage does not look at."""
_OWN: Mapping[Stage, str] = {"distill": "traces*", "build": "dataset", "mine": "mine", "evaluate": "evaluate"}
"""What a stage writes in a run's folder; all else is the training's."""


def command(run: Run, stage: Stage) -> list[str]:
    """A stage as a command line, without the interpreter."""
    overrides = read_by("data build" if stage == "build" else stage, run.overrides)
    return [*DOORS[stage], "--config", run.base, *overrides]


def outputs(run: Run, stage: Stage) -> list[Path]:
    """Files that are there when a stage is done."""
    folder = run.folder
    if stage == "distill":
        budgets = run.config.distill.budgets if run.config.distill else ()
        return [folder / "traces.jsonl", *(folder / f"traces_{budget}.jsonl" for budget in budgets)]
    if stage == "train" and not run.config.train.export:
        return []
    if stage == "build":
        sets = (run.config.build or BuildConfig()).sets
        return [folder / "dataset" / one.name / "all.parquet" for one in sets]
    last = {"train": "export/jaxguard.json", "evaluate": "evaluate/results.json"}
    return [folder / last.get(stage, "mine/difficult.jsonl")]


def fingerprint(run: Run, stage: Stage) -> str:
    """A hash of all that a stage's result depends on: its part of the config, and the local files that this names."""
    tree = run.config.model_dump(mode="json", exclude=_FOREIGN[stage])
    found = json.dumps([stage, tree, _files(tree)], sort_keys=True)
    return hashlib.sha256(found.encode()).hexdigest()


def _files(tree: Any) -> dict[str, str]:
    """The files that the paths in a config lead to, with their hashes."""
    if isinstance(tree, list):
        return {path: digest for item in tree for path, digest in _files(item).items()}
    if not isinstance(tree, Mapping):
        return {}
    path = tree.get("path")
    own = {path: _digest(Path(path), Path(path).stat().st_mtime_ns)} if path and Path(path).is_file() else {}
    return own | {name: digest for item in tree.values() for name, digest in _files(item).items()}


@cache
def _digest(path: Path, _changed: int) -> str:
    return file_digest(path)


def read_record(run: Run) -> dict[str, str]:
    """Stage -> the fingerprint that it was done with."""
    try:
        found = json.loads((run.folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def left(run: Run, others: Mapping[str, Run]) -> list[Stage]:
    """The stages that are not done: from the first on whose output is missing or was made of something else.

    Args:
        run: the run.
        others: the study's runs by name, for those that this one reads from.
    """
    record = read_record(run)
    for i, stage in enumerate(run.stages):
        there = all(path.is_file() for path in outputs(run, stage))
        if not there or record.get(stage) != _key(run, stage, others):
            return list(run.stages[i:])
    return []


def record(run: Run, stage: Stage, others: Mapping[str, Run]) -> None:
    """Note that a stage is done; what was noted of later ones no longer counts."""
    before = (READ, *run.stages[: run.stages.index(stage)])
    kept = {name: found for name, found in read_record(run).items() if name in before}
    _write_record(run, {**kept, stage: _key(run, stage, others)})


def begin(run: Run, others: Mapping[str, Run]) -> Path | None:
    """Note what a run reads of others. If it was begun with something else, all its output is put aside: where that is now.

    A training that goes on in its folder knows a change of its own config and data, but not that of the weights it began with.
    """
    noted, read = read_record(run), _read(run, others)
    if noted.get(READ, read) == read:
        aside = None
    else:
        aside, noted = put_aside(run, run.stages[0]), {}
    if read:
        _write_record(run, {**noted, READ: read})
    return aside


def put_aside(run: Run, stage: Stage) -> Path:
    """Move what a stage has written to RUN.old-1, or the next number that is free; with a training all that came of it.

    Whatever happens meanwhile, nothing of the old output can be taken for new.
    """
    folder = run.folder
    aside = next(path for n in count(1) if not (path := folder.with_name(f"{folder.name}.old-{n}")).exists())
    if stage in _OWN:
        _move(folder, aside, [_OWN[stage]])
    else:
        folder.rename(aside)
        _move(aside, folder, [RECORD, *(_OWN[one] for one in run.stages[: run.stages.index(stage)] if one in _OWN)])
    return aside


def _move(source: Path, target: Path, patterns: Iterable[str]) -> None:
    target.mkdir()
    for path in [path for pattern in patterns for path in source.glob(pattern)]:
        path.rename(target / path.name)


def _write_record(run: Run, noted: Mapping[str, str]) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(run.folder / RECORD, json.dumps(noted, indent=2) + "\n")


def _key(run: Run, stage: Stage, others: Mapping[str, Run]) -> str:
    """The fingerprint, and those of the runs that are read from."""
    return hashlib.sha256((fingerprint(run, stage) + _read(run, others)).encode()).hexdigest()


def _read(run: Run, others: Mapping[str, Run]) -> str:
    """A hash of what the runs that are read from have done, their scores aside, which nobody reads; "" if there are none."""
    read = [
        {name: found for name, found in read_record(other).items() if name != "evaluate"}
        for other in others.values()
        if other.row in run.after
    ]
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest() if read else ""


class Stages:
    """Runs one stage at a time, and hands SIGTERM and Ctrl-C on to it.

    A stage outlives a kill -9 of the study. It holds the lock of a file that it inherits, so that the study, when it is started
    again, waits for it instead of working beside it.

    Attributes:
        stopped: someone asked the study to stop.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.stopped = False
        self._path, self._say = folder / ".stage", say
        self._file: IO[str] | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stages":
        self._before = {n: signal.signal(n, self._on_signal) for n in (signal.SIGTERM, signal.SIGINT)}
        self._file = self._path.open("a+")
        told = False
        while not self.stopped:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    self._say("a stage of a study that was killed is still at work; waiting for it")
                told = True
                time.sleep(0.2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._file is not None:
            self._file.close()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.stopped = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)

    def run(self, words: list[str]) -> int:
        """Run a command of this interpreter to its end; its exit code, or that of REQUEUE if it was stopped."""
        assert self._file is not None
        if self.stopped:
            return REQUEUE
        self._child = subprocess.Popen([sys.executable, *words], pass_fds=(self._file.fileno(),))  # noqa: S603 (our doors)
        if self.stopped:  # between the question above and the start
            self._child.send_signal(signal.SIGTERM)
        code = self._child.wait()
        self._child = None
        return REQUEUE if code and self.stopped else code
