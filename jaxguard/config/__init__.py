"""The run's configuration: one frozen, typed tree, read from YAML.

A config file holds only what differs from the defaults, or from the one file that it `extends`. Dotted overrides
(`optimizer.learning_rate=2e-6`) come last. A stage shows, and lets the command line change, only the schemas that it reads.
"""

import typing
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeAlias

import yaml
from pydantic import model_validator

from jaxguard.config.base import CONFIG_FOLDER, NonNegative, Schema, beside, find_yaml, origin_of, scalar
from jaxguard.config.data import BuildConfig, DataConfig, DistillConfig
from jaxguard.config.evaluate import EvaluateConfig, MineConfig
from jaxguard.config.reinforce import ReinforceConfig
from jaxguard.config.train import CheckpointConfig, LogConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import Fields, PathPart, PathText, check, read_yaml

Source: TypeAlias = "str | Path | Mapping[str, Any] | Config"
"""A config's name, its path, the tree that a file holds, or the config itself."""
Overrides: TypeAlias = Iterable[str] | Mapping[str, Any]
"""Texts such as train.epochs=3, or dotted field -> value."""

RUN = ("name", "run_folder", "seed", "model", "data")
"""Fields of Config that every stage reads."""
READS: Mapping[str, tuple[str, ...]] = {
    "data": (*RUN, "train"),
    "data build": (*RUN, "build"),
    "distill": (*RUN, "distill"),
    "train": (*RUN, "optimizer", "train", "mesh", "checkpoint", "log"),
    "evaluate": (*RUN, "train", "mesh", "evaluate"),
    "mine": (*RUN, "train", "mesh", "evaluate", "mine"),
    "mine pairs": (*RUN, "mine"),
    "reinforce": (*RUN, "optimizer", "train", "mesh", "checkpoint", "log", "reinforce"),
    "plan": (*RUN, "optimizer", "train", "mesh", "reinforce"),
}
"""Stage -> the fields of Config that it reads."""
NO_EFFECT = (
    "checkpoint.", "log.", "data.prefetch", "train.export", "train.evaluate_every", "mesh.coordinator", "reinforce.endpoint",
    "reinforce.api_key_env", "reinforce.collapse_steps", "evaluate.batch",
)  # fmt: skip
"""Fields that do not change what a stage makes, but how, or how much of it is written down."""
ROUNDING = (
    "mesh.", "model.attention", "model.remat", "model.query_chunk", "model.loss_chunk", "train.accumulation",
    "reinforce.batch",
)  # fmt: skip
"""Fields with an effect on rounding only: sums are added up in another order."""


class Config(Schema):
    """A whole run."""

    name: PathPart
    """Name of the run and of its folder; by default the file's name."""
    run_folder: PathText = "runs"
    """The run's folder is run_folder/name."""
    seed: NonNegative = 0
    """Seed of the order of the examples, and of which keep their trace in dual mode."""
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    distill: DistillConfig | None = None
    build: BuildConfig | None = None
    evaluate: EvaluateConfig | None = None
    mine: MineConfig | None = None
    reinforce: ReinforceConfig | None = None

    @property
    def folder(self) -> Path:
        return Path(self.run_folder) / self.name

    @model_validator(mode="after")
    def _check(self) -> Self:
        data = self.data
        if not data.reasoning_marker or not data.direct_marker or data.reasoning_marker == data.direct_marker:
            raise ValueError("data.reasoning_marker and data.direct_marker must differ and not be empty")
        if data.mode == "dual" and data.dual_reasoning_share in (0, 1):
            only = "direct" if data.dual_reasoning_share == 0 else "reasoning"
            raise ValueError(
                f"data.dual_reasoning_share={data.dual_reasoning_share:g} trains one mode: set data.mode={only}"
            )
        if self.model.attention in ("flash", "cudnn") and self.model.compute_dtype == "float32":
            raise ValueError(
                f"model.attention={self.model.attention} computes in bfloat16 only; set model.compute_dtype=bfloat16"
            )
        return self


def load(source: Source, overrides: Overrides = (), folder: Path = CONFIG_FOLDER, stage: str | None = None) -> Config:
    """Read a config and apply overrides, of which the last one given to a field wins.

    Names are looked up in `folder`; what a file `extends`, and the paths that it holds, lie beside it or else in configs/ and in
    the working directory. A `stage` (a key of READS) takes
    overrides of what it reads only, and its absent schemas are filled in. JaxguardError: no such file, unknown or ill-typed
    field, impossible combination, override of what is not read.
    """
    if isinstance(source, Config):
        tree, origin = source.model_dump(), source.name
    elif isinstance(source, Mapping):
        tree, origin = _extended(source, CONFIG_FOLDER, "config"), "config"
    else:
        path = find_yaml(str(source), folder, "config")
        tree = {"name": path.stem, **_extended(_read(path), path.parent, str(path))}
        origin = str(path)
    given: dict[str, str] = {}
    for key, value, text in parsed(overrides):
        field = key.partition(".")[0]
        if stage is not None and field in Config.model_fields and field not in READS[stage]:
            readers = " and ".join(reader for reader, fields in READS.items() if field in fields)
            raise JaxguardError(f"override {text!r}: {stage} does not read {field!r}; it is read by {readers}")
        tree, given[key] = _put(tree, key.split("."), value, text), text
    read = READS[stage] if stage else READS["train"]
    tree |= {
        field: {} for field in ("build", "evaluate", "mine", "reinforce") if field in read and tree.get(field) is None
    }
    config = check(tree, Config, partial(origin_of, origin, given))
    subset, batch_size = config.data.subset, config.train.batch_size
    if "train" in read and subset is not None and subset < batch_size:
        message = f"data.subset={subset} is smaller than train.batch_size={batch_size}"
        raise JaxguardError(f"{origin_of(origin, given, '', message)}: {message}")
    return config


def dump(config: Config, stage: str | None = None) -> str:
    """Return the resolved config, or what a stage reads of it, as YAML; secrets are masked, else it loads as the same config."""
    include = set(READS[stage]) if stage else None
    return yaml.safe_dump(config.model_dump(mode="json", include=include), sort_keys=False, allow_unicode=True)


def read_by(stage: str, overrides: Iterable[str]) -> list[str]:
    """Return those of the overrides that a stage takes."""
    return [text for text in overrides if text.partition("=")[0].partition(".")[0] in READS[stage]]


def read_dump(path: Path) -> Config:
    """Read what `dump` wrote: its paths are resolved."""
    return check(read_yaml(path, Fields), Config, str(path))


def _read(path: Path) -> dict[str, Any]:
    """Read the fields of a config file, with its paths resolved: they are beside the file, else in the working directory."""
    return typing.cast("dict[str, Any]", beside(read_yaml(path, Fields), Config, path.parent))


def _extended(tree: Mapping[str, Any], folder: Path, origin: str) -> dict[str, Any]:
    """Return a tree over the one that it extends: a file of `folder`, or else of configs/."""
    tree = dict(tree)
    if "extends" not in tree:
        return tree
    name = str(tree.pop("extends"))
    path = find_yaml(name, folder if (folder / f"{name}.yaml").is_file() else CONFIG_FOLDER, "config")
    extended = _read(path)
    if "extends" in extended:
        text = f"extends {extended['extends']!r}, and {origin} extends it; inheritance has one level only"
        raise JaxguardError(f"{path}: {text}")
    extended.pop("name", None)  # two runs that share a folder would overwrite each other
    return dict(_merged(extended, tree))


def parsed(overrides: Overrides) -> Iterator[tuple[str, Any, str]]:
    """Yield each override's dotted field, its value, and how it is quoted in errors."""
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            yield key, str(value) if isinstance(value, Path) else value, f"{key}={value}"
        return
    for text in [overrides] if isinstance(overrides, str) else overrides:
        key, separator, value = text.partition("=")
        if not separator:
            raise JaxguardError(f"override {text!r}: write it as field=value, for example train.epochs=3")
        try:
            yield key.strip(), scalar(value), text
        except JaxguardError as error:
            raise JaxguardError(f"override {text!r}: {error}") from None


def _put(tree: Any, keys: list[str], value: Any, override: str) -> Any:
    """Return a copy of the tree with the value at dotted `keys`; a number is an index into a list, from 0."""
    if not keys:
        return _merged(tree, value)
    key, *rest = keys
    if isinstance(tree, list | tuple):
        if not key.isdigit() or int(key) >= len(tree):
            raise JaxguardError(f"override {override!r}: {key!r} is no index into a list of {len(tree)}; count from 0")
        return [_put(item, rest, value, override) if i == int(key) else item for i, item in enumerate(tree)]
    inner = tree if isinstance(tree, Mapping) else {}
    return {**inner, key: _put(inner.get(key), rest, value, override)}


def _merged(lower: Any, upper: Any) -> Any:
    """Return `upper` over `lower`, mapping by mapping; a list replaces a list."""
    if not isinstance(lower, Mapping) or not isinstance(upper, Mapping):
        return upper
    return {**lower, **{key: _merged(lower.get(key), value) for key, value in upper.items()}}
