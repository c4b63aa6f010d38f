"""Files of configs/ by name, frozen schemas read from them, and errors that name the field and the nearest valid one."""

import difflib
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jaxguard.utils.errors import JaxguardError

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


Tree = TypeVar("Tree", bound=Schema)


def validate(kind: type[Tree], tree: Mapping[str, Any], origin: str) -> Tree:
    """Turn a plain tree into a schema; JaxguardError has a line, with `origin`, for each field or combination that is wrong."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        # Pydantic also calls a list too short when its only item is ill-formed; the item's own error says it better.
        errors = [e for e in error.errors() if not (e["type"] == "too_short" and e["input"])]
        raise JaxguardError("\n".join(f"{origin}: {_explain(kind, e)}" for e in errors)) from None


def _explain(schema: type[Schema], error: Any) -> str:
    path, kind, value = [str(part) for part in error["loc"]], error["type"], error["input"]
    field = ".".join(path)
    if kind == "extra_forbidden":
        for part in path[:-1]:  # an index, or a key that the user chose, is no field
            if part in schema.model_fields:
                schema = inner_schema(schema.model_fields[part].annotation) or schema
        known = list(schema.model_fields)
        return f"unknown field {field!r}; {nearest(path[-1], known)}known here: {', '.join(known)}"
    if kind == "missing":
        return f"field {field!r} is missing"
    message = _PLAIN.get(kind, error["msg"].removeprefix("Value error, "))
    if not field:
        return message
    if not isinstance(value, dict | BaseModel):
        message += f" (given: {value!r})"
    hint = nearest(str(value), re.findall(r"'([^']*)'", error["ctx"]["expected"])) if kind == "literal_error" else ""
    return f"{field}: {message}{'; ' + hint.strip() if hint else ''}"


_PLAIN = {
    "tuple_type": "expected a list",
    "too_short": "expected at least one item",
    "model_type": "expected fields",
    "string_type": "expected text",
}
"""Where pydantic's own message speaks of Python's types."""


def inner_schema(annotation: Any) -> type[Schema] | None:
    """Return the schema that a field's annotation holds, also in a union or a tuple; None if it holds none."""
    if isinstance(annotation, type) and issubclass(annotation, Schema):
        return annotation
    return next(filter(None, map(inner_schema, typing.get_args(annotation))), None)


def first_repeated(values: Sequence[Any]) -> Any:
    """Return the first of the values that is there more than once, or None."""
    return next((value for value in values if values.count(value) > 1), None)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the fields of a YAML file."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise JaxguardError(f"{path}: not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise JaxguardError(f"{path}: expected fields, found {type(tree).__name__}")
    return tree


def scalar(text: str) -> Any:
    """Parse a value as written on the command line."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError:
        return text


class _Loader(yaml.SafeLoader):
    """A SafeLoader that reads 1e-6 as a number, which YAML 1.1 does not, and refuses a field that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        repeated = first_repeated([self.construct_object(key, deep=True) for key, _ in node.value])
        if repeated is not None:
            raise yaml.constructor.ConstructorError(None, None, f"field {repeated!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_EXPONENT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def locate(path: Path) -> Path:
    """Return the installed copy of a file or folder of ./configs that does not exist; any other path as it is."""
    if not path.exists() and path.is_relative_to(CONFIG_FOLDER):
        return INSTALLED / path.relative_to(CONFIG_FOLDER)
    return path


def folders(folder: Path) -> list[Path]:
    """Return the folders in which the names of `folder` are looked up: for one of ./configs its installed copy too."""
    installed = [INSTALLED / folder.relative_to(CONFIG_FOLDER)] if folder.is_relative_to(CONFIG_FOLDER) else []
    return [candidate for candidate in (folder, *installed) if candidate.is_dir()]


def names(folder: Path) -> list[str]:
    """List the names of the YAML files of `folder`, those of its own folders as `folder/name`."""
    files = ((source, path) for source in folders(folder) for path in source.rglob("*.yaml"))
    return sorted({path.relative_to(source).with_suffix("").as_posix() for source, path in files})


def find_yaml(name: str, folder: Path, what: str) -> Path:
    """Return the YAML file that a name in `folder`, or a path, stands for; JaxguardError lists those there are."""
    for path in (Path(name), *(source / f"{name}.yaml" for source in folders(folder))):
        if path.suffix in {".yaml", ".yml"} and path.is_file():
            return path
    known = names(folder)
    direct = ", ".join(name for name in known if "/" not in name)
    raise JaxguardError(f"no {what} {name!r}: {nearest(name, known)}known in {folder}/: {direct or 'none'}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `did you mean 'x'? `, or nothing when nothing is near."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}? " if match else ""
