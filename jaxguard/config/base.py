"""Typed, frozen trees read from YAML, and errors that name the field and the nearest valid one."""

import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jaxguard.config.lookup import nearest
from jaxguard.utils.errors import JaxguardError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Schema(BaseModel):
    """Frozen, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


Tree = TypeVar("Tree", bound=Schema)


def validate(kind: type[Tree], tree: Mapping[str, Any], origin: str, context: Any = None) -> Tree:
    """Turn a plain tree into a schema; `origin` names it in errors, `context` is for its validators.

    Raises:
        JaxguardError: unknown, missing or ill-typed field, impossible combination; one line for each.
    """
    try:
        return kind.model_validate(tree, context=context)
    except ValidationError as error:
        # Pydantic also calls a list too short when its only item is ill-formed; the item's own error says it better.
        errors = [e for e in error.errors() if not (e["type"] == "too_short" and e["input"])]
        raise JaxguardError("\n".join(f"{origin}: {_explain(kind, e)}" for e in errors)) from None


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
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = next((key for key in keys if keys.count(key) > 1), None)
        if repeated is not None:
            raise yaml.constructor.ConstructorError(None, None, f"field {repeated!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_EXPONENT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))

_PLAIN = {
    "tuple_type": "expected a list",
    "too_short": "expected at least one item",
    "model_type": "expected fields",
    "model_attributes_type": "expected fields",
    "string_type": "expected text",
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
    "int_parsing": "expected a whole number",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
}


def _explain(root: type[Schema], error: Any) -> str:
    where = [str(part) for part in error["loc"]]
    field = ".".join(where)
    if error["type"] == "extra_forbidden":
        known = list(_schema_at(root, where[:-1]).model_fields)
        return f"unknown field {field!r}; {nearest(where[-1], known)}known here: {', '.join(known)}"
    if error["type"] == "missing":
        return f"field {field!r} is missing"
    message = _PLAIN.get(error["type"], error["msg"].removeprefix("Value error, "))
    value = "" if isinstance(error["input"], dict | BaseModel) else f" (given: {error['input']!r})"
    hint = ""
    if error["type"] == "literal_error":
        hint = nearest(str(error["input"]), re.findall(r"'([^']*)'", error["ctx"]["expected"]))
    return f"{field}: {message}{value}{'; ' + hint.rstrip(' ;') if hint else ''}" if field else message


def inner_schema(annotation: Any) -> type[Schema] | None:
    """Return the schema that a field's annotation holds, also in a union or a tuple; None if it holds none."""
    if isinstance(annotation, type) and issubclass(annotation, Schema):
        return annotation
    return next(filter(None, map(inner_schema, typing.get_args(annotation))), None)


def _schema_at(root: type[Schema], path: list[str]) -> type[Schema]:
    """Return the schema that the parts of a dotted field lead to; numbers among them are indices of a tuple."""
    for part in path:
        if not part.isdigit():
            root = inner_schema(root.model_fields[part].annotation) or root
    return root
