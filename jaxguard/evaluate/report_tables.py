"""What the report says, as tables and sentences of plain text: report.md and report.html only differ in how they write it.

Nothing here is escaped.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxguard.data.dialogue import CHOICES, TITLES
from jaxguard.evaluate.comparison import Difference
from jaxguard.evaluate.published import AVERAGES, Published, PublishedRow
from jaxguard.evaluate.report_text import (
    ABSENT,
    Shown,
    difference,
    estimate,
    interval,
    number,
    probability,
    seconds,
    share,
    signed,
)
from jaxguard.evaluate.results import Average, Cell, Evaluation
from jaxguard.statistics import Estimate

Kind = Literal["ours", "difference", "paper"]
AVERAGE_TITLES = {
    "prompt": "Prompt F1",
    "response": "Response F1",
    "safety": "Safety (Avg)",
    "custom": "Custom policies",
}
MANY_UNPARSEABLE, MANY_FORCED = 0.01, 0.1
"""Shares of the answers above which the report warns."""


@dataclass(frozen=True)
class Line:
    """A row of a table; `group` stands above those that share it."""

    cells: tuple[Shown, ...]
    group: str = ""
    kind: Kind = "ours"


@dataclass(frozen=True)
class Table:
    """A table: a column of names, which nobody trusts, then columns of numbers."""

    heads: tuple[str, ...]
    lines: tuple[Line, ...]


def guards(evaluation: Evaluation) -> list[tuple[str, str]]:
    """(guard, mode), in order."""
    pairs = [(cell.guard, cell.mode) for cell in evaluation.cells]
    return list(dict.fromkeys([*pairs, *((one.guard, one.mode) for one in evaluation.averages)]))


def benchmarks(evaluation: Evaluation) -> dict[str, list[Cell]]:
    """Benchmark -> its cells, in the order of the benchmarks."""
    found: dict[str, list[Cell]] = {}
    for cell in evaluation.cells:
        found.setdefault(cell.benchmark, []).append(cell)
    return found


def facts(evaluation: Evaluation) -> list[tuple[str, str]]:
    """The head of the report."""
    settings = evaluation.settings
    judged = {cell.benchmark: cell.examples for cell in evaluation.cells}
    sampling = [f"{name} {settings[name]}" for name in ("generations", "temperature", "top_p") if name in settings]
    found = [
        ("Run", evaluation.name),
        ("Finished", evaluation.finished[:16].replace("T", " ") + " UTC" if evaluation.finished else ""),
        ("Hardware", evaluation.hardware),
        *((f"Guard {name}", what) for name, what in evaluation.models.items()),
        ("Examples", f"{sum(judged.values()):,} of {_count(len(judged), 'benchmark')}"),
        ("Sampling", ", ".join(sampling)),
        ("Unreadable answers count as", _text(settings.get("unparseable", ""))),
    ]
    return [(name, value) for name, value in found if value]


def flat_settings(evaluation: Evaluation) -> list[tuple[str, str]]:
    """All settings: name, and value as JSON where it is no text."""
    return [(name, _text(value)) for name, value in evaluation.settings.items()]


def cautions(evaluation: Evaluation, published: Published) -> list[str]:
    """What a reader must know before the numbers, a sentence each."""
    return [*_unfinished(evaluation), *_unreadable(evaluation), *_other_protocol(evaluation, published)]


def _unfinished(evaluation: Evaluation) -> Iterator[str]:
    if not evaluation.cells:
        yield "Nothing was judged."
    partial = list(dict.fromkeys(cell.benchmark for cell in evaluation.cells if not cell.complete))
    if partial:
        limit = evaluation.settings.get("limit")
        why = f"evaluate.limit is {limit}" if limit else "The evaluation is not complete"
        yield f"{why}: only some of the examples were judged of {', '.join(partial)}."
    for benchmark, cells in benchmarks(evaluation).items():
        there = {(cell.guard, cell.mode) for cell in cells}
        absent = [_name(*one) for one in guards(evaluation) if one not in there]
        if absent:
            yield f"{benchmark} was not judged by {', '.join(absent)}."


def _unreadable(evaluation: Evaluation) -> Iterator[str]:
    for guard, mode in guards(evaluation):
        cells = [cell for cell in evaluation.cells if (cell.guard, cell.mode) == (guard, mode)]
        unparseable = [c for c in cells if c.result.unparseable > MANY_UNPARSEABLE * answers(c)]
        forced = [c for c in cells if c.cost.forced > MANY_FORCED * answers(c)]
        if unparseable:
            many = ", ".join(f"{c.benchmark} ({share(c.result.unparseable, answers(c))})" for c in unparseable)
            yield f"{_name(guard, mode)} gives many answers that cannot be read: {many}."
        if forced:
            many = ", ".join(f"{c.benchmark} ({share(c.cost.forced, answers(c))})" for c in forced)
            yield f"{_name(guard, mode)} often thinks longer than it may, and is then made to answer: {many}."


def _other_protocol(evaluation: Evaluation, published: Published) -> Iterator[str]:
    other = {
        name: (evaluation.settings[name], wanted)
        for name, wanted in published.protocol.model_dump().items()
        if name in evaluation.settings and evaluation.settings[name] != wanted
    }
    if other:
        said = ", ".join(f"{name} {ours} (there {paper})" for name, (ours, paper) in other.items())
        yield f"Answers are not sampled as in the paper: {said}."
    odd: dict[tuple[str, ...], list[str]] = {}
    for name in AVERAGES:
        averages = [one for one in evaluation.averages if one.name == name]
        others = [one for one in averages if not comparable(evaluation, published, one)]
        if others:
            whose = () if len(others) == len(averages) else tuple(_name(one.guard, one.mode) for one in others)
            odd.setdefault(whose, []).append(AVERAGE_TITLES[name])
    for whose, titles in odd.items():
        of = f" of {', '.join(whose)}" if whose else ""
        verb = "is" if len(titles) == 1 else "are"
        yield (
            f"{', '.join(titles)}{of} {verb} over other benchmarks than the paper's, or not over all of their examples: "
            "no difference to the paper is claimed."
        )


def comparable(evaluation: Evaluation, published: Published, average: Average) -> bool:
    """Whether an average is over the paper's benchmarks, each of them whole."""
    groups = {"prompt": {"safety_prompt"}, "response": {"safety_response"}, "custom": {"custom_policy"}}
    wanted = groups.get(average.name, {"safety_prompt", "safety_response"})
    cells = [
        cell
        for cell in evaluation.cells
        if (cell.guard, cell.mode) == (average.guard, average.mode) and cell.group in wanted
    ]
    same = Counter(cell.source for cell in cells) == Counter(published.averages.benchmarks(average.name))
    return same and all(cell.complete for cell in cells)


def main_table(evaluation: Evaluation, published: Published) -> Table:
    """Averages of every guard in every mode, what they are better by, and the paper's rows."""
    lines = []
    first = evaluation.cells[0].guard if evaluation.cells else ""
    for guard, mode in guards(evaluation):
        found = {one.name: one for one in evaluation.averages if (one.guard, one.mode) == (guard, mode)}
        scores = (estimate(found[name].f1 if name in found else None, deviation=True) for name in AVERAGES)
        lines.append(Line((Shown(guard, mode), *scores)))
        if any(one.versus for one in found.values()):
            cells = (difference(found[name].versus if name in found else None) for name in AVERAGES)
            lines.append(Line((Shown(f"less {first}"), *cells), kind="difference"))
        row = chosen_row(evaluation, published, guard, mode)
        if row is not None:
            cells = (_less_paper(evaluation, published, found.get(name), row.average(name)) for name in AVERAGES)
            lines.append(Line((Shown("less the paper's", row.name), *cells), kind="difference"))
    for row in published.rows:
        scores = (Shown("" if row.average(name) is None else number(row.average(name))) for name in AVERAGES)
        lines.append(Line((Shown(row.name), *scores), f"The paper ({published.source})", "paper"))
    return Table(("guard", *(AVERAGE_TITLES[name] for name in AVERAGES)), tuple(lines))


def chosen_row(evaluation: Evaluation, published: Published, guard: str, mode: str) -> PublishedRow | None:
    """The paper's row that the evaluation compares a guard with."""
    return published.row(evaluation.paper_rows.get(f"{guard}/{mode}", ""))


def _less_paper(evaluation: Evaluation, published: Published, ours: Average | None, paper: float | None) -> Shown:
    if ours is None or ours.f1.value is None or paper is None:
        return Shown(ABSENT)
    if not comparable(evaluation, published, ours):
        return Shown(ABSENT, "other benchmarks")
    low, high = (None if end is None else end - paper for end in (ours.f1.low, ours.f1.high))
    return Shown(signed(ours.f1.value - paper), interval(low, high, difference=True))


def score_table(evaluation: Evaluation) -> Table:
    """Every guard on every benchmark."""
    heads = ("F1", "precision", "recall", "false-positive rate", "AUPRC", "ECE", "F1 at threshold", "unparseable", "forced",
             "seconds")  # fmt: skip
    lines = [Line(_scores(cell), heading(cells[0])) for cells in benchmarks(evaluation).values() for cell in cells]
    return Table(("guard", *heads), tuple(lines))


def heading(cell: Cell) -> str:
    """A benchmark in a line: its title, what is asked, and how many examples."""
    scores = cell.result.scores
    label = "" if cell.benchmark == cell.source else f" ({cell.benchmark})"
    positive = CHOICES[cell.question][0]
    partly = "" if cell.complete else ", not all of them"
    asked = TITLES[cell.question].lower()
    title = cell.title if asked in cell.title.casefold() else f"{cell.title}, {asked}"
    return f"{title}{label}: {cell.examples:,} examples{partly}, {scores.positives:,} {positive}"


def _scores(cell: Cell) -> tuple[Shown, ...]:
    scores, calibration, chosen = cell.result.scores, cell.calibration, cell.thresholded
    at = Shown(ABSENT)
    if chosen is not None:
        found = estimate(chosen.result.scores.f1)
        at = Shown(f"{found.text} at {chosen.threshold:.3f}", found.more)
    return (
        Shown(cell.guard, cell.mode),
        estimate(scores.f1, deviation=True),
        *map(estimate, (scores.precision, scores.recall, scores.false_positive_rate)),
        estimate(calibration.auprc if calibration else None),
        Shown(number(calibration.ece if calibration else None)),
        at,
        _part(cell.result.unparseable, answers(cell)),
        _part(cell.cost.forced, answers(cell)),
        Shown(seconds(cell.cost.seconds), f"{cell.cost.completion_tokens:,.0f} tokens"),
    )


def versus_table(evaluation: Evaluation) -> Table:
    """Every guard against the first one on the same examples; no lines where there is only one."""
    lines = []
    for cells in benchmarks(evaluation).values():
        for cell in cells:
            if cell.versus is None:
                continue
            found, test = cell.versus
            right = Shown(f"{test.only_first:,} : {test.only_second:,}", probability(test.p))
            lines.append(Line((Shown(cell.guard, cell.mode), *_parts(found), right), heading(cells[0])))
    return Table(("guard", "F1 less the first's", "95 % interval", "p", "right alone (McNemar)"), tuple(lines))


def _parts(found: Difference) -> tuple[Shown, Shown, Shown]:
    p = ABSENT if found.p is None else probability(found.p).removeprefix("p = ").removeprefix("p ")
    return Shown(difference(found).text), Shown(interval(found.low, found.high, difference=True) or ABSENT), Shown(p)


def slice_table(cells: Sequence[Cell]) -> Table:
    """The slices of one benchmark."""
    names = dict.fromkeys(name for cell in cells for name in cell.slices)
    lines = []
    for name in names:
        for cell in cells:
            found = cell.slices.get(name)
            if found is None:
                continue
            scores = found.scores
            counts = (Shown(f"{scores.examples:,}"), Shown(f"{scores.positives:,}"))
            rates: tuple[Estimate, ...] = (scores.f1, scores.recall, scores.false_positive_rate)
            unparseable = _part(found.unparseable, scores.examples * found.generations)
            values = (*counts, *map(estimate, rates), unparseable)
            lines.append(Line((Shown(cell.guard, cell.mode), *values), name))
    heads = ("guard", "examples", "positive", "F1", "recall", "false-positive rate", "unparseable")
    return Table(heads, tuple(lines))


def answers(cell: Cell) -> int:
    """All verdicts of a cell."""
    return cell.examples * cell.result.generations


def errors(cell: Cell) -> int:
    """Examples that most generations judge wrongly."""
    right = cell.result.right
    return sum(count for i, count in enumerate(right) if 2 * i < len(right) - 1)


def _part(count: int, whole: int) -> Shown:
    return Shown(f"{count:,}", share(count, whole) if count else "")


def _name(guard: str, mode: str) -> str:
    return f"{guard} ({mode})"


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
