"""An evaluation as results.json, report.md, and report.html: one page that loads nothing and has no script.

Prompts, responses, what guards wrote, and every name are text on it, never markup. Texts are only on the page, where they stay
hidden until they are asked for.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from jaxguard.data.format.dialogue import CHOICES
from jaxguard.data.policies import Question
from jaxguard.evaluate.report.figures import (
    colour_of,
    f1_figure,
    inline_svg,
    latency_figure,
    reliability_figure,
)
from jaxguard.evaluate.report.published import Published, read_published
from jaxguard.evaluate.report.tables import (
    Kind,
    Line,
    Table,
    benchmarks,
    cautions,
    cells_by,
    cost_table,
    errors,
    facts,
    flat_settings,
    guards,
    heading,
    main_table,
    score_table,
    slice_table,
    versus_table,
)
from jaxguard.evaluate.report.text import Shown, cut, number
from jaxguard.evaluate.scores.results import Cell, Evaluation, Wrong, write_results
from jaxguard.report.html import page_template
from jaxguard.report.markdown import escaped, plain, visible
from jaxguard.utils.files import write_atomically

TEMPLATE = Path(__file__).with_name("report.html.j2")
MOST_WRONG, MOST_CHARACTERS = 50, 2000
"""Errors of a guard in a mode on a benchmark, and characters of a text, that the page shows."""
CATEGORY = "category"
"""The slice that errors are grouped by; where a benchmark has no such slice, its first one."""
READ_AVERAGES = (
    "F1 of the positive class: each generation is scored by itself and the scores are averaged. In brackets the 95 % bootstrap "
    "interval over examples, after ± the deviation over generations. The safety average is (5 × prompt + 4 × response) / 9. "
    "Differences are paired, on what both guards judged. A dash: nothing of it was judged."
)
READ_SCORES = (
    "n/a: the examples lack the class that the score is about, or the guard gives no probability. A dash: the guard did not "
    "judge it. Probabilities are taken at face value for AUPRC and ECE; the threshold is chosen on other examples. Forced: the "
    "thought ran out, and a verdict was asked for."
)
READ_VERSUS = (
    "Each mode with the same mode of the first guard, or with its first where it has no such mode; on the same examples, by a "
    "paired bootstrap. Right alone: examples that only this guard, and only the first, judges right in more than half of its "
    "generations, with McNemar's exact test."
)
READ_COST = (
    "Means of all examples that the guard judged. Seconds are from asking to the answer. JAX judges in batches, and an example's "
    "seconds are its share of the batch's; at a server they are its own wait, beside the others that are under way. Passes for "
    "the probability alone are counted by themselves, but with evaluate.generations=0 they are the answer. Examples and tokens "
    "a second are by the clock, with these passes; tokens are those of prompts and of all generations."
)
READ_ERRORS = (
    "An example is an error unless more than half of its generations are right: a tie is one. The most certain probabilities come "
    "first; what is shown is the first wrong answer."
)


@dataclass(frozen=True)
class Drawing:
    """A figure on the page."""

    title: str
    svg: Markup
    wide: bool = False


@dataclass(frozen=True)
class Mistake:
    """An error as the page shows it; `parts` are (what, text, characters left out)."""

    title: str
    parts: tuple[tuple[str, str, int], ...]
    facts: str


@dataclass(frozen=True)
class Mistakes:
    """Errors of a guard in a mode on a benchmark: of `count` those that are shown, by category."""

    title: str
    count: int
    shown: int
    groups: dict[str, list[Mistake]]


def write_report(evaluation: Evaluation, folder: Path) -> None:
    """Write results.json, report.md and report.html into a folder, which is made.

    Raises:
        JaxguardError: one cannot be written, or configs/published/paper.yaml is absent or mistaken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_results(evaluation, folder / "results.json")
    published = read_published()
    for name, text in (("report.md", markdown(evaluation, published)), ("report.html", page(evaluation, published))):
        write_atomically(folder / name, text.encode("utf-8", "replace").decode())


# Markdown.


def markdown(evaluation: Evaluation, published: Published) -> str:
    """The report's tables, without diagrams and without any text that was judged."""
    versus = versus_table(evaluation)
    parts = [
        f"# Evaluation of {escaped(evaluation.name)}",
        "\n".join(f"- {escaped(name)}: {escaped(value)}" for name, value in facts(evaluation)),
        "\n".join(f"> - {escaped(said)}" for said in cautions(evaluation, published)),
        "## Averages",
        READ_AVERAGES,
        _table(main_table(evaluation, published)),
        "## Benchmarks",
        READ_SCORES,
        _table(score_table(evaluation)),
        "## Time and tokens",
        READ_COST,
        _table(cost_table(evaluation)),
        *(("## Compared with the first guard", READ_VERSUS, _table(versus)) if versus.lines else ()),
        "## Slices",
    ]
    for cells in benchmarks(evaluation).values():
        slices = slice_table(cells)
        if slices.lines:
            parts += [f"### {escaped(heading(cells[0]))}", _table(slices)]
    parts += [
        "## Errors",
        f"{READ_ERRORS} Texts are in report.html, hidden until they are asked for.",
        _table(_error_table(evaluation)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _error_table(evaluation: Evaluation) -> Table:
    """How many of the errors that are kept fall into each category."""
    lines = []
    for cells in benchmarks(evaluation).values():
        for cell in cells:
            for category, wrong in by_category(cell).items():
                values = (Shown(category, f"{cell.guard} ({cell.mode})"), Shown(f"{len(wrong):,}"))
                lines.append(Line(values, heading(cells[0])))
    return Table(("category and guard", "errors kept"), tuple(lines))


def _table(table: Table) -> str:
    """A Markdown table; groups become lines of their own."""
    heads = [escaped(head) for head in table.heads]
    marks = ["---", *["---:"] * (len(heads) - 1)]
    lines, group = [heads, marks], ""
    for line in table.lines:
        if line.group != group:
            group = line.group
            lines.append([f"**{escaped(group)}**", *[""] * (len(heads) - 1)])
        name, *numbers = line.cells
        shown = [Shown(escaped(name.text), escaped(name.more)), *numbers]
        lines.append([_cell(cell, line.kind) for cell in shown])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(shown: Shown, kind: Kind) -> str:
    text = f"*{shown.text}*" if shown.text and kind == "paper" else shown.text
    return " ".join(filter(None, (text, shown.more)))


# HTML.


def page(evaluation: Evaluation, published: Published) -> str:
    """The whole report in one file."""
    template = page_template(TEMPLATE, plain=plain, number="{:,}".format, grouped=_grouped)
    cells_of = benchmarks(evaluation)
    return template.render(
        evaluation=evaluation,
        published=published,
        facts=facts(evaluation),
        settings=flat_settings(evaluation),
        cautions=cautions(evaluation, published),
        averages=main_table(evaluation, published),
        scores=score_table(evaluation),
        cost=cost_table(evaluation),
        versus=versus_table(evaluation),
        slices={name: (heading(cells[0]), slice_table(cells)) for name, cells in cells_of.items()},
        overview=_overview(evaluation, published),
        reliability=_reliability(evaluation),
        mistakes={name: (heading(cells[0]), _mistakes(cells)) for name, cells in cells_of.items()},
        read={
            "averages": READ_AVERAGES,
            "scores": READ_SCORES,
            "cost": READ_COST,
            "versus": READ_VERSUS,
            "errors": READ_ERRORS,
        },
    )


def _grouped(lines: Iterable[Line]) -> list[tuple[str, list[Line]]]:
    return [(group, list(found)) for group, found in itertools.groupby(lines, lambda line: line.group)]


def _overview(evaluation: Evaluation, published: Published) -> list[Drawing]:
    f1, latency = f1_figure(evaluation), latency_figure(evaluation, published)
    found = []
    if f1 is not None:
        alt = "F1 of every guard and mode on every benchmark with its interval; the table of benchmarks has the numbers"
        found.append(
            Drawing(
                "F1 by benchmark; hollow marks answer without a thought, a dash: no F1",
                inline_svg(f1, "f1", alt),
                True,
            )
        )
    if latency is not None:
        alt = "F1 against seconds an example; the tables of averages and of benchmarks have the numbers"
        on = f", here on {plain(evaluation.hardware)}" if evaluation.hardware else ""
        found.append(Drawing(f"What an answer takes{on}", inline_svg(latency, "latency", alt)))
    return found


def _reliability(evaluation: Evaluation) -> list[Drawing]:
    found = []
    for i, (guard, mode) in enumerate(guards(evaluation)):
        cells = cells_by(evaluation, guard, mode)
        figure = reliability_figure(cells, colour_of(evaluation, guard))
        if figure is not None:
            ece = ", ".join(f"{c.benchmark} {number(c.calibration.ece)}" for c in cells if c.calibration)
            alt = f"Reliability of {guard} ({mode}). Expected calibration error: {ece}"
            found.append(Drawing(f"{guard} ({mode})", inline_svg(figure, f"reliability{i}", plain(alt))))
    return found


def by_category(cell: Cell) -> dict[str, list[Wrong]]:
    """The kept errors of a cell by the first category that each has, most frequent first."""
    slices = list(dict.fromkeys(name.split(": ", 1)[0] for name in cell.slices))
    chosen = CATEGORY if CATEGORY in slices or not slices else slices[0]
    found: dict[str, list[Wrong]] = {}
    for wrong in cell.wrong:
        values = (name.split(": ", 1)[1] for name in wrong.slices if name.startswith(f"{chosen}: "))
        found.setdefault(next(values, "without a category"), []).append(wrong)
    return dict(sorted(found.items(), key=lambda group: (-len(group[1]), group[0])))


def _mistakes(cells: Iterable[Cell]) -> list[Mistakes]:
    found = []
    for cell in cells:
        if not cell.wrong:
            continue
        groups, left = {}, MOST_WRONG
        for category, wrong in by_category(cell).items():
            if left > 0:
                groups[category] = [_mistake(one, cell.question) for one in wrong[:left]]
                left -= len(groups[category])
        shown = sum(map(len, groups.values()))
        found.append(Mistakes(f"{cell.guard} ({cell.mode})", max(errors(cell), len(cell.wrong)), shown, groups))
    return found


def _mistake(wrong: Wrong, question: Question) -> Mistake:
    example = wrong.example
    texts: Sequence[tuple[str, str | None]] = (
        ("Prompt", example.prompt), ("Response", example.response), ("Its first wrong answer", wrong.text or None),
        ("Policy", example.policy),
    )  # fmt: skip
    parts = tuple((what, *cut(visible(text), MOST_CHARACTERS, " …")) for what, text in texts if text is not None)
    about = [example.id, *wrong.slices, *(f"category: {name}" for name in example.categories)]
    title = (
        f"labelled {wrong.label}, it says {_said(wrong.said)}; P({CHOICES[question][0]}) {number(wrong.probability)}"
    )
    return Mistake(title, parts, plain(" · ".join(dict.fromkeys(about))))


def _said(verdicts: Sequence[str]) -> str:
    """Verdict words, the most frequent first; how often each was said, where they differ."""
    found = Counter(verdicts).most_common()
    if len(found) == 1:
        return verdicts[0]
    return ", ".join(f"{word} ({count} of {len(verdicts)})" for word, count in found)
