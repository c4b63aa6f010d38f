"""Reports as one HTML file, as Markdown and as tables in a terminal: one skin, one table, one figure style.

A report is written once, as blocks; every string in it is untrusted text and is escaped here, nowhere else:

    scores = Table(("guard", "examples", "F1", "seconds"), title="Scores")    # the first column left, the others right
    scores.add(guard, 1200, estimate, Cell("0.08", "5 tokens"), group="XSTest")   # str, int, float, Estimate, Cell, None
    page = Page(f"Evaluation of {run}", [
        Facts([("Hardware", hardware)]),
        Bullets(cautions, warning=True),
        Section("Scores", ["F1 of the harmful class.", scores, Drawing("F1", inline_svg(figure, "f1", "F1 by guard"))], "scores"),
        Only("html", [Details("What it said", [Quote("Prompt", prompt)])]),
    ])
    write_page(folder / "report.html", page)
    write_markdown(folder / "report.md", page)
    console.print(scores.rich())

Figures are drawn in `jaxguard.report.figures.style()`, which loads matplotlib. A page with a script has a template that extends
base.html.j2 and fills its blocks `main`, `style` and `script`, which the content security policy allows by its hash.
"""

import base64
import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import yaml
from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from rich.table import Table as RichTable
from rich.text import Text

from jaxguard.report.text import ABSENT, code, cut, escaped, escaped_piece, interval, number, plain, visible
from jaxguard.utils.files import write_atomically
from jaxguard.utils.statistics import Estimate

_INNER_SPACE = re.compile(r"(?<=\d,) (?=[+-]?\d)|(?<=[±=<]) |(?<=p) (?=[=<])|(?<=\d) (?=[a-z]{2})")
"""Spaces within intervals, deviations, p-values and counts, where no line breaks."""
_WEB = re.compile(r"https?://[^\s<>()\[\]\"'`|\\]+", re.ASCII)


@dataclass(frozen=True)
class Cell:
    """A cell of a table, or a piece of a sentence.

    Attributes:
        more: what belongs to it, in small letters.
        url: an http(s) address that it links to; others are shown without a link.
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


def _cell(value: Value) -> Cell:
    match value:
        case Cell():
            return value
        case Estimate():
            return estimate(value)
        case str() | int():
            return Cell(value if isinstance(value, str) else f"{value:,}")
        case _:
            return Cell(number(value))


Kind = Literal["", "strong", "detail", "faint"]
"""How a row looks: as others, in bold, as a continuation of the row above, or pale."""


@dataclass(frozen=True)
class Row:
    """A row of a table; `group` stands in a line of its own above the rows that share it."""

    cells: tuple[Cell, ...]
    group: str = ""
    kind: Kind = ""


@dataclass
class Table:
    """Columns and rows. The first `left` columns hold names and are aligned to the left, the others to the right.

    HTML tells the title to screen readers; a terminal shows it above the table, and `note` below it.
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
        self.rows.append(Row(tuple(map(_cell, cells)), group, kind))

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
    """A faint paragraph."""
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

    The first `most` characters are shown; `rest` says where the others are.
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


@dataclass(frozen=True)
class Beside:
    """Blocks side by side where HTML has the room."""

    blocks: Sequence["Content"]


@dataclass(frozen=True)
class Only:
    """Blocks for one of the two formats."""

    format: Literal["html", "markdown"]
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


def _blocks(contents: Iterable[Content], form: Literal["html", "markdown"]) -> list[Any]:
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
                blocks += _blocks(content.blocks, form) if content.format == form else []
            case Section() | Details() | Beside():
                inner = _blocks(content.blocks, form)
                blocks += [replace(content, blocks=inner)] if inner else []
            case _:
                blocks.append(content)
    return blocks


def write_page(path: Path, page: Page, template: Path | None = None, **values: object) -> None:
    """Write a page as HTML; arguments as of `page_html`. Half a character, which is no UTF-8, becomes a question mark."""
    write_atomically(path, page_html(page, template, **values).encode("utf-8", "replace").decode())


def write_markdown(path: Path, page: Page) -> None:
    """Write a page as Markdown, as `write_page` does."""
    write_atomically(path, page_markdown(page).encode("utf-8", "replace").decode())


def page_html(page: Page, template: Path | None = None, **values: object) -> str:
    """A page as HTML, in base.html.j2 or in a template that extends it and has these values."""
    blocks = _blocks(page.blocks, "html")
    sections = [block for block in blocks if isinstance(block, Section) and block.anchor]
    before = blocks.index(sections[0]) if sections else len(blocks)
    values = {"title": page.title, "intro": blocks[:before], "sections": sections, "blocks": blocks[before:]} | values
    return _template(template).render(values)


@functools.cache
def _template(path: Path | None) -> Template:
    """A template in which every value is escaped, and one that is missing is an error."""
    environment = Environment(
        loader=ChoiceLoader([FileSystemLoader(each.parent) for each in (Path(__file__), path) if each]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        sha256=lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode(),
        plain=plain,
        visible=visible,
        cut=cut,
        number="{:,}".format,
        unbroken=lambda text: _INNER_SPACE.sub("\u00a0", text),
        kind=lambda block: type(block).__name__,
        is_web=lambda url: bool(_WEB.fullmatch(url)),
    )
    return environment.get_template(path.name if path else "base.html.j2")


def page_markdown(page: Page) -> str:
    """A page as Markdown of GitHub."""
    front = yaml.safe_dump(dict(page.front), sort_keys=False, allow_unicode=True) if page.front is not None else ""
    head = f"---\n{front}---\n\n" if front else ""
    return head + _markdown([Section(page.title, page.blocks)], level=1) + "\n"


def _markdown(contents: Iterable[Content], level: int) -> str:
    return "\n\n".join(_block_markdown(block, level) for block in _blocks(contents, "markdown"))


def _block_markdown(block: Any, level: int) -> str:
    match block:
        case Section() | Details():
            return f"{'#' * level} {escaped(block.title)}\n\n{_markdown(block.blocks, level + 1)}"
        case Beside():
            return _markdown(block.blocks, level)
        case Paragraph():
            return "".join(escaped_piece(p) if isinstance(p, str) else _cell_markdown(p) for p in block.pieces).strip()
        case Bullets():
            return "\n".join(f"{'> ' * block.warning}- {escaped(item)}" for item in block.items)
        case Facts():
            return "\n".join(f"- {escaped(name)}: {escaped(value)}" for name, value in block.pairs)
        case Tiles():
            return "\n".join(f"- {escaped(name)}: {escaped('; '.join(more))}" for name, *more in block.tiles)
        case Drawing():
            return f"![{escaped(block.caption)}]({quote(block.file)})"
        case Code():
            fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", block.text))])
            return f"{fence}{block.language}\n{visible(block.text).rstrip()}\n{fence}"
        case _:
            return _table_markdown(block)


def _table_markdown(table: Table) -> str:
    marks = ["---" if i < table.left else "---:" for i in range(len(table.columns))]
    lines = [[escaped(name) for name in table.columns], marks]
    for group, rows in table.groups():
        if group:
            lines.append([f"**{escaped(group)}**", *[""] * (len(marks) - 1)])
        for row in rows:
            name, *others = map(_cell_markdown, row.cells)
            style = "*" if row.kind == "faint" else ""
            name = f"**{name}**" if row.kind == "strong" else f"{style}{name}{style}"
            lines.append([name, *(f"{style}{text}{style}" if text else "" for text in others)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell_markdown(cell: Cell) -> str:
    text = code(cell.text) if cell.code else escaped(cell.text)
    if _WEB.fullmatch(cell.url):
        text = f"[{text}]({cell.url})"
    return " ".join(filter(None, (text, escaped(cell.more))))
