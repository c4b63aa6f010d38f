"""Markdown around texts that nobody trusts."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

# What could begin markup, a link or a cell's end. An underscore inside a word begins nothing, and names are full of them.
_MARKUP = re.compile(r"[^\w\s.,:/()%+-]|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.|:(?=//)", re.ASCII | re.IGNORECASE)
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def plain(text: object) -> str:
    """Untrusted text on one line."""
    return " ".join(visible(text).split())


def visible(text: object) -> str:
    """Untrusted text whose line breaks stay; other control characters, and those that turn the direction, become �."""
    return "".join("\ufffd" if _steers(c) else c for c in str(text).replace("\r\n", "\n"))


def escaped(text: object) -> str:
    """Untrusted text for a cell of a Markdown table: nothing in it is markup, a link or the cell's end."""
    return _MARKUP.sub(lambda match: "".join(f"&#{ord(c)};" if c.isascii() else c for c in match[0]), plain(text))


def code(text: object) -> str:
    """A name as code; what would end it or a table's cell is replaced."""
    return f"`{plain(text).replace('`', chr(39)).replace('|', '/')}`"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns after the first are numbers; cells are escaped already. Without rows it is empty."""
    lines = [" | ".join(row) for row in (heads, ["---", *["---:"] * (len(heads) - 1)], *rows)]
    return "\n".join(f"| {line} |" for line in lines) if len(lines) > 2 else ""


def _steers(c: str) -> bool:
    return c in _BIDI or (c not in "\n\t" and unicodedata.category(c) in {"Cc", "Cs", "Co", "Zl", "Zp"})
