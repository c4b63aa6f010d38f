"""The page of a trace store as its reader meets it, in headless Chromium."""

import re
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from browser import complaints, open_page, requests, screen
from page_examples import BREAKOUTS, GOOD, SETTINGS, STORE, hostile


def visible(browser):
    """The text that a reader sees."""
    return browser.execute_script("return document.body.innerText.toWellFormed()")


def listed(browser):
    """(example, round, result) of the attempts that are not filtered out."""
    code = """return [...document.querySelectorAll('#attempts > details:not([hidden]) > summary')].map(summary => [
        summary.firstChild, summary.querySelector('small'), summary.querySelector('.chip') || 'accepted'
    ].map(part => part.textContent?.toWellFormed() ?? part))"""
    return [(name, re.match(r"round (\d+)", where)[1], result) for name, where, result in browser.execute_script(code)]


def summaries(browser):
    return browser.find_elements("css selector", "#attempts summary")


def choose(browser, name, value):
    browser.find_element("css selector", f"#{name} option[value='{value}']").click()


def test_nothing_hostile_runs(browser, page):
    open_page(
        browser, page(hostile(), {**SETTINGS, "teacher": BREAKOUTS[0], "version": BREAKOUTS[1], "prompt": BREAKOUTS[6]})
    )
    assert len(listed(browser)) == len(BREAKOUTS)
    for summary in summaries(browser):
        summary.click()
    assert BREAKOUTS[0] in visible(browser)
    assert browser.execute_script("return window.hacked") is None
    assert browser.execute_script("return document.images.length") == 0
    assert (complaints(browser), requests(browser)) == ([], [])


def test_text_is_hidden_until_it_is_asked_for(browser, page):
    open_page(browser, page(STORE))
    assert "sourdough" not in visible(browser)
    assert "the given label" not in visible(browser)
    attempts = summaries(browser)
    attempts[3].send_keys("\n")
    assert "Rye needs a sourdough." in visible(browser)
    attempts[1].click()
    assert "sourdough" not in visible(browser)
    assert "labels_leaked: says 'the given label'" in visible(browser)
    assert len(browser.find_elements("css selector", "details[name=attempt][open]")) == 1
    attempts[1].click()
    assert "the given label" not in visible(browser)


def test_search_narrows_the_rows(browser, page):
    open_page(browser, page(STORE))
    search, deep = browser.find_element("id", "search"), browser.find_element("id", "deep")
    assert len(listed(browser)) == 6
    search.send_keys("GIVEN label")
    assert [row[:2] for row in listed(browser)] == [("x1", "0"), ("x1", "1")]
    search.clear()
    search.send_keys("sourdough")
    assert listed(browser) == []
    assert "0 of 6 match" in visible(browser)
    deep.click()
    assert listed(browser) == [("x1", "2", "accepted")]
    search.send_keys("\ue003" * len("sourdough"))  # backspace
    assert len(listed(browser)) == 6


def test_filters(browser, page):
    open_page(browser, page(STORE))
    browser.find_element("xpath", "//select[@id='result']/option[.='accepted']").click()
    assert [row[:2] for row in listed(browser)] == [("x0", "0"), ("x1", "2")]
    browser.find_element("xpath", "//select[@id='result']/option[.='failed']").click()
    assert len(listed(browser)) == 4
    choose(browser, "check", "labels_leaked")
    assert [row[:2] for row in listed(browser)] == [("x1", "0"), ("x1", "1")]
    browser.find_element("xpath", "//select[@id='round']/option[.='1']").click()
    assert listed(browser) == [("x1", "1", "labels_leaked")]
    choose(browser, "check", "judge")
    assert listed(browser) == [("x2", "1", "judge")]


@pytest.fixture
def server():
    """A web server that notes what it is asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()
        thread.join()


CALL = """
const [url, done] = arguments;
const image = new Promise(end => { const i = new Image(); i.onload = i.onerror = end; i.src = url + "/image"; });
Promise.allSettled([image, fetch(url + "/fetch", {mode: "no-cors"})]).then(() => done());
"""


def test_the_page_cannot_reach_the_network(browser, page, server, tmp_path):
    url, asked = server
    free = tmp_path / "free.html"
    free.write_text("<!DOCTYPE html><title>free</title>")
    open_page(browser, free)
    browser.execute_async_script(CALL, url)
    assert sorted(asked) == ["/fetch", "/image"]  # without the policy it works, so the test can fail
    asked.clear()
    open_page(browser, page(STORE))
    assert requests(browser) == []
    browser.execute_async_script(CALL, url)
    assert asked == []
    assert any("Content Security Policy" in message for message in complaints(browser))


@pytest.mark.parametrize("attempts", [STORE, hostile(), []], ids=["plain", "hostile", "empty"])
def test_it_fits_a_phone(browser, page, attempts):
    long = [replace(GOOD, example_id="y" * 300, trace="z" * 5000)] if attempts else []
    with screen(browser, 390):
        open_page(browser, page([*long, *attempts], {**SETTINGS, "teacher": "organisation/" + "m" * 80}))
        for summary in summaries(browser):
            summary.click()
            assert browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]
        assert browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]


def test_dark_where_the_reader_likes_it_dark(browser, page):
    open_page(browser, page(STORE))
    lightness = []
    for dark in (False, True):
        with screen(browser, 1100, dark=dark):
            colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
            lightness.append(sum(map(int, re.findall(r"\d+", colour)[:3])))
    assert lightness[0] > 600 > 200 > lightness[1]
