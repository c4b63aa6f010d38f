"""The paper's results as shipped, and mistakes in such a file."""

from pathlib import Path

import pytest
import yaml

from jaxguard.config.base import find_yaml
from jaxguard.evaluate.benchmarks.loading import list_benchmarks
from jaxguard.evaluate.report.published import AVERAGES, nearest_row, read_published
from jaxguard.evaluate.scores.metrics import PROMPT_SHARE
from jaxguard.utils.errors import JaxguardError

PAPER = read_published()


def test_the_papers_main_numbers():
    full, half = PAPER.row("llama_wgm_reasoning"), PAPER.row("gemma_reasoning")
    assert [getattr(full, name) for name in AVERAGES] == [0.846, 0.836, 0.841, 0.878]
    assert (full.dynaguardrail, full.cosapien) == (0.876, 0.882)
    assert [getattr(half, name) for name in AVERAGES] == [0.835, 0.824, 0.830, 0.834]
    assert PAPER.row("llama_topic_following").safety is None
    assert PAPER.row("another") is None
    assert len(PAPER.rows) == 23
    assert [(one.x, one.f1, one.deviation) for one in PAPER.sample_efficiency[:2]] == [
        (500, 0.746, 0.016),
        (1000, 0.78, 0.003),
    ]
    assert PAPER.sample_efficiency[-1].f1 == full.safety
    assert [one.x for one in PAPER.sentence_budget] == list(range(1, 11))
    assert [point.seconds for point in PAPER.latency.points] == [0.019, 0.026, 0.051]


def test_its_benchmarks_are_known():
    assert set(PAPER.benchmarks("safety")) | set(PAPER.benchmarks("custom")) <= set(list_benchmarks())
    assert [len(PAPER.benchmarks(name)) for name in AVERAGES] == [5, 4, 9, 2]


@pytest.mark.parametrize(
    ("asked", "row"),
    [
        (("google/gemma-3-4b-it", "Aegis 2.0", "reasoning", "reasoning", 5000), "gemma_reasoning"),
        (("meta-llama/Llama-3.1-8B-Instruct", "Aegis 2.0", "reasoning", "reasoning", 4000), "llama_aegis_reasoning_5k"),
        (("llama-3.1-8b", "WildGuardMix", "reasoning", "reasoning", 50000), "llama_wgm_reasoning"),
        (("Llama-3.1-8B", "WildGuardMix", "dual", "direct", 5000), "llama_wgm_dual_direct"),
        (("Llama-3.1-8B", "Aegis 2.0", "dual", "direct", 5000), None),
        (("Llama-3.1-8B", None, "none", "direct", None), "llama_untrained"),
        (("Llama-3.1-8B", None, "none", "reasoning", None), None),
        (("SmolLM2-135M", "Aegis 2.0", "reasoning", "reasoning", 5000), None),
    ],
)
def test_the_nearest_row(asked, row):
    found = nearest_row(PAPER, *asked)
    assert (found and found.id) == row


def test_its_numbers_agree_with_each_other():
    ids = [row.id for row in PAPER.rows]
    assert len(set(ids)) == len(ids)
    assert {point.row for point in PAPER.latency.points} <= set(ids)
    whole = [row for row in PAPER.rows if None not in (row.prompt, row.response, row.safety)]
    for row in whole:  # their averages are rounded
        assert row.safety == pytest.approx(PROMPT_SHARE * row.prompt + (1 - PROMPT_SHARE) * row.response, abs=0.0011)
    for curve in (PAPER.sample_efficiency, PAPER.sentence_budget):
        xs = [point.x for point in curve]
        assert xs == sorted(set(xs))


def test_a_mistake_in_the_file_is_named(tmp_path, monkeypatch):
    tree = yaml.safe_load(find_yaml("paper", Path("configs/published"), "results").read_text())
    tree["rows"][0]["promt"] = 0.5
    (tmp_path / "configs/published").mkdir(parents=True)
    (tmp_path / "configs/published/paper.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JaxguardError, match=r"paper.yaml.*rows\.0\.promt.*'prompt'"):
        read_published()
