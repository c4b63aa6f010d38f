"""The paper's results as shipped agree with each other, and with notes on the paper where these are at hand."""

import os
import re
from pathlib import Path

import pytest
import yaml
from benchmark_examples import ROOT

from jaxguard.config.base import find_yaml
from jaxguard.data.benchmarks.loading import list_benchmarks
from jaxguard.data.benchmarks.schema import read_benchmark
from jaxguard.evaluate.report.published import AVERAGES, nearest_row, read_published
from jaxguard.evaluate.scores.metrics import PROMPT_SHARE
from jaxguard.utils.errors import JaxguardError

PAPER = read_published()
NOTES = Path(os.environ.get("JAXGUARD_PAPER", ROOT.parent / "shared" / "paper.md"))


def test_the_papers_main_numbers():
    full, half = PAPER.row("llama_wgm_reasoning"), PAPER.row("gemma_wgm_reasoning")
    assert [full.scores[name] for name in AVERAGES] == [0.846, 0.836, 0.841, 0.878]
    assert (full.scores["dynaguardrail"], full.scores["cosapien"]) == (0.876, 0.882)
    assert [half.scores[name] for name in AVERAGES] == [0.835, 0.824, 0.830, 0.834]
    assert "safety" not in PAPER.row("llama_wgm_topic_following").scores
    assert PAPER.row("another") is None
    assert PAPER.sample_efficiency[-1].scores["safety"] == full.scores["safety"]


def test_its_benchmarks_are_known():
    assert set(PAPER.benchmarks("safety")) | set(PAPER.benchmarks("custom")) <= set(list_benchmarks())
    assert [len(PAPER.benchmarks(name)) for name in AVERAGES] == [5, 4, 9, 2]
    known = {*AVERAGES, *PAPER.benchmarks("safety"), *PAPER.benchmarks("custom")}
    scores = {
        name for row in PAPER.rows for part in (row.scores, row.deviations, *row.restated.values()) for name in part
    }
    assert {name.partition("/")[0] for name in scores} == known
    subsets = {name.partition("/")[2] for name in scores if name.startswith("cosapien/")}
    assert subsets == set(read_benchmark("cosapien").source.splits)
    rules = read_benchmark("dynaguardrail").policy.rules
    assert {name.partition("/")[2] for name in scores if name.startswith("dynaguardrail/")} == set(rules)


@pytest.mark.parametrize(
    ("asked", "row"),
    [
        (("google/gemma-3-4b-it", "WildGuardMix", "reasoning", "reasoning", 5000), "gemma_wgm_reasoning"),
        (("google/gemma-3-4b-it", "Aegis 2.0", "reasoning", "reasoning", 5000), None),
        (("meta-llama/Llama-3.1-8B-Instruct", "Aegis 2.0", "reasoning", "reasoning", 4000), "llama_aegis_reasoning_5k"),
        (("llama-3.1-8b", "WildGuardMix", "reasoning", "reasoning", 50000), "llama_wgm_reasoning"),
        (("Llama-3.1-8B", "WildGuardMix", "dual", "direct", 5000), "llama_wgm_dual_direct"),
        (("Llama-3.1-8B", "Aegis 2.0", "dual", "direct", 5000), None),
        (("Llama-3.1-8B", None, "none", "direct", None), None),
        (("SmolLM2-135M", "Aegis 2.0", "reasoning", "reasoning", 5000), None),
    ],
)
def test_the_nearest_row(asked, row):
    nearest = nearest_row(PAPER, *asked)
    assert (nearest and nearest.id) == row


def test_its_numbers_agree_with_each_other():
    ids = [row.id for row in PAPER.rows]
    assert len(set(ids)) == len(ids)
    assert {point.row for point in PAPER.latency.points} <= set(ids)
    whole = [row.scores for row in PAPER.rows if {"prompt", "response", "safety"} <= set(row.scores)]
    assert len(whole) == 22
    for scores in whole:  # their averages are rounded
        safety = PROMPT_SHARE * scores["prompt"] + (1 - PROMPT_SHARE) * scores["response"]
        assert scores["safety"] == pytest.approx(safety, abs=0.0011)
    for curve in (PAPER.sample_efficiency, PAPER.sentence_budget):
        xs = [point.x for point in curve]
        assert xs == sorted(set(xs))


def test_cosapien_is_the_mean_of_its_scenarios():
    rows = [row for row in PAPER.rows if "cosapien/film_production" in row.scores]
    assert len(rows) == 19
    for row in rows:
        parts = [score for name, score in row.scores.items() if name.startswith("cosapien/")]
        stated = [
            row.scores["cosapien"],
            *(other["cosapien"] for other in row.restated.values() if "cosapien" in other),
        ]
        assert min(abs(sum(parts) / 5 - score) for score in stated) <= 0.0012, row.id


def test_a_mistake_in_the_file_is_named(tmp_path, monkeypatch):
    tree = yaml.safe_load(find_yaml("paper", Path("configs/published"), "results").read_text())
    tree["rows"][0]["moode"] = "direct"
    (tmp_path / "configs/published").mkdir(parents=True)
    (tmp_path / "configs/published/paper.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JaxguardError, match=r"paper.yaml.*rows\.0\.moode.*'mode'"):
        read_published()


# The notes on the paper, table by table: every number of theirs is in the file.

MAIN = {
    "WildGuard (7B)": "wildguard",
    "Aegis 2.0 guard": "aegis2_guard",
    "Llama-3.1-8B-Instruct zero-shot": "llama_untrained",
    "DeepSeek-R1-Distill-Llama-8B": "r1_distill_llama",
    "WGM NR": "llama_wgm_direct",
    "WGM-R full": "llama_wgm_reasoning",
    "WGM-R 5k": "llama_wgm_reasoning_5k",
    "WGM-R 0.5k (50 epochs)": "llama_wgm_reasoning_500",
    "WGM-R 1 sentence": "llama_wgm_one_sentence",
    "WGM dual, NR mode": "llama_wgm_dual_direct",
    "WGM dual, R mode": "llama_wgm_dual_reasoning",
    "WGM-R continual SFT": "llama_wgm_continual",
    "Aegis-R full": "llama_aegis_reasoning",
    "Aegis-R 5k": "llama_aegis_reasoning_5k",
    "Aegis-R 1 sentence": "llama_aegis_one_sentence",
}
SHORT = {
    "NR": "llama_wgm_direct",
    "R full": "llama_wgm_reasoning",
    "R 5k": "llama_wgm_reasoning_5k",
    "R 0.5k": "llama_wgm_reasoning_500",
    "R 1-sent": "llama_wgm_one_sentence",
    "Dual NR": "llama_wgm_dual_direct",
    "Dual R": "llama_wgm_dual_reasoning",
    "Aegis-R full": "llama_aegis_reasoning",
    "Aegis-R 5k": "llama_aegis_reasoning_5k",
    "Aegis-R 1-sent": "llama_aegis_one_sentence",
}
GEMMA = {
    "base": "gemma_untrained",
    "NR": "gemma_wgm_direct",
    "R": "gemma_wgm_reasoning",
    "Dual NR": "gemma_wgm_dual_direct",
    "Dual R": "gemma_wgm_dual_reasoning",
    "+TF (R)": "gemma_wgm_topic_following",
    "1-sent": "gemma_wgm_one_sentence",
}
DYNA = [f"dynaguardrail/{part}" for part in ("finance", "safety", "injection", "tax")]
SCENES = ("game_development", "public_prosecutor", "book_publisher_arab", "language_learning", "film_production")
COSA = [f"cosapien/{part}" for part in SCENES]
PROMPTS = ["wildguardtest_prompt", "aegis2_prompt", "openai_moderation", "simple_safety_tests", "toxic_chat"]
RESPONSES = ["xstest_response", "jbb_response", "wildguardtest_response", "aegis2_response"]
CUSTOM = ["dynaguardrail", "cosapien", "custom"]


@pytest.fixture(scope="module")
def notes():
    if not NOTES.is_file():
        pytest.skip(f"no {NOTES}; JAXGUARD_PAPER names the file")
    return NOTES.read_text(encoding="utf-8")


def numbers(text):
    return [float(number) for number in re.findall(r"(?<![\d.])\d*\.\d+", text)]


def table(notes, heading):
    """Name -> cells of the first table below a heading."""
    rows, below = {}, notes.split(heading, 1)[1]
    for line in below.splitlines()[1:]:
        if line.startswith("|"):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            rows[name] = cells
        elif rows:
            break
    return rows


def check(row, columns, cells):
    """Every number stands in the row's scores, or in what a later table restates."""
    row = PAPER.row(row)
    assert len(columns) == len(cells), row.id
    for column, number in zip(columns, cells, strict=True):
        stated = [part[column] for part in (row.scores, *row.restated.values()) if column in part]
        assert number in stated, (row.id, column)


def test_table_1(notes):
    rows = table(notes, "WGM = WildGuardMix")
    for name, row in MAIN.items():
        check(row, ["prompt", "response", "safety", *CUSTOM], numbers(" ".join(rows[name])))
    check("llama_wgm_topic_following", CUSTOM, numbers(" ".join(rows["+ topic following (on 5k)"])))


def test_tables_5_to_7(notes):
    single = table(notes, "### Table 5 prompt / Table 6 response")
    policies = table(notes, "### Table 7 custom policy")
    for name, row in SHORT.items():
        check(row, [*PROMPTS, "prompt", *RESPONSES, "response"], numbers(" ".join(single[name])))
        check(row, [*DYNA, "dynaguardrail", *COSA, "cosapien", "custom"], numbers(" ".join(policies[name])))


def test_tables_2_and_8(notes):
    text = notes.split("### Tables 2/8", 1)[1].split("###", 1)[0]
    averages, subsets = text.split("Sub-scores", 1)
    parts = [numbers(part) for part in re.split(r";|->", averages)]
    names = ["llama_wgm_reasoning_5k", "llama_wgm_topic_following", "llama_wgm_one_sentence",
             "llama_wgm_topic_following_one_sentence", "llama_aegis_reasoning", "llama_aegis_topic_following"]  # fmt: skip
    for row, cells in zip(names, parts, strict=True):
        check(row, CUSTOM, cells)
    for row, cells in zip([names[1], names[3], names[4], names[5]], subsets.split(";"), strict=True):
        check(row, DYNA + COSA, numbers(cells.split("):", 1)[-1].replace("+TF 1-sent", "")))


def test_table_3(notes):
    text = notes.split("### Table 3", 1)[1].split("\n", 1)[1].split("(This", 1)[0]
    columns = ["safety", "prompt", "response", *CUSTOM]
    rows = ["llama_wgm_reasoning", "llama_wgm_one_sentence", "llama_wgm_dual_reasoning", "llama_wgm_topic_following",
            "llama_aegis_reasoning", "llama_aegis_topic_following"]  # fmt: skip
    for row, cells in zip(rows, text.split(";"), strict=True):
        assert PAPER.row(row).deviations == dict(zip(columns, numbers(cells), strict=True))


def test_curves(notes):
    efficiency = table(notes, "### Table 4 / Fig 2")
    names = [*(f"{point.x:.0f}" for point in PAPER.sample_efficiency[:-1]), "full"]
    for name, point in zip(names, PAPER.sample_efficiency, strict=True):
        cells = [cell.partition("+-") for cell in efficiency[name]]
        columns = ["prompt", "response", "safety"]
        assert point.scores == dict(zip(columns, (float(mean) for mean, _, _ in cells), strict=True))
        assert point.deviations == {c: float(d) for c, (_, _, d) in zip(columns, cells, strict=True) if d}
    budget = [numbers(part) for part in notes.split("### Fig 3", 1)[1].split("\n", 1)[1].split("\n", 1)[0].split(";")]
    assert [list(point.scores.values()) for point in PAPER.sentence_budget] == budget
    words = re.search(r"Mean words for N=1..10: ([\d. ]+) \(", notes)[1].split()
    assert [point.words for point in PAPER.sentence_budget] == [float(word) for word in words]


def test_latency(notes):
    text = notes.split("### Fig 4", 1)[1].split("\n", 1)[1].split("\n", 1)[0]
    bars = [re.search(r" (\.\d+)(?: \(\+([\d.]+)%\))?\.?$", part.strip()) for part in text.split(";")]
    expected = [(float(seconds), float(percent or 0) / 100) for seconds, percent in (bar.groups() for bar in bars)]
    assert [(p.seconds, p.slower) for p in PAPER.latency.points] == [(s, pytest.approx(x)) for s, x in expected]


def test_gemma(notes):
    rows = table(notes, "### Gemma-3-4B (Tables 9-12)")
    for name, row in GEMMA.items():
        check(row, ["prompt", "response", "safety", *CUSTOM, *PROMPTS, *RESPONSES], numbers(" ".join(rows[name])))
    text = notes.split("Custom sub-scores", 1)[1].split("):", 1)[1].split("\n", 1)[0]
    subsets = {part.split()[0]: numbers(part.split(" ", 2)[2]) for part in text.split(";")}
    names = {"base": "base", "NR": "NR", "R": "R", "DualNR": "Dual NR", "DualR": "Dual R", "+TF": "+TF (R)"}
    for name, cells in subsets.items():
        check(GEMMA[names[name]], DYNA + COSA, cells)
    restated = re.search(r"Table 12 base averages \((\S+)\)", notes)[1].split("/")
    check("gemma_untrained", CUSTOM, [float(number) for number in restated])
