"""Parts of documents that a tool writes, between two marks; tests hold the documents to them."""

from pathlib import Path

START, END = "<!-- generated -->\n", "<!-- end of generated -->\n"


def written(document: Path) -> str:
    """What stands between the marks."""
    _, _, rest = document.read_text(encoding="utf-8").partition(START)
    return rest.partition(END)[0]


def rewrite(document: Path, text: str) -> None:
    """Put `text` between the marks."""
    before, _, rest = document.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    document.write_text(before + START + text + END + after, encoding="utf-8")
