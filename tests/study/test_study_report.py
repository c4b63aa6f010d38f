"""The report, from made-up results."""

import json
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from jaxguard.config.evaluate import GuardConfig
from jaxguard.evaluate.report.published import AVERAGES, Published, read_published
from jaxguard.guards.loading import modes_of
from jaxguard.study.grid import open_study
from jaxguard.study.report import CURVES, gather, write_report
from jaxguard.utils.errors import JaxguardError


@dataclass
class Results:
    """Stands for the reader of results.json: F1 by run, mode and name, kept in the file's place."""

    by_run: dict

    def __call__(self, path):
        modes = self.by_run[path.parent.parent.name]
        cells, averages = [], []
        for mode, scores in modes.items():
            for name, value in scores.items():
                f1 = SimpleNamespace(value=value, deviation=0.004)
                if name in AVERAGES:
                    missing = ("own",) if value == PARTIAL else ()
                    averages.append(SimpleNamespace(guard="ours", mode=mode, name=name, f1=f1, missing=missing))
                elif "/" not in name:
                    result = SimpleNamespace(scores=SimpleNamespace(f1=f1))
                    slices = {
                        f"scenario: {key.partition('/')[2]}": result for key in scores if key.startswith(f"{name}/")
                    }
                    cell = {
                        "guard": "ours",
                        "mode": mode,
                        "benchmark": name,
                        "result": result,
                        "complete": name != "part",
                        "examples": 10,
                        "cost": SimpleNamespace(seconds=0.25, wait_p50=0.5, wait_p95=1.25, wait_p99=150.4),
                        "slices": slices,
                        "other_f1": {"over all": SimpleNamespace(value=0.222)}
                        if name in ("dynaguardrail", "cosapien")
                        else {},
                    }
                    cells.append(SimpleNamespace(**cell))
            worse = SimpleNamespace(scores=SimpleNamespace(f1=SimpleNamespace(value=0.01, deviation=None)))
            baseline = {
                "guard": "baseline",
                "mode": mode,
                "benchmark": "own",
                "result": worse,
                "complete": False,
                "examples": 10,
            }
            waits = dict.fromkeys(("wait_p50", "wait_p95", "wait_p99"))
            cells.append(
                SimpleNamespace(**baseline, cost=SimpleNamespace(seconds=0.0, **waits), slices={}, other_f1={})
            )
        return SimpleNamespace(cells=cells, averages=averages)


PARTIAL = 0.123
"""An average that lacks a benchmark."""
PUBLISHED = Published(
    title="Bread",
    source="a book",
    url="https://example.org",
    protocol={},
    averages={"prompt": ["rye", "oats"], "response": ["own_responses"], "custom": ["dynaguardrail", "cosapien"]},
    rows=[
        {
            "id": "oven",
            "name": "An oven",
            "mode": "reasoning",
            "scores": {"safety": 0.5, "rye": 0.4, "cosapien/film": 0.3},
            "deviations": {"safety": 0.01},
        }
    ],
    sample_efficiency=[
        {"x": 8, "scores": {"safety": 0.7, "prompt": 0.72, "response": 0.68}, "deviations": {"safety": 0.02}},
        {"x": 99, "scores": {"safety": 0.9, "prompt": 0.92, "response": 0.88}},
    ],
    sentence_budget=[{"x": 8, "scores": {"safety": 0.7, "prompt": 0.72, "response": 0.68}, "words": 41}],
    latency={"hardware": "an oven", "points": [{"name": "An oven", "row": "oven", "seconds": 0.02, "slower": 0}]},
)


@pytest.fixture
def report(study):
    """report(results, **changes): (study, reader), with a file for every run of `results`."""

    def report(by_run, *overrides, **changes):
        made = study(*overrides, **changes)
        for run in made.runs:
            if run.name in by_run:
                (run.folder / "evaluate").mkdir(parents=True)
                (run.folder / "evaluate" / "results.json").write_text("{}")
        return made, Results(by_run)

    return report


def direct(value, name="own"):
    return {"direct": {name: value}}


def points(scores, metric):
    """(series, mode, x, F1) of the results on the curve's axis."""
    chosen = scores[(scores.metric == metric) & scores.x.notna()].dropna(subset="f1")
    return list(chosen[["series", "mode", "x", "f1"]].itertuples(index=False, name=None))


def test_seeds_are_averaged_and_axes_told_apart(report):
    study, read = report({"bread-8-0": direct(0.5), "bread-8-1": direct(0.7), "bread-16-0": direct(0.8)})
    text = write_report(study, read, PUBLISHED)[0].read_text()
    assert "| bread, 8 loaves | direct | 0.600 ± 0.141 | 2 of 2 |" in text  # √((0.1² + 0.1²) / 1)
    assert "| bread, 16 loaves | direct | 0.800 | 1 of 2 |" in text
    assert "Without results: base, bread-16-1, more." in text
    assert points(gather(study, read), "own") == [
        ("bread", "direct", 8, 0.5),
        ("bread", "direct", 8, 0.7),
        ("bread", "direct", 16, 0.8),
    ]


def test_both_modes_of_a_run_are_lines_and_curves_of_their_own(report):
    both = {"direct": {"own_responses": 0.4}, "reasoning": {"own_responses": None, "part": 0.3}}
    study, read = report({"bread-8-0": both, "bread-8-1": direct(0.6, "own_responses")})
    text = write_report(study, read, PUBLISHED)[0].read_text()
    assert "| bread, 8 loaves | direct | 0.500 ± 0.141 | n/a | 2 of 2 |" in text
    assert "| bread, 8 loaves | reasoning | n/a | 0.300 | 1 of 2 part |" in text
    assert points(gather(study, read), "own_responses") == [("bread", "direct", 8, 0.4), ("bread", "direct", 8, 0.6)]


def test_an_average_that_lacks_a_benchmark_is_marked_as_partial(report):
    results = {"bread-8-0": PARTIAL, "bread-16-0": 0.8}
    study, read = report({name: {"direct": {"own": 0.5, "safety": value}} for name, value in results.items()})
    text = write_report(study, read, PUBLISHED)[0].read_text()
    assert "| bread, 8 loaves | direct | 0.123 | 1 of 2 part |" in text
    assert "| bread, 16 loaves | direct | 0.800 | 1 of 2 |" in text


ROWS = {
    "base": {"published": {"reasoning": "oven"}},
    "bread": {"series": "loaf", "axes": {"data.subset": [8, 16]}},
    "control": {"axes": {"data.subset": [8]}},
    "all": {"series": "loaf", "axes": {"data.subset": [None]}, "examples": 99},
}
CURVE = {"axis": "data.subset", "label": "loaves", "published": "sample_efficiency", "series": "loaf"}


def reasoned(value):
    return {"reasoning": {"safety": value, "prompt": 0.25, "own": 0.1}}


def test_published_values_stand_beside_ours(report):
    made, read = report(
        {
            "base": reasoned(0.6),
            "bread-8": reasoned(0.65),
            "bread-16": reasoned(0.75),
            "all-all": reasoned(0.85),
            "control-8": reasoned(0.8),
        },
        rows=ROWS,
        curve=CURVE,
        metric="safety",
    )
    markdown, page = write_report(made, read, PUBLISHED)
    text = markdown.read_text()
    assert "| base | reasoning | 0.250 | 0.600 / 0.500 | 1 of 1 |" in text
    assert "| base | reasoning | 0.004 / 0.010 | 0.004 | 1 of 1 |" in text
    assert "| loaf, 8 loaves | reasoning | 0.250 / 0.720 | 0.650 / 0.700 ± 0.020 | 1 of 1 |" in text
    assert "| loaf, 16 loaves | reasoning | 0.250 | 0.750 | 1 of 1 |" in text
    assert "| loaf, all loaves | reasoning | 0.250 / 0.920 | 0.850 / 0.900 | 1 of 1 |" in text
    assert "| control, 8 loaves | reasoning | 0.250 | 0.800 | 1 of 1 |" in text
    html = page.read_text()
    svg = ElementTree.fromstring(re.search(r"<svg.*?</svg>", html, re.DOTALL)[0])
    assert svg.tag.endswith("svg")
    assert "0.850 / 0.900" in html
    curve = [(x, f1) for series, _, x, f1 in points(gather(made, read), "safety") if series == "loaf"]
    assert curve == [(8, 0.65), (16, 0.75), (99, 0.85)]


def test_a_dual_guard_is_told_from_those_of_one_mode(report):
    both = {mode: {"own": value} for mode, value in (("reasoning", 0.6), ("direct", 0.7))}
    made, read = report(
        {"bread-reasoning": {"reasoning": {"own": 0.5}}, "bread-dual": both},
        rows={"bread": {"axes": {"data.mode": ["reasoning", "dual"]}}},
    )
    text = write_report(made, read, PUBLISHED)[0].read_text()
    assert "| bread | reasoning | 0.500 | 1 of 1 |" in text
    assert "| bread, mode dual | reasoning | 0.600 | 1 of 1 |" in text


def test_a_published_row_without_a_run_can_be_quoted_and_other_tables_values_are_noted(report, study):
    again = PUBLISHED.rows[0].model_copy(
        update={"id": "again", "name": "Another", "restated": {"Table 7": {"cosapien/film": 0.35}}}
    )
    published = PUBLISHED.model_copy(update={"rows": (*PUBLISHED.rows, again)})
    changes = {
        "rows": {"base": {"published": {"reasoning": "again"}}},
        "quoted": ["oven"],
        "scales": {"tiny": {"about": "Less bread."}},
    }
    scores = {"reasoning": {"cosapien/film": 0.6, "cosapien": 0.6, "safety": 0.55}}
    made, read = report({"base": scores}, **changes)
    text = write_report(made, read, published)[0].read_text()
    assert "| An oven | reasoning | n/a / 0.500 | n/a | published |" in text
    assert "| An oven | reasoning | n/a / 0.020 | n/a / +0.0% |" in text
    assert "For base, reasoning, Table 7 of the paper has cosapien/film 0.350." in text
    made, read = report({"base": scores}, scale="tiny", **changes)
    text = write_report(made, read, published)[0].read_text()
    assert "oven" not in text
    assert "Table 7" not in text


def test_the_figure_shows_what_there_is_and_says_so(report):
    """A study may be evaluated on other benchmarks than its own: no empty figure comes of it."""
    made, read = report({"bread-8-0": direct(0.5, "own_prompts"), "bread-8-1": direct(0.7, "own_prompts")})
    html = write_report(made, read, PUBLISHED)[1].read_text()
    assert "The figure shows own_prompts: no run has a result for own_responses." in html
    assert "F1, own_prompts" in html


def test_rows_are_compared_with_another_on_the_same_examples(report):
    """Seeds are averaged for each example; a benchmark of other examples is left out."""
    right = {"base": [0, 1, 0, 1] * 25, "bread-8-0": [1, 1, 0, 1] * 25, "bread-8-1": [1, 1, 1, 1] * 25}
    results = {name: {"reasoning": {"own": 0.5, "rye": 0.6}} for name in right}
    opened, _ = report(results, against=["base"])
    markdown, _ = write_report(opened, gather_cells(results, right), PUBLISHED)
    section = markdown.read_text().partition("## Against base, on the same examples")[2].partition("\n## ")[0]
    assert "| own |" in section
    assert "rye" not in section
    [line] = [line for line in section.splitlines() if line.startswith("| bread")]
    value, low, high = (float(x) for x in re.findall(r"[-+]\d\.\d+", line.replace("\N{MINUS SIGN}", "-")))
    assert value == pytest.approx(0.375)
    assert 0.25 < low < value < high < 0.5
    assert "base" not in section.partition("| --- |")[2]


def gather_cells(results, right):
    """A reader of results.json whose cells also say which examples are right; of rye the examples differ by run."""
    whole = Results(results)

    def read(path):
        evaluation, run = whole(path), path.parent.parent.name
        for cell in evaluation.cells:
            cell.right = tuple(right[run]) if cell.guard == "ours" else ()
            cell.examples_sha256 = run if cell.benchmark == "rye" else "same"
            cell.result.generations = 1
        return evaluation

    return read


def test_how_preferences_and_reinforcement_trained_is_shown(report):
    study, read = report({"base": direct(0.5), "bread-8-0": direct(0.5), "bread-8-1": direct(0.7), "more": direct(0.8)})
    rights = {"bread-8-0": [0.25] * 2 + [0.5] * 17 + [0.75], "bread-8-1": [0.75, 1.0], "base": []}
    for run in study.runs:
        records = [
            {"step": step, "loss": 0.5, "rollouts/right": right} for step, right in enumerate(rights.get(run.name, []))
        ]
        if run.name == "more":
            records = [{"step": 1, "validation/direct/loss": 0.5}, {"step": 2, "preference/accuracy": 0.5}]
        if run.name in rights or records:
            run.folder.mkdir(parents=True, exist_ok=True)
            (run.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    text = write_report(study, read, PUBLISHED)[0].read_text()
    assert "|  | bread, 8 loaves | more |" in text
    assert "| rollouts/right | 0.500 to 0.812 | – |" in text  # two of twenty steps and one of two; (0.25 + 0.75) / 2
    assert "| preference/accuracy | – | 0.500 to 0.500 |" in text
    assert "validation/direct/loss" not in text


def test_the_metric_can_be_chosen(report):
    both = {"direct": {"own": 0.5, "own_responses": 0.6}}
    made, read = report({"bread-8-0": both}, "metric=own")
    html = write_report(made, read, PUBLISHED)[1].read_text()
    assert "F1, own<" in html
    assert "The figure shows" not in html


def test_the_published_curves_are_drawn_with_their_own_metrics(report):
    made, read = report(
        {"bread-8": reasoned(0.65)}, rows=ROWS, curve=CURVE | {"levels": {"oven": "oven"}}, metric="own"
    )
    assert "paper, reasoning" not in write_report(made, read, PUBLISHED)[1].read_text()
    made = replace(made, definition=made.definition.model_copy(update={"metric": "safety"}))
    made.definition.curve.levels["oven"] = "oven"
    PUBLISHED.row("oven").scores.update(prompt=0.1, response=0.1)
    html = write_report(made, read, PUBLISHED)[1].read_text()
    assert {"F1, prompt<", "F1, safety<"} <= set(re.findall("F1, [a-z]+<", html))
    assert "paper, reasoning" in html
    assert "paper, oven" in html


def test_single_benchmarks_and_subsets_have_tables_of_their_own(report):
    scores = {"reasoning": {"rye": 0.45, "cosapien": 0.6, "cosapien/film": 0.6, "safety": 0.55}}
    made, read = report({"base": scores}, rows=ROWS)
    text = write_report(made, read, PUBLISHED)[0].read_text()
    assert text.index("## Prompt benchmarks") < text.index("| base | reasoning | 0.450 / 0.400 | 1 of 1 |")
    assert text.index("## Custom policies, cosapien") < text.index(
        "| base | reasoning | 0.600 / 0.300 | 0.600 | 0.222 | 1 of 1 |"
    )
    assert "## Response benchmarks" not in text


def test_seconds_are_bars_beside_the_papers(report):
    made, read = report({"base": reasoned(0.5)}, rows=ROWS)
    html = write_report(made, read, PUBLISHED)[1].read_text()
    assert "seconds an example of an offline batch" in html
    assert "the paper (an oven)" in html
    page = (made.folder / "report.md").read_text()
    assert "| base | reasoning | 0.25 / 0.020 | +0.0% / +0.0% |" in page
    assert "| base | reasoning | 0.5 | 1.25 | 150 |" in page[page.index("## A request's own wait") :]


@pytest.mark.parametrize("scale", [None, "tiny"])
def test_words_of_a_budget_stand_beside_the_papers(report, study, scale):
    curve, scales = CURVE | {"published": "sentence_budget"}, {"tiny": {"about": "Less bread."}}
    made, read = report({"bread-8": reasoned(0.65)}, scale=scale, rows=ROWS, curve=curve, scales=scales)
    [folder] = [run.folder for run in made.runs if run.name == "bread-8"]
    (folder / "data.json").write_text('{"train": {"trace_words": 12.5}}')
    html = write_report(made, read, PUBLISHED)[1].read_text()
    assert "mean words of a trace" in html
    assert f"| 8 | 12.5{' / 41.0' if scale is None else ''} |" in (made.folder / "report.md").read_text()
    assert ("the paper<" in html) == (scale is None)


def test_a_scale_shows_nothing_published(report, study):
    scales = {"tiny": {"about": "Less bread."}}
    study(rows=ROWS, curve=CURVE, metric="safety", scales=scales)
    made, read = report({"base": reasoned(0.6)}, scale="tiny", rows=ROWS, curve=CURVE, metric="safety", scales=scales)
    text = write_report(made, read, PUBLISHED)[0].read_text()
    assert "| base | reasoning | 0.250 | 0.600 | 1 of 1 |" in text
    assert "Less bread." in text
    html = (made.folder / "report.html").read_text()
    assert "not comparable at this scale" in html
    assert "paper, reasoning" not in html
    assert "Without results: bread-8, bread-16, control-8, all-all." in text


def test_the_page_loads_nothing_and_titles_are_text(report):
    made, read = report({"base": direct(0.5)}, title="<b>Bread</b> | $x$", rows={"base": {"series": "<i>$\\frac{x$"}})
    markdown, page = write_report(made, read, PUBLISHED)
    assert "<b>" not in markdown.read_text()
    html = page.read_text()
    assert "<b>" not in html
    assert "&lt;i&gt;" in html
    assert not re.search(r"(src|href)=[\"']?https?:|<script", html)


def test_without_results_there_is_no_report(report):
    made, read = report({})
    with pytest.raises(JaxguardError, match="no results yet"):
        write_report(made, read, PUBLISHED)


def test_a_published_row_that_does_not_exist_is_named(report):
    made, read = report({"base": reasoned(0.5)}, rows={"base": {"published": {"reasoning": "mill"}}})
    with pytest.raises(JaxguardError, match="no row 'mill'"):
        write_report(made, read, PUBLISHED)


ROOT = Path(__file__).parents[2]
TABLE, PROMPT, RESPONSE, CUSTOM = "F1", "## Prompt benchmarks", "## Response benchmarks", "## Custom policies"
COUNTERPARTS = {
    "main": {
        "Table 1": TABLE,
        "Table 2": CUSTOM,
        "Table 3": "## Deviation over generations",
        "Table 5": PROMPT,
        "Table 6": RESPONSE,
        "Table 7": CUSTOM,
        "Table 8": CUSTOM,
        "Figure 4": "## Seconds an example",
    },
    "gemma": {"Table 9": TABLE, "Table 10": PROMPT, "Table 11": RESPONSE, "Table 12": CUSTOM},
    "sample_efficiency": {"Table 4": TABLE, "Figure 2": "F1 by training examples"},
    "sentence_budget": {"Figure 3": "F1 by sentences of a trace", "Figure 5": "## Words of the traces"},
}
"""Study -> a table or figure of the paper -> what its counterpart in the report is called."""


def test_the_counterparts_are_of_all_tables_and_figures():
    names = [name for counterparts in COUNTERPARTS.values() for name in counterparts]
    assert set(names) == {f"Table {i}" for i in range(1, 13)} | {f"Figure {i}" for i in range(2, 6)}
    page = (ROOT / "docs/studies.md").read_text(encoding="utf-8")
    for study, counterparts in COUNTERPARTS.items():
        rows = [line for line in page.splitlines() if line.startswith("|") and f"`paper/{study}`" in line]
        for name in counterparts:
            assert any(re.search(rf"\b{name}\b", row) for row in rows), f"docs/studies.md: {name} is in {study}"


@pytest.mark.parametrize("scale", [None, "smollm"])
def test_every_published_table_and_figure_has_a_counterpart(monkeypatch, tmp_path, scale):
    """Every published number stands in the line of the run that reproduces it; a scale has the same tables without them."""
    monkeypatch.chdir(ROOT)
    published = read_published()
    names = dict.fromkeys(name for row in published.rows for name in row.scores)
    reproduced, bars = set(), set()
    for name, counterparts in COUNTERPARTS.items():
        opened = open_study(f"paper/{name}", scale, [f"run_folder={tmp_path / str(scale)}"])
        by_run = {}
        for run in opened.runs:
            [guard] = run.config.evaluate.guards if run.config.evaluate else [GuardConfig()]
            by_run[run.name] = {mode: dict.fromkeys(names, 0.111) for mode in modes_of(guard, run.config)}
            (run.folder / "evaluate").mkdir(parents=True)
            (run.folder / "evaluate/results.json").touch()
        text, html = (path.read_text() for path in write_report(opened, Results(by_run), published))
        for counterpart in counterparts.values():
            assert counterpart in html if counterpart[0] != "#" else counterpart in text, (name, counterpart)
        assert ("Without results" in text, "mathdefault" in html) == (False, False), "every result, every tick as text"
        lines = defaultdict(str)
        for line in text.splitlines():
            title, mode, *_ = [cell.strip() for cell in line.split("|")[1:3]] + [""] * 2
            lines[title, mode] += line
            lines[title.rpartition(", ")[0], mode] += line
        shown = [
            (run.row.series or run.key, mode, row)
            for run in opened.runs
            for mode, row in run.row.published.items()
            if mode in by_run[run.name]
        ]
        if scale is None:
            shown += [(row.name, row.mode, row.id) for row in map(published.row, opened.definition.quoted)]
        for title, mode, row in shown:
            line, known = lines[title, mode], published.row(row)
            reproduced.add(row)
            for score in (*known.scores.values(), *known.deviations.values()):
                assert (f"/ {score:.3f} " in line) == (scale is None), (title, row, score)
            for table, scores in known.restated.items():
                for other, score in scores.items():
                    restated = rf"For {title}, {mode}, {table} of the paper has .*{other} {score:.3f}[,.]"
                    assert bool(re.search(restated, text)) == (scale is None), (title, table, other)
            for point in published.latency.points:
                if point.row == row and f"/ {point.seconds:.3f} |" in line and f"/ {point.slower:+.1%} |" in line:
                    bars.add(row)
        curve = opened.definition.curve
        if curve:
            assert {f"F1, {metric}<" for metric in CURVES} <= set(re.findall("F1, [a-z]+<", html))
            for level in curve.levels:
                assert (f"paper, {level}<" in html) == (scale is None)
        if scale is None and curve:
            for point in getattr(published, curve.published):
                for metric, score in point.scores.items():
                    spread = f" ± {point.deviations[metric]:.3f}" if metric in point.deviations else ""
                    assert f"/ {score:.3f}{spread} |" in text
                assert not point.words or f"/ {point.words:.1f} |" in text
    missing = {"aegis2_guard", "wildguard"} if scale else set()  # a quotation, and what needs SGLang
    assert reproduced == {row.id for row in published.rows} - missing
    assert bars == ({point.row for point in published.latency.points} if scale is None else set())


@pytest.mark.parametrize("scale", [None, "smollm"])
def test_ours_of_full_length_and_of_labels_stand_beside_the_budgets(monkeypatch, tmp_path, scale):
    monkeypatch.chdir(ROOT)
    opened = open_study("paper/sentence_budget", scale, [f"run_folder={tmp_path}"])
    by_run = {}
    for run in opened.runs:
        mode = "direct" if run.config.data.mode == "direct" else "reasoning"
        by_run[run.name] = {mode: {"prompt": 0.5, "response": 0.6, "safety": 0.55, "toxic_chat": 0.5}}
        (run.folder / "evaluate").mkdir(parents=True)
        (run.folder / "evaluate/results.json").touch()
    text, html = (path.read_text() for path in write_report(opened, Results(by_run), read_published()))
    assert {"ours, full length<", "ours, label only<"} <= set(re.findall("ours, [a-z ]+<", html))
    assert f"| full_length | reasoning | {'0.500 / 0.846' if scale is None else '0.500'} |" in text
    assert f"| label_only | direct | {'0.500 / 0.834' if scale is None else '0.500'} |" in text
