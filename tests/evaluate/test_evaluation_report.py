"""The report of an evaluation: what it says, what it does not claim, and that nothing in it is markup."""

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from markdown_it import MarkdownIt
from report_examples import FEW, HOSTILE, PUBLISHED, SIZE, evaluation, hostile, some, whole
from rich.console import Console

from jaxguard.evaluate.report.page import (
    MOST_CHARACTERS,
    MOST_WRONG,
    cautions,
    errors,
    latency_figure,
    pooled,
    reliability_figure,
    report,
    write_report,
)
from jaxguard.evaluate.report.tables import main_table, points_table, score_table, summary_table, versus_table
from jaxguard.evaluate.scores.metrics import Bin
from jaxguard.evaluate.scores.results import read_results, write_results
from jaxguard.guards.operating_points import Platt
from jaxguard.report import Cell, page_html, page_markdown
from jaxguard.utils.errors import JaxguardError


def numbers(table, guard, mode=""):
    """The texts of the table's first row of a guard."""
    return next(
        [cell.text for cell in row.cells[1:]]
        for row in table.rows
        if row.cells[0].text == guard and (not mode or row.cells[0].more == mode)
    )


def with_cell(**changes):
    return replace(some(), cells=(replace(some().cells[0], **changes), *some().cells[1:]))


# results.json.


@pytest.mark.parametrize("example", [whole, some])
def test_results_are_read_as_they_were_written(tmp_path, example):
    found = example()
    write_results(found, tmp_path / "results.json")
    assert read_results(tmp_path / "results.json") == found


def test_results_are_ascii_whatever_they_hold(tmp_path):
    path = tmp_path / "results.json"
    write_results(hostile(), path)
    assert path.read_bytes().isascii()
    assert "\x1b" not in path.read_text()
    wrong = read_results(path).cells[0].wrong
    assert [one.text for one in wrong] == [text.replace("\ud800", "?") for text in HOSTILE]


def break_number(tree):
    tree["evaluation"]["cells"][0]["result"]["generations"] = "many"


def break_label(tree):
    tree["evaluation"]["cells"][0]["wrong"][0]["example"]["response_label"] = "harmful"


def break_field(tree):
    del tree["evaluation"]["averages"][1]["f1"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree: tree.update(version=0), "version"),
        (lambda tree: tree.pop("evaluation"), "evaluation"),
        (break_number, "cells.0.result.generations"),
        (break_field, "evaluation.averages.1.f1"),
        (break_label, "example 'x0': a response is labelled, but there is no response"),
    ],
)
def test_broken_results_are_named(tmp_path, change, said):
    path = tmp_path / "results.json"
    write_results(some(), path)
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(JaxguardError) as caught:
        read_results(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert "evaluate again" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\ufeff{}"])
def test_what_is_no_results_file_is_named(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(JaxguardError, match=r"results\.json: "):
        read_results(path)


def test_absent_results_are_named(tmp_path):
    with pytest.raises(JaxguardError, match=r"results\.json is not there: evaluate first"):
        read_results(tmp_path / "results.json")


# What it says.


def test_the_same_evaluation_gives_the_same_files(tmp_path):
    for name in ("one", "two"):
        write_report(some(), tmp_path / "runs" / name)
    for name in ("results.json", "report.md", "report.html"):
        assert (tmp_path / "runs/one" / name).read_bytes() == (tmp_path / "runs/two" / name).read_bytes()


def test_averages_and_differences():
    table = main_table(whole(), PUBLISHED)
    ours = {one.name: one.f1 for one in whole().averages if (one.guard, one.mode) == ("ours", "reasoning")}
    assert numbers(table, "ours", "reasoning") == [
        f"{ours[name].value:.3f}" for name in ("prompt", "response", "safety", "custom")
    ]
    less = numbers(table, "less the paper's")
    assert less[2] == f"{ours['safety'].value - 0.842:+.3f}"
    assert less[3] == f"{ours['custom'].value - 0.871:+.3f}"
    versus = next(one.versus for one in whole().averages if one.guard == "other").f1
    assert numbers(table, "less ours")[0] == f"{versus.value:+.3f}"
    assert numbers(table, "Llama, WildGuardMix, reasoning") == ["0.846", "0.836", "0.841", "0.878"]
    assert numbers(table, "Llama, WildGuardMix 5k, reasoning, topic following") == ["", "", "", "0.893"]
    assert sum(row.kind == "faint" for row in table.rows) == len(PUBLISHED.rows)
    assert cautions(whole(), PUBLISHED) == []


def test_without_a_chosen_row_they_only_stand_beside_each_other():
    table = main_table(replace(whole(), paper_rows={}), PUBLISHED)
    assert not [row for row in table.rows if row.cells[0].text == "less the paper's"]
    assert sum(row.kind == "faint" for row in table.rows) == len(PUBLISHED.rows)


def partly():
    return replace(whole(), cells=tuple(replace(cell, complete=False) for cell in whole().cells))


@pytest.mark.parametrize("example", [some, partly])
def test_no_difference_is_claimed_over_other_benchmarks(example):
    found = example()
    assert numbers(main_table(found, PUBLISHED), "less the paper's") == ["n/a"] * 4
    said = " ".join(cautions(found, PUBLISHED))
    assert "Prompt F1, Response F1, Safety (Avg), Custom policies are over other benchmarks than the paper's" in said


def test_one_incomplete_guard_is_named_by_itself():
    cells = tuple(replace(c, complete=not (c.guard == "other" and c.source == "cosapien")) for c in whole().cells)
    said = cautions(replace(whole(), cells=cells, settings={"limit": 7}), PUBLISHED)
    assert said[0] == "evaluate.limit is 7: only some of the examples were evaluated of cosapien."
    assert said[1].startswith("Custom policies of other (reasoning), other (direct) is over other benchmarks")
    assert numbers(main_table(replace(whole(), cells=cells), PUBLISHED), "less the paper's")[3] != "n/a"


def test_what_touches_the_answers_is_a_warning():
    result, cost = some().cells[0].result, some().cells[0].cost
    assert not any("ours (reasoning) gives" in said for said in cautions(some(), PUBLISHED))
    changed = replace(cost, forced=60, unscored=24, cut=3)
    said = cautions(with_cell(result=replace(result, unparsable=12), cost=changed), PUBLISHED)
    found = [one.removeprefix("ours (reasoning) ") for one in said if one.startswith("ours (reasoning) ")]
    where = "wildguardtest_prompt"
    assert found == [
        f"gives many unparsable answers: {where} (5.0%).",
        f"often reasons longer than it may, and is forced to a verdict: {where} (25.0%).",
        f"has many answers without a probability, which count as unparsable ones do: {where} (10.0%).",
        f"cannot hold some examples, whose text lacks its middle: {where} (5.0%).",
    ]


def test_an_absent_cell_and_another_protocol_are_a_warning():
    said = cautions(replace(some(), cells=some().cells[1:], settings={"temperature": 0.0, "generations": 4}), PUBLISHED)
    assert "wildguardtest_prompt has no results of ours (reasoning)." in said
    assert "Answers are not sampled as in the paper: temperature 0.0 (there 0.6)." in said


def test_scores_of_a_benchmark():
    cell = some().cells[0]
    shown = dict(zip(score_table(some()).columns, score_table(some()).rows[0].cells, strict=True))
    f1 = cell.result.scores.f1
    assert shown["F1"] == Cell(f"{f1.value:.3f}", f"[{f1.low:.3f}, {f1.high:.3f}] ± {f1.deviation:.3f}")
    assert shown["unparsable"] == Cell("1", "0.4%")
    at_threshold = shown["F1 at chosen threshold"]
    assert at_threshold.text == f"{cell.thresholded.result.scores.f1.value:.3f}"
    assert f"at {cell.thresholded.scale}" in at_threshold.more
    assert score_table(some()).columns[1:3] == ("F1", "F1 at chosen threshold")
    bare = score_table(with_cell(calibration=None, thresholded=None))
    shown = dict(zip(bare.columns, bare.rows[0].cells, strict=True))
    assert [shown[head].text for head in ("AUPRC", "ECE", "F1 at chosen threshold")] == ["n/a"] * 3


def test_recall_and_false_positive_rate_at_each_operating_point():
    table = points_table(some())
    scores = some().cells[0].thresholded.points["0.01"]
    assert table.columns[1:] == ("best F1", "1.0% FPR")
    assert table.rows[0].cells[2].text == f"{scores.recall.value:.3f} / {scores.false_positive_rate.value:.3f}"
    without = replace(some(), cells=tuple(replace(cell, thresholded=None) for cell in some().cells))
    assert points_table(without).rows == []


def test_a_comparison_needs_two_guards():
    found = next(cell.versus for cell in some().cells if cell.versus)
    row = versus_table(some()).rows[0]
    assert row.cells[0] == Cell("other", "reasoning, less ours (reasoning)")
    assert row.cells[1].text == f"{found.f1.value:+.3f}"
    assert row.cells[4].text == f"{found.mcnemar.only_first} : {found.mcnemar.only_second}"
    alone = replace(some(), cells=tuple(cell for cell in some().cells if cell.guard == "ours"))
    assert versus_table(alone).rows == []
    for text in (page_markdown(report(alone, PUBLISHED)), page_html(report(alone, PUBLISHED))):
        assert "Compared with the first guard" not in text


def test_a_tie_of_generations_is_an_error():
    result = replace(some().cells[0].result, right=[5, 4, 3, 2, 1])
    assert errors(replace(some().cells[0], result=result)) == 12
    said = ("harmful", "unharmful", "unparsable", "unharmful")
    wrong = replace(some().cells[0].wrong[0], label="harmful", said=said)
    text = page_html(report(with_cell(wrong=(wrong,)), PUBLISHED))
    assert "labelled harmful, it says unharmful (2 of 4), harmful (1 of 4), unparsable (1 of 4)" in text
    assert "a tie is one" in text
    assert "a tie is one" in page_markdown(report(some(), PUBLISHED))


def test_an_evaluation_of_nothing_still_has_a_report():
    nothing = replace(some(), cells=(), averages=())
    assert "Nothing was evaluated." in page_markdown(report(nothing, PUBLISHED))
    assert "Nothing was evaluated." in page_html(report(nothing, PUBLISHED))


def test_many_errors_and_long_texts_are_cut():
    wrong = some().cells[0].wrong[0]
    long = replace(wrong, text="z" * (MOST_CHARACTERS + 1234))
    text = page_html(report(with_cell(wrong=(long,) * (MOST_WRONG + 9)), PUBLISHED))
    assert f"{MOST_WRONG} of {MOST_WRONG + 9} errors" in text
    assert text.count("1,234 more characters are in results.json.") == MOST_WRONG
    assert "z" * (MOST_CHARACTERS + 1) not in text


# Nothing is markup.


def test_markdown_shows_no_text_of_examples():
    assert "sourdough" in page_html(report(some(), PUBLISHED))
    assert "sourdough" not in page_markdown(report(some(), PUBLISHED))


def test_hostile_names_are_text_in_markdown():
    text = page_markdown(report(hostile(), PUBLISHED))
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    kinds = {child.type for token in tokens for child in token.children or ()} | {token.type for token in tokens}
    links = [
        dict(child.attrs)["href"] for token in tokens for child in token.children or () if child.type == "link_open"
    ]
    assert links == [PUBLISHED.url]
    assert not kinds & {"image", "html_inline", "html_block", "code_inline", "fence", "code_block"}
    assert "table_open" in kinds
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 6 + len(FEW)  # averages, scores, points, costs, comparison, errors, and slices
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.names, self.attributes = set(), set()

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_hostile_texts_add_no_element_or_attribute():
    found = []
    for one in (evaluation(wrong=len(HOSTILE)), hostile()):
        elements = Elements()
        elements.feed(page_html(report(one, PUBLISHED)))
        found.append((elements.names, elements.attributes))
    assert found[0][0] == found[1][0]
    assert not {"script", "img", "iframe", "object"} & found[1][0]
    assert not {name for name in found[1][1] if name.startswith("on")}


# Diagrams.


def test_pooled_bins_keep_all_examples():
    curves = [(Bin(10, 0.05, 0.0), Bin(30, 0.95, 1.0)), (Bin(30, 0.01, 0.2), Bin(5, 1.0, 0.4))]
    found = pooled(curves)
    assert [one.examples for one in found] == [40, 35]
    assert found[0].positive == pytest.approx(30 * 0.2 / 40)
    assert found[1].probability == pytest.approx((30 * 0.95 + 5) / 35)


def test_seconds_against_f1():
    (axes,) = latency_figure(some(), PUBLISHED).axes
    lines = {line.get_label(): line for line in axes.lines}
    safety = next(one.f1.value for one in some().averages if (one.mode, one.name) == ("direct", "safety"))
    assert lines["ours (direct)"].get_xydata().tolist() == [[pytest.approx(0.02), pytest.approx(safety)]]
    paper = lines["the paper (8 × A100, vLLM)"]
    assert list(paper.get_xdata()) == [0.019, 0.026, 0.051]  # of the data that ours is compared on
    (axes,) = latency_figure(replace(some(), paper_rows={}), PUBLISHED).axes
    assert sum(len(line.get_xdata()) for line in axes.lines if line.get_label() == paper.get_label()) == 7
    assert (axes.get_xscale(), axes.get_ylabel()) == ("log", "safety average, F1")
    (axes,) = latency_figure(replace(some(), averages=some().averages[:-1]), PUBLISHED).axes
    assert axes.get_ylabel() == "mean F1 of the common benchmarks"
    assert len(axes.lines) == 4
    free = tuple(replace(cell, cost=replace(cell.cost, seconds=0.0)) for cell in some().cells)
    assert latency_figure(replace(some(), cells=free), PUBLISHED) is None


def test_a_guard_without_probabilities_has_no_reliability_diagram():
    (axes,) = reliability_figure(some().cells[:3]).axes
    assert len(axes.lines) == 1 + 3 + 2  # the ideal, each benchmark, all of them before and after
    assert reliability_figure([replace(cell, calibration=None) for cell in some().cells]) is None


def test_the_page_has_each_diagram_with_a_text():
    for found, count in ((whole(), 2 + 4), (some(), 2 + 4)):
        assert len(re.findall(r'<svg role="img" aria-label="[^"]{20,}"', page_html(report(found, PUBLISHED)))) == count
    assert len(some().cells) == 4 * len(FEW)
    assert some().cells[0].examples == SIZE


def test_the_summary_of_twelve_benchmarks_fits_a_terminal():
    out = io.StringIO()
    Console(file=out, width=80).print(summary_table(whole()).rich())
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    rows = [line for line in text.splitlines() if "│" in line]
    assert len(whole().benchmarks) >= 11
    for cell in whole().cells:
        f1 = cell.result.scores.f1
        score = f"{f1.value:.3f} [{f1.low:.3f}, {f1.high:.3f}]"
        assert any(score in row and cell.guard in row and cell.mode in row for row in rows), score
    assert all(sum(f" {name} " in row for row in rows) == 1 for name in whole().benchmarks)


@pytest.mark.parametrize(
    ("platt", "scale"),
    [
        (None, "P > 0.400"),
        (Platt(1.0, 0.0), "calibrated P > 0.400, 0.400 as given"),
        (Platt(0.5, 1.0), "calibrated P > 0.400, 0.057 as given"),
        (Platt(-1.0, 0.0), "calibrated P > 0.400"),
    ],
)
def test_a_threshold_names_its_scale(platt, scale):
    thresholded = replace(some().cells[0].thresholded, threshold=0.4, platt=platt)
    assert thresholded.scale == scale
    if platt is not None and platt.slope > 0:
        given = float(scale.split()[-3])
        assert platt(np.array([given])) == pytest.approx(0.4, abs=2e-3)


def own(mixed=False):
    """The same evaluation on data of one's own; if `mixed`, beside a benchmark of the averages."""
    last = some().benchmarks[-1]
    cells = [
        replace(c, group="extra", benchmark="mine", source="own_prompts", title="Your prompts")
        if c.benchmark == last
        else c
        for c in some().cells
        if mixed or c.benchmark == last
    ]
    names = tuple(dict.fromkeys(cell.benchmark for cell in cells))
    return replace(some(), cells=tuple(cells), benchmarks=names, averages=some().averages if mixed else ())


def test_a_report_on_own_data_leads_with_them():
    text = page_markdown(report(own(), PUBLISHED))
    assert PUBLISHED.source not in text
    assert "paper" not in text.casefold()
    assert "## Averages" not in text
    assert text.index("## Benchmarks") < text.index("## Time and tokens")
    mixed = page_markdown(report(own(mixed=True), PUBLISHED))
    assert mixed.index("## Benchmarks") < mixed.index("## Averages")
    assert score_table(own(mixed=True)).rows[0].group.startswith("Your prompts")
    usual = page_markdown(report(some(), PUBLISHED))
    assert usual.index("## Averages") < usual.index("## Benchmarks")


def test_the_summary_has_f1_at_both_thresholds():
    table = summary_table(replace(own(), settings={**own().settings, "generations": 0}))
    assert table.columns[-1] == "F1 at P > 0.5 [95 % interval]"
    first, chosen = table.rows[:2]
    at = own().cells[0].thresholded
    assert first.cells[2].text == "reasoning"
    assert chosen.cells[-1] == Cell(f"{at.result.scores.f1.value:.3f}", f"at {at.scale}")
    bare = replace(own(), cells=tuple(replace(cell, thresholded=None) for cell in own().cells))
    assert len(summary_table(bare).rows) == len(bare.cells)
