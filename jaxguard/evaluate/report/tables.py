"""What the report says, as tables and sentences of plain text: report.md and report.html only differ in how they write it.

Nothing here is escaped.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxguard.data.format.dialogue import CHOICES, TITLES
from jaxguard.evaluate.report.published import AVERAGES, Published, PublishedRow
from jaxguard.evaluate.report.text import (
    ABSENT,
    DASH,
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
from jaxguard.evaluate.scores.results import Average, Cell, Evaluation, Versus
from jaxguard.utils.statistics import Estimate

Kind = Literal["ours", "difference", "paper"]
AVERAGE_TITLES = {
    "prompt": "Prompt F1",
    "response": "Response F1",
    "safety": "Safety (Avg)",
    "custom": "Custom policies",
}
# What the report warns of: of a guard that does so in more than this share of its answers.
CAUTIONS: tuple[tuple[str, Callable[[Cell], float], float], ...] = (
    ("gives many answers that cannot be read", lambda cell: cell.result.unparsable / answers(cell), 0.01),
    ("often thinks longer than it may, and is then made to answer", lambda cell: cell.cost.forced / answers(cell), 0.1),
    (
        "has many answers whose probability cannot be read, which counts as an unreadable answer does",
        lambda cell: cell.cost.unscored / answers(cell) if cell.calibration else 0.0,
        0.01,
    ),
    (
        "has no room for some examples, and judged them without the middle of their text",
        lambda cell: cell.cost.cut / cell.examples,
        0.0,
    ),
)


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
    """(guard, mode) of all that judged anything, in order."""
    return list(dict.fromkeys((cell.guard, cell.mode) for cell in evaluation.cells))


def cells_by(evaluation: Evaluation, guard: str, mode: str) -> list[Cell]:
    """What a guard judged in a mode."""
    return [cell for cell in evaluation.cells if (cell.guard, cell.mode) == (guard, mode)]


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
        ("Unreadable answers count as", _text(settings.get("unparsable", ""))),
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
        return
    partial = list(dict.fromkeys(cell.benchmark for cell in evaluation.cells if not cell.complete))
    if partial:
        limit = evaluation.settings.get("limit")
        why = f"evaluate.limit is {limit}" if limit else "The evaluation is not complete"
        yield f"{why}: only some of the examples were judged of {', '.join(partial)}."
    idle = [name for name in evaluation.models if name not in {cell.guard for cell in evaluation.cells}]
    if idle:
        yield f"{', '.join(idle)} judged nothing: what a guard cannot be asked is left out."
    cells_of = benchmarks(evaluation)
    for benchmark in evaluation.benchmarks:
        there = {(cell.guard, cell.mode) for cell in cells_of.get(benchmark, ())}
        absent = [_name(*one) for one in guards(evaluation) if one not in there]
        if absent:
            yield f"{benchmark} was not judged by {', '.join(absent) if there else 'any guard'}."
    partly = dict.fromkeys(_name(one.guard, one.mode) for one in evaluation.averages if one.missing)
    if partly:
        yield (
            f"Averages of {', '.join(partly)} are over the benchmarks that it judged, which are fewer than those of others: "
            "compare it by the differences, which are over what both judged."
        )


def _unreadable(evaluation: Evaluation) -> Iterator[str]:
    for guard, mode in guards(evaluation):
        for said, part, most in CAUTIONS:
            parts = [(cell.benchmark, part(cell)) for cell in cells_by(evaluation, guard, mode)]
            many = [f"{benchmark} ({share(found, 1)})" for benchmark, found in parts if found > most]
            if many:
                yield f"{_name(guard, mode)} {said}: {', '.join(many)}."


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
    cells = [cell for cell in cells_by(evaluation, average.guard, average.mode) if cell.group in wanted]
    same = Counter(cell.source for cell in cells) == Counter(published.averages.benchmarks(average.name))
    return same and all(cell.complete for cell in cells)


def main_table(evaluation: Evaluation, published: Published) -> Table:
    """Averages of every guard in every mode, what they are better by, and the paper's rows."""
    lines = []
    for guard, mode in guards(evaluation):
        found = {one.name: one for one in evaluation.averages if (one.guard, one.mode) == (guard, mode)}
        lines.append(Line((Shown(guard, mode), *(_average(found.get(name)) for name in AVERAGES))))
        versus = {name: one.versus for name, one in found.items() if one.versus}
        if versus:
            first = next(iter(versus.values()))
            cells = (_difference(versus.get(name)) for name in AVERAGES)
            lines.append(Line((Shown(f"less {first.guard}", first.mode), *cells), kind="difference"))
        row = chosen_row(evaluation, published, guard, mode)
        if row is not None:
            cells = (_less_paper(evaluation, published, found.get(name), row.average(name)) for name in AVERAGES)
            lines.append(Line((Shown("less the paper's", row.name), *cells), kind="difference"))
    for row in published.rows:
        scores = (Shown("" if row.average(name) is None else number(row.average(name))) for name in AVERAGES)
        lines.append(Line((Shown(row.name), *scores), f"The paper ({published.source})", "paper"))
    return Table(("guard", *(AVERAGE_TITLES[name] for name in AVERAGES)), tuple(lines))


def _average(found: Average | None) -> Shown:
    return Shown(DASH) if found is None else _without(estimate(found.f1, deviation=True), found.missing)


def _difference(found: Versus | None) -> Shown:
    return Shown(DASH) if found is None else _without(difference(found.f1), found.missing)


def _without(shown: Shown, missing: Sequence[str]) -> Shown:
    left_out = f"{_count(len(missing), 'benchmark')} left out" if missing else ""
    return Shown(shown.text, " ".join(filter(None, (shown.more, left_out))))


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
    """Every guard on every benchmark, with dashes for what it did not judge."""
    heads = ("F1", "precision", "recall", "false-positive rate", "AUPRC", "ECE", "F1 at threshold", "unparsable", "forced",
             "seconds")  # fmt: skip
    lines = []
    for cells in benchmarks(evaluation).values():
        found = {(cell.guard, cell.mode): _scores(cell) for cell in cells}
        lines += [Line((Shown(*one), *found.get(one, _dashes(heads))), heading(cells[0])) for one in guards(evaluation)]
    return Table(("guard", *heads), tuple(lines))


def _dashes(heads: Sequence[str]) -> tuple[Shown, ...]:
    return (Shown(DASH),) * len(heads)


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
        estimate(scores.f1, deviation=True),
        *map(estimate, (scores.precision, scores.recall, scores.false_positive_rate)),
        estimate(calibration.auprc if calibration else None),
        Shown(number(calibration.ece if calibration else None)),
        at,
        _part(cell.result.unparsable, answers(cell)),
        _part(cell.cost.forced, answers(cell)),
        Shown(seconds(cell.cost.seconds), f"{cell.cost.completion_tokens:,.0f} tokens"),
    )


def versus_table(evaluation: Evaluation) -> Table:
    """Every guard against the first one on the same examples; no lines where there is only one."""
    heads = ("F1 less the first's", "95 % interval", "p", "right alone (McNemar)")
    first_of = {(cell.guard, cell.mode): cell.versus for cell in evaluation.cells if cell.versus}
    lines = []
    for cells in benchmarks(evaluation).values():
        found = {(cell.guard, cell.mode): _versus(cell.versus) for cell in cells if cell.versus}
        for one, first in first_of.items():
            name = Shown(one[0], f"{one[1]}, less {_name(first.guard, first.mode)}")
            lines.append(Line((name, *found.get(one, _dashes(heads))), heading(cells[0])))
    return Table(("guard", *heads), tuple(lines))


def _versus(found: Versus) -> tuple[Shown, ...]:
    f1, test = found.f1, found.mcnemar
    p = ABSENT if f1.p is None else probability(f1.p).removeprefix("p = ").removeprefix("p ")
    right = Shown(f"{test.only_first:,} : {test.only_second:,}", probability(test.p)) if test else Shown(ABSENT)
    return Shown(difference(f1).text), Shown(interval(f1.low, f1.high, difference=True) or ABSENT), Shown(p), right


def cost_table(evaluation: Evaluation) -> Table:
    """Time and tokens of every guard in every mode, over all that it judged."""
    heads = ("guard", "examples", "seconds", "seconds for the probability", "prompt tokens", "generated tokens", "examples/s",
             "tokens/s")  # fmt: skip
    lines = []
    for guard, mode in guards(evaluation):
        cells = cells_by(evaluation, guard, mode)
        count, wall = sum(cell.examples for cell in cells), sum(cell.cost.wall for cell in cells)
        took, scoring, prompt, generated = (
            sum(getattr(cell.cost, name) * cell.examples for cell in cells) / count
            for name in ("seconds", "scoring", "prompt_tokens", "completion_tokens")
        )
        rates = (Shown(ABSENT), Shown(ABSENT))
        if wall:
            more = f"{generated * count / wall:,.0f} generated"
            rates = (Shown(seconds(count / wall)), Shown(f"{(prompt + generated) * count / wall:,.0f}", more))
        times = (Shown(seconds(took)), Shown(seconds(scoring)))
        tokens = (Shown(f"{prompt:,.0f}"), Shown(f"{generated:,.0f}"))
        lines.append(Line((Shown(guard, mode), Shown(f"{count:,}"), *times, *tokens, *rates)))
    return Table(heads, tuple(lines))


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
            unparsable = _part(found.unparsable, scores.examples * found.generations)
            values = (*counts, *map(estimate, rates), unparsable)
            lines.append(Line((Shown(cell.guard, cell.mode), *values), name))
    heads = ("guard", "examples", "positive", "F1", "recall", "false-positive rate", "unparsable")
    return Table(heads, tuple(lines))


def answers(cell: Cell) -> int:
    """All verdicts of a cell."""
    return cell.examples * cell.result.generations


def errors(cell: Cell) -> int:
    """Examples that no more than half of the generations judge right."""
    right = cell.result.right
    return sum(count for i, count in enumerate(right) if 2 * i <= len(right) - 1)


def _part(count: int, whole: int) -> Shown:
    return Shown(f"{count:,}", share(count, whole) if count else "")


def _name(guard: str, mode: str) -> str:
    return f"{guard} ({mode})"


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
