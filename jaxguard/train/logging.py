"""The log of a run: metrics.jsonl always, a progress bar, and the trackers that the config names.

metrics.jsonl is the record; the rest is for looking at. One JSON object a line:

    {"step": 50, "loss": 0.41, "learning_rate": 9.9e-07, ..., "speed": {"tokens_per_second": 1.2e4, ...}}

Everything outside "speed" is a function of the config and the data alone, so two runs of one config on one mesh write the same
lines except for "speed", however often they were interrupted. For that the loop must log everything about step s before it
saves the checkpoint of step s.

Floats are written so that reading gives the same bits. JSON has no NaN or infinity: they are written as the strings "NaN",
"Infinity" and "-Infinity", and read_metrics turns them back into floats.
"""

import importlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxguard.config import Config
from jaxguard.train.run_folder import RunFolder
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically
from jaxguard.utils.progress import Progress

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

LogScalars = Callable[[int, Mapping[str, float]], None]
"""(step, name -> finite value) -> None."""


class RunLog(ExitStack):
    """The log of one run, a context manager: call `rewind` once, then `log`. Only process 0 writes."""

    def __init__(self, run: RunFolder, config: Config, total_steps: int, console: Console | None = None) -> None:
        super().__init__()
        self._writes = jax.process_index() == 0
        self._run, self._config = run, config
        self._total_steps, self._console = total_steps, console or Console()
        self._outputs: list[LogScalars] | None = None

    def rewind(self, step: int | None) -> "RunLog":
        """Start to log after `step`, from which the run resumes; None when it starts.

        Records of later steps, which the run will repeat, are removed from metrics.jsonl and hidden in TensorBoard.

        Raises:
            JaxguardError: a line of metrics.jsonl is no record, or a tracker is not installed.
        """
        if self._writes:
            rewind_metrics(self._run.metrics, step)
            self._outputs = []
            for log, close in _trackers(self._run, self._config, step):
                self._outputs.append(log)
                self.callback(close)
            self._file = self.enter_context(self._run.metrics.open("a", encoding="utf-8"))
            progress = Progress(self._config.name, self._total_steps, step or 0, self._console, unit=None)
            self._progress = self.enter_context(progress)
        return self

    def log(self, step: int, values: Mapping[str, Any], speed: Mapping[str, Any] | None = None) -> None:
        """Record `values` after `step` completed steps.

        Args:
            step: number of completed steps.
            values: what the config and the data determine: loss, learning_rate, gradient_norm, validation/...
            speed: what the machine determines: seconds, tokens_per_second, examples_per_second, mfu.

        Raises:
            JaxguardError: the disk is full.
        """
        if not self._writes:
            return
        if self._outputs is None:
            raise RuntimeError("call rewind before log")
        numbers = {name: float(value) for name, value in values.items()}
        speeds = {name: float(value) for name, value in (speed or {}).items()}
        record: dict[str, Any] = {"step": int(step), **_to_json(numbers)}
        if speeds:
            record["speed"] = _to_json(speeds)
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise JaxguardError(
                f"cannot write {self._run.metrics}: {error.strerror}; free some space and run the command again"
            ) from None
        scalars = numbers | {f"speed/{name}": value for name, value in speeds.items()}
        for output in self._outputs:
            output(step, {name: value for name, value in scalars.items() if math.isfinite(value)})
        validation = {name: value for name, value in numbers.items() if name.startswith("validation")}
        if validation:
            text = "  ".join(f"{name.removeprefix('validation/')} {value:.4f}" for name, value in validation.items())
            self.print(f"step {step}/{self._total_steps}  validation: {text}")
        if len(validation) < len(numbers):
            self._progress.update(step, _summarize(numbers | speeds))

    def print(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self._writes:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _summarize(numbers: Mapping[str, float]) -> str:
    """Format the numbers of a step that the progress display shows."""
    formats = {
        "loss": "loss {:.4f}",
        "learning_rate": "lr {:.2e}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "examples_per_second": "{:.3g} examples/s",
        "mfu": "MFU {:.1%}",
    }
    return "  ".join(text.format(numbers[name]) for name, text in formats.items() if name in numbers)


def _trackers(run: RunFolder, config: Config, step: int | None) -> Iterator[tuple[LogScalars, Callable[[], Any]]]:
    """Start the trackers of config.log; each is imported only here. Yields what logs scalars, and what closes it."""
    settings = config.model_dump(mode="json")
    if config.log.tensorboard:
        # purge_step hides what an earlier start logged from this step on. The suffix keeps two starts within one second
        # out of one file, where the second would overwrite the first.
        first = 0 if step is None else step + 1
        suffix = f".{first}.{os.getpid()}"
        writer = _import("tensorboard", "tensorboardX").SummaryWriter(
            str(run.tensorboard), purge_step=first, flush_secs=10, filename_suffix=suffix
        )

        def log(step: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield log, writer.close
    if config.log.trackio:
        trackio = _import("trackio", "trackio").init(
            project=config.log.project, name=config.name, config=settings, resume="allow"
        )
        yield lambda step, values: trackio.log(dict(values), step=step), trackio.finish
    if config.log.wandb:
        id_file = run.path / "wandb_id.txt"
        if not id_file.is_file():
            write_atomically(id_file, uuid.uuid4().hex[:12])
        wandb = _import("wandb", "wandb").init(
            project=config.log.project,
            name=config.name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            config=settings,
            dir=str(run.path),
        )
        # wandb's own step only increases, and would drop what a resumed run repeats; so the step is a value like the others.
        wandb.define_metric("*", step_metric="step")
        yield lambda step, values: wandb.log({"step": step, **values}), wandb.finish


def _import(field: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = f"jaxguard[{field}]" if field != "tensorboard" else name
        raise JaxguardError(
            f"log.{field} is true but {name} cannot be imported ({error}): "
            f"pip install '{extra}', or set log.{field}=false"
        ) from None


def rewind_metrics(path: Path, step: int | None) -> None:
    """Remove the records after `step` (all, when it is None), and an incomplete last line. Other lines keep their bytes.

    Raises:
        JaxguardError: another line is no record.
    """
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    records = () if step is None else _records(path, lines)
    remaining = [line for line, record in zip(lines, records, strict=False) if record["step"] <= (step or 0)]
    if remaining != lines:
        write_atomically(path, "".join(remaining))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl, in order, floats as floats; an incomplete last line is left out.

    Raises:
        JaxguardError: another line is no record.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [_from_json(record) for record in _records(path, lines)]


def _records(path: Path, lines: list[str]) -> Iterator[dict[str, Any]]:
    complete = lines[:-1] if lines and not lines[-1].endswith("\n") else lines
    for number, line in enumerate(complete, start=1):
        try:
            record = json.loads(line)
            valid = isinstance(record["step"], int)
        except (ValueError, KeyError, TypeError):
            valid = False
        if not valid:
            raise JaxguardError(
                f"{path}, line {number} is not a record of a step: {line.strip()[:80]!r}; correct or delete that line"
            )
        yield record


def _to_json(numbers: Mapping[str, float]) -> dict[str, Any]:
    return {
        k: v if math.isfinite(v) else "NaN" if math.isnan(v) else "Infinity" if v > 0 else "-Infinity"
        for k, v in numbers.items()
    }


def _from_json(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: _from_json(v) if isinstance(v, dict) else _NON_FINITE.get(v, v) if isinstance(v, str) else v
        for k, v in record.items()
    }
