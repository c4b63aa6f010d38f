"""An evaluation as results.json, report.md and report.html.

Prompts, responses and what guards wrote are only in report.html, where they are hidden until the reader opens them.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxguard.data.format.dialogue import CHOICES
from jaxguard.data.policies import Question
from jaxguard.evaluate.report.figures import f1_figure, latency_figure, mark, reliability_figure
from jaxguard.evaluate.report.published import Published, read_published
from jaxguard.evaluate.report.tables import (
    AVERAGE_TITLES,
    by_category,
    comparable,
    cost_table,
    error_table,
    main_table,
    score_table,
    slice_table,
    versus_table,
)
from jaxguard.evaluate.scores.results import Cell, Evaluation, Wrong, write_results
from jaxguard.report import (
    Beside,
    Bullets,
    Details,
    Drawing,
    Facts,
    Only,
    Page,
    Paragraph,
    Quote,
    Section,
    note,
    write_markdown,
    write_page,
)
from jaxguard.report import Cell as TableCell
from jaxguard.report.figures import inline_svg
from jaxguard.report.text import count, number, share

MOST_WRONG, MOST_CHARACTERS = 50, 2000
"""Errors of a guard in a mode on a benchmark, and characters of a text, that the page shows."""
ABOUT_AVERAGES = (
    "F1 of the positive class: each generation is scored by itself and the scores are averaged. In brackets the 95 % bootstrap "
    "interval over examples, after ± the deviation over generations. The safety average is (5 × prompt + 4 × response) / 9. "
    "Differences are paired, over the examples of both guards. A dash: no results."
)
ABOUT_SCORES = (
    "n/a: the examples lack the class that the score is about, or the guard gives no probability. A dash: no results. "
    "Probabilities are taken at face value for AUPRC and ECE; the threshold is chosen on other examples. Forced: the "
    "reasoning reached its limit, and the guard was made to give its verdict."
)
ABOUT_VERSUS = (
    "Each mode with the same mode of the first guard, or with its first where it has no such mode; on the same examples, by a "
    "paired bootstrap. Right alone: examples that only this guard, and only the first, gets right in more than half of its "
    "generations, with McNemar's exact test."
)
ABOUT_COST = (
    "Means of all examples of the guard. Seconds are from request to answer. JAX works in batches, and an example's "
    "seconds are its share of the batch's; at a server they are its own wait, beside the others that are under way. Passes for "
    "the probability alone are counted by themselves, but with evaluate.generations=0 they are the answer. Examples and tokens "
    "a second are by the clock, with these passes; tokens are those of prompts and of all generations."
)
ABOUT_ERRORS = (
    "An example is an error unless more than half of its generations are right: a tie is one. The most certain probabilities come "
    "first; the text is the first wrong answer."
)
ABOUT_PROBABILITIES = (
    "On the dotted line, as many examples are positive as the guard says. Thin lines are single benchmarks, the thick one is all "
    "of them, the dashed one after calibration, if there are validation examples."
)

# A warning, the share that it is about, and the share above which it is given.
LIMITS: tuple[tuple[str, Callable[[Cell], float], float], ...] = (
    ("gives many unparsable answers", lambda cell: cell.result.unparsable / cell.verdicts, 0.01),
    (
        "often reasons longer than it may, and is forced to a verdict",
        lambda cell: cell.cost.forced / cell.verdicts,
        0.1,
    ),
    (
        "has many answers without a probability, which count as unparsable ones do",
        lambda cell: cell.cost.unscored / cell.verdicts if cell.calibration else 0.0,
        0.01,
    ),
    (
        "cannot hold some examples, whose text lacks its middle",
        lambda cell: cell.cost.cut / cell.examples,
        0.0,
    ),
)


def write_report(evaluation: Evaluation, folder: Path) -> None:
    """Write results.json, report.md and report.html into a folder, which is made.

    Raises:
        JaxguardError: one cannot be written, or configs/published/paper.yaml is absent or mistaken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_results(evaluation, folder / "results.json")
    page = report(evaluation, read_published())
    write_markdown(folder / "report.md", page)
    write_page(folder / "report.html", page)


def report(evaluation: Evaluation, published: Published) -> Page:
    """The report: tables in both formats; figures, and errors with their texts, for HTML only."""
    link = TableCell(published.source, url=published.url)
    paper = Paragraph([f"The paper: {published.title}, ", link, "."], faint=True)
    groups = evaluation.by_benchmark.values()
    scores, cost, versus = score_table(evaluation), cost_table(evaluation), versus_table(evaluation)
    reliability = list(_reliability(evaluation))
    slices = [Details(cells[0].heading, [slice_table(cells)]) for cells in groups]
    mistakes = [Section(cells[0].heading, [_mistakes(cell) for cell in cells]) for cells in groups]
    hidden = "Much of their text is offensive; it is hidden until you open it. A label may be wrong as well as a guard."
    any_errors = any(cell.wrong for cell in evaluation.cells)
    return Page(f"Evaluation of {evaluation.name}", [
        Facts(facts(evaluation)),
        Bullets(cautions(evaluation, published), warning=True),
        Only("html", [Details("All settings", [Facts([(name, _text(value)) for name, value in evaluation.settings.items()])])]),
        Section("Averages", [
            note(ABOUT_AVERAGES), main_table(evaluation, published), paper, Beside(list(_figures(evaluation, published))),
        ], "averages"),
        Section("Benchmarks", [note(ABOUT_SCORES), scores], "benchmarks") if scores.rows else None,
        Section("Time and tokens", [note(ABOUT_COST), cost], "cost") if cost.rows else None,
        Section("Compared with the first guard", [note(ABOUT_VERSUS), versus], "versus") if versus.rows else None,
        Section("Probabilities", [Only("html", [note(ABOUT_PROBABILITIES), Beside(reliability)])], "probabilities")
        if reliability else None,
        Section("Slices", slices, "slices"),
        Section("Errors", [
            note(ABOUT_ERRORS),
            Only("html", [note(hidden), *mistakes] if any_errors else ["None."]),
            Only("markdown", ["Texts are in report.html, hidden until they are opened.", error_table(evaluation)]),
        ], "errors"),
    ])  # fmt: skip


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


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def cautions(evaluation: Evaluation, published: Published) -> list[str]:
    """What a reader must know before the numbers, a sentence each."""
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
    for benchmark in evaluation.benchmarks:
        present = {cell.guard_mode for cell in evaluation.by_benchmark.get(benchmark, ())}
        absent = [_name(*guard) for guard in evaluation.by_guard if guard not in present]
        if absent:
            yield f"{benchmark} has no results of {', '.join(absent) if present else 'any guard'}."
    partly = dict.fromkeys(_name(*each.guard_mode) for each in evaluation.averages if each.missing)
    if partly:
        yield (
            f"Averages of {', '.join(partly)} are over fewer benchmarks than those of others: compare it by the differences, "
            "which are over what both have results for."
        )


def _odd_answers(evaluation: Evaluation) -> Iterator[str]:
    for guard_mode, cells in evaluation.by_guard.items():
        for warning, measure, limit in LIMITS:
            above = [f"{cell.benchmark} ({share(measure(cell))})" for cell in cells if measure(cell) > limit]
            if above:
                yield f"{_name(*guard_mode)} {warning}: {', '.join(above)}."


def _other_protocol(evaluation: Evaluation, published: Published) -> Iterator[str]:
    settings = evaluation.settings
    different = [
        f"{name} {settings[name]} (there {paper})"
        for name, paper in published.protocol.items()
        if name in settings and settings[name] != paper
    ]
    if different:
        yield f"Answers are not sampled as in the paper: {', '.join(different)}."
    titles_by_guards: dict[tuple[str, ...], list[str]] = {}
    for name, title in AVERAGE_TITLES.items():
        averages = [each for each in evaluation.averages if each.name == name]
        others = [each for each in averages if not comparable(evaluation, published, each)]
        if others:
            names = () if len(others) == len(averages) else tuple(_name(*each.guard_mode) for each in others)
            titles_by_guards.setdefault(names, []).append(title)
    for names, titles in titles_by_guards.items():
        of = f" of {', '.join(names)}" if names else ""
        verb = "is" if len(titles) == 1 else "are"
        yield (
            f"{', '.join(titles)}{of} {verb} over other benchmarks than the paper's, or not over all of their examples: "
            "no difference to the paper is claimed."
        )


def _name(guard: str, mode: str) -> str:
    return f"{guard} ({mode})"


def _figures(evaluation: Evaluation, published: Published) -> Iterator[Drawing]:
    f1, latency = f1_figure(evaluation), latency_figure(evaluation, published)
    if f1 is not None:
        alt = "F1 of every guard and mode on every benchmark with its interval; the table of benchmarks has the numbers"
        caption = "F1 by benchmark; hollow marks answer in direct mode, a dash: no F1"
        yield Drawing(caption, inline_svg(f1, "f1", alt), wide=True)
    if latency is not None:
        alt = "F1 against seconds an example; the tables of averages and of benchmarks have the numbers"
        where = f", here on {evaluation.hardware}" if evaluation.hardware else ""
        yield Drawing(f"Seconds for an answer{where}", inline_svg(latency, "latency", alt))


def _reliability(evaluation: Evaluation) -> Iterator[Drawing]:
    for i, ((guard, mode), cells) in enumerate(evaluation.by_guard.items()):
        figure = reliability_figure(cells, mark(evaluation, guard, mode)["color"])
        if figure is not None:
            ece = ", ".join(f"{c.benchmark} {number(c.calibration.ece)}" for c in cells if c.calibration)
            alt = f"Reliability of {_name(guard, mode)}. Expected calibration error: {ece}"
            yield Drawing(_name(guard, mode), inline_svg(figure, f"reliability{i}", alt))


def _mistakes(cell: Cell) -> Details | None:
    """The errors of a guard in a mode on a benchmark, by category."""
    if not cell.wrong:
        return None
    groups, left = [], MOST_WRONG
    for category, wrong in by_category(cell).items():
        listed = wrong[:left]
        left -= len(listed)
        if listed:
            groups.append(Details(f"{category} ({len(listed)})", [_mistake(each, cell.question) for each in listed]))
    total, shown = max(errors(cell), len(cell.wrong)), MOST_WRONG - left
    of = f"{shown:,} of {total:,} errors" if shown < total else count(total, "error")
    return Details(f"{_name(*cell.guard_mode)}: {of}", groups)


def errors(cell: Cell) -> int:
    """Examples of which no more than half of the generations are right."""
    right = cell.result.right
    return sum(examples for i, examples in enumerate(right) if 2 * i <= len(right) - 1)


def _mistake(wrong: Wrong, question: Question) -> Details:
    """Its texts below what was said: verdict words, the most frequent first, and how often each where they differ."""
    example, said = wrong.example, Counter(wrong.said)
    words = [f"{word} ({times} of {said.total()})" if len(said) > 1 else word for word, times in said.most_common()]
    texts = {"Prompt": example.prompt, "Response": example.response, "Its first wrong answer": wrong.text or None,
             "Policy": example.policy}  # fmt: skip
    quotes = [Quote(name, text, MOST_CHARACTERS, "in results.json") for name, text in texts.items() if text is not None]
    about = dict.fromkeys([example.id, *wrong.slices, *(f"category: {name}" for name in example.categories)])
    probability = f"P({CHOICES[question][0]}) {number(wrong.probability)}"
    title = f"labelled {wrong.label}, it says {', '.join(words)}; {probability}"
    return Details(title, [*quotes, note(" · ".join(about))])
