"""Rewrites the tables of docs/configuration.md from the config's schemas: `python tools/document_config.py`."""

import typing
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from generated import rewrite
from jaxguard.config import READS, Config
from jaxguard.utils.parse import inner_schema
from jaxguard.utils.secrets import Masked

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"


def main() -> None:
    rewrite(DOCUMENT, tables())


def tables() -> str:
    """One table for each schema, the run's own fields first."""
    rows: dict[str, list[str]] = {}
    headings: dict[str, str] = {}
    for prefix, title, name, field, allowed in walk(Config, "", {}):
        headings[prefix] = f"### `{prefix[:-1]}`: {title}{readers(prefix)}" if prefix else f"### {title}"
        rows.setdefault(prefix, ["| field | values | default | meaning |", "|---|---|---|---|"])
        rows[prefix].append(f"| `{prefix}{name}` | {allowed} | {default(field)} | {meaning(field)} |")
    return "\n".join(f"{headings[prefix]}\n\n" + "\n".join(lines) + "\n" for prefix, lines in rows.items())


def readers(prefix: str) -> str:
    """Which stages read a field of Config, unless all do."""
    stages = [stage for stage, names in READS.items() if prefix[:-1] in names]
    return "" if len(stages) in (0, len(READS)) else f"\n\nRead by {', '.join(f'`{stage}`' for stage in stages)}."


def walk(
    schema: type[BaseModel], prefix: str, documented: dict[type[BaseModel], str], title: str = "The run"
) -> Iterator[tuple[str, str, str, FieldInfo, str]]:
    """Yield (schema's dotted prefix, its title, field, what is known of it, its values in words).

    A schema's own fields come before inner schemas; one that is `documented` elsewhere is only referred to.
    """
    inner = {}
    for name, field in schema.model_fields.items():
        nested = inner_schema(field.annotation)
        if nested is None:
            yield prefix, title, name, field, values(field.annotation)
        elif nested in documented:
            yield prefix, title, name, field, f"as `{documented[nested]}`"
        else:
            many = "[]" if typing.get_origin(field.annotation) is tuple else ""
            inner[nested] = documented[nested] = f"{prefix}{name}{many}"
    for nested, name in inner.items():
        yield from walk(nested, f"{name}.", documented, (nested.__doc__ or name).partition("\n")[0].removesuffix("."))


def values(annotation: object) -> str:
    """Which values are allowed, in words."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{arg}`" for arg in args)
    if origin in (typing.Union, UnionType):
        return " or ".join(values(arg) for arg in args)
    if origin is typing.Annotated:
        return values(args[0])
    if annotation is NoneType:
        return "`null`"
    names = {bool: "`true`, `false`", int: "integer", float: "number", str: "text", Masked: "text"}
    return names.get(typing.cast(type, annotation), "list")


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    value = field.default
    if isinstance(value, tuple):
        value = tuple(str(each) if isinstance(each, Masked) else each for each in value)
    plain = {None: "null", True: "true", False: "false"}
    return f"`{plain[value] if value is None or isinstance(value, bool) else value}`"


def meaning(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


if __name__ == "__main__":
    main()
