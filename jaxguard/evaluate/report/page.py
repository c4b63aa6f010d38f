"""An evaluation as results.json, report.md and report.html.

Prompts, responses and what guards wrote are only in report.html, where they are hidden until the reader opens them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxguard.data.format.dialogue import CHOICES
from jaxguard.data.policies import Question
from jaxguard.evaluate.report.cautions import cautions, facts, flat_settings
from jaxguard.evaluate.report.figures import colour_of, f1_figure, latency_figure, reliability_figure
from jaxguard.evaluate.report.published import Published, read_published
from jaxguard.evaluate.report.tables import (
    benchmarks,
    by_category,
    cells_by,
    cost_table,
    error_table,
    errors,
    guards,
    heading,
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
    write_markdown,
    write_page,
)
from jaxguard.report import Cell as TableCell
from jaxguard.report.figures import inline_svg
from jaxguard.report.text import count, number

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
    paper = Paragraph(
        [f"The paper: {published.title}, ", TableCell(published.source, url=published.url), "."], faint=True
    )
    cells_of = benchmarks(evaluation).values()
    scores, cost, versus = score_table(evaluation), cost_table(evaluation), versus_table(evaluation)
    figures, reliability = list(_figures(evaluation, published)), list(_reliability(evaluation))
    slices = [Details(heading(cells[0]), [slice_table(cells)]) for cells in cells_of]
    mistakes = [Section(heading(cells[0]), [_mistakes(cell) for cell in cells]) for cells in cells_of]
    hidden = "Much of their text is offensive; it is hidden until you open it. A label may be wrong as well as a guard."
    any_errors = any(cell.wrong for cell in evaluation.cells)
    return Page(
        f"Evaluation of {evaluation.name}",
        [
            Facts(facts(evaluation)),
            Bullets(cautions(evaluation, published), warning=True),
            Only("html", [Details("All settings", [Facts(flat_settings(evaluation))])]),
            Section("Averages", [_about(ABOUT_AVERAGES), main_table(evaluation, published), paper, Beside(figures)], "averages"),
            Section("Benchmarks", [_about(ABOUT_SCORES), scores], "benchmarks") if scores.rows else None,
            Section("Time and tokens", [_about(ABOUT_COST), cost], "cost") if cost.rows else None,
            Section("Compared with the first guard", [_about(ABOUT_VERSUS), versus], "versus") if versus.rows else None,
            Section("Probabilities", [Only("html", [_about(ABOUT_PROBABILITIES), Beside(reliability)])], "probabilities")
            if reliability
            else None,
            Section("Slices", slices, "slices"),
            Section(
                "Errors",
                [
                    _about(ABOUT_ERRORS),
                    Only("html", [_about(hidden), *mistakes] if any_errors else ["None."]),
                    Only("markdown", ["Texts are in report.html, hidden until they are opened.", error_table(evaluation)]),
                ],
                "errors",
            ),
        ],
    )  # fmt: skip


def _about(text: str) -> Paragraph:
    return Paragraph([text], faint=True)


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
    for i, (guard, mode) in enumerate(guards(evaluation)):
        cells = cells_by(evaluation, guard, mode)
        figure = reliability_figure(cells, colour_of(evaluation, guard))
        if figure is not None:
            ece = ", ".join(f"{c.benchmark} {number(c.calibration.ece)}" for c in cells if c.calibration)
            alt = f"Reliability of {guard} ({mode}). Expected calibration error: {ece}"
            yield Drawing(f"{guard} ({mode})", inline_svg(figure, f"reliability{i}", alt))


def _mistakes(cell: Cell) -> Details | None:
    """The errors of a guard in a mode on a benchmark, by category."""
    if not cell.wrong:
        return None
    groups, left = [], MOST_WRONG
    for category, wrong in by_category(cell).items():
        if left > 0:
            groups.append(
                Details(
                    f"{category} ({min(len(wrong), left)})", [_mistake(each, cell.question) for each in wrong[:left]]
                )
            )
            left -= len(wrong[:left])
    total, listed = max(errors(cell), len(cell.wrong)), MOST_WRONG - left
    of = f"{listed:,} of {total:,} errors" if listed < total else count(total, "error")
    return Details(f"{cell.guard} ({cell.mode}): {of}", groups)


def _mistake(wrong: Wrong, question: Question) -> Details:
    example = wrong.example
    texts: Sequence[tuple[str, str | None]] = (
        ("Prompt", example.prompt), ("Response", example.response), ("Its first wrong answer", wrong.text or None),
        ("Policy", example.policy),
    )  # fmt: skip
    quotes = [Quote(name, text, MOST_CHARACTERS, "in results.json") for name, text in texts if text is not None]
    about = dict.fromkeys([example.id, *wrong.slices, *(f"category: {name}" for name in example.categories)])
    title = f"labelled {wrong.label}, it says {_verdicts(wrong.said)}; P({CHOICES[question][0]}) {number(wrong.probability)}"
    return Details(title, [*quotes, Paragraph([" · ".join(about)], faint=True)])


def _verdicts(verdicts: Sequence[str]) -> str:
    """Verdict words, the most frequent first; how often each occurs, where they differ."""
    counts = Counter(verdicts).most_common()
    if len(counts) == 1:
        return verdicts[0]
    return ", ".join(f"{word} ({times} of {len(verdicts)})" for word, times in counts)
