"""Expand a study into runs: every combination of each row's axes, with a resolved config and a folder of its own."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from jaxguard.config import Config, load
from jaxguard.config.base import scalar, validate
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.config.study import CostConfig, RowConfig, Stage, StudyConfig, labelled, read_study
from jaxguard.utils.errors import JaxguardError

REPEATS = ("seed", "data.subset_seed")
"""Axes that repeat a run: results are averaged over them."""
PREPARING = ("distill", "build")
"""Config sections that overrides change in prepared runs only."""


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        name: of the run and its folder.
        key: the row's name.
        row: the row as written.
        labels: axis -> label of its value.
        base, overrides: the config's name and what differs; `config` is the result.
        parents: earlier runs whose output this one reads.
        cost: assumptions for its cost.
    """

    name: str
    key: str
    row: RowConfig
    labels: dict[str, str]
    base: str
    overrides: tuple[str, ...]
    config: Config
    parents: tuple["Run", ...]
    cost: CostConfig

    @property
    def folder(self) -> Path:
        return self.config.folder

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.row.stages

    def inputs(self, stage: Stage) -> set[Path]:
        """Return the local paths that a stage reads, from the config fields that name them."""
        config = self.config
        sources = [*config.data.train, *config.data.validation]
        paths = [config.model.checkpoint]
        if stage == "build" and config.build is not None:
            sources += [source for each in config.build.sets for source in (*each.sources, *each.append)]
            sources += config.build.benchmarks
        if stage == "evaluate" and config.evaluate is not None:
            sources += config.evaluate.validation
            paths += [benchmark.path or "" for benchmark in config.evaluate.benchmarks]
            paths += [guard.checkpoint or "" for guard in config.evaluate.guards]
        return {Path(path) for path in (*paths, *(source.path for source in sources)) if path}


@dataclass(frozen=True)
class Study:
    """A resolved study.

    Attributes:
        name, folder: its name and folder.
        scale: None is the paper's own.
        definition: the study as written.
        prepared: runs that make what the others read.
        runs: in order.
    """

    name: str
    folder: Path
    scale: str | None
    definition: StudyConfig
    prepared: tuple[Run, ...]
    runs: tuple[Run, ...]


def open_study(name: str, scale: str | None = None, overrides: Iterable[str] = ()) -> Study:
    """Read a study and resolve all of its runs.

    An override changes every run. One of an axis replaces its values in the rows that have it and leaves other rows alone.
    `name`, `run_folder`, `metric` and `cost.` belong to the study. Prepared runs that no run reads are left out.

    Raises:
        JaxguardError: no such study, or a run whose config is not valid; it names the row.
    """
    definition, study_name = read_study(name, scale)
    own, changes = _split_overrides(overrides)
    study_name = str(own.pop("name", study_name))
    if not study_name or "/" in study_name or study_name in (".", ".."):
        raise JaxguardError(f"name={study_name!r} is the study's folder: it must not be empty or hold a slash")
    folder = Path(str(own.pop("run_folder", "runs"))) / study_name
    tree = definition.model_dump()
    cost = {key.removeprefix("cost."): value for key, value in own.items() if key != "metric"}
    tree |= {"metric": own.get("metric", definition.metric), "cost": {**tree["cost"], **cost}}
    definition = validate(StudyConfig, tree, name)
    prepared = [
        _resolve(key, key, row, {}, definition, folder, {"name": key}, _of_sections(changes, ("model", *row.stages)))
        for key, row in definition.prepare.items()
    ]
    preparing = _of_sections(changes, PREPARING)
    changes = [text for text in changes if text not in preparing]
    axes = {axis for row in definition.rows.values() for axis in row.axes}
    runs: list[Run] = []
    for key, row in definition.rows.items():
        parents = tuple(run for run in runs if run.key in row.after)
        runs += [replace(run, parents=parents) for run in _grid(key, row, axes, changes, definition, folder)]
    return Study(study_name, folder, scale, definition, _needed(prepared, runs), tuple(runs))


def _of_sections(overrides: Iterable[str], sections: Iterable[str]) -> list[str]:
    return [text for text in overrides if text.startswith(tuple(f"{section}." for section in sections))]


def _needed(prepared: list[Run], runs: Iterable[Run]) -> tuple[Run, ...]:
    """Return the prepared runs whose output another run reads, in order."""
    readers, needed = list(runs), []
    for run in reversed(prepared):
        paths = (path for reader in readers for stage in reader.stages for path in reader.inputs(stage))
        if any(path.is_relative_to(run.folder) for path in paths):
            readers.append(run)
            needed.append(run)
    return tuple(reversed(needed))


def _split_overrides(overrides: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Split overrides into the study's own fields and those of its runs."""
    own: dict[str, Any] = {}
    rest = []
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator:
            raise JaxguardError(f"override {text!r}: write it as field=value, for example data.subset_seed=[0,1]")
        if key in ("name", "run_folder", "metric") or key.startswith("cost."):
            own[key] = scalar(value)
        else:
            rest.append(text)
    return own, rest


def _grid(
    key: str, row: RowConfig, all_axes: set[str], overrides: list[str], study: StudyConfig, folder: Path
) -> list[Run]:
    """Resolve every combination of a row's axes."""
    axes, changes = dict(row.axes), []
    for text in overrides:
        field, _, value = text.partition("=")
        if field in axes:
            try:
                axes[field] = labelled(scalar(value))
            except ValueError as error:
                raise JaxguardError(f"override {text!r}: {error}") from None
        elif field not in all_axes and "{study}" not in str(row.set.get(field)):  # another row's output stays
            changes.append(text)
    row = row.model_copy(update={"set": {**study.set, **row.set}})
    runs = []
    for labels in product(*axes.values()):
        name = "-".join([key, *labels])
        by_axis = dict(zip(axes, labels, strict=True))
        values = {field: axes[field][label] for field, label in by_axis.items()}
        values |= {"name": name, "run_folder": str(folder)}
        runs.append(_resolve(name, key, row, by_axis, study, folder, values, changes))
    return runs


def _resolve(
    name: str,
    key: str,
    row: RowConfig,
    labels: dict[str, str],
    study: StudyConfig,
    folder: Path,
    values: Mapping[str, Any],
    changes: Iterable[str],
) -> Run:
    overrides = [f"{field}={written(value)}" for field, value in {**row.set, **values}.items()]
    overrides = [text.replace("{study}", str(folder)) for text in overrides] + list(changes)
    base = row.config or study.config
    try:
        config = load(base, overrides)
        if "train" not in row.stages and "evaluate" in row.stages:
            overrides.append(f"evaluate.guards={written(_untrained_guards(config))}")
            config = load(base, overrides)
        cost = validate(CostConfig, {**study.cost.model_dump(), **row.cost}, "cost")
    except JaxguardError as error:
        raise JaxguardError(f"row {key}, run {name}: {error}") from None
    return Run(name, key, row, labels, base, tuple(overrides), config, (), cost)


def _untrained_guards(config: Config) -> list[dict[str, Any]]:
    """Return the guards of a row that trains nothing: by default, the model itself."""
    model = {"checkpoint": config.model.checkpoint, "revision": config.model.revision}
    return [
        guard.model_dump(mode="json", exclude_defaults=True) | ({} if guard.checkpoint else model)
        for guard in (config.evaluate or EvaluateConfig()).guards
    ]


def written(value: Any) -> str:
    """Format a value as the command line parses it."""
    if isinstance(value, str) and scalar(value) == value:
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise JaxguardError(f"{value} is not a finite number")
    return json.dumps(value, ensure_ascii=False)
