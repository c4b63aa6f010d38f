"""The tables of an evaluation: averages beside the paper's, scores, comparison, cost, slices, errors."""

from collections.abc import Sequence

from jaxguard.data.format.dialogue import CHOICES, TITLES
from jaxguard.evaluate.report.published import AVERAGES, Published, PublishedRow
from jaxguard.evaluate.scores.metrics import Difference
from jaxguard.evaluate.scores.results import Average, Cell, Evaluation, Versus, Wrong
from jaxguard.report import Cell as TableCell
from jaxguard.report import Table, estimate
from jaxguard.report.text import ABSENT, DASH, count, interval, number, probability, seconds, share, signed

AVERAGE_TITLES = {
    "prompt": "Prompt F1",
    "response": "Response F1",
    "safety": "Safety (Avg)",
    "custom": "Custom policies",
}
CATEGORY = "category"
"""The slice that errors are grouped by; where a benchmark has no such slice, its first one."""


def guards(evaluation: Evaluation) -> list[tuple[str, str]]:
    """(guard, mode) of all that have results, in order."""
    return list(dict.fromkeys((cell.guard, cell.mode) for cell in evaluation.cells))


def cells_by(evaluation: Evaluation, guard: str, mode: str) -> list[Cell]:
    """The results of a guard in a mode."""
    return [cell for cell in evaluation.cells if (cell.guard, cell.mode) == (guard, mode)]


def benchmarks(evaluation: Evaluation) -> dict[str, list[Cell]]:
    """Benchmark -> its cells, in the order of the benchmarks."""
    cells: dict[str, list[Cell]] = {}
    for cell in evaluation.cells:
        cells.setdefault(cell.benchmark, []).append(cell)
    return cells


def heading(cell: Cell) -> str:
    """A benchmark in a line: its title, its question, and how many examples."""
    label = "" if cell.benchmark == cell.source else f" ({cell.benchmark})"
    partly = "" if cell.complete else ", not all of them"
    question = TITLES[cell.question].lower()
    title = cell.title if question in cell.title.casefold() else f"{cell.title}, {question}"
    positives = f"{cell.result.scores.positives:,} {CHOICES[cell.question][0]}"
    return f"{title}{label}: {cell.examples:,} examples{partly}, {positives}"


def main_table(evaluation: Evaluation, published: Published) -> Table:
    """Averages of every guard in every mode, their differences, and the paper's rows."""
    table = Table(("guard", *(AVERAGE_TITLES[name] for name in AVERAGES)), "Averages")
    for guard, mode in guards(evaluation):
        averages = {each.name: each for each in evaluation.averages if (each.guard, each.mode) == (guard, mode)}
        table.add(TableCell(guard, mode), *(_average(averages.get(name)) for name in AVERAGES), kind="strong")
        versus = {name: each.versus for name, each in averages.items() if each.versus}
        if versus:
            first = next(iter(versus.values()))
            differences = (_average_difference(versus.get(name)) for name in AVERAGES)
            table.add(TableCell(f"less {first.guard}", first.mode), *differences, kind="detail")
        row = chosen_row(evaluation, published, guard, mode)
        if row is not None:
            differences = (_less_paper(evaluation, published, averages.get(n), row.average(n)) for n in AVERAGES)
            table.add(TableCell("less the paper's", row.name), *differences, kind="detail")
    for row in published.rows:
        scores = ("" if row.average(name) is None else row.average(name) for name in AVERAGES)
        table.add(row.name, *scores, group=f"The paper ({published.source})", kind="faint")
    return table


def chosen_row(evaluation: Evaluation, published: Published, guard: str, mode: str) -> PublishedRow | None:
    """The paper's row that the evaluation compares a guard with."""
    return published.row(evaluation.paper_rows.get(f"{guard}/{mode}", ""))


def comparable(evaluation: Evaluation, published: Published, average: Average) -> bool:
    """Whether an average is over the paper's benchmarks, each of them whole."""
    groups = {"prompt": {"safety_prompt"}, "response": {"safety_response"}, "custom": {"custom_policy"}}
    wanted = groups.get(average.name, {"safety_prompt", "safety_response"})
    cells = [cell for cell in cells_by(evaluation, average.guard, average.mode) if cell.group in wanted]
    same = sorted(cell.source for cell in cells) == sorted(published.averages.benchmarks(average.name))
    return same and all(cell.complete for cell in cells)


def difference(score: Difference | None) -> TableCell:
    """A difference with its interval and p-value."""
    if score is None or score.value is None:
        return TableCell(ABSENT)
    parts = (interval(score.low, score.high, difference=True), "" if score.p is None else probability(score.p))
    return TableCell(signed(score.value), " ".join(filter(None, parts)))


def _average(average: Average | None) -> TableCell:
    return TableCell(DASH) if average is None else _without(estimate(average.f1, deviation=True), average.missing)


def _average_difference(versus: Versus | None) -> TableCell:
    return TableCell(DASH) if versus is None else _without(difference(versus.f1), versus.missing)


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


def score_table(evaluation: Evaluation) -> Table:
    """Every guard on every benchmark, with dashes where it has no results."""
    columns = ("F1", "precision", "recall", "false-positive rate", "AUPRC", "ECE", "F1 at threshold", "unparsable", "forced",
               "seconds")  # fmt: skip
    table = Table(("guard", *columns), "Benchmarks")
    for cells in benchmarks(evaluation).values():
        by_guard = {(cell.guard, cell.mode): cell for cell in cells}
        for name in guards(evaluation):
            scores = _scores(by_guard[name]) if name in by_guard else (TableCell(DASH),) * len(columns)
            table.add(TableCell(*name), *scores, group=heading(cells[0]))
    return table


def _scores(cell: Cell) -> tuple[TableCell, ...]:
    scores, calibration, chosen = cell.result.scores, cell.calibration, cell.thresholded
    at_threshold = TableCell(ABSENT)
    if chosen is not None:
        f1 = estimate(chosen.result.scores.f1)
        at_threshold = TableCell(f"{f1.text} at {chosen.threshold:.3f}", f1.more)
    return (
        estimate(scores.f1, deviation=True),
        *map(estimate, (scores.precision, scores.recall, scores.false_positive_rate)),
        estimate(calibration.auprc if calibration else None),
        TableCell(number(calibration.ece if calibration else None)),
        at_threshold,
        _part(cell.result.unparsable, verdicts(cell)),
        _part(cell.cost.forced, verdicts(cell)),
        TableCell(seconds(cell.cost.seconds), f"{cell.cost.completion_tokens:,.0f} tokens"),
    )


def versus_table(evaluation: Evaluation) -> Table:
    """Every guard against the first one on the same examples; no rows where there is only one."""
    columns = ("F1 less the first's", "95 % interval", "p", "right alone (McNemar)")
    first_of = {(cell.guard, cell.mode): cell.versus for cell in evaluation.cells if cell.versus}
    table = Table(("guard", *columns), "Compared with the first guard")
    for cells in benchmarks(evaluation).values():
        versus = {(cell.guard, cell.mode): cell.versus for cell in cells if cell.versus}
        for (guard, mode), first in first_of.items():
            name = TableCell(guard, f"{mode}, less {first.guard} ({first.mode})")
            compared = versus.get((guard, mode))
            values = _versus(compared) if compared else (TableCell(DASH),) * len(columns)
            table.add(name, *values, group=heading(cells[0]))
    return table


def _versus(versus: Versus) -> tuple[TableCell, ...]:
    f1, test = versus.f1, versus.mcnemar
    p = ABSENT if f1.p is None else probability(f1.p).removeprefix("p = ").removeprefix("p ")
    right = TableCell(f"{test.only_first:,} : {test.only_second:,}", probability(test.p)) if test else TableCell(ABSENT)
    return (
        TableCell(difference(f1).text),
        TableCell(interval(f1.low, f1.high, difference=True) or ABSENT),
        TableCell(p),
        right,
    )


def cost_table(evaluation: Evaluation) -> Table:
    """Time and tokens of every guard in every mode, over all of its examples."""
    columns = ("guard", "examples", "seconds", "seconds for the probability", "prompt tokens", "generated tokens", "examples/s",
               "tokens/s")  # fmt: skip
    table = Table(columns, "Time and tokens")
    for guard, mode in guards(evaluation):
        cells = cells_by(evaluation, guard, mode)
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
        table.add(TableCell(guard, mode), total, seconds(latency), seconds(scoring), *tokens, *rates)
    return table


def slice_table(cells: Sequence[Cell]) -> Table:
    """The slices of one benchmark."""
    columns = ("guard", "examples", "positive", "F1", "recall", "false-positive rate", "unparsable")
    table = Table(columns, heading(cells[0]))
    for name in dict.fromkeys(name for cell in cells for name in cell.slices):
        for cell in cells:
            result = cell.slices.get(name)
            if result is not None:
                scores = result.scores
                unparsable = _part(result.unparsable, scores.examples * result.generations)
                rates = (scores.f1, scores.recall, scores.false_positive_rate)
                guard = TableCell(cell.guard, cell.mode)
                table.add(guard, scores.examples, scores.positives, *rates, unparsable, group=name)
    return table


def error_table(evaluation: Evaluation) -> Table:
    """How many of the errors in results.json fall into each category."""
    table = Table(("category and guard", "errors in results.json"), "Errors")
    for cells in benchmarks(evaluation).values():
        for cell in cells:
            for category, wrong in by_category(cell).items():
                table.add(TableCell(category, f"{cell.guard} ({cell.mode})"), len(wrong), group=heading(cells[0]))
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


def verdicts(cell: Cell) -> int:
    """How many verdicts a cell has, those of all generations."""
    return cell.examples * cell.result.generations


def errors(cell: Cell) -> int:
    """Examples of which no more than half of the generations are right."""
    right = cell.result.right
    return sum(examples for i, examples in enumerate(right) if 2 * i <= len(right) - 1)


def _part(part: int, whole: int) -> TableCell:
    return TableCell(f"{part:,}", share(part, whole) if part else "")


def summary_table(evaluation: Evaluation) -> Table:
    """F1 of every guard in every mode on every benchmark, and the averages; a dash where there is none."""
    names = list(dict.fromkeys(average.name for average in evaluation.averages))
    table = Table(("guard", "mode", *evaluation.benchmarks, *names), "F1 of the harmful class [95 % interval]", left=2)
    scores = {(cell.guard, cell.mode, cell.benchmark): cell.result.scores.f1 for cell in evaluation.cells}
    averages = {(each.guard, each.mode, each.name): each for each in evaluation.averages}
    for guard, mode in guards(evaluation):
        f1 = [scores.get((guard, mode, name)) for name in evaluation.benchmarks]
        cells = [TableCell("-") if score is None or score.value is None else estimate(score) for score in f1]
        for average in (averages.get((guard, mode, name)) for name in names):
            score = estimate(average.f1) if average else TableCell("-")
            cells.append(TableCell(score.text + "*", score.more) if average and average.missing else score)
        table.add(guard, mode, *cells)
    if any(average.missing for average in evaluation.averages):
        table.note = "* without the benchmarks that the guard has no predictions for"
    return table
