"""Pages, tables and figures: hostile text is text in every format, and what is empty is left out."""

import html
import io
import re
from html.parser import HTMLParser

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markupsafe import Markup
from matplotlib.figure import Figure
from rich.console import Console

from jaxguard.report import (
    Beside,
    Bullets,
    Cell,
    Code,
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
    page_html,
    page_markdown,
    write_markdown,
    write_page,
)
from jaxguard.report.figures import COLOURS, INK, inline_svg, save_figure, style
from jaxguard.report.text import code, cut, escaped, plain, seconds, short, signed, visible
from jaxguard.utils.statistics import Estimate

MARKDOWN = MarkdownIt("gfm-like", {"linkify": False})
HOSTILE = st.one_of(
    st.text(),
    st.lists(
        st.sampled_from(
            ["<script>", "</td>", "</pre>", "<!--", "|", "\n", "\r", "[a](http://x)", "![b](//x)", "http://x", "www.x.y", "`", "**",
             "_", "~~", "# ", "- ", "1. ", "> ", "[0.1, 0.2]", "[1]: http://x", "(http://x)", "!", "\\", "&lt;", "{{ 7 * 7 }}",
             "$x$", "---", "===", "\x1b[31m", "\u202e", "\ud800", "' onload='x", '" onload="x', "a", " "]
        )
    ).map("".join),
)  # fmt: skip


class Elements(HTMLParser):
    """The tree of a page as (tag, names of attributes), and all of its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.data = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data):
        self.data.append(data)


def everything(text):
    """A page that has this text everywhere."""
    table = Table((f"h{text}", "b", "c"), f"t{text}", left=2)
    table.add(f"x{text}", Cell(f"x{text}", f"m{text}"), Cell(f"x{text}", url=f"http://{text}"), group=f"g{text}")
    table.add(Cell(f"x{text}", code=True), Cell("x", tone="bad", bar=0.5), 0.5, group=f"g{text}", kind="strong")
    blocks = [
        f"p{text}",
        Paragraph([f"p{text}", Cell(f"x{text}"), f"y{text}", Cell("l", url="http://a.b")]),
        Facts([(f"n{text}", f"v{text}")]),
        Bullets([f"i{text}"], warning=True),
        Bullets([f"i{text}"]),
        Tiles([(f"n{text}", f"v{text}", f"m{text}")]),
        Beside([table, Code(f"c{text}", "yaml")]),
        Details(f"d{text}", [Quote("q", f"q{text}", most=50), "x"]),
    ]
    return Page(f"T{text}", [Section(f"s{text}", blocks, "one"), Section("two", [table], "two")])


@given(HOSTILE)
def test_hostile_text_adds_no_element_or_attribute_to_a_page(text):
    marked_page, plain_page = (
        Elements(page_html(everything(text))),
        Elements(page_html(everything("x" * min(len(text), 60)))),
    )
    count = [tag for tag, _ in marked_page.tags].count("a")
    assert count in (
        3,
        5,
    )  # two of the navigation, one of the page, and the hostile address, twice, if it is an address
    rest = [[(tag, names) for tag, names in each.tags if tag not in ("a", "p")] for each in (marked_page, plain_page)]
    assert rest[0] == rest[1]
    assert "\x1b" not in page_html(everything(text))


@given(HOSTILE)
def test_hostile_text_is_text_in_markdown(text):
    tokens = MARKDOWN.parse(page_markdown(everything(text)))
    types = [token.type for token in tokens]
    assert types.count("heading_open") == 4
    assert types.count("table_open") == 2
    assert types.count("bullet_list_open") == 3  # the last two lists are neighbours
    assert types.count("fence") == 1
    assert not {"html_block", "hr", "code_block", "ordered_list_open"} & set(types)
    inline = [child for token in tokens for child in token.children or ()]
    assert not {child.type for child in inline} & {"html_inline", "image"}
    links = [dict(child.attrs)["href"] for child in inline if child.type == "link_open"]
    assert [link for link in links if not link.startswith("http://")] == []
    assert len(links) - links.count("http://a.b") in (0, 2)


@given(HOSTILE)
def test_escaped_text_renders_as_itself(text):
    assert MARKDOWN.render(escaped(f"x{text}")) == f"<p>{html.escape(plain(f'x{text}'), quote=True)}</p>\n".replace(
        "&#x27;", "'"
    )


@given(HOSTILE)
def test_escaped_text_is_one_cell_of_a_table(text):
    rendered = MARKDOWN.render(f"| a |\n| --- |\n| {escaped(text)} |\n| {code(text)} |")
    assert rendered.count("<td>") == 2
    assert not re.search(r"<(?!/?(table|thead|tbody|tr|th|td|code)\b)", rendered)


@given(HOSTILE)
def test_a_terminal_shows_text_and_no_markup(text):
    table = Table((f"a{text}", "b"), f"t{text}")
    table.add(f"[bold]{text}", 1, group="g")
    console = Console(file=io.StringIO(), width=400)
    console.print(table.rich())
    output = console.file.getvalue()
    assert "[bold]" in output
    assert "\x1b" not in output


def test_values_of_cells():
    table = Table(("a", "b", "c", "d", "e"))
    table.add("x", 1234, 0.12345, None, Estimate(0.5, 0.25, 0.75))
    assert [cell.text for cell in table.rows[0].cells] == ["x", "1,234", "0.123", "n/a", "0.500"]
    assert table.rows[0].cells[-1].more == "[0.250, 0.750]"
    with pytest.raises(ValueError, match="a, b"):
        table.add("x")


def test_columns_are_aligned():
    table = Table.of(("name", "kind", "size"), [("a", "b", 1)], left=2)
    assert "| --- | --- | ---: |" in page_markdown(Page("p", [table]))
    assert re.findall(r'<t[hd][^>]*class="n[^>]*>(\w+)', page_html(Page("p", [table]))) == ["size", "1"]
    assert [column.justify for column in table.rich().columns] == ["left", "left", "right"]


def test_what_is_empty_is_left_out():
    empty = [None, "", Table(("a",)), Bullets([]), Details("d", [Section("s", [Beside([Table(("a",))])])])]
    page = Page("title", [Section("gone", empty, "gone"), Section("here", ["x"], "here")])
    for text in (page_markdown(page), page_html(page)):
        assert "gone" not in text
        assert "here" in text
    assert "<nav" not in page_html(page)


def test_formats_differ_where_told():
    page = Page(
        "t",
        [Only("html", ["one"]), Only("markdown", ["two"]), Quote("name", "three"), Drawing("four", Markup("<svg/>"))],
    )
    assert ("one" in page_html(page), "two" in page_html(page), "three" in page_html(page)) == (True, False, True)
    assert page_markdown(page) == "# t\n\ntwo\n"


def test_long_quotes_are_cut():
    page = page_html(Page("t", [Quote("Prompt", "z" * 3000, 1000, "in results.json")]))
    assert "2,000 more characters are in results.json." in page
    assert "z" * 1001 not in page


def test_front_matter(tmp_path):
    write_markdown(tmp_path / "README.md", Page("t", ["lone \ud800"], front={"tags": ["ä: b"], "n": 1}))
    _, front, body = (tmp_path / "README.md").read_text().split("---\n")
    assert yaml.safe_load(front) == {"tags": ["ä: b"], "n": 1}
    assert body.startswith("\n# t\n")


def test_a_template_may_have_a_script_of_its_own(tmp_path):
    template = tmp_path / "mine.html.j2"
    template.write_text(
        '{% extends "base.html.j2" %}\n{% block style %}.mine { color: red; }{% endblock %}\n'
        "{% block script %}window.one = 1 < 2;{% endblock %}\n"
        "{% block main %}{{ super() }}<b>{{ extra }}</b>{% endblock %}\n"
    )
    write_page(tmp_path / "page.html", Page("t", ["first"]), template, extra="<i>")
    text = (tmp_path / "page.html").read_text()
    assert "<script>window.one = 1 < 2;</script>" in text
    assert "<b>&lt;i&gt;</b>" in text
    assert ".mine { color: red; }" in text
    assert re.search(r"script-src 'sha256-[\w+/]{43}='; ", text)
    assert "script-src" not in page_html(Page("t", ["first"]))


def test_numbers():
    assert [signed(x) for x in (0.1, -0.0001, -0.1)] == ["+0.100", "+0.000", "-0.100"]
    assert [seconds(x) for x in (0.01234, 3.14159, 123.4)] == ["0.0123", "3.14", "123"]
    assert cut("abc", 2, "…") == ("ab…", 1)
    assert short("a\n" * 40, 10) == "a a a a a…"


def test_control_characters_are_replaced_and_joined_emoji_stay():
    assert plain("a\u202eb\x1b[1m\nc") == "a\ufffdb\ufffd[1m c"
    assert visible("a\n\tb\r\nc \U0001f469\u200d\U0001f373") == "a\n\tb\nc \U0001f469\u200d\U0001f373"


@style()
def drawn():
    figure = Figure(figsize=(2, 2))
    figure.add_subplot(title="$x^{2$ <b>").plot([0, 1], color=COLOURS[0])
    return figure


def test_a_figure_takes_the_pages_colours_and_has_a_text_for_screen_readers():
    svg = inline_svg(drawn(), "curve", 'a "quoted" <text>')
    assert svg.startswith('<svg role="img" aria-label="a &#34;quoted&#34; &lt;text&gt;"')
    assert "var(--c0)" in svg
    assert "$x^{2$ &lt;b&gt;" in svg
    assert not re.search(f"{COLOURS[0]}|{INK}|<style|<script", svg, re.IGNORECASE)
    assert set(re.findall(r'(?:\bid="|url\(#|href="#)(.{6})', svg)) == {"curve-"}
    assert svg == inline_svg(drawn(), "curve", 'a "quoted" <text>')


@pytest.mark.parametrize(("name", "start"), [("x.png", b"\x89PNG"), ("x.svg", b"<?xml")])
def test_a_picture_is_replaced_at_once(tmp_path, name, start):
    save_figure(drawn(), tmp_path / name)
    first = (tmp_path / name).read_bytes()
    assert first.startswith(start)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    save_figure(drawn(), tmp_path / name)
    assert (tmp_path / name).read_bytes() == first


def test_markdown_shows_a_picture_beside_it():
    page = Page("t", [Drawing("a ]( b", file="right answers.png")])
    assert "![a &#93;( b](right%20answers.png)" in page_markdown(page)
    assert "<figure" not in page_html(page)
