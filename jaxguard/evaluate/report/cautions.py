"""What a reader must know before the numbers: what the evaluation is of, and what is odd about it."""

import json
from collections.abc import Callable, Iterator

from jaxguard.evaluate.report.published import AVERAGES, Published
from jaxguard.evaluate.report.tables import AVERAGE_TITLES, benchmarks, cells_by, comparable, guards, verdicts
from jaxguard.evaluate.scores.results import Cell, Evaluation
from jaxguard.report.text import count, share

# A warning, the share that it is about, and the share above which it is given.
LIMITS: tuple[tuple[str, Callable[[Cell], float], float], ...] = (
    ("gives many unparsable answers", lambda cell: cell.result.unparsable / verdicts(cell), 0.01),
    (
        "often reasons longer than it may, and is forced to a verdict",
        lambda cell: cell.cost.forced / verdicts(cell),
        0.1,
    ),
    (
        "has many answers without a probability, which count as unparsable ones do",
        lambda cell: cell.cost.unscored / verdicts(cell) if cell.calibration else 0.0,
        0.01,
    ),
    (
        "cannot hold some examples, whose text lacks its middle",
        lambda cell: cell.cost.cut / cell.examples,
        0.0,
    ),
)


def facts(evaluation: Evaluation) -> list[tuple[str, str]]:
    """The head of the report."""
    settings = evaluation.settings
    examples = {cell.benchmark: cell.examples for cell in evaluation.cells}
    sampling = [f"{name} {settings[name]}" for name in ("generations", "temperature", "top_p") if name in settings]
    pairs = [
        ("Finished", evaluation.finished[:16].replace("T", " ") + " UTC" if evaluation.finished else ""),
        ("Hardware", evaluation.hardware),
        *((f"Guard {name}", description) for name, description in evaluation.models.items()),
        ("Examples", f"{sum(examples.values()):,} of {count(len(examples), 'benchmark')}"),
        ("Sampling", ", ".join(sampling)),
        ("Unparsable answers count as", _text(settings.get("unparsable", ""))),
    ]
    return [(name, value) for name, value in pairs if value]


def flat_settings(evaluation: Evaluation) -> list[tuple[str, str]]:
    """All settings: name, and value as JSON where it is no text."""
    return [(name, _text(value)) for name, value in evaluation.settings.items()]


def cautions(evaluation: Evaluation, published: Published) -> list[str]:
    """Warnings, a sentence each."""
    return [*_unfinished(evaluation), *_odd_answers(evaluation), *_other_protocol(evaluation, published)]


def _unfinished(evaluation: Evaluation) -> Iterator[str]:
    if not evaluation.cells:
        yield "Nothing was evaluated."
        return
    partial = list(dict.fromkeys(cell.benchmark for cell in evaluation.cells if not cell.complete))
    if partial:
        limit = evaluation.settings.get("limit")
        why = f"evaluate.limit is {limit}" if limit else "The evaluation is not complete"
        yield f"{why}: only some of the examples were evaluated of {', '.join(partial)}."
    idle = [name for name in evaluation.models if name not in {cell.guard for cell in evaluation.cells}]
    if idle:
        yield f"{', '.join(idle)} has no results: requests that a guard does not support are left out."
    cells_of = benchmarks(evaluation)
    for benchmark in evaluation.benchmarks:
        present = {(cell.guard, cell.mode) for cell in cells_of.get(benchmark, ())}
        absent = [_name(*guard) for guard in guards(evaluation) if guard not in present]
        if absent:
            yield f"{benchmark} has no results of {', '.join(absent) if present else 'any guard'}."
    partly = dict.fromkeys(_name(each.guard, each.mode) for each in evaluation.averages if each.missing)
    if partly:
        yield (
            f"Averages of {', '.join(partly)} are over fewer benchmarks than those of others: compare it by the differences, "
            "which are over what both have results for."
        )


def _odd_answers(evaluation: Evaluation) -> Iterator[str]:
    for guard, mode in guards(evaluation):
        for warning, measure, limit in LIMITS:
            shares = [(cell.benchmark, measure(cell)) for cell in cells_by(evaluation, guard, mode)]
            above = [f"{benchmark} ({share(value)})" for benchmark, value in shares if value > limit]
            if above:
                yield f"{_name(guard, mode)} {warning}: {', '.join(above)}."


def _other_protocol(evaluation: Evaluation, published: Published) -> Iterator[str]:
    settings = evaluation.settings
    different = [
        f"{name} {settings[name]} (there {paper})"
        for name, paper in published.protocol.model_dump().items()
        if name in settings and settings[name] != paper
    ]
    if different:
        yield f"Answers are not sampled as in the paper: {', '.join(different)}."
    titles_by_guards: dict[tuple[str, ...], list[str]] = {}
    for name in AVERAGES:
        averages = [each for each in evaluation.averages if each.name == name]
        others = [each for each in averages if not comparable(evaluation, published, each)]
        if others:
            names = () if len(others) == len(averages) else tuple(_name(each.guard, each.mode) for each in others)
            titles_by_guards.setdefault(names, []).append(AVERAGE_TITLES[name])
    for names, titles in titles_by_guards.items():
        of = f" of {', '.join(names)}" if names else ""
        verb = "is" if len(titles) == 1 else "are"
        yield (
            f"{', '.join(titles)}{of} {verb} over other benchmarks than the paper's, or not over all of their examples: "
            "no difference to the paper is claimed."
        )


def _name(guard: str, mode: str) -> str:
    return f"{guard} ({mode})"


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
