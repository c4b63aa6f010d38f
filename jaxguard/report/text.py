"""Format numbers, and make untrusted text safe to show: on one line, in Markdown, without control characters."""

import re

from jaxguard.utils.terminal import CONTROL

ABSENT = "n/a"
"""Shown for a value that is not defined."""
DASH = "–"
"""Shown for a value that was not measured."""

# First what stays: an interval of numbers in brackets that cannot be a link. Then what is markup, a link or the end of a
# table cell: punctuation, an underscore at a word's edge, the dot of www., the colon of a scheme, a list marker at the start.
_MARKUP = re.compile(
    r"(?P<interval>\[[+-]?\d[\d.,+ -]*\](?![\[(:]))|[^\w\s.,:;/()%+?!'\"=-]|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.|:(?=//)"
    r"|!(?=\[)|^[+=-](?![\d.])|^\d+[.)](?=\s|$)",
    re.ASCII | re.IGNORECASE,
)


def visible(text: object) -> str:
    """Replace control characters and those that turn the writing direction by �; line breaks and tabs stay."""
    return CONTROL.sub("\ufffd", str(text).replace("\r\n", "\n"))


def plain(text: object) -> str:
    """Untrusted text on one line."""
    return " ".join(visible(text).split())


def _entities(match: re.Match[str]) -> str:
    if match["interval"]:
        return match[0]
    return "".join(f"&#{ord(c)};" if c.isascii() and not c.isdigit() else c for c in match[0])


def escaped(text: object) -> str:
    """Escape untrusted text for one line of Markdown: no character of it is markup, part of a link, or the end of a cell."""
    return _MARKUP.sub(_entities, plain(text))


def escaped_piece(text: object) -> str:
    """The same for a piece of a line, which may be followed by a link: spaces at its ends stay."""
    piece = _MARKUP.sub(_entities, re.sub(r"\s+", " ", visible(text)))
    return re.sub(r"[\]!]$", lambda match: f"&#{ord(match[0])};", piece)


def code(text: object) -> str:
    """Untrusted text as inline code of Markdown; backticks and pipes, which would end it or its cell, are replaced."""
    return f"`{plain(text).replace('`', chr(39)).replace('|', '/')}`"


def cut(text: str, most: int, rest: str = "") -> tuple[str, int]:
    """The first `most` characters of a text, then `rest` if any are left out; and how many are."""
    return (text, 0) if len(text) <= most else (text[:most].rstrip() + rest, len(text) - most)


def short(text: object, most: int = 40) -> str:
    """A name on one line that fits a figure."""
    return cut(plain(text), most - 1, "…")[0]


def number(value: float | None) -> str:
    """A score with three decimals."""
    return ABSENT if value is None else f"{value:.3f}"


def signed(value: float) -> str:
    """A difference of scores; never -0.000."""
    return f"{round(value, 3) + 0.0:+.3f}"


def share(part: float, whole: float = 1) -> str:
    """A part as a percentage."""
    return f"{part / whole:.1%}" if whole else ABSENT


def interval(low: float | None, high: float | None, *, difference: bool = False) -> str:
    """The ends of an interval in brackets, with signs if it is of a difference; empty if there is none."""
    if low is None or high is None:
        return ""
    return f"[{signed(low)}, {signed(high)}]" if difference else f"[{low:.3f}, {high:.3f}]"


def probability(p: float) -> str:
    """A p-value."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def seconds(value: float) -> str:
    """Seconds, or a rate, with three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural where needed."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
