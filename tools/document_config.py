"""Rewrites the tables of docs/configuration.md from the config's classes: `python tools/document_config.py`."""

import typing
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType

from pydantic.fields import FieldInfo

from generated import rewrite
from jaxguard.config import Config
from jaxguard.config.base import Schema

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"


def main() -> None:
    rewrite(DOCUMENT, tables())


def tables() -> str:
    """One table for each section, the run's own fields first."""
    rows: dict[str, list[str]] = {}
    titles = {"": "The run"}
    for section, title, name, field, allowed in walk(Config, "", {}):
        titles[section] = f"`{section[:-1]}`: {title}" if section else title
        rows.setdefault(section, ["| field | values | default | meaning |", "|---|---|---|---|"])
        rows[section].append(f"| `{section}{name}` | {allowed} | {default(field)} | {meaning(field)} |")
    return "\n".join(f"### {titles[section]}\n\n" + "\n".join(lines) + "\n" for section, lines in rows.items())


def walk(
    section: type[Schema], prefix: str, told: dict[type[Schema], str], title: str = "The run"
) -> Iterator[tuple[str, str, str, FieldInfo, str]]:
    """(section's dotted name, its title, field, what is known of it, what may be written there).

    A section's own fields come before inner sections; one that was `told` of elsewhere is only referred to.
    """
    inner = {}
    for name, field in section.model_fields.items():
        found = section_of(field.annotation)
        if found is None:
            yield prefix, title, name, field, values(field.annotation)
        elif found in told:
            yield prefix, title, name, field, f"as `{told[found]}`"
        else:
            many = "[]" if typing.get_origin(field.annotation) is tuple else ""
            inner[found] = told[found] = f"{prefix}{name}{many}"
    for found, name in inner.items():
        yield from walk(found, f"{name}.", told, (found.__doc__ or name).partition("\n")[0].removesuffix("."))


def section_of(annotation: object) -> type[Schema] | None:
    candidates = (annotation, *typing.get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Schema)), None)


def values(annotation: object) -> str:
    """What may be written there, in words."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{arg}`" for arg in args)
    if origin in (typing.Union, UnionType):
        return " or ".join(values(arg) for arg in args)
    if origin is typing.Annotated:
        return values(args[0])
    if annotation is NoneType:
        return "`null`"
    names = {bool: "`true`, `false`", int: "integer", float: "number", str: "text"}
    return names.get(typing.cast(type, annotation), "list")


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    value = field.default
    plain = {None: "null", True: "true", False: "false"}
    return f"`{plain[value] if value is None or isinstance(value, bool) else value}`"


def meaning(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


if __name__ == "__main__":
    main()
