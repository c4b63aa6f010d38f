"""The run's configuration: one frozen, typed tree, read from YAML.

A config file holds only what differs from the defaults below, or from the one file that it `extends`. Dotted
overrides (`optimizer.learning_rate=2e-6`) come last. Every mistake is a JaxguardError that names the field.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import model_validator

from jaxguard.config import base as fields
from jaxguard.config.base import NonNegative, Schema, read_yaml
from jaxguard.config.data import BuildConfig, DataConfig
from jaxguard.config.distill import DistillConfig
from jaxguard.config.evaluate import EvaluateConfig, MineConfig
from jaxguard.config.lookup import CONFIG_FOLDER, find_yaml
from jaxguard.config.train import CheckpointConfig, LogConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxguard.utils.errors import JaxguardError


class Config(Schema):
    """A whole run."""

    name: str
    """What the run and its folder are called; by default the file's name."""
    run_folder: str = "runs"
    """The run lives in run_folder/name."""
    seed: NonNegative = 0
    """Order of the examples and which of them keep their trace."""
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

    @property
    def folder(self) -> Path:
        return Path(self.run_folder) / self.name

    @model_validator(mode="after")
    def _check(self) -> Self:
        data, train = self.data, self.train
        if self.name in {"", ".", ".."} or "/" in self.name:
            raise ValueError(f"name={self.name!r} is also the run's folder: it must not be empty or hold a slash")
        if not data.reasoning_marker or not data.direct_marker or data.reasoning_marker == data.direct_marker:
            raise ValueError("data.reasoning_marker and data.direct_marker must differ and not be empty")
        if data.mode == "dual" and data.dual_reasoning_share in (0, 1):
            only = "direct" if data.dual_reasoning_share == 0 else "reasoning"
            raise ValueError(
                f"data.dual_reasoning_share={data.dual_reasoning_share:g} trains one mode: set data.mode={only}"
            )
        if data.subset is not None and data.subset < train.batch_size:
            raise ValueError(f"data.subset={data.subset} is smaller than train.batch_size={train.batch_size}")
        if self.model.attention == "cudnn" and self.model.compute_dtype == "float32":
            raise ValueError("model.attention=cudnn computes in bfloat16 only; set model.compute_dtype=bfloat16")
        return self


def load(name: str, overrides: Iterable[str] = (), folder: Path = CONFIG_FOLDER) -> Config:
    """Read a config by name (a file in `folder`) or by path, and apply overrides such as `train.epochs=3`.

    What it `extends` lies beside it or in configs/.

    Raises:
        JaxguardError: no such file, unknown or ill-typed field, impossible combination.
    """
    path = find_yaml(name, folder, "config")
    tree = read_yaml(path)
    if "extends" in tree:
        base_name = str(tree.pop("extends"))
        beside = (path.parent / f"{base_name}.yaml").is_file()
        base_path = find_yaml(base_name, path.parent if beside else CONFIG_FOLDER, "config")
        base = read_yaml(base_path)
        if "extends" in base:
            raise JaxguardError(
                f"{base_path}: extends {base['extends']!r}, and {path} extends it; inheritance has one level only"
            )
        # A name belongs to one file: two runs that share a folder would overwrite each other.
        base.pop("name", None)
        tree = _merge(base, tree)
    tree.setdefault("name", path.stem)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise JaxguardError(f"override {override!r}: write it as field=value, for example train.epochs=3")
        tree = _put(tree, key.strip().split("."), fields.scalar(text), override)
    return validate(tree, str(path))


def validate(tree: Mapping[str, Any], origin: str) -> Config:
    """Turn a plain tree into a Config; `origin` names it in errors."""
    return fields.validate(Config, tree, origin)


def dump(config: Config) -> str:
    """The resolved config as YAML; loading it gives the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _put(tree: Any, keys: list[str], value: Any, override: str) -> Any:
    """A copy of the tree with the value at dotted `keys`; a number counts into a list, from 0."""
    if not keys:
        return _merge(tree, value) if isinstance(tree, Mapping) and isinstance(value, Mapping) else value
    key, *rest = keys
    if isinstance(tree, list):
        if not key.isdigit() or int(key) >= len(tree):
            raise JaxguardError(f"override {override!r}: {key!r} is not a place in a list of {len(tree)}; count from 0")
        return [_put(item, rest, value, override) if i == int(key) else item for i, item in enumerate(tree)]
    section = tree if isinstance(tree, Mapping) else {}
    return {**section, key: _put(section.get(key), rest, value, override)}


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` over `base`, section by section; a list replaces a list."""
    both = {
        key: _merge(base[key], value)
        for key, value in top.items()
        if isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
    }
    return {**base, **top, **both}
