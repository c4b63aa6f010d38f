"""Where the curves go besides metrics.jsonl: TensorBoard, trackio, wandb; each imported only when asked for."""

import importlib
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxguard.config import Config
from jaxguard.train.run_folder import RunFolder
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically


@dataclass(frozen=True)
class Tracker:
    """One place that scalars go to."""

    log: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]


def open_trackers(run: RunFolder, config: Config, step: int | None) -> list[Tracker]:
    """The trackers that config.log asks for.

    Args:
        run: the run's folder.
        config: the resolved config, shown by trackio and wandb.
        step: the step that the run goes on from, None when it starts anew.

    Raises:
        JaxguardError: one is not installed; the message names the extra.
    """
    opened: list[Tracker] = []
    try:
        if config.log.tensorboard:
            opened.append(_tensorboard(run, step))
        if config.log.trackio:
            opened.append(_trackio(config))
        if config.log.wandb:
            opened.append(_wandb(run, config))
    except BaseException:
        for tracker in opened:
            tracker.close()
        raise
    return opened


def _tensorboard(run: RunFolder, step: int | None) -> Tracker:
    module = _module("tensorboard", "tensorboardX")
    first = 0 if step is None else step + 1
    # purge_step hides what an earlier start logged from this step on. The suffix keeps two starts within one second
    # out of one file, where the second would overwrite the first.
    suffix = f".{first}.{os.getpid()}"
    writer = module.SummaryWriter(str(run.tensorboard), purge_step=first, flush_secs=10, filename_suffix=suffix)

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def _trackio(config: Config) -> Tracker:
    module = _module("trackio", "trackio")
    started = module.init(
        project=config.log.project, name=config.name, config=config.model_dump(mode="json"), resume="allow"
    )
    return Tracker(lambda step, values: started.log(dict(values), step=step), started.finish)


def _wandb(run: RunFolder, config: Config) -> Tracker:
    module = _module("wandb", "wandb")
    name = run.path / "wandb_id.txt"
    if not name.is_file():
        write_atomically(name, uuid.uuid4().hex[:12])
    started = module.init(
        project=config.log.project,
        name=config.name,
        id=name.read_text(encoding="utf-8").strip(),
        resume="allow",
        config=config.model_dump(mode="json"),
        dir=str(run.path),
    )
    # wandb's own step only goes up, and would drop what a resumed run repeats; so the step is a value like the others.
    started.define_metric("*", step_metric="step")
    return Tracker(lambda step, values: started.log({"step": step, **values}), started.finish)


def _module(field: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = f"jaxguard[{field}]" if field != "tensorboard" else name
        raise JaxguardError(
            f"log.{field} is true but {name} cannot be imported ({error}): "
            f"pip install '{extra}', or set log.{field}=false"
        ) from None
