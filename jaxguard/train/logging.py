"""The log of a run: metrics.jsonl always, a progress bar, and the trackers that the config names.

metrics.jsonl is the record; the rest is for looking at. One JSON object a line:

    {"step": 50, "loss": 0.41, "learning_rate": 9.9e-07, ..., "speed": {"tokens_per_second": 1.2e4, ...}}

Everything outside "speed" is a function of the config and the data alone, so two runs of one config on one mesh write the same
lines except for "speed", however often they were interrupted. For that the loop must log everything about step s before it
saves the checkpoint of step s.

Floats are read back with the same bits; NaN and infinities, which JSON lacks, are written as strings: "NaN", "-Infinity".
"""

import importlib
import importlib.util
import json
import math
import os
import textwrap
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxguard.config import Config
from jaxguard.config.train import LogConfig
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically
from jaxguard.utils.parse import check, parse_json
from jaxguard.utils.progress import Progress
from jaxguard.utils.terminal import Console
from jaxguard.utils.versions import install

SHOWN = {
    "loss": "loss {:.4f}",
    "rollouts/reward": "reward {:.3f}",
    "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "examples_per_second": "{:.3g} examples/s",
    "mfu": "MFU {:.1%}",
}
"""The numbers of a step that the progress display shows."""

LogScalars = Callable[[int, Mapping[str, float]], None]


class RunLog(ExitStack):
    """The log of one run, a context manager. Only process 0 writes.

    Records of later steps than `step`, from which the run resumes (None when it starts), are removed from metrics.jsonl and hidden
    in TensorBoard: the run will repeat them.

    Attributes:
        validated: the step of the newest validation that is logged; on every process.

    Raises:
        JaxguardError: a line of metrics.jsonl is no record, or a tracker is not installed.
    """

    def __init__(
        self, folder: Path, config: Config, total_steps: int, step: int | None, console: Console | None = None
    ) -> None:
        super().__init__()
        self._metrics, self._total_steps = folder / "metrics.jsonl", total_steps
        self._writes = jax.process_index() == 0
        self.validated = -1
        if self._writes:
            rewind_metrics(self._metrics, step)
            if self._metrics.is_file():
                records = read_metrics(self._metrics)
                self.validated = max((x["step"] for x in records if "validation/loss" in x), default=-1)
            self._outputs: list[LogScalars] = []
            for log, close in _trackers(folder, config, step):
                self._outputs.append(log)
                self.callback(close)
            self._file = self.enter_context(self._metrics.open("a", encoding="utf-8"))
            self._progress = self.enter_context(Progress(config.name, total_steps, step or 0, console, unit=None))
        self.validated = int(multihost_utils.broadcast_one_to_all(np.int32(self.validated)))

    def log(self, step: int, values: Mapping[str, Any], speed: Mapping[str, Any] | None = None) -> None:
        """Record what config and data determine (`values`) and what the machine does (`speed`) after `step` completed steps.

        Raises:
            JaxguardError: the disk is full.
        """
        if "validation/loss" in values:
            self.validated = step
        if not self._writes:
            return
        numbers, speeds = ({name: float(x) for name, x in group.items()} for group in (values, speed or {}))

        def written(group: Mapping[str, float]) -> dict[str, Any]:
            return {name: x if math.isfinite(x) else json.dumps(x) for name, x in group.items()}

        record = {"step": int(step), **written(numbers), **({"speed": written(speeds)} if speeds else {})}
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise JaxguardError(
                f"cannot write {self._metrics}: {error.strerror}; free some space and run the command again"
            ) from None
        scalars = numbers | {f"speed/{name}": value for name, value in speeds.items()}
        for output in self._outputs:
            output(step, {name: value for name, value in scalars.items() if math.isfinite(value)})
        validation = {name: value for name, value in numbers.items() if name.startswith("validation")}
        if validation and step < self._total_steps:  # the last one is the command's result
            named = {name.removeprefix("validation/"): value for name, value in validation.items()}
            texts = [f"{name}\N{NO-BREAK SPACE}{value:.4f}" for name, value in distinct(named).items()]
            lines = textwrap.wrap(
                f"step {step}/{self._total_steps}  validation: {'  '.join(texts)}", 80, subsequent_indent="  "
            )
            self.print("\n".join(lines).replace("\N{NO-BREAK SPACE}", " "))
        if len(validation) < len(numbers):
            shown = numbers | speeds
            self._progress.update(step, "  ".join(SHOWN[name].format(shown[name]) for name in SHOWN if name in shown))

    def skip(self) -> None:
        """Leave the time since the last step out of the time left: a program was compiled."""
        if self._writes:
            self._progress.skip()

    def print(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self._writes:
            self._progress.say(text)


def distinct(metrics: Mapping[str, float]) -> dict[str, float]:
    """Leave out the metrics that repeat another: of the only mode, and of both harms where one is asked."""
    modes = {name.partition("/")[0] for name in metrics if "/" in name}
    kept = {}
    for name, value in metrics.items():
        mode, _, metric = name.rpartition("/")
        alone = not all(f"{mode}/{question}_f1" in metrics for question in ("prompt_harm", "response_harm"))
        repeats = "loss" in metrics and len(modes) == 1 and mode and metric == "loss"
        if not repeats and not (metric.startswith("harm_") and alone):
            kept[metric if len(modes) == 1 else name] = value
    return kept


_TRACKERS = {"tensorboard": "tensorboardX", "trackio": "trackio", "wandb": "wandb"}
"""Field of config.log -> the package that it needs."""


def check_trackers(config: LogConfig) -> None:
    """Raise a JaxguardError if the package of a tracker that the config names is not installed."""
    for field, name in _TRACKERS.items():
        if getattr(config, field) and importlib.util.find_spec(name) is None:
            raise _not_installed(field, f"{name} is not installed")


def _trackers(folder: Path, config: Config, step: int | None) -> Iterator[tuple[LogScalars, Callable[[], Any]]]:
    """Start the trackers of config.log; each is imported only here. Yields what logs scalars, and what closes it."""
    about = {"project": config.log.project, "name": config.name, "config": config.model_dump(mode="json")}
    if config.log.tensorboard:
        # purge_step hides what an earlier start logged from this step on. The suffix keeps two starts within one second
        # out of one file, where the second would overwrite the first.
        first = 0 if step is None else step + 1
        options = {"purge_step": first, "flush_secs": 10, "filename_suffix": f".{first}.{os.getpid()}"}
        writer = _import("tensorboard").SummaryWriter(str(folder / "tensorboard"), **options)

        def log(step: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield log, writer.close
    if config.log.trackio:
        trackio = _import("trackio").init(**about, resume="allow")
        yield lambda step, values: trackio.log(dict(values), step=step), trackio.finish
    if config.log.wandb:
        id_file = folder / "wandb_id.txt"
        if not id_file.is_file():
            write_atomically(id_file, uuid.uuid4().hex[:12])
        run_id = id_file.read_text(encoding="utf-8").strip()
        wandb = _import("wandb").init(**about, id=run_id, resume="allow", dir=str(folder))
        # wandb's own step only increases, and would drop what a resumed run repeats; so the step is a value like the others.
        wandb.define_metric("*", step_metric="step")
        yield lambda step, values: wandb.log({"step": step, **values}), wandb.finish


def _import(field: str) -> Any:
    try:
        return importlib.import_module(_TRACKERS[field])
    except ImportError as error:
        raise _not_installed(field, f"{_TRACKERS[field]} cannot be imported ({error})") from None


def _not_installed(field: str, problem: str) -> JaxguardError:
    command = install(field) if field != "tensorboard" else f"python -m pip install {_TRACKERS[field]}"
    return JaxguardError(f"log.{field} is true but {problem}: {command}, or set log.{field}=false")


_Record = dict[str, int | float | dict[str, int | float]]
"""A line of metrics.jsonl."""


def rewind_metrics(path: Path, step: int | None) -> None:
    """Remove the records after `step` (all, when it is None), and an incomplete last line. Other lines keep their bytes."""
    if path.is_file():
        records = [] if step is None else list(_records(path))
        write_atomically(path, "".join(line for line, record in records if record["step"] <= (step or 0)))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl, in order, floats as floats; an incomplete last line is left out.

    Raises:
        JaxguardError: another line is no record.
    """
    return [record for _, record in _records(path)]


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (line, its record) of every complete line."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            return
        try:
            record = parse_json(line, _Record, f"{path}, line {number}")
            numbers = {name: value for name, value in record.items() if name != "speed"}
            check(numbers, dict[str, int | float], f"{path}, line {number}")
            check(record.get("step"), int, f"{path}, line {number}: step")
        except JaxguardError as error:
            raise JaxguardError(f"{error}; correct or delete that line") from None
        yield line, record
