"""An audit of the teacher as audit.json, audit.md and audit.html; the same numbers give the same bytes."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Final

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxguard.data.format.dialogue import TITLES
from jaxguard.data.policies import Question
from jaxguard.evaluate.scores.audit import Audit, QuestionAudit
from jaxguard.evaluate.scores.metrics import Result
from jaxguard.report import (
    Beside,
    Cell,
    Content,
    Details,
    Drawing,
    Facts,
    Only,
    Page,
    Paragraph,
    Section,
    Table,
    Tiles,
    write_markdown,
    write_page,
)
from jaxguard.report.blocks import Value
from jaxguard.report.figures import COLOURS, FAINT, INK, inline_svg, style
from jaxguard.report.text import count, interval, number, share, short
from jaxguard.utils.files import write_atomically
from jaxguard.utils.statistics import Estimate

MOST_CATEGORIES, MOST_DRAWN, MOST_DISAGREEMENTS = 40, 16, 25
SCORES: Final = {
    "agreement": "agreement",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "kappa": "Cohen's κ",
}
CONSISTENCY: Final = {
    "majority": "Samples that agree with their majority",
    "unanimous": "Examples whose samples all agree",
    "pairwise": "Pairs of samples that agree",
    "fleiss": "Fleiss' κ",
}
LENGTHS: Final = {"words": "Words", "sentences": "Sentences", "repeated_share": "Repeated share"}
ABOUT_SCORES = (
    "Each sample is scored by itself and the scores are averaged; brackets hold 95 % bootstrap intervals over examples. An "
    "unparsable verdict counts as harmful, or as no refusal. n/a: the examples or the verdicts lack the class that the score is "
    "about."
)
ABOUT_CATEGORIES = (
    "Categories are the source's own; an example may have several. Where all of a category's examples are positive, F1 says no "
    "more than recall. Intervals of a handful of examples are too narrow."
)


def write_audit(audit: Audit, folder: Path) -> None:
    """Write audit.json, audit.md and audit.html.

    Raises:
        JaxguardError: one cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = report(audit)
    write_atomically(folder / "audit.json", json.dumps(asdict(audit), indent=2, allow_nan=False) + "\n")
    write_markdown(folder / "audit.md", page)
    write_page(folder / "audit.html", page)


def audit_table(audit: Audit) -> Table:
    """The scores of each question, for a terminal."""
    table = Table(("", "examples", "F1 and 95 % interval", "Cohen's κ", "Fleiss' κ"), "The teacher and people")
    for question, each in audit.questions.items():
        scores, fleiss = each.result.scores, each.result.consistency.fleiss
        table.add(TITLES[question], scores.examples, scores.f1, number(scores.kappa.value), fleiss)
    numbers = audit.completions
    table.note = f"{count(numbers.total, 'answer')}, {numbers.unparsable:,} unparsable, {numbers.cut:,} cut"
    return table


def report(audit: Audit) -> Page:
    """The report: the same tables in both formats, figures for HTML only."""
    questions, samples = audit.questions, audit.about["samples"]
    scores = Table(("question", "examples", "positive", *SCORES.values()), "Agreement with people")
    for question, each in questions.items():
        scores.add(TITLES[question], *_scores(each.result))
    several: list[Content] = (
        [_right(audit), _consistency_table(audit)] if samples > 1 else ["One sample cannot disagree with itself."]
    )
    return Page(f"Audit of {audit.about['teacher']}", [
        f"{count(audit.examples, 'example')}, {count(samples, 'answer')} to each, requested without the labels of people.",
        Only("html", [_tiles(audit)]),
        Section("Agreement with people", [_faint(ABOUT_SCORES), scores, Beside([*map(_confusion, questions, questions.values())])]),
        Section("F1 by category", [_faint(ABOUT_CATEGORIES), _f1(audit), *map(_categories, questions, questions.values())]),
        Section("Agreement with itself", several),
        Section("Reasoning", _reasoning(audit)),
        Section("Where most samples differ from people", [
            _faint("By id, without texts. A label may be wrong as well as the teacher."),
            *(_disagreements(question, each, samples) for question, each in questions.items()),
        ]),
        Section("Settings", [Facts(list(facts(audit)))]),
    ])  # fmt: skip


def facts(audit: Audit) -> Iterator[tuple[str, object]]:
    """What was audited, and how it was sampled."""
    about, numbers = audit.about, audit.completions
    yield "Run", about["run"]
    yield "Teacher", about["teacher"] + ("" if about["version"] is None else f", version {about['version']}")
    yield "Sampling", ", ".join(f"{name} {value}" for name, value in about["sampling"].items())
    yield "Prompt", f"{about['prompt_name']} ({about['prompt'][:12]})"
    yield "Policy", f"{about['policy_name']} ({about['policy'][:12]})"
    yield "Examples", f"{audit.examples:,} of {about['available']:,} with a label, seed {about['seed']}"
    yield "Answers", f"{numbers.total:,}; {numbers.unparsable:,} unparsable, {numbers.cut:,} cut by the server"
    yield "Without reasoning", f"{numbers.without_reasoning:,}"
    yield "Judge a response that is not there", f"{numbers.invented_responses:,}"
    yield "Tokens", f"{numbers.prompt_tokens:,} of prompts, {numbers.completion_tokens:,} of completions"


def _tiles(audit: Audit) -> Tiles:
    tiles = []
    for question, each in audit.questions.items():
        f1, kappa, fleiss = each.result.scores.f1, each.result.scores.kappa.value, each.result.consistency.fleiss
        notes = (interval(f1.low, f1.high), f"Cohen's κ {number(kappa)}", f"Fleiss' κ {number(fleiss)}")
        tiles.append((f"{TITLES[question]}, F1", number(f1.value), *filter(None, notes)))
    numbers = audit.completions
    of_all = f"{numbers.unparsable:,} of {numbers.total:,}"
    unparsable = ("Unparsable answers", share(numbers.unparsable, numbers.total), of_all, f"{numbers.cut:,} were cut")
    return Tiles([*tiles, unparsable])


def _scores(result: Result) -> list[Value]:
    scores = result.scores
    return [scores.examples, scores.positives, *(getattr(scores, name) for name in SCORES)]


def _confusion(question: Question, each: QuestionAudit) -> Table:
    title, words = f"{TITLES[question]}: people say", (each.positive, each.negative)
    table = Table((title, *words, "unparsable"), f"{TITLES[question]}: verdicts")
    for i, counts in enumerate(each.result.confusion):
        tones = ("good" if i == 0 else "bad", "good" if i == 1 else "bad", "faint")
        cells = (Cell(f"{n:,}", share(n, sum(counts)), tone=tone) for n, tone in zip(counts, tones, strict=True))
        table.add(words[i], *cells)
    return table


def _categories(question: Question, each: QuestionAudit) -> Details:
    table = Table(("category", "examples", "positive", *SCORES.values()), f"{TITLES[question]} by category")
    for name, result in each.categories[:MOST_CATEGORIES]:
        table.add(_category(name), *_scores(result))
    left_out = len(each.categories) - MOST_CATEGORIES
    more = f"{left_out} more categories are in audit.json." if left_out > 0 else None
    return Details(f"{TITLES[question]}: all scores by category", [table, more])


def _consistency_table(audit: Audit) -> Table:
    table = Table(("", *(TITLES[question] for question in audit.questions)), "Agreement with itself")
    for name, title in CONSISTENCY.items():
        table.add(title, *(getattr(each.result.consistency, name) for each in audit.questions.values()))
    return table


def _reasoning(audit: Audit) -> list[Content]:
    table = Table(("per answer", "mean", "5 %", "median", "95 %", "most"), "Reasoning")
    for name, title in LENGTHS.items():
        each = audit.lengths[name]
        values = (each.mean, each.p5, each.p50, each.p95, each.most)
        table.add(title, *(share(v) if name == "repeated_share" else f"{v:,.1f}".removesuffix(".0") for v in values))
    failed = Table(("check", "answers", "share"), "What the filter would reject")
    for check, n in audit.completions.failed_checks.items():
        failed.add(check, n, share(n, audit.completions.total))
    leaks = "The teacher knew no labels, so what labels_leaked finds here are false alarms of that check."
    svg = inline_svg(_lengths_figure(audit), "lengths", "Histograms of the reasoning; the table has their percentiles")
    return [
        _faint("Length of the reasoning, and the share of its runs of words that stood before. Dotted: the median."),
        Drawing("", svg),
        table,
        Section("What the filter would reject", [_faint(leaks), failed] if failed.rows else ["Nothing."]),
    ]


def _disagreements(question: Question, each: QuestionAudit, samples: int) -> Details:
    table = Table(("example", "people say", "samples that differ", "of them unparsable"), left=2)
    for one in each.disagreements[:MOST_DISAGREEMENTS]:
        label = each.positive if one.label_positive else each.negative
        table.add(one.id, label, f"{one.differ} of {samples}", one.unparsable)
    total, left_out = len(each.disagreements), len(each.disagreements) - MOST_DISAGREEMENTS
    more = f"{left_out} more examples are in audit.json." if left_out > 0 else None
    title = f"{TITLES[question]}: {total:,} of {count(each.result.scores.examples, 'example')}"
    return Details(title, [table, more] if total else ["None."])


def _category(name: str | None) -> str:
    return "without a category" if name is None else name


def _faint(text: str) -> Paragraph:
    return Paragraph([text], faint=True)


def _f1(audit: Audit) -> Drawing:
    alt = "F1 with its interval of all examples and of the largest categories; the tables have the numbers"
    return Drawing("", inline_svg(_f1_figure(audit), "f1", alt), wide=True)


@style()
def _f1_figure(audit: Audit) -> Figure:
    """F1 with its interval: all examples first, then the largest categories that have one."""
    sizes: dict[str | None, int] = {}
    for each in audit.questions.values():
        for name, result in each.categories:
            if result.scores.f1.value is not None:
                sizes[name] = max(result.scores.examples, sizes.get(name, 0))
    drawn = sorted(sizes, key=lambda name: (name is None, -sizes[name], _category(name)))[:MOST_DRAWN]
    figure = Figure(figsize=(8.6, 0.9 + 0.26 * (len(drawn) + 1)))
    for i, (question, each) in enumerate(audit.questions.items()):
        axes, by_name = figure.add_subplot(1, len(audit.questions), i + 1), dict(each.categories)
        results = [each.result, *(by_name.get(name) for name in drawn)]
        for y, f1 in enumerate(result.scores.f1 if result else Estimate(None) for result in results):
            if f1.value is None:
                continue
            colour = FAINT if y else COLOURS[0]
            if f1.low is not None and f1.high is not None:
                axes.plot((f1.low, f1.high), (y, y), color=colour, linewidth=1.6)
            axes.plot(f1.value, y, "o", color=colour, markersize=5)
        labels = ["all examples", *(short(_category(name), 34) for name in drawn)]
        axes.set_yticks(range(len(labels)), labels if i == 0 else [""] * len(labels))
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlim(-0.03, 1.03)
        axes.grid(visible=False, axis="y")
        axes.set_title(TITLES[question])
    return figure


def _right(audit: Audit) -> Drawing:
    alt = "Share of the examples by how many samples say what people say; the table has the agreement"
    caption = f"How many of {audit.about['samples']} samples say what people say"
    return Drawing(caption, inline_svg(_right_figure(audit), "right", alt))


@style()
def _right_figure(audit: Audit) -> Figure:
    """For each question, the share of the examples on which 0 … k samples say what people say."""
    questions, samples = audit.questions, audit.about["samples"]
    figure = Figure(figsize=(8.6, 0.9 + 0.45 * len(questions)))
    axes, colours = figure.add_subplot(), matplotlib.colormaps["RdYlBu"]
    for y, each in enumerate(questions.values()):
        left = 0.0
        for right, examples in enumerate(each.result.right):
            part = examples / sum(each.result.right)
            axes.barh(y, part, left=left, height=0.62, color=colours(0.08 + 0.84 * right / samples))
            if part >= 0.04:
                ink = INK if 0.2 < right / samples < 0.8 else "white"
                axes.text(left + part / 2, y, f"{right}", ha="center", va="center", color=ink, fontsize=8)
            left += part
    axes.set_yticks(range(len(questions)), [TITLES[question] for question in questions])
    axes.set_ylim(len(questions) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(visible=False)
    return figure


@style()
def _lengths_figure(audit: Audit) -> Figure:
    figure = Figure(figsize=(8.6, 2.4))
    for i, (name, title) in enumerate(LENGTHS.items(), start=1):
        axes, each = figure.add_subplot(1, len(LENGTHS), i), audit.lengths[name]
        axes.stairs(each.counts, each.edges, fill=True, color=COLOURS[0])
        axes.axvline(each.p50, color=INK, linewidth=1, linestyle=":")
        axes.set_title(title)
        axes.set_xlim(0, max(each.edges[-1], 0.25 if name == "repeated_share" else 0))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        if name == "repeated_share":
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        axes.grid(visible=False, axis="x")
    figure.supylabel("answers", fontsize=9)
    return figure
