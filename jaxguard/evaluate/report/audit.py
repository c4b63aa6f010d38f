"""An audit's numbers as a terminal table, as Markdown, and as one HTML page that loads nothing.

Names of categories, ids of examples, and whatever the config names are untrusted: they are shown as text everywhere. The
same numbers give the same bytes.
"""

import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter
from rich.markup import escape
from rich.table import Table

from jaxguard.data.format.dialogue import TITLES
from jaxguard.data.policies import Question
from jaxguard.report.html import page_template
from jaxguard.report.markdown import escaped, plain, table
from jaxguard.utils.files import write_atomically

MOST_CATEGORIES, MOST_DRAWN, MOST_DISAGREEMENTS = 40, 16, 25
BLUE, GREY = "#0072B2", "#555555"
SCORES = {"agreement": "Agreement", "precision": "Precision", "recall": "Recall", "f1": "F1", "kappa": "Cohen's κ"}
CONSISTENCY = {
    "majority": "Samples that agree with their majority",
    "unanimous": "Examples whose samples all agree",
    "pairwise": "Pairs of samples that agree",
    "fleiss": "Fleiss' κ",
}
TRACES = {"words": "Words", "sentences": "Sentences", "repeated_share": "Repeated share"}
_STYLE: dict[Any, Any] = {"svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10}


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write audit.json, audit.md and audit.html.

    Raises:
        JaxguardError: one cannot be written.
    """
    text = json.dumps(report, indent=2, ensure_ascii=True, allow_nan=False)
    for name, content in (("audit.json", text + "\n"), ("audit.md", markdown(report)), ("audit.html", page(report))):
        write_atomically(folder / name, content)


def shown_table(report: Mapping[str, Any]) -> Table:
    """The scores of each question, for a terminal."""
    table = Table("", title="The teacher and people", title_justify="left")
    for name in ("examples", "F1 and 95 % interval", "Cohen's κ", "Fleiss' κ"):
        table.add_column(name, justify="right", no_wrap=True)
    for question, found in report["questions"].items():
        kappas = found["scores"]["kappa"]["value"], found["consistency"]["fleiss"]
        f1 = escape(estimate(found["scores"]["f1"]))
        table.add_row(TITLES[question], f"{found['scores']['examples']:,}", f1, *map(number, kappas))
    answers = report["answers"]
    table.caption = f"{answers['total']:,} answers, {answers['unreadable']:,} unreadable, {answers['cut']:,} cut"
    return table


# Text.


def number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def estimate(found: Mapping[str, float | None]) -> str:
    """A score with its interval."""
    if found["low"] is None:
        return number(found["value"])
    return f"{number(found['value'])} [{number(found['low'])}, {number(found['high'])}]"


def percent(part: float, whole: float = 1) -> str:
    return f"{part / whole:.1%}" if whole else "n/a"


def category(name: str | None) -> str:
    return "without a category" if name is None else name


# Markdown.


def markdown(report: Mapping[str, Any]) -> str:
    """The report without its plots."""
    about, questions, failed = report["about"], report["questions"], report["answers"]["failed_checks"]
    parts = [
        f"# Audit of {escaped(about['teacher'])}",
        table(("", ""), ((name, escaped(value)) for name, value in facts(report))),
        "Verdicts of the teacher, which was not told the labels, against people's. Each sample is scored by itself and the "
        "scores are averaged; brackets hold 95 % bootstrap intervals over examples. Unreadable answers count as harmful, or "
        "as no refusal.",
        "## Agreement with people",
        table(
            ("question", "examples", "positive", *SCORES.values()),
            (_score_row(TITLES[name], found["scores"]) for name, found in questions.items()),
        ),
        *(part for name, found in questions.items() for part in _question(name, found, about["samples"])),
        "## Agreement with itself",
        table(
            ("question", *CONSISTENCY.values()),
            (
                (TITLES[name], *(number(found["consistency"][c]) for c in CONSISTENCY))
                for name, found in questions.items()
            ),
        ),
        "## Traces",
        table(
            ("per answer", "mean", "5 %", "median", "95 %", "most"),
            ((title, *_spread_row(name, report["traces"][name])) for name, title in TRACES.items()),
        ),
        "## What the filter would turn down",
        table(("check", "answers"), ((escaped(n), f"{c:,}") for n, c in failed.items())) if failed else "Nothing.",
    ]
    return "\n\n".join(parts) + "\n"


def facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was asked, of whom, and what came back; not escaped."""
    about, answers = report["about"], report["answers"]

    def of_all(count: int) -> str:
        return f"{count:,} ({percent(count, answers['total'])})"

    return [
        ("Run", about["run"]),
        ("Teacher", about["teacher"] + (f", weights {about['version']}" if about["version"] else "")),
        ("Sampling", ", ".join(f"{name} {value}" for name, value in about["sampling"].items())),
        ("Prompt", f"{about['prompt_name']} ({about['prompt'][:12]})"),
        ("Policy", f"{about['policy_name']} ({about['policy'][:12]})"),
        ("Examples", f"{report['examples']:,} of {about['available']:,} with a label, seed {about['seed']}"),
        ("Answers", f"{answers['total']:,}, {about['samples']} to each example"),
        ("Unreadable", of_all(answers["unreadable"])),
        ("Cut", of_all(answers["cut"])),
        ("Without a thought", of_all(answers["without_thought"])),
        ("Judge a response that is not there", of_all(answers["invented_responses"])),
        ("Tokens", f"{answers['prompt_tokens']:,} in prompts, {answers['completion_tokens']:,} in answers"),
    ]


def _question(name: Question, found: Mapping[str, Any], samples: int) -> list[str]:
    title, rows = TITLES[name], found["confusion"]
    categories = found["categories"]
    parts = [
        f"### {title}: verdicts",
        table(
            ("people say", f"teacher: {found['positive']}", f"teacher: {found['negative']}", "unreadable"),
            (
                (label, *(f"{count:,}" for count in row))
                for label, row in zip((found["positive"], found["negative"]), rows, strict=True)
            ),
        ),
        f"### {title}: by category",
        table(
            ("category", "examples", "positive", *SCORES.values()),
            (_score_row(escaped(category(c["name"])), c) for c in categories[:MOST_CATEGORIES]),
        ),
        *_more(len(categories), MOST_CATEGORIES, "categories"),
    ]
    if found["disagreements"]:
        parts += [
            f"### {title}: where most samples differ from people",
            table(
                ("example", "people say", "samples that differ", "of them unreadable"),
                (
                    (
                        escaped(entry["id"]),
                        found["positive" if entry["label_positive"] else "negative"],
                        f"{entry['differ']} of {samples}",
                        f"{entry['unreadable']}",
                    )
                    for entry in found["disagreements"][:MOST_DISAGREEMENTS]
                ),
            ),
            *_more(len(found["disagreements"]), MOST_DISAGREEMENTS, "examples"),
        ]
    return parts


def _more(count: int, shown: int, what: str) -> list[str]:
    return [f"{count - shown:,} more {what} are in audit.json."] if count > shown else []


def _score_row(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    return name, f"{found['examples']:,}", f"{found['positives']:,}", *(estimate(found[score]) for score in SCORES)


def _spread_row(name: str, found: Mapping[str, Any]) -> list[str]:
    values = [found[key] for key in ("mean", "p5", "p50", "p95", "most")]
    return [percent(value) if name == "repeated_share" else f"{value:,.0f}" for value in values]


# HTML.


def page(report: Mapping[str, Any]) -> str:
    """The whole report in one file: no script, and nothing that is loaded from elsewhere."""
    filters: dict[str, Any] = {
        "plain": plain,
        "number": number,
        "estimate": estimate,
        "percent": percent,
        "category": category,
    }
    template = page_template(Path(__file__).with_name("audit.html.j2"), **filters)
    names = {"titles": TITLES, "scores": SCORES, "consistency": CONSISTENCY, "traces": TRACES}
    limits = {"most_categories": MOST_CATEGORIES, "most_disagreements": MOST_DISAGREEMENTS}
    with matplotlib.rc_context(_STYLE):
        plots = {"f1": _draw_f1(report), "right": _draw_right(report), "lengths": _draw_lengths(report)}
    rows = {name: _spread_row(name, report["traces"][name]) for name in TRACES}
    values = {"report": report, "facts": facts(report), "names": names, "plots": plots, "spreads": rows, **limits}
    return template.render(values) + "\n"


def _draw_f1(report: Mapping[str, Any]) -> Markup:
    """F1 with its interval: all examples first, then the largest categories that have one."""
    questions = report["questions"]
    sizes: dict[str | None, int] = {}
    for found in questions.values():
        for one in found["categories"]:
            if one["f1"]["value"] is not None:
                sizes[one["name"]] = max(one["examples"], sizes.get(one["name"], 0))
    drawn = sorted(sizes, key=lambda name: (name is None, -sizes[name], category(name)))[:MOST_DRAWN]
    figure = Figure(figsize=(8.6, 0.9 + 0.26 * (len(drawn) + 1)), layout="constrained")
    for i, (question, found) in enumerate(questions.items()):
        axes = figure.add_subplot(1, len(questions), i + 1)
        by_name = {one["name"]: one["f1"] for one in found["categories"]}
        rows = [found["scores"]["f1"], *(by_name.get(name) for name in drawn)]
        for y, f1 in enumerate(rows):
            if f1 is None or f1["value"] is None:
                continue
            colour = GREY if y else BLUE
            if f1["low"] is not None:
                axes.plot((f1["low"], f1["high"]), (y, y), color=colour, linewidth=1.6, solid_capstyle="butt")
            axes.plot(f1["value"], y, "o", color=colour, markersize=5)
        labels = ["all examples", *(_short(category(name)) for name in drawn)] if i == 0 else [""] * len(rows)
        axes.set_yticks(range(len(rows)), labels, parse_math=False)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(-0.03, 1.03)
        axes.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))
        axes.set_xticks((0.25, 0.75), minor=True)
        axes.set_title(TITLES[question], loc="left")
        _tidy(axes, "x")
    return _svg(figure, "f1")


def _draw_right(report: Mapping[str, Any]) -> Markup:
    """For each question, the share of the examples on which 0 … k samples say what people say."""
    questions, samples = report["questions"], report["about"]["samples"]
    figure = Figure(figsize=(8.6, 0.9 + 0.45 * len(questions)), layout="constrained")
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["RdYlBu"]
    for y, found in enumerate(questions.values()):
        total, left = sum(found["right_samples"]), 0.0
        for right, count in enumerate(found["right_samples"]):
            share, colour = count / total, colours(0.08 + 0.84 * right / samples)
            axes.barh(y, share, left=left, height=0.62, color=colour, edgecolor="white", linewidth=0.8)
            if share >= 0.04:
                dark = 0.2 < right / samples < 0.8
                ink = "black" if dark else "white"
                axes.text(left + share / 2, y, f"{right}", ha="center", va="center", color=ink, fontsize=8)
            left += share
    axes.set_yticks(range(len(questions)), [TITLES[question] for question in questions])
    axes.set_ylim(len(questions) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel(f"share of the examples; in the bars: how many of {samples} samples say what people say")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    return _svg(figure, "right")


def _draw_lengths(report: Mapping[str, Any]) -> Markup:
    figure = Figure(figsize=(8.6, 2.4), layout="constrained")
    for i, (name, title) in enumerate(TRACES.items(), start=1):
        axes, found = figure.add_subplot(1, len(TRACES), i), report["traces"][name]
        axes.stairs(found["counts"], found["edges"], fill=True, color=BLUE)
        axes.axvline(found["p50"], color="black", linewidth=1, linestyle=":")
        axes.set_title(title, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.xaxis.set_major_formatter(
            PercentFormatter(1, decimals=0) if name == "repeated_share" else StrMethodFormatter("{x:g}")
        )
        axes.set_xlim(0, max(found["edges"][-1], 0.25 if name == "repeated_share" else 0))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        _tidy(axes, "y")
    figure.supylabel("answers", fontsize=9)
    return _svg(figure, "lengths")


def _tidy(axes: Axes, grid: str) -> None:
    axes.grid(visible=True, which="both", axis="x" if grid == "x" else "y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _short(name: str) -> str:
    name = plain(name)
    return name if len(name) <= 34 else f"{name[:33]}…"


def _svg(figure: Figure, salt: str) -> Markup:
    """A figure as an SVG element, the same for the same figure, its texts left to the browser's fonts."""
    FigureCanvasSVG(figure)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # the browser has more fonts
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    return Markup(text[text.index("<svg") :])  # noqa: S704 (matplotlib escapes its texts; a test shows it)
