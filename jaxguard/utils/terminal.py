"""What goes to a terminal: texts of models, data sets and servers cannot move its cursor, set its title or colour what follows."""

import logging
import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\uf8ff\U000f0000-\U0010ffff]"
)
"""Control characters but for line feeds and tabs, those that turn the writing direction, halves of a character, private ones."""


def shown(text: str) -> str:
    r"""Replace control characters by their escapes, such as \x1b."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class Console(RichConsole):
    """Rich's, which shows control characters instead of sending them, and takes no text for markup."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else shown(text), style, control)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def show_warnings() -> None:
    """Show control characters in warnings too, where no handler of their own was set up."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Formatter())
