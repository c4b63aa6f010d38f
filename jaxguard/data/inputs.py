"""What a stage reads from this machine, and whether it is there: checked before anything expensive begins."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxguard.config import Config
from jaxguard.config.base import Schema
from jaxguard.data.policies import load_policy
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import absent
from jaxguard.utils.hub import local_folder

_READS = {
    "data": ("model", "data"),
    "data build": ("model", "data", "build"),
    "distill": ("model", "data"),
    "train": ("model", "data"),
    "evaluate": ("evaluate",),
    "mine": ("data", "mine.sources", "mine.guard"),
    "mine pairs": ("mine.ensemble",),
    "reinforce": ("model", "data"),
}
"""Stage -> the schemas or fields of its config that name files."""


def input_paths(config: Config, stage: str) -> dict[str, str]:
    """Return the data files, data folders and checkpoints that a stage reads: dotted field -> value."""
    reads = tuple(f"{name}." for name in _READS.get(stage, ()))
    return {field: value for field, value in _paths(config) if field.startswith(reads)}


def _paths(value: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Yield the fields `path` and `checkpoint` inside a schema or a list of them, and the folders `ensemble`."""
    if isinstance(value, Schema):
        for name in type(value).model_fields:
            yield from _paths(getattr(value, name), f"{field}.{name}".lstrip("."))
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            yield from _paths(item, f"{field}.{number}")
    elif isinstance(value, str) and (field.endswith((".path", ".checkpoint")) or ".ensemble." in field):
        yield field, value


def missing_inputs(config: Config, stage: str) -> dict[str, str]:
    """Return what of a stage's inputs is not there: field -> the problem. What lies on the hub is not looked at."""
    problems = {}
    for field, value in input_paths(config, stage).items():
        try:
            if field.endswith(".checkpoint"):
                local_folder(value)
            elif not Path(value).exists():
                problems[field] = f"no file or folder {value!r}: {absent(Path(value))}"
        except JaxguardError as error:
            problems[field] = str(error)
    try:
        load_policy(config.data.policy)
    except JaxguardError as error:
        problems["data.policy"] = str(error)
    return problems


def check_inputs(config: Config, stage: str) -> None:
    """Raise a JaxguardError with a line for every input of a stage that is not there: policy, data files, checkpoints."""
    problems = missing_inputs(config, stage)
    if problems:
        raise JaxguardError("\n".join(f"{field}: {problem}" for field, problem in problems.items()))
