"""What the cells of a row say: text, labels, lists, dialogues; an error where one is not what its column promises."""

import json
from collections.abc import Mapping
from typing import Any

from jaxguard.data.files import Row
from jaxguard.utils.errors import JaxguardError


class Skip(Exception):  # noqa: N818 (not an error)
    """This row, or part of one, is not trained on; the message is the reason under which it is counted."""


def text(row: Row, column: str, place: str) -> str | None:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise JaxguardError(f"{place}: {column} is {value!r}; expected text or null")
    if value is None or value.isascii():
        return value
    # JSON can spell half of a surrogate pair, which is not a character: no tokenizer takes it.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def label(row: Row, column: str, meaning: Mapping[str, str], place: str) -> str | None:
    value = row.get(column)
    if value is None or value == "":
        return None
    known = meaning.get(str(value).strip().casefold())
    if known is None:
        name = f" (id {row['id']!r})" if row.get("id") is not None else ""
        raise JaxguardError(f"{place}{name}: {column} is {value!r}; expected {', '.join(meaning)} or null")
    return known


def words(value: Any, place: str) -> tuple[str, ...]:
    """Categories, as a list or separated by commas."""
    parts = value.split(",") if isinstance(value, str) else (value or [])
    if not all(isinstance(part, str) for part in parts):
        raise JaxguardError(f"{place}: categories are {value!r}; expected a list of texts")
    return tuple(part.strip() for part in parts if part.strip())


def objects(row: Row, column: str, keys: tuple[str, str], place: str) -> list[tuple[str, str]]:
    """A column of JSON objects, or the same as JSON text, as pairs of stripped texts; what is absent is empty."""
    value, (one, two) = row.get(column), keys
    try:
        value = json.loads(value) if isinstance(value, str) and value.strip() else value
        pairs = [(text(item, one, place) or "", text(item, two, place) or "") for item in value or ()]
    except (AttributeError, TypeError, json.JSONDecodeError):
        raise JaxguardError(f"{place}: {column} is no list of objects with {one!r} and {two!r}") from None
    return [(first.strip(), second.strip()) for first, second in pairs]


def squeezed(value: str) -> str:
    """Without case and with single spaces."""
    return " ".join(value.split()).casefold()


def transcript(history: Any, last: str | None, place: str) -> str | None:
    """A dialogue as one prompt: earlier turns first, then the message under judgement.

    Further lines of a turn are indented, so that no text inside a turn can pass for another turn.
    """
    if not history or not (last or "").strip():
        return last
    try:
        turns = [(str(turn["role"]), str(turn["content"])) for turn in history]
    except (TypeError, KeyError):
        raise JaxguardError(
            f"{place}: conversation_history is {history!r}; expected a list of role and content"
        ) from None
    lines = [f"[{role}] {_indent(content)}" for role, content in turns]
    return "\n".join(["Earlier in the conversation:", *lines, "Message to judge:", f"[user] {_indent(last or '')}"])


def _indent(value: str) -> str:
    return "\n    ".join(value.strip().splitlines())
