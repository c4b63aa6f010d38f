"""Files of configs/ by name, and the frozen schemas read from them; utils/parse.py reads and checks them."""

import contextlib
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer

from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import absent
from jaxguard.utils.parse import PathText, check, inner_schema, nearest, parse_yaml

CONFIG_FOLDER = Path("configs")
_PACKAGE = Path(__file__).parents[1]
# A wheel holds the copy inside the package; in a checkout it is the repository's own folder.
INSTALLED = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Schema(BaseModel):
    """Frozen, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(frozen=True)
class _Path:
    """Marks a field that holds a path, or a name where it ends with none of the suffixes."""

    suffixes: tuple[str, ...] = ("",)


def locate(path: Path) -> Path:
    """Return the installed copy of a file or folder of ./configs that does not exist; any other path as it is."""
    if not path.exists() and path.is_relative_to(CONFIG_FOLDER):
        return INSTALLED / path.relative_to(CONFIG_FOLDER)
    return path


def _portable(text: str) -> str:
    """Write an installed file as the path in configs/ that `locate` finds again, on whatever machine."""
    return str(CONFIG_FOLDER / Path(text).relative_to(INSTALLED)) if Path(text).is_relative_to(INSTALLED) else text


_Located = AfterValidator(lambda text: str(locate(Path(text))) if text.startswith(f"{CONFIG_FOLDER}/") else text)
_Portable = PlainSerializer(_portable, return_type=str)
LocalPath = Annotated[PathText, _Path(), _Located, _Portable]
"""A path, or a repository; in a file, it is looked for beside the file first. One in configs/ is found from any folder."""
NameOrYaml = Annotated[PathText, _Path((".yaml", ".yml")), _Located, _Portable]
"""A name in a folder of configs/, or the path of a YAML file, which is looked for as that of LocalPath."""


def beside(value: Any, shape: Any, folder: Path) -> Any:
    """Return what a file of `folder` holds, a plain value of `shape`, with the paths of what lies beside the file."""
    if isinstance(value, str):
        suffixes, path = _suffixes(shape), folder / value
        with contextlib.suppress(OSError, ValueError):  # no name of a file
            if suffixes and value.endswith(suffixes) and path.exists():
                return os.path.normpath(path)
        return value
    if isinstance(value, list):
        return [beside(item, shape, folder) for item in value]
    schema = inner_schema(shape) if isinstance(value, dict) else None
    if schema is None:
        return value
    shapes = typing.get_type_hints(schema, include_extras=True)
    return {key: beside(item, shapes.get(key), folder) for key, item in value.items()}


def _suffixes(shape: Any) -> tuple[str, ...]:
    """Return how the paths end that a field holds; nothing if it holds none."""
    marks = [mark.suffixes for mark in getattr(shape, "__metadata__", ()) if isinstance(mark, _Path)]
    return next(filter(None, [*marks, *map(_suffixes, typing.get_args(shape))]), ())


def origin_of(origin: str, overrides: Mapping[str, str], field: str, message: str) -> str:
    """Name the overrides that an error comes from: of its field, or below it and named in its message; else its origin."""
    unknown = message.startswith("unknown field")
    for key, text in reversed(list(overrides.items())):
        below = not field or key.startswith(f"{field}.")
        named = unknown or re.search(rf"\b{re.escape(key.rpartition('.')[2])}\b", message)
        if f"{field}.".startswith(f"{key}.") or (below and named):
            return f"override {text!r}"
    return origin


def first_repeated(values: Sequence[Any]) -> Any:
    """Return the first of the values that is there more than once, or None."""
    return next((value for value in values if values.count(value) > 1), None)


def scalar(text: str) -> Any:
    """Parse a value as written on the command line."""
    try:
        return parse_yaml(text, object, text)
    except JaxguardError:
        if any(text.count(opening) > text.count(closing) for opening, closing in ("[]", "{}")):
            raise JaxguardError(
                "a bracket is open; quote the whole override, so that the shell does not split it at spaces"
            ) from None
        return text


def folders(folder: Path) -> list[Path]:
    """Return the folders in which the names of `folder` are looked up: for one of ./configs its installed copy too."""
    installed = [INSTALLED / folder.relative_to(CONFIG_FOLDER)] if folder.is_relative_to(CONFIG_FOLDER) else []
    return [candidate for candidate in (folder, *installed) if candidate.is_dir()]


def names(folder: Path) -> list[str]:
    """List the names of the YAML files of `folder`, those of its own folders as `folder/name`, hidden ones left out."""
    files = (path.relative_to(source) for source in folders(folder) for path in source.rglob("*.yaml"))
    return sorted({path.with_suffix("").as_posix() for path in files if not str(path).startswith(".")})


def find_yaml(name: str, folder: Path, what: str) -> Path:
    """Return the YAML file that a name in `folder`, or a path, stands for; JaxguardError lists those there are."""
    name = check(name, PathText, what)
    for path in (Path(name), *(source / f"{name}.yaml" for source in folders(folder))):
        if path.suffix in {".yaml", ".yml"} and path.is_file():
            return path
    known, path = names(folder), Path(name)
    direct = ", ".join([name for name in known if "/" not in name] or known)
    hint = nearest(name, known)
    if path.exists():
        config = path / "config.yaml"
        hint = f"{path} is no YAML file; {f'did you mean {str(config)!r}? ' if config.is_file() else ''}"
    elif path.suffix in {".yaml", ".yml"}:
        hint = f"{absent(path)}; "
    raise JaxguardError(f"no {what} {name!r}: {hint}known in {folder}/: {direct or 'none'}")
