"""Write a page as one HTML file that loads nothing, and as Markdown."""

import base64
import functools
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

import yaml
from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined, Template

from jaxguard.report.blocks import (
    Beside,
    Bullets,
    Cell,
    Code,
    Content,
    Details,
    Drawing,
    Facts,
    Page,
    Paragraph,
    Section,
    Table,
    Tiles,
    blocks_of,
)
from jaxguard.report.text import code, cut, escaped, escaped_piece, plain, visible
from jaxguard.utils.files import write_atomically

_INNER_SPACE = re.compile(r"(?<=\d,) (?=[+-]?\d)|(?<=[±=<]) |(?<=p) (?=[=<])|(?<=\d) (?=[a-z]{2})")
"""Spaces within intervals, deviations, p-values and counts, where no line breaks."""
_WEB = re.compile(r"https?://[^\s<>()\[\]\"'`|\\]+", re.ASCII)


def write_page(path: Path, page: Page, template: Path | None = None, **values: object) -> None:
    """Write a page as HTML; arguments as of `page_html`. Half a character, which is no UTF-8, becomes a question mark.

    Raises:
        JaxguardError: it cannot be written.
    """
    write_atomically(path, page_html(page, template, **values).encode("utf-8", "replace").decode())


def write_markdown(path: Path, page: Page) -> None:
    """Write a page as Markdown, as `write_page` does."""
    write_atomically(path, page_markdown(page).encode("utf-8", "replace").decode())


def page_html(page: Page, template: Path | None = None, **values: object) -> str:
    """A page as HTML.

    Args:
        page: what it says.
        template: extends base.html.j2, of which it fills the blocks main, style or script.
        values: of the template.
    """
    blocks = blocks_of(page.blocks, "html")
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
        csp=_csp,
        plain=plain,
        visible=visible,
        cut=cut,
        number="{:,}".format,
        percent="{:.1%}".format,
        unbroken=lambda text: _INNER_SPACE.sub("\u00a0", text),
        kind=lambda block: type(block).__name__,
        is_web=lambda url: bool(_WEB.fullmatch(url)),
    )
    return environment.get_template(path.name if path else "base.html.j2")


def page_markdown(page: Page) -> str:
    """A page as Markdown of GitHub."""
    front = yaml.safe_dump(dict(page.front), sort_keys=False, allow_unicode=True) if page.front is not None else ""
    head = f"---\n{front}---\n\n" if front else ""
    return head + markdown([Section(page.title, page.blocks)], level=1) + "\n"


def markdown(contents: Iterable[Content], level: int = 2) -> str:
    """Blocks as Markdown; their headings begin at `level`."""
    return "\n\n".join(_markdown(block, level) for block in blocks_of(contents, "markdown"))


def _markdown(block: Content, level: int) -> str:
    match block:
        case Section() | Details():
            return f"{'#' * level} {escaped(block.title)}\n\n{markdown(block.blocks, level + 1)}"
        case Beside():
            return markdown(block.blocks, level)
        case Paragraph():
            return "".join(escaped_piece(p) if isinstance(p, str) else _cell(p) for p in block.pieces).strip()
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
        case Table():
            return _table(block)
    raise TypeError(f"no block of a page: {block!r}")


def _table(table: Table) -> str:
    marks = ["---" if i < table.left else "---:" for i in range(len(table.columns))]
    lines = [[escaped(name) for name in table.columns], marks]
    for group, rows in table.groups():
        if group:
            lines.append([f"**{escaped(group)}**", *[""] * (len(marks) - 1)])
        for row in rows:
            name, *others = map(_cell, row.cells)
            style = "*" if row.kind == "faint" else ""
            name = f"**{name}**" if row.kind == "strong" else f"{style}{name}{style}"
            lines.append([name, *(f"{style}{text}{style}" if text else "" for text in others)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(cell: Cell) -> str:
    text = code(cell.text) if cell.code else escaped(cell.text)
    if _WEB.fullmatch(cell.url):
        text = f"[{text}]({cell.url})"
    return " ".join(filter(None, (text, escaped(cell.more))))


def _csp(text: str) -> str:
    """The content security policy's source that allows exactly this script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
