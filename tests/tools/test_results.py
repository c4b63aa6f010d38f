"""The page of results, from made-up evaluations."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from report_examples import FEW, some

import results as page


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Two sizes, two subsets of each, and how the second guard is the bag of words."""
    monkeypatch.setattr(page, "WORDS", "other")
    monkeypatch.setattr(page, "OVER_REFUSAL", "wildguardtest_prompt")
    direct = [cell for cell in some().cells if cell.mode == "direct"]
    # Made-up evaluations compare F1 only.
    direct = [c if c.versus is None else replace(c, versus=replace(c.versus, auprc=c.versus.f1)) for c in direct]
    steps = "".join(json.dumps({"step": i, "speed": {"seconds": 30.0}}) + "\n" for i in range(4))
    (tmp_path / "metrics.jsonl").write_text(steps)
    runs = [
        SimpleNamespace(
            labels={"data.subset": size, "data.subset_seed": seed},
            row=SimpleNamespace(series="one epoch"),
            key="equal_epochs",
            folder=tmp_path,
        )
        for size in ("5000", "500")
        for seed in ("0", "1")
    ]
    return [page.result(run, SimpleNamespace(cells=direct)) for run in runs]


def test_the_guard_is_compared_with_the_words(trained):
    ours, words = (guard["wildguardtest_prompt"] for guard in (trained[0].ours, trained[0].words))
    _, auprc, other, difference, *_ = page.beside(trained[:2]).rows[0].cells
    assert auprc.text == f"{ours.calibration.auprc.value:.3f}"
    assert other.text == f"{words.calibration.auprc.value:.3f}"
    stored = words.versus.auprc
    assert float(difference.text.replace("\N{MINUS SIGN}", "-")) == pytest.approx(-stored.value, abs=5e-4)
    low, high = (float(x) for x in re.findall(r"[-+\d.]+", difference.more.replace("\N{MINUS SIGN}", "-")))
    assert (low, high) == pytest.approx((-stored.high, -stored.low), abs=5e-4)


def test_sizes_are_means_over_subsets(trained):
    table = page.by_size(trained)
    assert len(table.rows) == 4, "two sizes, two guards"
    assert [cell.text for cell in page.costs(trained).rows[0].cells] == ["5,000", "4", "2"]


def test_the_figure_has_a_panel_for_each_set(trained):
    axes = page.figure(trained).axes
    assert [one.get_title("left") for one in axes] == list(FEW)
