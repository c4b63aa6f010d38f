"""Parse the cells of a row: text, labels, lists, dialogues; an unexpected value is an error."""

import json
from collections.abc import Mapping
from typing import Any

from jaxguard.data.files import Row
from jaxguard.utils.errors import JaxguardError


class Skip(Exception):  # noqa: N818 (not an error)
    """Skips a row, or a message of one; the text is the reason under which it is counted."""


def text(row: Row, column: str, location: str) -> str | None:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise JaxguardError(f"{location}: {column} is {value!r}; expected text or null")
    if value is None or value.isascii():
        return value
    # JSON can hold half a surrogate pair, which tokenizers reject.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def label(row: Row, column: str, meaning: Mapping[str, str], location: str) -> str | None:
    value = row.get(column)
    if value is None or value == "":
        return None
    known = meaning.get(str(value).strip().casefold())
    if known is None:
        name = f" (id {row['id']!r})" if row.get("id") is not None else ""
        raise JaxguardError(f"{location}{name}: {column} is {value!r}; expected {', '.join(meaning)} or null")
    return known


def words(value: Any, location: str) -> tuple[str, ...]:
    """Parse categories: a list, or text separated by commas."""
    parts = value.split(",") if isinstance(value, str) else (value or [])
    if not all(isinstance(part, str) for part in parts):
        raise JaxguardError(f"{location}: categories are {value!r}; expected a list of texts")
    return tuple(part.strip() for part in parts if part.strip())


def objects(row: Row, column: str, keys: tuple[str, str], location: str) -> list[tuple[str, str]]:
    """Parse a column of JSON objects, or their JSON text, into pairs of stripped texts; a missing one is empty."""
    value, (first, second) = row.get(column), keys
    try:
        value = json.loads(value) if isinstance(value, str) and value.strip() else value
        return [
            ((text(item, first, location) or "").strip(), (text(item, second, location) or "").strip())
            for item in value or ()
        ]
    except (AttributeError, TypeError, json.JSONDecodeError):
        raise JaxguardError(f"{location}: {column} is not a list of objects with {first!r} and {second!r}") from None


def squeezed(value: str) -> str:
    """Fold case and white space."""
    return " ".join(value.split()).casefold()


def transcript(history: Any, last: str | None, location: str) -> str | None:
    """Format a dialogue as one prompt: earlier turns, then the message to check.

    Further lines of a turn are indented, so that text inside a turn cannot look like another turn.
    """
    if not history or not (last or "").strip():
        return last
    try:
        turns = [(str(turn["role"]), str(turn["content"])) for turn in history]
    except (TypeError, KeyError):
        raise JaxguardError(
            f"{location}: conversation_history is {history!r}; expected a list of role and content"
        ) from None
    lines = [f"[{role}] {_indent(content)}" for role, content in turns]
    return "\n".join(["Earlier in the conversation:", *lines, "Message to judge:", f"[user] {_indent(last or '')}"])


def _indent(value: str) -> str:
    return "\n    ".join(value.strip().splitlines())
