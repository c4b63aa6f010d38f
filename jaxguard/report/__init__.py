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

Figures: `from jaxguard.report.figures import COLOURS, inline_svg, save_figure, style`, which loads matplotlib; draw in `style()`.
A page with a script has a template that extends base.html.j2 and fills its blocks `main` (with {{ page }} for the blocks),
`style` and `script`, which the content security policy allows by its hash: write_page(path, page, template, name=value).
"""

from jaxguard.report.blocks import (
    Beside,
    Bullets,
    Cell,
    Code,
    Content,
    Details,
    Drawing,
    Facts,
    Only,
    Page,
    Paragraph,
    Quote,
    Section,
    Table,
    Tiles,
    estimate,
    note,
)
from jaxguard.report.write import page_html, page_markdown, write_markdown, write_page

__all__ = [
    "Beside", "Bullets", "Cell", "Code", "Content", "Details", "Drawing", "Facts", "Only", "Page", "Paragraph", "Quote",
    "Section", "Table", "Tiles", "estimate", "note", "page_html", "page_markdown", "write_markdown", "write_page",
]  # fmt: skip
