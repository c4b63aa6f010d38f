"""The page as its reader meets it, in headless Chromium."""

from dataclasses import replace

import pytest
from browser import complaints, open_page, requests
from plan_examples import plan_of

from jaxguard.plan.run import PlanReport
from jaxguard.plan.run_cost import RunCost
from jaxguard.plan.targets import find_cluster
from jaxguard.report import write_page


@pytest.fixture
def two(tmp_path):
    path = tmp_path / "plan.html"
    small = plan_of(40, name="run <b>$x$", cluster=find_cluster("h100:2x8"))
    report = PlanReport([plan_of(61, cost=RunCost(781)), replace(small, ideal_sent=0.0)])
    write_page(path, report.page())
    return path


def test_the_page_shows_both_plans_and_loads_nothing(browser, two):
    open_page(browser, two)
    text = browser.execute_script("return document.body.innerText")
    assert "61.00 GiB of 60.0 usable: does not fit" in text
    assert "run <b>$x$" in text
    assert "seconds of a step" in browser.execute_script("return document.querySelector('svg').textContent")
    assert browser.execute_script("return document.querySelectorAll('td.bad').length") == 1
    assert (complaints(browser), requests(browser)) == ([], [])
