"""The study's page as its reader meets it, in headless Chromium, drawn by the published study from made-up results."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from browser import complaints, open_page, requests, screen

from jaxguard.evaluate.report.published import read_published
from jaxguard.study.grid import open_study
from jaxguard.study.report import write_report

ROOT = Path(__file__).parents[2]
TEXTS = "return [...document.querySelectorAll('svg text')].map(one => one.textContent)"
WIDTHS = "return [innerWidth, document.documentElement.scrollWidth]"


def made_up(path):
    """F1 that grows with the subset and differs between modes and seeds."""
    record = json.loads(path.read_text())
    f1 = SimpleNamespace(value=record["f1"], deviation=0.004)
    result = SimpleNamespace(scores=SimpleNamespace(f1=f1))
    cell = SimpleNamespace(guard="ours", mode=record["mode"], benchmark="own_responses", result=result, complete=True, examples=10,
                           cost=SimpleNamespace(seconds=0.25, wait_p50=1, wait_p95=2, wait_p99=3),
                           slices={}, other_f1={})  # fmt: skip
    average = SimpleNamespace(guard="ours", mode=record["mode"], name="safety", f1=f1, missing=())
    return SimpleNamespace(cells=[cell], averages=[average])


def page(folder, scale):
    """report.html of paper/sample_efficiency with a result for every run."""
    study = open_study("paper/sample_efficiency", scale, [f"run_folder={folder}"])
    for run in study.runs:
        data = run.config.data
        grown = 0.05 * (data.subset or 80_000) ** 0.2 + 0.01 * data.subset_seed + 0.02 * (data.mode == "direct")
        (run.folder / "evaluate").mkdir(parents=True)
        record = {"mode": data.mode, "f1": 0.4 + grown / 2}
        (run.folder / "evaluate/results.json").write_text(json.dumps(record))
    return write_report(study, made_up, read_published())[1]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Scale, None being the paper's -> report.html."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return {scale: page(tmp_path_factory.mktemp("study"), scale) for scale in (None, "smollm")}


@pytest.mark.parametrize("scale", [None, "smollm"])
def test_it_loads_nothing_and_complains_of_nothing(browser, pages, scale):
    open_page(browser, pages[scale])
    assert browser.execute_script("return document.scripts.length + document.images.length") == 0
    assert (complaints(browser), requests(browser)) == ([], [])


def test_both_modes_stand_beside_the_papers_points(browser, pages):
    open_page(browser, pages[None])
    texts = browser.execute_script(TEXTS)
    for wanted in ("5 epochs, reasoning", "5 epochs, direct", "781 steps, direct", "paper, reasoning", "F1, safety"):
        assert wanted in texts
    assert {"500", "1,000", "2,500", "5,000", "86,759"} <= set(texts)
    rows = browser.execute_script("return [...document.querySelectorAll('tr')].map(one => one.innerText)")
    row, deviations, *_ = [row for row in rows if row.startswith("5 epochs, 500 training examples\treasoning")]
    assert " ± 0.006 / 0.746" in row  # four subsets, 0.005 apart: 0.005 √(5 / 3)
    assert "0.004 ± 0.000" in deviations
    row, *_ = [row for row in rows if row.startswith("5 epochs, 500 training examples\tdirect")]
    assert "/" not in row
    assert "Dotted and black" in browser.execute_script("return document.querySelector('figcaption').innerText")


def test_a_scale_is_not_laid_beside_the_paper(browser, pages):
    open_page(browser, pages["smollm"])
    texts = browser.execute_script(TEXTS)
    assert {"1 step, reasoning", "1 step, direct", "F1, safety"} <= set(texts)
    assert "paper, reasoning" not in texts
    assert "not comparable at this scale" in browser.execute_script("return document.body.innerText")


def test_the_figure_is_seen_and_nothing_in_it_is_cut_off(browser, pages):
    open_page(browser, pages[None])
    inside = """
        return [...document.querySelectorAll('svg text')].every(one => {
            const box = one.getBoundingClientRect(), frame = one.closest('svg').getBoundingClientRect();
            return box.width > 0 && box.left >= frame.left - 1 && box.right <= frame.right + 1
                && box.top >= frame.top - 1 && box.bottom <= frame.bottom + 1
                && frame.width > 300 && frame.height > 150;
        });"""
    assert browser.execute_script(inside)


@pytest.mark.parametrize("scale", [None, "smollm"])
def test_it_fits_a_phone(browser, pages, scale):
    with screen(browser, 360):
        open_page(browser, pages[scale])
        assert browser.execute_script(WIDTHS) == [360, 360]
