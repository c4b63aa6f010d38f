"""From a study to its runs: every combination of every row's axes, each with a resolved config and a folder of its own."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from jaxguard.config import Config, load
from jaxguard.config import base as fields
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.config.study import CostConfig, RowConfig, Stage, StudyConfig, labelled, read_study
from jaxguard.utils.errors import JaxguardError

REPEATS = ("seed", "data.subset_seed")
"""Axes that repeat a run: results are averaged over them."""
PREPARING = ("distill", "build")
"""Sections that an override on the command line changes where such a stage prepares, and nowhere else."""


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        name: of the run and its folder.
        row: the row that it belongs to.
        labels: field of an axis -> the label of its value.
        base, overrides: the config by name and what is different; `config` is what that comes to.
        stages: what is done, in order.
        after: the runs whose output it reads.
        fields: its row.
        cost: what its cost is reckoned from.
    """

    name: str
    row: str
    labels: dict[str, str]
    base: str
    overrides: tuple[str, ...]
    config: Config
    stages: tuple[Stage, ...]
    after: tuple[str, ...]
    fields: RowConfig
    cost: CostConfig

    @property
    def folder(self) -> Path:
        return self.config.folder


@dataclass(frozen=True)
class Study:
    """A study, resolved.

    Attributes:
        name, folder: what it is called and where it lies.
        scale: None is the paper's own.
        fields: what its file says.
        prepared: what is needed first.
        runs: in order.
    """

    name: str
    folder: Path
    scale: str | None
    fields: StudyConfig
    prepared: tuple[Run, ...]
    runs: tuple[Run, ...]


def open_study(name: str, scale: str | None = None, overrides: Iterable[str] = ()) -> Study:
    """Read a study and resolve all of its runs.

    An override changes every run. One of a field that is an axis replaces the axis' values in the rows that have it and does
    nothing to the others; `name`, `run_folder` and `metric` are the study's own, and `cost.` changes the reckoning. What is
    prepared but read by no run is left out.

    Raises:
        JaxguardError: no such study, or a run whose config is not valid; it names the row.
    """
    found, study_name = read_study(name, scale)
    own, rest = _study_overrides(overrides)
    root = Path(str(own.get("run_folder", "runs")))
    study_name = str(own.get("name", study_name))
    folder = root / study_name
    if not study_name or "/" in study_name or study_name in (".", ".."):
        raise JaxguardError(f"name={study_name!r} is the study's folder: it must not be empty or hold a slash")
    cost = {key.removeprefix("cost."): value for key, value in own.items() if key.startswith("cost.")}
    tree = found.model_dump()
    changed = {"metric": own.get("metric", found.metric), "cost": {**tree["cost"], **cost}}
    found = fields.validate(StudyConfig, {**tree, **changed}, name)
    prepared = [
        _resolve(key, key, {}, row, found, folder, {"name": key}, _of_sections(rest, ("model", *row.stages)))
        for key, row in found.prepare.items()
    ]
    preparing = _of_sections(rest, PREPARING)
    rest = [text for text in rest if text not in preparing]
    axes = {field for row in found.rows.values() for field in row.axes}
    grids = {key: _grid(key, row, axes, rest, found, folder) for key, row in found.rows.items()}
    runs = tuple(run for grid in grids.values() for run in grid)
    return Study(study_name, folder, scale, found, _needed(prepared, runs), runs)


def _of_sections(overrides: Iterable[str], sections: Iterable[str]) -> list[str]:
    return [text for text in overrides if text.startswith(tuple(f"{section}." for section in sections))]


def _needed(prepared: list[Run], runs: Iterable[Run]) -> tuple[Run, ...]:
    """What of it a run reads, or something that is needed reads, in order."""
    readers, needed = list(runs), []
    for one in reversed(prepared):
        if any(f'"{one.folder}/' in json.dumps(run.config.model_dump(mode="json")) for run in readers):
            readers.append(one)
            needed.append(one)
    return tuple(reversed(needed))


def _study_overrides(overrides: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    own: dict[str, Any] = {}
    rest = []
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator:
            raise JaxguardError(f"override {text!r}: write it as field=value, for example data.subset_seed=[0,1]")
        if key in ("name", "run_folder", "metric") or key.startswith("cost."):
            own[key] = fields.scalar(value)
        else:
            rest.append(text)
    return own, rest


def _grid(
    key: str, row: RowConfig, all_axes: set[str], overrides: list[str], study: StudyConfig, folder: Path
) -> list[Run]:
    """Every combination of a row's axes."""
    axes, changes = dict(row.axes), []
    for text in overrides:
        field, _, value = text.partition("=")
        if field in axes:
            axes[field] = _new_values(text, fields.scalar(value))
        elif field not in all_axes and not _inner(row.set.get(field)):
            changes.append(text)
    row = row.model_copy(update={"set": {**study.set, **row.set}})
    runs = []
    for labels in product(*axes.values()):
        name = "-".join([key, *labels])
        chosen = dict(zip(axes, labels, strict=True))
        values = {field: axes[field][one] for field, one in chosen.items()}
        values |= {"name": name, "run_folder": str(folder)}
        runs.append(_resolve(name, key, chosen, row, study, folder, values, changes))
    return runs


def _new_values(text: str, value: Any) -> dict[str, Any]:
    try:
        return labelled(value)
    except ValueError as error:
        raise JaxguardError(f"override {text!r}: {error}") from None


def _inner(value: Any) -> bool:
    """Whether a value is the output of another row, which nothing on the command line may replace."""
    return "{study}" in json.dumps(value)


def _resolve(
    name: str,
    key: str,
    labels: dict[str, str],
    row: RowConfig,
    study: StudyConfig,
    folder: Path,
    values: Mapping[str, Any],
    changes: Iterable[str],
) -> Run:
    settings = {field: _placed(value, folder) for field, value in row.set.items()} | dict(values)
    overrides = [f"{field}={written(value)}" for field, value in settings.items()] + list(changes)
    base = row.config or study.config
    try:
        config = load(base, overrides)
        if "train" not in row.stages and "evaluate" in row.stages:
            overrides += _untrained(config)
            config = load(base, overrides)
        cost = fields.validate(CostConfig, {**study.cost.model_dump(), **row.cost}, "cost")
    except JaxguardError as error:
        raise JaxguardError(f"row {key}, run {name}: {error}") from None
    after = tuple(dict.fromkeys(row.after))
    return Run(name, key, labels, base, tuple(overrides), config, row.stages, after, row, cost)


def _untrained(config: Config) -> list[str]:
    """A row that trains nothing judges with the model itself."""
    settings = config.evaluate or EvaluateConfig()
    guards = [
        guard.model_dump(mode="json", exclude_defaults=True)
        | ({} if guard.checkpoint else {"checkpoint": config.model.checkpoint, "revision": config.model.revision})
        for guard in settings.guards
    ]
    return [f"evaluate.guards={written(guards)}"]


def _placed(value: Any, folder: Path) -> Any:
    if isinstance(value, str):
        return value.replace("{study}", str(folder))
    if isinstance(value, list):
        return [_placed(item, folder) for item in value]
    if isinstance(value, Mapping):
        return {key: _placed(item, folder) for key, item in value.items()}
    return value


def written(value: Any) -> str:
    """A value as the command line reads it."""
    if isinstance(value, str) and fields.scalar(value) == value:
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise JaxguardError(f"{value} is no finite number")
    return json.dumps(value, ensure_ascii=False)
