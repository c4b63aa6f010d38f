"""The tables of an evaluation: averages beside the paper's, scores, comparison, cost, slices, errors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from jaxguard.evaluate.report.published import AVERAGES, Published
from jaxguard.evaluate.scores.metrics import FALSE_POSITIVE_RATES, Difference
from jaxguard.evaluate.scores.results import WAITS, Average, Cell, Evaluation, Wrong
from jaxguard.evaluate.scores.scoring import AVERAGED
from jaxguard.guards.operating_points import F1
from jaxguard.report import Cell as TableCell
from jaxguard.report import Table, estimate
from jaxguard.report.text import ABSENT, DASH, count, interval, number, probability, seconds, share, signed

AVERAGE_TITLES = dict(zip(AVERAGES, ("Prompt F1", "Response F1", "Safety (Avg)", "Custom policies"), strict=True))
OWN = "extra"
"""The group of benchmarks that are in no average, those of one's own data among them; they lead the report."""
AT_THRESHOLD = "F1 at chosen threshold"
CATEGORY = "category"
"""The slice that errors are grouped by; where a benchmark has no such slice, its first one."""


def main_table(evaluation: Evaluation, published: Published) -> Table:
    """Averages of every guard in every mode, their differences, and the paper's rows."""
    table = Table(("guard", *AVERAGE_TITLES.values()), "Averages")
    for guard, mode in evaluation.by_guard:
        own = {each.name: each for each in evaluation.averages if each.guard_mode == (guard, mode)}
        averages = [own.get(name) for name in AVERAGES]
        scores = (_without(estimate(each.f1, deviation=True), each.missing) if each else DASH for each in averages)
        table.add(TableCell(guard, mode), *scores, kind="strong")
        versus = [each.versus if each else None for each in averages]
        first = next(filter(None, versus), None)
        if first:
            differences = (_without(difference(each.f1), each.missing) if each else DASH for each in versus)
            table.add(TableCell(f"less {first.guard}", first.mode), *differences, kind="detail")
        row = published.row(evaluation.paper_rows.get(f"{guard}/{mode}", ""))
        if row is not None:
            papers = zip(averages, map(row.scores.get, AVERAGES), strict=True)
            less = (_less_paper(evaluation, published, average, paper) for average, paper in papers)
            table.add(TableCell("less the paper's", row.name), *less, kind="detail")
    for row in published.rows:
        table.add(
            row.name,
            *(row.scores.get(name, "") for name in AVERAGES),
            group=f"The paper ({published.source})",
            kind="faint",
        )
    return table


def comparable(evaluation: Evaluation, published: Published, average: Average) -> bool:
    """Whether an average is over the paper's benchmarks, each of them whole."""
    cells = [c for c in evaluation.by_guard.get(average.guard_mode, ()) if c.group in AVERAGED[average.name]]
    same = sorted(cell.source for cell in cells) == sorted(published.benchmarks(average.name))
    return same and all(cell.complete for cell in cells)


def difference(score: Difference) -> TableCell:
    """A difference with its interval and p-value."""
    if score.value is None:
        return TableCell(ABSENT)
    parts = (interval(score.low, score.high, difference=True), "" if score.p is None else probability(score.p))
    return TableCell(signed(score.value), " ".join(filter(None, parts)))


def _without(score: TableCell, missing: Sequence[str]) -> TableCell:
    left_out = f"{count(len(missing), 'benchmark')} left out" if missing else ""
    return TableCell(score.text, " ".join(filter(None, (score.more, left_out))))


def _less_paper(
    evaluation: Evaluation, published: Published, average: Average | None, paper: float | None
) -> TableCell:
    if average is None or average.f1.value is None or paper is None:
        return TableCell(ABSENT)
    if not comparable(evaluation, published, average):
        return TableCell(ABSENT, "other benchmarks")
    low, high = (None if end is None else end - paper for end in (average.f1.low, average.f1.high))
    return TableCell(signed(average.f1.value - paper), interval(low, high, difference=True))


def f1_title(evaluation: Evaluation) -> str:
    """The heading of F1: of sampled verdicts, or of those that probabilities above a half give."""
    return "F1" if evaluation.settings.get("generations", 1) else "F1 at P > 0.5"


def score_table(evaluation: Evaluation) -> Table:
    """Every guard on every benchmark, with dashes where it has no results."""
    recall_at = f"recall at {' / '.join(f'{rate:.1%}' for rate in FALSE_POSITIVE_RATES)} FPR"
    columns = (f1_title(evaluation), AT_THRESHOLD, "precision", "recall", "false-positive rate", "AUPRC", recall_at, "ECE",
               "unparsable", "forced", "seconds")  # fmt: skip

    def scores(cell: Cell) -> list[TableCell | str]:
        values, calibration, at_threshold = cell.result.scores, cell.calibration, TableCell(ABSENT)
        if cell.thresholded is not None:
            at = cell.thresholded.result.scores
            chosen, rate = estimate(at.f1), f"false-positive rate {number(at.false_positive_rate.value)}"
            at_threshold = TableCell(chosen.text, f"{chosen.more} at {cell.thresholded.scale}; {rate}".strip())
        f1 = estimate(values.f1, deviation=True)
        other = (f"{what} {number(score.value)}" for what, score in cell.other_f1.items())
        return [
            TableCell(f1.text, "; ".join(filter(None, (f1.more, *other)))),
            at_threshold,
            *map(estimate, (values.precision, values.recall, values.false_positive_rate)),
            estimate(calibration.auprc if calibration else None),
            " / ".join(number(each.value) for each in calibration.recall_at.values()) if calibration else ABSENT,
            TableCell(number(calibration.ece if calibration else None)),
            _part(cell.result.unparsable, cell.verdicts),
            _part(cell.cost.forced, cell.verdicts),
            TableCell(seconds(cell.cost.seconds), f"{cell.cost.completion_tokens:,.0f} tokens"),
        ]

    names = {guard_mode: TableCell(*guard_mode) for guard_mode in evaluation.by_guard}
    return _by_benchmark(evaluation, "Benchmarks", columns, names, scores)


def points_table(evaluation: Evaluation) -> Table:
    """Recall and false-positive rate at each operating point of guard.json; no rows where none was chosen."""
    chosen = [cell.thresholded for cell in evaluation.cells if cell.thresholded]
    points = list(dict.fromkeys(name for each in chosen for name in each.points))
    titles = {F1: "best F1"} | {str(rate): f"{rate:.1%} FPR" for rate in FALSE_POSITIVE_RATES}

    def rates(cell: Cell) -> list[TableCell | str]:
        scores = cell.thresholded.points if cell.thresholded else {}
        at = [scores.get(name) for name in points]
        return [
            f"{number(each.recall.value)} / {number(each.false_positive_rate.value)}" if each else DASH for each in at
        ]

    names = {guard_mode: TableCell(*guard_mode) for guard_mode in evaluation.by_guard} if points else {}
    return _by_benchmark(evaluation, "Operating points", [titles.get(name, name) for name in points], names, rates)


def versus_table(evaluation: Evaluation) -> Table:
    """Every guard against the first one on the same examples; no rows where there is only one."""
    columns = (
        "F1 less the first's",
        "95 % interval",
        "p",
        "right alone (McNemar)",
        "F1 at chosen thresholds less",
        "AUPRC less",
    )

    def compared(cell: Cell) -> list[TableCell | str]:
        if cell.versus is None:
            return []
        f1, test = cell.versus.f1, cell.versus.mcnemar
        p = ABSENT if f1.p is None else probability(f1.p).removeprefix("p = ").removeprefix("p ")
        alone = (f"{test.only_first:,} : {test.only_second:,}", probability(test.p)) if test else (ABSENT,)
        ends = interval(f1.low, f1.high, difference=True) or ABSENT
        others = (difference(each) if each else ABSENT for each in (cell.versus.f1_at_threshold, cell.versus.auprc))
        return [TableCell(difference(f1).text), TableCell(ends), TableCell(p), TableCell(*alone), *others]

    first_of = {cell.guard_mode: cell.versus for cell in evaluation.cells if cell.versus}
    less = {guard_mode: f"less {first.guard} ({first.mode})" for guard_mode, first in first_of.items()}
    names = {(guard, mode): TableCell(guard, f"{mode}, {first}") for (guard, mode), first in less.items()}
    return _by_benchmark(evaluation, "Compared with the first guard", columns, names, compared)


def _by_benchmark(
    evaluation: Evaluation,
    title: str,
    columns: Sequence[str],
    names: Mapping[tuple[str, str], TableCell],
    values: Callable[[Cell], list[TableCell | str]],
) -> Table:
    """A group of rows for each benchmark, with a row for each guard: its values, or dashes where it has none."""
    table = Table(("guard", *columns), title)
    for cells in sorted(evaluation.by_benchmark.values(), key=lambda cells: cells[0].group != OWN):
        values_of = {cell.guard_mode: values(cell) for cell in cells}
        for guard_mode, name in names.items():
            row = values_of.get(guard_mode) or [TableCell(DASH)] * len(columns)
            table.add(name, *row, group=cells[0].heading)
    return table


def cost_table(evaluation: Evaluation) -> Table:
    """Time and tokens of every guard in every mode, over all of its examples."""
    columns = ("guard", "examples", "seconds", "seconds for the probability", "prompt tokens", "generated tokens", "examples/s",
               "tokens/s")  # fmt: skip
    table = Table(columns, "Time and tokens")
    for guard_mode, cells in evaluation.by_guard.items():
        total, wall = sum(cell.examples for cell in cells), sum(cell.cost.wall for cell in cells)
        latency, scoring, prompt, generated = (
            sum(getattr(cell.cost, name) * cell.examples for cell in cells) / total
            for name in ("seconds", "scoring", "prompt_tokens", "completion_tokens")
        )
        rates = (TableCell(ABSENT), TableCell(ABSENT))
        if wall:
            more = f"{generated * total / wall:,.0f} generated"
            rates = (TableCell(seconds(total / wall)), TableCell(f"{(prompt + generated) * total / wall:,.0f}", more))
        tokens = (f"{prompt:,.0f}", f"{generated:,.0f}")
        table.add(TableCell(*guard_mode), total, seconds(latency), seconds(scoring), *tokens, *rates)
    return table


def wait_table(evaluation: Evaluation) -> Table:
    """Percentiles of how long a request waits for its answer, in seconds; no rows where that is unknown."""

    def waits(cell: Cell) -> list[TableCell | str]:
        return [DASH if (wait := getattr(cell.cost, name)) is None else seconds(wait) for name in WAITS]

    names = {
        cell.guard_mode: TableCell(*cell.guard_mode) for cell in evaluation.cells if cell.cost.wait_p50 is not None
    }
    columns = [f"p{percentile}" for percentile in WAITS.values()]
    return _by_benchmark(evaluation, "A request's own wait", columns, names, waits)


def slice_table(cells: Sequence[Cell]) -> Table:
    """The slices of one benchmark."""
    columns = ("guard", "examples", "positive", "F1", "recall", "false-positive rate", "unparsable")
    table = Table(columns, cells[0].heading)
    for name in dict.fromkeys(name for cell in cells for name in cell.slices):
        for cell in cells:
            result = cell.slices.get(name)
            if result is not None:
                scores = result.scores
                unparsable = _part(result.unparsable, scores.examples * result.generations)
                rates = (scores.f1, scores.recall, scores.false_positive_rate)
                guard = TableCell(*cell.guard_mode)
                table.add(guard, scores.examples, scores.positives, *rates, unparsable, group=name)
    return table


def error_table(evaluation: Evaluation) -> Table:
    """How many of the errors in results.json fall into each category."""
    table = Table(("category and guard", "errors in results.json"), "Errors")
    for cells in evaluation.by_benchmark.values():
        for cell in cells:
            for category, wrong in by_category(cell).items():
                table.add(TableCell(category, f"{cell.guard} ({cell.mode})"), len(wrong), group=cells[0].heading)
    return table


def by_category(cell: Cell) -> dict[str, list[Wrong]]:
    """The errors of a cell by the first category that each has, most frequent first."""
    slices = list(dict.fromkeys(name.split(": ", 1)[0] for name in cell.slices))
    chosen = CATEGORY if CATEGORY in slices or not slices else slices[0]
    groups: dict[str, list[Wrong]] = {}
    for wrong in cell.wrong:
        values = (name.split(": ", 1)[1] for name in wrong.slices if name.startswith(f"{chosen}: "))
        groups.setdefault(next(values, "without a category"), []).append(wrong)
    return dict(sorted(groups.items(), key=lambda group: (-len(group[1]), group[0])))


def _part(part: int, whole: int) -> TableCell:
    return TableCell(f"{part:,}", share(part, whole) if part else "")


def summary_table(evaluation: Evaluation) -> Table:
    """F1 of every guard in every mode on every benchmark, and the averages, a row each; a dash where there is none.

    Where a threshold was chosen, F1 at it stands below.
    """
    columns = ("benchmark", "guard", "mode", f"{f1_title(evaluation)} [95 % interval]")
    table = Table(columns, "F1 of the harmful class", left=3)
    chosen = {(*c.guard_mode, c.benchmark): c.thresholded for c in evaluation.cells if c.thresholded}
    averages = list(dict.fromkeys(average.name for average in evaluation.averages))
    scores = {(*cell.guard_mode, cell.benchmark): estimate(cell.result.scores.f1) for cell in evaluation.cells}
    for each in evaluation.averages:
        score = estimate(each.f1)
        scores[*each.guard_mode, f"average: {each.name}"] = replace(score, text=score.text + "*" * bool(each.missing))
    for name in (*evaluation.benchmarks, *(f"average: {average}" for average in averages)):
        for i, guard_mode in enumerate(evaluation.by_guard):
            table.add(name if i == 0 else "", *guard_mode, scores.get((*guard_mode, name), TableCell("-")))
            if at := chosen.get((*guard_mode, name)):
                f1 = estimate(at.result.scores.f1)
                table.add("", "", "threshold", TableCell(f1.text, f"at {at.scale}"), kind="detail")
    if any(average.missing for average in evaluation.averages):
        table.note = "* without the benchmarks that the guard has no predictions for"
    return table
