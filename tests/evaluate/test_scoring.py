"""Scoring: what is compared, what is left out, and what every verdict counts as."""

import io
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from report_examples import PUBLISHED
from rich.console import Console

from jaxguard.config.evaluate import EvaluateConfig, GuardConfig
from jaxguard.data.benchmarks.loading import Benchmark
from jaxguard.data.benchmarks.schema import BenchmarkDefinition
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import CHOICES, LABEL, Mode
from jaxguard.data.policies import Policy
from jaxguard.evaluate.report.page import cautions, f1_figure, latency_figure, report
from jaxguard.evaluate.report.tables import cost_table, main_table, score_table, summary_table, versus_table, wait_table
from jaxguard.evaluate.scores.results import Evaluation
from jaxguard.evaluate.scores.scoring import MAX_ERRORS, PredictedExamples, choose_points, references_of, score
from jaxguard.guards.protocol import Prediction
from jaxguard.report import Cell, page_html, page_markdown

POLICY = Policy("bread", rules="No bread.")
R, D = Mode.REASONING, Mode.DIRECT
QUESTION = {"safety_prompt": "prompt_harm", "safety_response": "response_harm", "custom_policy": "prompt_harm"}
GROUPS = {"rye": "safety_prompt", "oats": "safety_prompt", "answers": "safety_response", "rules": "custom_policy"}
TRUTH = (1, 1, 1, 0, 0, 0)
GOOD, FAIR, POOR = (1, 1, 1, 0, 0, 0), (1, 1, 0, 0, 0, 0), (1, 0, 0, 1, 0, 0)
SETTINGS = EvaluateConfig(guards=(GuardConfig(name="first"), GuardConfig(name="other")), resamples=20)


def examples_of(name, truth=TRUTH):
    question = QUESTION[GROUPS[name]]
    response = None if question == "prompt_harm" else "With flour."
    words = CHOICES[question]
    return tuple(
        Example(f"{name} {i}", "bread", f"question {i}", response, **{LABEL[question]: words[0] if one else words[1]})
        for i, one in enumerate(truth)
    )


def benchmark_of(name, truth=TRUTH):
    examples = examples_of(name, truth)
    definition = BenchmarkDefinition(
        name=name,
        title=f"Bread: {name}",
        group=GROUPS[name],
        question=QUESTION[GROUPS[name]],
        source={"path": "bread.jsonl"},
        examples=[{"prompt": "prompt", "response": "response", "positive": {"always": True}}],
        license="none",
        citation="nobody",
        url="here",
    )
    slices = {"grain": {"whole": frozenset(one.id for one in examples[::2]), "absent": frozenset()}}
    return Benchmark(definition, examples, slices, {}, Counter())


def scored(prediction, probability=None, unscored=0, **changes):
    """The prediction of one question with another probability."""
    [question] = prediction.verdicts
    return replace(prediction, probabilities={question: probability}, unscored={question: unscored}, **changes)


def predictions_of(guard, mode, name, verdicts, truth=TRUTH, wall=3.0, **changes):
    """`verdicts`: of each example one, or a tuple of each generation's."""
    benchmark, question, answers = benchmark_of(name, truth), QUESTION[GROUPS[name]], []
    for example, verdict in zip(benchmark.examples, verdicts, strict=True):
        each = verdict if isinstance(verdict, tuple) else (verdict,)
        texts = tuple(f"generation {i} says {one}" for i, one in enumerate(each))
        answers.append(Prediction(example.id, {question: each}, {question: None}, texts, wall=wall / len(verdicts)))
    answers = [scored(one, **changes) for one in answers]
    return PredictedExamples(guard, mode, name, question, benchmark.examples, benchmark, answers)


def held_out(one):
    """The same predictions, for validation examples."""
    return replace(one, benchmark=None)


def evaluated(found):
    held = [one for one in found if one.benchmark is None]
    chosen = {(one.guard, one.mode, one.question): choose_points(one, POLICY, SETTINGS) for one in held}
    cells, averages = score(found, SETTINGS, {key: points for key, points in chosen.items() if points})
    models = {guard.name: "made up" for guard in SETTINGS.guards}
    return Evaluation("bread", models, tuple(GROUPS), cells, averages, {})


def cell_of(found, guard, mode, name):
    return next(c for c in found.cells if (c.guard, c.mode, c.benchmark) == (guard, mode, name))


def average_of(found, guard, mode, name):
    return next((a for a in found.averages if (a.guard, a.mode, a.name) == (guard, mode, name)), None)


def f1(found, guard, mode, name):
    return cell_of(found, guard, mode, name).result.scores.f1.value


# References.


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ([("first", R), ("first", D), ("other", R), ("other", D)], {("other", R): R, ("other", D): D}),
        ([("first", D), ("other", R), ("other", D)], {("other", R): D, ("other", D): D}),
        ([("first", R), ("first", D), ("baseline", D)], {("baseline", D): D}),
        ([("first", R), ("baseline", D)], {("baseline", D): R}),
        ([("other", R), ("baseline", D)], {}),
    ],
)
def test_a_mode_is_compared_with_its_like(asked, expected):
    assert references_of(asked, "first") == {one: ("first", mode) for one, mode in expected.items()}


@pytest.fixture(scope="module")
def modes():
    """Both guards in both modes on one benchmark, each better than the next."""
    poorest = (0, 0, 1, 1, 1, 0)
    quality = {("first", R): GOOD, ("first", D): FAIR, ("other", R): POOR, ("other", D): poorest}
    return evaluated([predictions_of(*asked, "rye", verdicts) for asked, verdicts in quality.items()])


def test_differences_are_to_the_first_guard_in_the_same_mode(modes):
    for mode in ("reasoning", "direct"):
        cell, average = cell_of(modes, "other", mode, "rye"), average_of(modes, "other", mode, "prompt")
        gap = f1(modes, "other", mode, "rye") - f1(modes, "first", mode, "rye")
        for versus in (cell.versus, average.versus):
            assert (versus.guard, versus.mode) == ("first", mode)
            assert versus.f1.value == pytest.approx(gap)
        assert cell_of(modes, "first", mode, "rye").versus is None
        assert average_of(modes, "first", mode, "prompt").versus is None
    test = cell_of(modes, "other", "direct", "rye").versus.mcnemar
    assert (test.only_first, test.only_second) == (1, 4)


def test_the_report_says_whom_a_difference_is_to(modes):
    names = [row.cells[0] for row in main_table(modes, PUBLISHED).rows if row.kind == "detail"]
    assert names == [Cell("less first", "reasoning"), Cell("less first", "direct")]
    names = [row.cells[0] for row in versus_table(modes).rows]
    assert names == [Cell("other", f"{mode}, less first ({mode})") for mode in ("reasoning", "direct")]
    for text in (page_markdown(report(modes, PUBLISHED)), page_html(report(modes, PUBLISHED))):
        assert "Each mode with the same mode of the first guard, or with its first where it has no such mode" in text


# Results that a guard lacks.


@pytest.fixture(scope="module")
def partly():
    """The first guard has no `rye`, the other no `answers`, and none has `rules`."""
    return evaluated(
        [
            predictions_of("first", R, "oats", FAIR),
            predictions_of("first", R, "answers", GOOD),
            predictions_of("other", D, "rye", GOOD),
            predictions_of("other", D, "oats", POOR),
        ]
    )


def test_an_average_names_the_benchmarks_that_it_lacks(partly):
    mine = average_of(partly, "first", "reasoning", "prompt")
    assert (mine.f1.value, mine.missing) == (f1(partly, "first", "reasoning", "oats"), ("rye",))
    other = average_of(partly, "other", "direct", "prompt")
    both = (f1(partly, "other", "direct", "rye") + f1(partly, "other", "direct", "oats")) / 2
    assert (other.f1.value, other.missing) == (pytest.approx(both), ())
    assert average_of(partly, "other", "direct", "safety") is None
    safety = average_of(partly, "first", "reasoning", "safety")
    assert safety.f1.value == pytest.approx((5 * f1(partly, "first", "reasoning", "oats") + 4) / 9)
    assert safety.missing == ("rye",)


def test_two_averages_are_compared_over_their_common_benchmarks(partly):
    versus = average_of(partly, "other", "direct", "prompt").versus
    assert versus.missing == ("rye",)
    gap = f1(partly, "other", "direct", "oats") - f1(partly, "first", "reasoning", "oats")
    assert versus.f1.value == pytest.approx(gap)
    assert cell_of(partly, "other", "direct", "rye").versus is None
    assert cell_of(partly, "other", "direct", "oats").versus is not None


def test_absent_results_are_dashes(partly):
    scores = {(row.cells[0].text, row.group.split(",")[0]): row.cells[1].text for row in score_table(partly).rows}
    assert scores["first", "Bread: rye"] == scores["other", "Bread: answers"] == "–"
    assert scores["other", "Bread: rye"] == "1.000"
    versus = {row.group.split(",")[0]: row.cells[1].text for row in versus_table(partly).rows}
    assert (versus["Bread: rye"], versus["Bread: answers"]) == ("–", "–")
    assert versus["Bread: oats"] not in ("–", "n/a")
    first, other, less = main_table(partly, PUBLISHED).rows[:3]
    assert [cell.text == "–" for cell in first.cells[1:]] == [False, False, False, True]
    assert [cell.text == "–" for cell in other.cells[1:]] == [False, True, True, True]
    assert [cell.text == "–" for cell in less.cells[1:]] == [False, True, True, True]
    assert first.cells[1].more.endswith("1 benchmark left out")
    assert less.cells[1].more.endswith("1 benchmark left out")
    assert "left out" not in other.cells[1].more


def test_absent_results_are_named(partly):
    said = cautions(partly, PUBLISHED)
    assert "rye has no results of first (reasoning)." in said
    assert "answers has no results of other (direct)." in said
    assert "rules has no results of any guard." in said
    assert any(each.startswith("Averages of first (reasoning) are over fewer benchmarks") for each in said)


def test_figures_and_report_without_some_results(partly):
    (axes,) = f1_figure(partly).axes
    assert [one.get_text() for one in axes.texts] == ["–", "–"]
    took = [replace(cell, cost=replace(cell.cost, seconds=1.0 + i)) for i, cell in enumerate(partly.cells)]
    (axes,) = latency_figure(replace(partly, cells=tuple(took)), PUBLISHED).axes
    points = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    oats = {guard: f1(partly, guard, mode, "oats") for guard, mode in (("first", "reasoning"), ("other", "direct"))}
    assert points == {"first (reasoning)": [[1.0, oats["first"]]], "other (direct)": [[4.0, oats["other"]]]}
    for text in (page_markdown(report(partly, PUBLISHED)), page_html(report(partly, PUBLISHED))):
        assert "1 benchmark left out" in text.replace("\xa0", " ")


def printed(evaluation, width=80):
    out = io.StringIO()
    Console(file=out, width=width).print(summary_table(evaluation).rich())
    return out.getvalue()


def test_the_summary_without_some_results(partly):
    rows = [[part.strip() for part in line.split("│")[1:-1]] for line in printed(partly).splitlines() if "│" in line]
    scores, name = {}, ""
    for benchmark, guard, mode, f1 in rows:
        name = benchmark or name
        scores[name, guard, mode] = f1
    assert [name for name, guard, _ in scores if guard == "first"][:4] == list(partly.benchmarks)
    first, other = (
        {name: score for (name, *guard_mode), score in scores.items() if guard_mode == [guard, mode]}
        for guard, mode in (("first", "reasoning"), ("other", "direct"))
    )
    assert [first[name] == "-" for name in partly.benchmarks] == [True, False, False, True]
    assert [other[name] == "-" for name in partly.benchmarks] == [False, False, True, True]
    assert "*" in first["average: prompt"]
    assert "*" not in other["average: prompt"]
    assert summary_table(partly).note in printed(partly)


def test_a_first_guard_without_results_is_no_reference():
    found = evaluated([predictions_of("other", D, "rye", GOOD)])
    assert cell_of(found, "other", "direct", "rye").versus is None
    assert any(each.startswith("first has no results") for each in cautions(found, PUBLISHED))
    assert page_html(report(found, PUBLISHED))
    assert printed(found)


def test_nothing_at_all_is_no_error():
    found = evaluated([])
    assert (found.cells, found.averages) == ((), ())
    assert cautions(found, PUBLISHED) == ["Nothing was evaluated."]
    assert printed(found)


# What a verdict counts as.


def test_a_cell_is_of_its_benchmark():
    one = predictions_of("first", D, "answers", (1, 1, (-1), 0, 1, 0))
    cut = replace(one, examples=one.examples[:5], predictions=one.predictions[:5])
    whole, part = evaluated([one]).cells[0], evaluated([cut]).cells[0]
    assert (whole.complete, part.complete, part.examples) == (True, False, 5)
    assert (whole.question, whole.group, whole.source) == ("response_harm", "safety_response", "answers")
    assert (whole.result.unparsable, whole.result.scores.f1.value) == (1, pytest.approx(6 / 7))
    assert whole.slices["grain: whole"].scores.examples == 3
    assert whole.slices["grain: absent"].scores.f1.value is None
    assert (whole.calibration, whole.thresholded) == (None, None)


def test_probabilities_lack_what_is_not_scored():
    """Three of four thoughts say 0.2 and one leads nowhere, which fails closed: (3 × 0.2 + 1) / 4."""
    one = predictions_of("first", R, "rye", [(0, 0, 0, -1)] * 6, probability=0.2, unscored=1)
    brier = {p: np.mean([(p - label) ** 2 for label in TRUTH]) for p in (0.4, 0.2)}
    assert evaluated([one]).cells[0].calibration.brier.value == pytest.approx(brier[0.4])
    whole = replace(one, predictions=[scored(answer, 0.2) for answer in one.predictions])
    assert evaluated([whole]).cells[0].calibration.brier.value == pytest.approx(brier[0.2])
    none = replace(one, predictions=[scored(one.predictions[0], None, 4), *one.predictions[1:]])
    expected = np.mean([(1.0 - 1) ** 2, *((0.4 - label) ** 2 for label in TRUTH[1:])])
    assert evaluated([none]).cells[0].calibration.brier.value == pytest.approx(expected)


def test_a_threshold_is_of_probabilities_that_lack_what_is_not_scored():
    """At face value all are alike; only what is not scored tells the classes apart."""
    one = predictions_of("first", R, "rye", [(1, 0)] * 6)
    answers = [scored(answer, 0.3, label) for answer, label in zip(one.predictions, TRUTH, strict=True)]
    one = replace(one, predictions=answers)
    found = evaluated([one, replace(held_out(one), precision="float32")]).cells[0].thresholded
    assert found.precision == "float32"
    assert found.result.scores.f1.value == 1
    assert found.points == {"f1": found.result.scores}  # rates need more negatives than there are
    assert found.result.unparsable == 0


def test_a_missing_probability_is_an_unparsable_verdict_at_any_threshold():
    one = predictions_of("first", D, "rye", GOOD)
    answers = [scored(a, p) for a, p in zip(one.predictions, (None, 0.9, 0.8, 0.1, 0.2, 0.3), strict=True)]
    one = replace(one, predictions=answers)
    found = evaluated([one, held_out(one)]).cells[0].thresholded
    assert (found.result.unparsable, found.result.scores.f1.value) == (1, 1)


def test_guards_are_compared_by_auprc_and_at_their_own_thresholds():
    """The other ranks alike on another scale, and errs at one example."""
    chances = {"first": (0.9, 0.8, 0.7, 0.3, 0.2, 0.1), "other": (0.4, 0.3, 0.1, 0.2, 0.05, 0.04)}
    found = []
    for guard, values in chances.items():
        one = predictions_of(guard, D, "rye", GOOD)
        answers = [scored(answer, p) for answer, p in zip(one.predictions, values, strict=True)]
        found += [replace(one, predictions=answers), held_out(replace(one, predictions=answers))]
    results = evaluated(found)
    first, other = results.cells
    versus = other.versus
    assert (versus.f1.value, first.versus) == (0, None)
    assert versus.auprc.value == pytest.approx(other.calibration.auprc.value - 1)
    gap = other.thresholded.result.scores.f1.value - first.thresholded.result.scores.f1.value
    assert versus.f1_at_threshold.value == pytest.approx(gap)
    assert gap < 0
    table = results.tables["versus"].iloc[0]
    assert table["auprc_difference"] == versus.auprc.value
    assert table["f1_at_threshold_low"] == versus.f1_at_threshold.low


def test_without_validation_there_is_no_threshold():
    one = predictions_of("first", D, "rye", GOOD, probability=0.4)
    assert evaluated([one, replace(held_out(one), mode=R)]).cells[0].thresholded is None
    assert evaluated([one]).cells[0].calibration is not None


def test_what_judging_takes_is_by_guard_and_mode():
    costs = {"seconds": 0.5, "scoring": 0.25, "prompt_tokens": 100, "completion_tokens": 20, "forced": 1, "cut": True}
    found = evaluated(
        [
            predictions_of("first", R, "rye", GOOD, wall=4.5, **costs),
            predictions_of("first", R, "oats", GOOD[:2], truth=TRUTH[:2], wall=5.5, **costs | {"seconds": 2.5}),
            predictions_of("first", D, "rye", GOOD, wall=0.0),
        ]
    )
    cost = found.cells[0].cost
    assert (cost.seconds, cost.scoring, cost.wall, cost.forced, cost.cut, cost.unscored) == (0.5, 0.25, 4.5, 6, 6, 0)
    table = cost_table(found)
    shown = dict(zip(table.columns, table.rows[0].cells, strict=True))
    assert shown["guard"] == Cell("first", "reasoning")
    assert {head: cell.text for head, cell in shown.items() if head != "guard"} == {
        "examples": "8",
        "seconds": "1",  # (6 × 0.5 + 2 × 2.5) / 8
        "seconds for the probability": "0.25",
        "prompt tokens": "100",
        "generated tokens": "20",
        "examples/s": "0.8",  # 8 in 4.5 + 5.5 seconds
        "tokens/s": "96",
    }
    assert shown["tokens/s"].more == "16 generated"
    shown = dict(zip(table.columns, table.rows[1].cells, strict=True))
    assert (shown["guard"].more, shown["examples/s"].text) == ("direct", "n/a")
    for text in (page_markdown(report(found, PUBLISHED)), page_html(report(found, PUBLISHED))):
        assert "Time and tokens" in text
        assert "A request's own wait" not in text


def test_requests_that_overlap_share_the_time_and_wait_for_themselves():
    one = predictions_of("first", R, "rye", GOOD, wall=3.0, seconds=0.75, scoring=0.25)
    waits = [replace(each, wait=float(i)) for i, each in enumerate(one.predictions)]  # the first one's is unknown
    found = evaluated([replace(one, predictions=waits), predictions_of("baseline", R, "rye", GOOD)])
    cost = found.cells[0].cost
    assert (cost.seconds, cost.scoring) == (0.375, 0.125)  # 6 in 3 seconds
    assert (cost.wait_p50, cost.wait_p95, cost.wait_p99) == pytest.approx((3, 4.8, 4.96))
    (row,) = wait_table(found).rows
    assert [cell.text for cell in row.cells[1:]] == ["3", "4.8", "4.96"]
    assert "A request's own wait" in page_markdown(report(found, PUBLISHED))
    assert found.tables["cost"].loc[0, "wait_p95"] == pytest.approx(4.8)


# Errors.


def test_an_error_shows_a_generation_that_is_wrong():
    verdicts = [(1, 1, 0, 1), (1, 0, 0, 1), (1, -1, 0, 0), (0, 0, 1, -1), (0, 1, 1, 1), (0, 0, 0, 0)]
    found = evaluated([predictions_of("first", D, "rye", verdicts)]).cells[0].wrong
    assert [(one.example.id, one.text) for one in found] == [
        ("rye 1", "generation 1 says 0"),  # a tie
        ("rye 2", "generation 2 says 0"),  # unparsable counts as harmful, which is right here: a tie
        ("rye 3", "generation 2 says 1"),  # and wrong here: a tie
        ("rye 4", "generation 1 says 1"),
    ]
    assert found[1].said == ("harmful", "unparsable", "unharmful", "unharmful")
    assert [one.label for one in found] == ["harmful", "harmful", "unharmful", "unharmful"]
    assert found[0].slices == ()
    assert found[1].slices == ("grain: whole",)


def test_errors_are_counted_alike_everywhere():
    verdicts = [(1, 1, 0, 1), (1, 0, 0, 1), (1, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0)]
    found = evaluated([predictions_of("first", D, "rye", verdicts), predictions_of("other", D, "rye", GOOD)])
    alone = cell_of(found, "other", "direct", "rye").versus.mcnemar.only_first
    wrong = cell_of(found, "first", "direct", "rye").wrong
    assert len(wrong) == alone == 2
    text = page_html(report(found, PUBLISHED))
    assert "first (direct): 2 errors" in text


def test_the_surest_errors_come_first_and_not_all_are_kept():
    count = MAX_ERRORS + 5
    one = predictions_of("first", D, "rye", (0,) * count, truth=(1,) * count)
    sure = [0.5 - 0.4 * i / count for i in range(count - 1)]
    answers = [scored(a, p) for a, p in zip(one.predictions, [*sure, None], strict=True)]
    found = evaluated([replace(one, predictions=answers)]).cells[0].wrong
    assert [wrong.example.id for wrong in found] == [f"rye {count - 2 - i}" for i in range(MAX_ERRORS)]


def test_verdicts_from_probabilities_alone_have_no_text():
    one = predictions_of("first", D, "rye", POOR, texts=())
    found = evaluated([one]).cells[0].wrong
    assert {wrong.text for wrong in found} == {""}
    assert "Its first wrong answer" not in page_html(report(evaluated([one]), PUBLISHED))


def test_tables_as_dataframes(modes, partly):
    tables = modes.tables
    assert list(tables) == ["scores", "averages", "cost", "calibration", "versus"]
    scores = tables["scores"].set_index(["guard", "mode", "benchmark"])
    assert scores.loc[("other", "direct", "rye"), "f1"] == f1(modes, "other", "direct", "rye")
    assert set(scores.columns) >= {"f1_low", "f1_high", "f1_deviation", "recall", "unparsable", "examples"}
    averages = partly.tables["averages"].set_index(["guard", "average"])
    assert averages.loc[("first", "prompt"), "missing"] == "rye"
    versus = tables["versus"]
    assert versus["benchmark"].notna().sum() == 2
    row = versus[(versus["mode"] == "direct") & (versus["benchmark"] == "rye")].iloc[0]
    assert (row.first_guard, row.right_alone, row.first_right_alone) == ("first", 1, 4)
    assert tables["calibration"].empty


def test_probabilities_are_in_the_tables():
    tables = evaluated([predictions_of("first", D, "rye", GOOD, probability=0.4)]).tables
    assert tables["calibration"].loc[0, "auprc"] == 0.5
    assert tables["calibration"].loc[0, ["threshold", "f1_at_threshold"]].isna().all()
    assert tables["cost"].loc[0, "wall"] == 3.0


def with_mean(one, mean):
    """The same predictions on a benchmark with a slice of two values, whose F1 has this mean."""
    ids = [example.id for example in one.examples]
    slices = {"scene": {"a": frozenset(ids[:2] + ids[4:]), "b": frozenset(ids[2:4])}}
    slice_of = {"name": "scene", "column": "scene", "mean": mean}
    definition = one.benchmark.definition.model_copy(
        update={"slices": BenchmarkDefinition.model_validate(RULES | {"slices": [slice_of]}).slices}
    )
    return replace(one, benchmark=replace(one.benchmark, definition=definition, slices=slices))


RULES = benchmark_of("rules").definition.model_dump(exclude={"expected"})


@pytest.mark.parametrize("verdicts", [POOR, (1, 0, 1, 1, 0, 1), [(1, 1), (0, 1), (1, 0), (0, 1), (0, 0), (1, 0)]])
def test_a_benchmarks_f1_is_the_mean_of_its_subsets(verdicts):
    main, beside, plain = (
        predictions_of("first", R, "rules", verdicts),
        with_mean(predictions_of("first", R, "rules", verdicts), "main"),
        with_mean(predictions_of("first", R, "rules", verdicts), "beside"),
    )
    (over_all,), _ = score([main], SETTINGS, {})
    (mean,), averages = score([beside], SETTINGS, {})
    (both,), _ = score([plain], SETTINGS, {})
    expected = np.mean([part.scores.f1.value for name, part in mean.slices.items() if name.startswith("scene")])
    assert mean.result.scores.f1.value == pytest.approx(expected, abs=1e-12)
    assert mean.result.scores.f1.value != over_all.result.scores.f1.value
    assert mean.other_f1 == {"over all": over_all.result.scores.f1}
    assert mean.result.scores.f1.low <= mean.result.scores.f1.value <= mean.result.scores.f1.high
    assert mean.result.scores.recall == over_all.result.scores.recall
    [custom] = [each for each in averages if each.name == "custom"]
    assert custom.f1.value == pytest.approx(expected, abs=1e-12)
    assert both.result == over_all.result
    assert both.other_f1 == {"mean of scene": mean.result.scores.f1}


def test_guards_are_compared_by_the_mean_of_the_subsets():
    two = [with_mean(predictions_of(guard, R, "rules", x), "main") for guard, x in (("first", GOOD), ("other", POOR))]
    cells, _ = score(two, SETTINGS, {})
    first, other = (cell.result.scores.f1.value for cell in cells)
    assert cells[1].versus.f1.value == pytest.approx(other - first, abs=1e-12)


def test_both_f1_are_in_the_table():
    evaluation = evaluated([with_mean(predictions_of("first", R, "rules", POOR), "beside")])
    assert "mean of scene" in page_markdown(report(evaluation, PUBLISHED))
