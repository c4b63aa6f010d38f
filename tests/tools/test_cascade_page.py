"""The page about the cascade of two modes."""

import pytest
from report_examples import some

import cascade as page
from generated import written
from jaxguard.study.grid import open_study


@pytest.fixture
def kept():
    return page.read(open_study("results/cascade"), page.DOCS / "results")


def test_the_page_says_what_was_kept(kept):
    assert written(page.DOCS / "cascade.md") == page.tables(kept), "python tools/cascade.py"


def test_both_answer_formats_are_compared(kept):
    assert list(kept) == ["answer format first", "answer format last"]
    rows = page.modes(kept).rows
    assert len(rows) == 2 * 2 * 4, "two formats, two modes, four sets"


def test_each_row_is_a_mode_of_a_benchmark():
    evaluation = some()
    rows = page.modes({"answer format first": evaluation}).rows
    assert [row.cells[0].text for row in rows] == [
        c.mode for b in evaluation.benchmarks for c in evaluation.by_benchmark[b]
    ]
    assert {row.cells[0].more for row in rows} == {"answer format first"}
