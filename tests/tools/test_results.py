"""The page of results, from made-up evaluations."""

import json
import re
from dataclasses import replace

import pytest
from report_examples import FEW, some

import results as page
from generated import written
from jaxguard.evaluate.scores.results import write_results
from jaxguard.study.grid import open_study


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Two sizes, two subsets of each, and how the second guard is the bag of words."""
    monkeypatch.setattr(page, "WORDS", "other")
    monkeypatch.setattr(page, "OVER_REFUSAL", "wildguardtest_prompt")
    direct = [cell for cell in some().cells if cell.mode == "direct"]
    # Made-up evaluations compare F1 only.
    direct = [c if c.versus is None else replace(c, versus=replace(c.versus, auprc=c.versus.f1)) for c in direct]
    steps = "".join(json.dumps({"step": i, "loss": 0.5, "speed": {"seconds": 30.0}}) + "\n" for i in range(4))
    (tmp_path / "run" / "evaluate").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps({"step": 0, "validation": {}}) + "\n" + steps)
    write_results(replace(some(), cells=tuple(direct)), tmp_path / "run" / "evaluate" / "results.json")
    study = open_study("results/pool_sizes", overrides=["data.subset=[5000,500]"])
    study = replace(study, runs=study.runs[:4])
    for run in study.runs:
        page.keep(tmp_path / "run", tmp_path / "kept" / run.name)
    return page.read(study, tmp_path / "kept")


def test_what_is_kept_holds_no_text(trained, tmp_path):
    wrong = [example for cell in some().cells for example in cell.wrong]
    assert wrong, "the evaluation lists errors"
    for path in (tmp_path / "kept").glob("*/*"):
        assert not any(each.example.prompt in path.read_text() for each in wrong)


def test_the_page_says_what_was_kept():
    results = page.read(open_study("results/pool_sizes"), page.DOCS / "results")
    assert written(page.DOCS / "results.md") == page.tables(results), "python tools/results.py"


def test_the_guard_is_compared_with_the_words(trained):
    ours, words = (trained[0].cells[guard]["wildguardtest_prompt"] for guard in (page.OURS, page.WORDS))
    _, auprc, other, difference, *_ = page.beside(trained[:2]).rows[0].cells
    assert auprc.text == f"{ours.calibration.auprc.value:.3f}"
    assert other.text == f"{words.calibration.auprc.value:.3f}"
    stored = words.versus.auprc
    assert float(difference.text.replace("\N{MINUS SIGN}", "-")) == pytest.approx(-stored.value, abs=5e-4)
    low, high = (float(x) for x in re.findall(r"[-+\d.]+", difference.more.replace("\N{MINUS SIGN}", "-")))
    assert (low, high) == pytest.approx((-stored.high, -stored.low), abs=5e-4)


def test_each_run_is_compared_with_its_words(trained):
    table = page.differences(trained)
    assert [row.cells[0].text for row in table.rows] == ["5,000", "5,000", "500", "500"]
    stored = trained[0].cells[page.WORDS]["wildguardtest_prompt"].versus.auprc
    assert float(table.rows[0].cells[1].text.replace("\N{MINUS SIGN}", "-")) == pytest.approx(-stored.value, abs=5e-4)


def test_sizes_are_means_over_subsets(trained):
    table = page.by_size(trained)
    assert len(table.rows) == 4, "two sizes, two guards"
    assert [cell.text for cell in page.costs(trained).rows[0].cells] == ["5,000", "4", "2"]


def test_the_figure_has_a_panel_for_each_set(trained):
    axes = page.figure(trained).axes
    assert [one.get_title("left") for one in axes] == list(FEW)
