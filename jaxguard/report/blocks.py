"""What a report is made of: tables, sentences, figures and sections, as values. Every string in them is untrusted text."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from markupsafe import Markup
from rich.table import Table as RichTable
from rich.text import Text

from jaxguard.report.text import ABSENT, interval, number, plain
from jaxguard.utils.statistics import Estimate

Kind = Literal["", "strong", "detail", "faint"]
"""How a row looks: as others, in bold, as a continuation of the row above, or pale."""
Format = Literal["html", "markdown"]


@dataclass(frozen=True)
class Cell:
    """A cell of a table, or a piece of a sentence.

    Attributes:
        text: what it says.
        more: what belongs to it, in small letters.
        url: an http(s) address that it links to; others are shown without a link.
        code: show it as code.
        tone: "good", "bad" or "faint", its background in HTML.
        bar: a share from 0 to 1 to draw below it in HTML.
    """

    text: str
    more: str = ""
    url: str = ""
    code: bool = False
    tone: str = ""
    bar: float | None = None


Value = str | int | float | Estimate | Cell | None
"""A cell: text, an int (with separators), a float (with three decimals), a score with its interval, None (as n/a)."""


def estimate(score: Estimate | None, deviation: bool = False) -> Cell:
    """A score with its interval and, if asked for, its deviation over generations."""
    if score is None or score.value is None:
        return Cell(ABSENT)
    spread = f"± {score.deviation:.3f}" if deviation and score.deviation is not None else ""
    return Cell(number(score.value), " ".join(filter(None, (interval(score.low, score.high), spread))))


def cell(value: Value) -> Cell:
    """A value as a table shows it."""
    match value:
        case Cell():
            return value
        case str():
            return Cell(value)
        case int():
            return Cell(f"{value:,}")
        case Estimate():
            return estimate(value)
        case _:
            return Cell(number(value))


@dataclass(frozen=True)
class Row:
    """A row of a table; `group` stands in a line of its own above the rows that share it."""

    cells: tuple[Cell, ...]
    group: str = ""
    kind: Kind = ""


@dataclass
class Table:
    """Columns and rows. The first `left` columns hold names and are aligned to the left, the others to the right.

    Attributes:
        columns: their headings.
        title: its name, which HTML tells screen readers and a terminal shows above it.
        left: how many columns are aligned to the left.
        note: what a terminal shows below it.
    """

    columns: Sequence[str]
    title: str = ""
    left: int = 1
    note: str = ""
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def of(cls, columns: Sequence[str], rows: Iterable[Sequence[Value]], title: str = "", left: int = 1) -> "Table":
        """A table of plain rows."""
        table = cls(columns, title, left)
        for row in rows:
            table.add(*row)
        return table

    def add(self, *cells: Value, group: str = "", kind: Kind = "") -> None:
        """Add a row, a cell for each column."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for the columns {', '.join(self.columns)}")
        self.rows.append(Row(tuple(map(cell, cells)), group, kind))

    def groups(self) -> list[tuple[str, list[Row]]]:
        """Consecutive rows by their group."""
        return [(group, list(rows)) for group, rows in itertools.groupby(self.rows, lambda row: row.group)]

    def rich(self) -> RichTable:
        """The table for a terminal."""
        title, note = (Text(plain(text)) if text else None for text in (self.title, self.note))
        table = RichTable(title=title, caption=note, title_justify="left")
        for i, name in enumerate(self.columns):
            table.add_column(Text(plain(name)), justify="left" if i < self.left else "right", overflow="fold")
        for group, rows in self.groups():
            if group:
                table.add_row(Text(plain(group), "bold"))
            for row in rows:
                table.add_row(*(Text(plain(f"{each.text} {each.more}")) for each in row.cells))
        return table


@dataclass(frozen=True)
class Paragraph:
    """Sentences of strings and Cells, such as links; a faint one explains what stands beside it."""

    pieces: Sequence[str | Cell]
    faint: bool = False


def note(text: str) -> Paragraph:
    """A faint paragraph, which explains what stands beside it."""
    return Paragraph([text], faint=True)


@dataclass(frozen=True)
class Bullets:
    """A list; `warning` sets it apart as what a reader must know first."""

    items: Sequence[str]
    warning: bool = False


@dataclass(frozen=True)
class Facts:
    """Names with their values."""

    pairs: Sequence[tuple[str, object]]


@dataclass(frozen=True)
class Tiles:
    """The most important numbers, in large letters: (name, value, *notes)."""

    tiles: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Code:
    """A block of code, such as YAML."""

    text: str
    language: str = ""


@dataclass(frozen=True)
class Drawing:
    """A figure with its caption: of figures.inline_svg in HTML, where a wide one scrolls; a file beside it in Markdown."""

    caption: str
    svg: Markup | None = None
    wide: bool = False
    file: str = ""


@dataclass(frozen=True)
class Quote:
    """Text of a data set or a model with its line breaks, for HTML only. Put it into Details: much of it is offensive.

    Attributes:
        name: what it is.
        text: of which the first `most` characters are shown.
        rest: where the others are, as in "in results.json".
    """

    name: str
    text: str
    most: int = 2000
    rest: str = "left out"


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it. Those with an anchor are in the page's navigation."""

    title: str
    blocks: Sequence["Content"]
    anchor: str = ""


@dataclass(frozen=True)
class Details:
    """What HTML shows when its title is clicked; a section in Markdown."""

    title: str
    blocks: Sequence["Content"]
    open: bool = False


@dataclass(frozen=True)
class Beside:
    """Blocks side by side where HTML has the room."""

    blocks: Sequence["Content"]


@dataclass(frozen=True)
class Only:
    """Blocks for one of the two formats."""

    format: Format
    blocks: Sequence["Content"]


Block = Table | Paragraph | Bullets | Facts | Tiles | Code | Drawing | Quote | Section | Details | Beside | Only
Content = Block | Markup | str | None
"""A block; a string is a paragraph, Markup is for HTML only, None and what is empty is left out."""


@dataclass(frozen=True)
class Page:
    """A report: its heading, its blocks, and YAML that begins the Markdown, as the hub reads it."""

    title: str
    blocks: Sequence[Content]
    front: Mapping[str, Any] | None = None


def blocks_of(contents: Iterable[Content], form: Format) -> list[Any]:
    """The blocks of one format: strings as paragraphs, without what is empty or of the other format."""
    blocks: list[Any] = []
    for content in contents:
        match content:
            case None | "" | Table(rows=[]) | Bullets(items=[] | ()) | Paragraph(pieces=[] | ()):
                continue
            case Drawing():
                blocks += [content] if (content.svg if form == "html" else content.file) else []
            case Markup() | Quote():
                blocks += [content] if form == "html" else []
            case str():
                blocks.append(Paragraph([content]))
            case Only():
                blocks += blocks_of(content.blocks, form) if content.format == form else []
            case Section() | Details() | Beside():
                inner = blocks_of(content.blocks, form)
                blocks += [replace(content, blocks=inner)] if inner else []
            case _:
                blocks.append(content)
    return blocks
