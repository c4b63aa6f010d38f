"""The report as its reader meets it, in headless Chromium."""

import re

import pytest
from browser import complaints, open_page, requests, screen
from report_examples import HOSTILE, hostile, partly, whole

from jaxguard.evaluate.report.page import write_report

WIDTHS = "return [innerWidth, document.documentElement.scrollWidth]"
OPEN_ALL = "document.querySelectorAll('details').forEach(one => { one.open = true; })"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Name -> report.html."""
    folder = tmp_path_factory.mktemp("reports")
    found = {"plain": whole(), "partly": partly(), "hostile": hostile()}
    for name, one in found.items():
        write_report(one, folder / name)
    return {name: folder / name / "report.html" for name in found}


def visible(browser):
    """The text that a reader sees."""
    return browser.execute_script("return document.body.innerText")


def test_nothing_hostile_runs(browser, pages):
    open_page(browser, pages["hostile"])
    browser.execute_script(OPEN_ALL)
    assert HOSTILE[0] in visible(browser)
    assert HOSTILE[2] in visible(browser)
    assert browser.execute_script("return window.hacked") is None
    assert browser.execute_script("return document.images.length + document.scripts.length") == 0
    assert browser.execute_script("return [...document.links].filter(a => !a.hash).map(a => a.href)") == [
        "https://arxiv.org/abs/2505.20087v1"
    ]
    assert (complaints(browser), requests(browser)) == ([], [])


@pytest.mark.parametrize("name", ["plain", "partly"])
def test_it_loads_nothing_and_complains_of_nothing(browser, pages, name):
    open_page(browser, pages[name])
    browser.execute_script(OPEN_ALL)
    assert (complaints(browser), requests(browser)) == ([], [])


def test_texts_are_hidden_until_opened(browser, pages):
    open_page(browser, pages["plain"])
    assert "sourdough" not in visible(browser)
    assert "category: rye" not in visible(browser)
    steps = "#errors ~ details", "#errors ~ details > details", "#errors ~ details > details > details"
    for step in steps:
        assert "sourdough" not in visible(browser)
        browser.find_element("css selector", f"{step} > summary").click()
    assert visible(browser).count("How is sourdough number") == 2  # the prompt, and what the guard wrote
    assert re.search(r"labelled harmful, it says unharmful; P\(harmful\) 0\.\d{3}", visible(browser))
    browser.find_element("css selector", f"{steps[0]} > summary").click()
    assert "sourdough" not in visible(browser)


def test_absent_results_are_dashes(browser, pages):
    open_page(browser, pages["partly"])
    assert "toxic_chat has no results of other (direct)." in visible(browser)
    cells = "[...document.querySelectorAll('#benchmarks ~ .scroll td')].filter(one => one.innerText === '–').length"
    assert (
        browser.execute_script(f"return {cells}") == 11 + 2 + 6
    )  # of the scores, the operating points and the comparison


@pytest.mark.parametrize("name", ["plain", "partly", "hostile"])
def test_it_fits_a_phone(browser, pages, name):
    with screen(browser, 360):
        open_page(browser, pages[name])
        assert browser.execute_script(WIDTHS) == [360, 360]
        browser.execute_script(OPEN_ALL)
        assert browser.execute_script(WIDTHS) == [360, 360]


def test_names_stay_in_sight_while_a_table_is_scrolled(browser, pages):
    position = "return document.querySelector('tr.strong > th').getBoundingClientRect().left"
    with screen(browser, 360):
        open_page(browser, pages["plain"])
        before = browser.execute_script(position)
        browser.execute_script("document.querySelector('.scroll').scrollLeft = 80")
        assert browser.execute_script("return document.querySelector('.scroll').scrollLeft") == 80
        assert browser.execute_script(position) == before


def test_dark_where_the_reader_likes_it_dark(browser, pages):
    """The diagrams too: their axes' texts take the page's colour."""
    open_page(browser, pages["plain"])
    properties = (
        "getComputedStyle(document.body).backgroundColor",
        "getComputedStyle(document.querySelector('svg text')).fill",
    )
    colours = []
    for dark in (False, True):
        with screen(browser, 1100, dark=dark):
            colours += [browser.execute_script(f"return {script}") for script in properties]
    lightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours]
    back, text, dark_back, dark_text = lightness
    assert back > 600 > 200 > dark_back
    assert text < 200 < 600 < dark_text
