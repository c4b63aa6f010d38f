"""The page as its reader meets it, in headless Chromium."""

from dataclasses import replace

import pytest
from browser import complaints, open_page, requests
from plan_examples import plan_of

from jaxguard.plan.page import page
from jaxguard.plan.targets import find_cluster
from jaxguard.plan.work import Work


@pytest.fixture
def two(tmp_path):
    path = tmp_path / "plan.html"
    small = plan_of(40, name="run <b>$x$", cluster=find_cluster("h100:2x8"))
    path.write_text(page([(plan_of(61), Work(781)), (replace(small, ideal_sent=0.0), Work(None))]))
    return path


def test_the_page_shows_both_plans_and_asks_for_nothing(browser, two):
    open_page(browser, two)
    text = browser.execute_script("return document.body.innerText")
    assert "61.00 GiB of 60.0 usable: does not fit" in text
    assert "run <b>$x$" in text
    assert "seconds of an update" in browser.execute_script("return document.querySelector('svg').textContent")
    assert browser.execute_script("return document.querySelectorAll('td.no').length") == 1
    assert (complaints(browser), requests(browser)) == ([], [])
