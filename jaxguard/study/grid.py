"""Expand a study into runs: every combination of each row's axes, with a resolved config and a folder of its own."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from jaxguard.config import Config, load, parsed
from jaxguard.config.base import scalar
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.config.study import CostConfig, RowConfig, Stage, StudyConfig, labelled, read_study
from jaxguard.data.inputs import input_paths
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import PathPart, check
from jaxguard.utils.secrets import revealed

PREPARING = ("distill", "build")
"""Config sections that overrides change in prepared runs only."""


def words(stage: Stage) -> str:
    """Return what follows `jaxguard` on the command line of a row's stage: a key of READS."""
    return {"build": "data build", "pairs": "mine pairs"}.get(stage, stage)


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        key, row: the row's name, and the row with the study's `set`.
        labels: axis -> label of its value.
        base, overrides: the config's name and what differs; `config` is the result.
        prepared: makes data for several studies, and is done when its output exists.
        parents: earlier runs whose output this one reads.
    """

    key: str
    row: RowConfig
    labels: dict[str, str]
    base: str
    overrides: tuple[str, ...]
    config: Config
    cost: CostConfig
    prepared: bool
    parents: tuple["Run", ...] = field(default=())

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def folder(self) -> Path:
        return self.config.folder

    def inputs(self, stage: Stage) -> set[Path]:
        """Return the local paths that a stage reads, from the config fields that name them."""
        return set(map(Path, input_paths(self.config, words(stage)).values()))

    def reads(self, other: "Run") -> bool:
        return any(path.is_relative_to(other.folder) for stage in self.row.stages for path in self.inputs(stage))


@dataclass(frozen=True)
class Study:
    """A study as written, at a scale (None is the paper's own), its runs, and those prepared runs that make what they read."""

    folder: Path
    scale: str | None
    definition: StudyConfig
    prepared: tuple[Run, ...]
    runs: tuple[Run, ...]


def open_study(name: str, scale: str | None = None, overrides: Iterable[str] = ()) -> Study:
    """Read a study and resolve all of its runs.

    An override changes every run, over the study's own. One of an axis replaces its values in the rows that have it and leaves
    other rows alone. `name`, `run_folder`, `metric` and `cost.` belong to the study. Prepared runs that no run reads are left out.
    JaxguardError: no such study, or a run whose config is not valid; it names the row.
    """
    own: dict[str, Any] = {"cost": {}}
    changes: list[str] = []
    for key, value, text in parsed(overrides):
        if key in ("name", "run_folder", "metric"):
            own[key] = value
        elif key.startswith("cost."):
            own["cost"][key.removeprefix("cost.")] = value
        else:
            changes.append(text)
    settings = {field: value for field, value in own.items() if field in ("cost", "metric")}
    definition, study_name = read_study(name, scale, settings)
    study_name = check(own.get("name", study_name), PathPart, "name")
    folder = Path(str(own.get("run_folder", "runs"))) / study_name
    changes = [f"{field}={written(value)}" for field, value in definition.overrides.items()] + changes

    prepared: list[Run] = []
    for key, row in definition.prepare.items():
        own_changes = [text for text in changes if text.partition(".")[0] in ("model", *row.stages)]
        run = _resolve(definition, None, key, row, {}, own_changes)
        prepared.append(replace(run, parents=tuple(filter(run.reads, prepared))))
    runs: list[Run] = []
    for run in _grid(definition, folder, [text for text in changes if text.partition(".")[0] not in PREPARING]):
        rows = [other for other in runs if other.key in run.row.after]
        runs.append(replace(run, parents=(*filter(run.reads, prepared), *rows)))
    needed = {parent.folder for run in runs for parent in run.parents}
    for run in reversed(prepared):
        needed |= {parent.folder for parent in run.parents if run.folder in needed}
    return Study(folder, scale, definition, tuple(run for run in prepared if run.folder in needed), tuple(runs))


def _grid(study: StudyConfig, folder: Path, overrides: Sequence[str]) -> Iterator[Run]:
    """Yield a run for every combination of each row's axes."""
    all_axes = {axis for row in study.rows.values() for axis in row.axes}
    for key, row in study.rows.items():
        axes, changes = dict(row.axes), []
        for text in overrides:
            name, _, value = text.partition("=")
            if name in axes:
                try:
                    axes[name] = labelled(scalar(value))
                except ValueError as error:
                    raise JaxguardError(f"override {text!r}: {error}") from None
            elif name not in all_axes and "{study}" not in str(row.set.get(name)):  # another row's output stays
                changes.append(text)
        whole = row.model_copy(update={"axes": axes, "set": {**study.set, **row.set}})
        for labels in product(*axes.values()):
            yield _resolve(study, folder, key, whole, dict(zip(axes, labels, strict=True)), changes)


def _resolve(
    study: StudyConfig, folder: Path | None, key: str, row: RowConfig, labels: dict[str, str], changes: Iterable[str]
) -> Run:
    """Load the config of a row at some labels; without a folder it is a prepared run."""
    name, base = "-".join([key, *labels.values()]), row.config or study.config
    values = row.set | {axis: row.axes[axis][label] for axis, label in labels.items()} | {"name": name}
    if folder is not None:
        values["run_folder"] = str(folder)
    overrides = [f"{field}={written(value)}".replace("{study}", str(folder)) for field, value in values.items()]
    overrides += changes
    try:
        config = load(base, overrides)
        if not {"train", "reinforce"} & {*row.stages} and "evaluate" in row.stages:
            # Without training, a guard is by default the model itself.
            model = {"checkpoint": config.model.checkpoint, "revision": config.model.revision}
            guards = [
                guard.model_dump(exclude_defaults=True) | ({} if guard.checkpoint else model)
                for guard in (config.evaluate or EvaluateConfig()).guards
            ]
            overrides.append(f"evaluate.guards={written(guards)}")
            config = load(base, overrides)
        cost = check({**study.cost.model_dump(), **row.cost}, CostConfig, "cost")
    except JaxguardError as error:
        raise JaxguardError(f"row {key}, run {name}: {error}") from None
    return Run(key, row, labels, base, tuple(overrides), config, cost, prepared=folder is None)


def written(value: Any) -> str:
    """Format a value as the command line parses it."""
    if isinstance(value, str) and scalar(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False, default=revealed)
