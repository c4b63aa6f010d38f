"""What a run says of itself while it runs: metrics.jsonl always, a progress bar, and the trackers that are asked for.

metrics.jsonl is the record; the rest is for looking at. One JSON object a line:

    {"step": 50, "loss": 0.41, "learning_rate": 9.9e-07, ..., "speed": {"tokens_per_second": 1.2e4, ...}}

Everything outside "speed" is a function of the config and the data alone, so two runs of one config on one mesh write
the same lines but for "speed", however often they were killed in between. For that the loop must log everything about
step s before it saves the checkpoint of step s.

Floats are written so that reading gives the same bits. JSON has no NaN or infinity: they are written as the strings
"NaN", "Infinity" and "-Infinity", and read_metrics turns them back into floats.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import jax
from rich.console import Console

from jaxguard.config import Config
from jaxguard.train.run_folder import RunFolder
from jaxguard.train.trackers import Tracker, open_trackers
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically
from jaxguard.utils.progress import Progress

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Telemetry:
    """The log of one run. Only process 0 writes; on the others every method does nothing.

    Use it as a context manager, call `rewind` once, then `log`.
    """

    def __init__(self, run: RunFolder, config: Config, total_steps: int, console: Console | None = None) -> None:
        self._writes = jax.process_index() == 0
        self._run, self._config = run, config
        self._total_steps, self._console = total_steps, console or Console()
        self._progress: Progress | None = None
        self._file: IO[str] | None = None
        self._trackers: list[Tracker] = []

    def rewind(self, step: int | None) -> None:
        """Start to log after `step`, the checkpoint that the run goes on from; None when it starts anew.

        Records of later steps, which the run is about to repeat, are dropped from metrics.jsonl and hidden in
        TensorBoard.

        Raises:
            JaxguardError: a line of metrics.jsonl is no record, or a tracker is not installed.
        """
        if not self._writes:
            return
        rewind_metrics(self._run.metrics, step)
        self._trackers = open_trackers(self._run, self._config, step)
        self._file = self._run.metrics.open("a", encoding="utf-8")
        self._progress = Progress(self._config.name, self._total_steps, step or 0, self._console, unit=None)
        self._progress.__enter__()

    def log(self, step: int, values: Mapping[str, Any], speed: Mapping[str, Any] | None = None) -> None:
        """Record `values` after `step` completed steps.

        Args:
            step: number of completed steps.
            values: what the config and the data determine: loss, learning_rate, gradient_norm, validation/...
            speed: what the machine and its mood determine: seconds, tokens_per_second, examples_per_second, mfu.

        Raises:
            JaxguardError: the disk is full.
        """
        if not self._writes:
            return
        if self._file is None or self._progress is None:
            raise RuntimeError("call rewind before log")
        numbers = {name: float(value) for name, value in values.items()}
        speeds = {name: float(value) for name, value in (speed or {}).items()}
        record: dict[str, Any] = {"step": int(step), **_writable(numbers)}
        if speeds:
            record["speed"] = _writable(speeds)
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise JaxguardError(
                f"cannot write {self._run.metrics}: {error.strerror}; free some space and start again"
            ) from None
        finite = {
            name: value
            for name, value in (numbers | {f"speed/{k}": v for k, v in speeds.items()}).items()
            if math.isfinite(value)
        }
        for tracker in self._trackers:
            tracker.log(step, finite)
        validation = {name: value for name, value in numbers.items() if name.startswith("validation")}
        if validation:
            text = "  ".join(f"{name.removeprefix('validation/')} {value:.4f}" for name, value in validation.items())
            self.say(f"step {step}/{self._total_steps}  validation: {text}")
        if len(validation) < len(numbers):
            self._progress.update(step, _shown(numbers, speeds))

    def say(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        if self._writes:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Flush everything and end the progress bar."""
        if self._progress is not None:
            self._progress.__exit__()
            self._progress = None
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _shown(values: Mapping[str, float], speed: Mapping[str, float]) -> str:
    """The numbers of a step that the progress display shows."""
    formats = (
        (values, "loss", "loss {:.4f}"),
        (values, "learning_rate", "lr {:.2e}"),
        (speed, "tokens_per_second", "{:,.0f} tokens/s"),
        (speed, "examples_per_second", "{:.3g} examples/s"),
        (speed, "mfu", "MFU {:.1%}"),
    )
    return "  ".join(text.format(source[name]) for source, name, text in formats if name in source)


def rewind_metrics(path: Path, step: int | None) -> None:
    """Drop the records after `step` (all, when it is None), and a last line that a kill cut in half.

    The lines that stay keep their bytes.

    Raises:
        JaxguardError: another line is no record.
    """
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            continue
        if step is not None and _record(path, number, line)["step"] <= step:
            kept.append(line)
    if kept != lines:
        write_atomically(path, "".join(kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order, floats as floats; a half-written last line is left out.

    Raises:
        JaxguardError: another line is no record.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    records = [_record(path, n, line) for n, line in enumerate(lines, start=1) if line.endswith("\n")]
    return [_readable(record) for record in records]


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if isinstance(record["step"], int):
            return record
    except (ValueError, KeyError, TypeError):
        pass
    raise JaxguardError(
        f"{path}, line {number} is not a record of a step: {line.strip()[:80]!r}; mend or delete that line"
    )


def _writable(numbers: Mapping[str, float]) -> dict[str, Any]:
    return {
        k: v if math.isfinite(v) else "NaN" if math.isnan(v) else "Infinity" if v > 0 else "-Infinity"
        for k, v in numbers.items()
    }


def _readable(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: _readable(v) if isinstance(v, dict) else _NON_FINITE.get(v, v) if isinstance(v, str) else v
        for k, v in record.items()
    }
