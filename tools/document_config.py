"""Rewrites the tables of docs/configuration.md from jaxguard/config.py: `python tools/document_config.py`."""

import typing
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType

from pydantic.fields import FieldInfo

from jaxguard.config import Config
from jaxguard.fields import Section

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
START, END = "<!-- fields -->\n", "<!-- end of fields -->\n"


def main() -> None:
    before, _, after = parts(DOCUMENT.read_text(encoding="utf-8"))
    DOCUMENT.write_text(before + START + tables() + END + after, encoding="utf-8")


def parts(text: str) -> tuple[str, str, str]:
    """The document before its tables, the tables, and what follows."""
    before, _, rest = text.partition(START)
    inside, _, after = rest.partition(END)
    return before, inside, after


def tables() -> str:
    """One table for each section, the run's own fields first."""
    rows: dict[str, list[str]] = {}
    titles = {"": "The run"}
    for section, title, name, field in walk(Config, ""):
        titles[section] = f"`{section[:-1]}`: {title}" if section else title
        rows.setdefault(section, ["| field | values | default | meaning |", "|---|---|---|---|"])
        rows[section].append(
            f"| `{section}{name}` | {values(field.annotation)} | {default(field)} | {meaning(field)} |"
        )
    return "\n".join(f"### {titles[section]}\n\n" + "\n".join(lines) + "\n" for section, lines in rows.items())


def walk(section: type[Section], prefix: str, title: str = "The run") -> Iterator[tuple[str, str, str, FieldInfo]]:
    """(section's dotted name, its title, field, what is known of it), a section's own fields before inner sections."""
    inner = {name: section_of(field.annotation) for name, field in section.model_fields.items()}
    for name, field in section.model_fields.items():
        if inner[name] is None:
            yield prefix, title, name, field
    for name, found in inner.items():
        if found is not None and name != "validation":  # shaped like train
            many = "[]" if typing.get_origin(section.model_fields[name].annotation) is tuple else ""
            yield from walk(
                found, f"{prefix}{name}{many}.", (found.__doc__ or name).partition("\n")[0].removesuffix(".")
            )


def section_of(annotation: object) -> type[Section] | None:
    candidates = (annotation, *typing.get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


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
