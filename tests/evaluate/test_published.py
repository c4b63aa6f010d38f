"""The paper's results as shipped, and mistakes in such a file."""

import pytest
import yaml

from jaxguard.evaluate.benchmarks.loading import list_benchmarks
from jaxguard.evaluate.report.published import AVERAGES, PUBLISHED_FOLDER, nearest_row, read_published
from jaxguard.utils.errors import JaxguardError

PAPER = read_published()


@pytest.fixture
def broken(tmp_path):
    """broken(change): the error of the shipped file after change(tree)."""

    def read(change):
        tree = yaml.safe_load((PUBLISHED_FOLDER / "paper.yaml").read_text())
        change(tree)
        (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(tree))
        with pytest.raises(JaxguardError) as caught:
            read_published("wrong", tmp_path)
        return str(caught.value)

    return read


def test_the_papers_main_numbers():
    full, half = PAPER.row("llama_wgm_reasoning"), PAPER.row("gemma_reasoning")
    assert [full.average(name) for name in AVERAGES] == [0.846, 0.836, 0.841, 0.878]
    assert (full.dynaguardrail, full.cosapien) == (0.876, 0.882)
    assert [half.average(name) for name in AVERAGES] == [0.835, 0.824, 0.830, 0.834]
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
    assert set(PAPER.averages.benchmarks("safety")) | set(PAPER.averages.benchmarks("custom")) <= set(list_benchmarks())
    assert [len(PAPER.averages.benchmarks(name)) for name in AVERAGES] == [5, 4, 9, 2]


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


def test_mistakes_are_named(broken):
    assert "row 'wildguard': safety is 0.832, but its parts come to 0.8043" in broken(
        lambda tree: tree["rows"][0].update(prompt=0.775)
    )
    assert "'wildguard' is given twice" in broken(lambda tree: tree["rows"][1].update(id="wildguard"))
    assert "latency: there is no row 'x'" in broken(lambda tree: tree["latency"]["points"][0].update(row="x"))
    assert "sentence_budget: x must rise" in broken(lambda tree: tree["sentence_budget"].reverse())
    assert "wrong.yaml: unknown field 'rows.0.promt'; did you mean 'prompt'?" in broken(
        lambda tree: tree["rows"][0].update(promt=0.5)
    )
    assert "rows.0.prompt" in broken(lambda tree: tree["rows"][0].update(prompt=84))


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(JaxguardError, match="no published results 'paper'"):
        read_published("paper", tmp_path)
