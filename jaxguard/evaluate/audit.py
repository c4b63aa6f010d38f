"""Audit the teacher: evaluate it as a guard on a sample of data.train, without telling it the labels.

Its answers are parsed as strictly as a guard's and scored by the same functions. Every completion is stored as an attempt, so
an audit that was killed resumes; the report is made from the store alone.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxguard import report as blocks
from jaxguard.config import Config
from jaxguard.config.data import DistillConfig
from jaxguard.data.format.answer import parse
from jaxguard.data.format.dialogue import ABSENT, CHOICES, TITLES, Mode
from jaxguard.data.policies import QUESTIONS, Question
from jaxguard.data.prepare import subset
from jaxguard.distill.filters import repeated_share, split_sentences, words
from jaxguard.distill.prompts import Task, TeacherPrompt, load_prompt
from jaxguard.distill.run import generate, load_job, provenance
from jaxguard.distill.store import Attempt, read_attempts
from jaxguard.evaluate.scores.metrics import Result, count_votes, measure
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, UNPARSABLE
from jaxguard.report.figures import COLOURS, FAINT, INK, draw_interval, inline_svg, style
from jaxguard.report.text import count, interval, number, share, short
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically
from jaxguard.utils.statistics import spread

BINS, NO_CATEGORY = 24, "without a category"
MOST_CATEGORIES, MOST_DRAWN, MOST_DISAGREEMENTS = 40, 16, 25
SCORES = {"agreement": "agreement", "precision": "precision", "recall": "recall", "f1": "F1", "kappa": "Cohen's κ"}
CONSISTENCY = {
    "majority": "Samples that agree with their majority",
    "unanimous": "Examples whose samples all agree",
    "pairwise": "Pairs of samples that agree",
    "fleiss": "Fleiss' κ",
}
LENGTHS = {"words": "Words", "sentences": "Sentences", "repeated_share": "Repeated share"}
ABOUT_SCORES = (
    "Each sample is scored by itself and the scores are averaged; brackets hold 95 % bootstrap intervals over examples. An "
    "unparsable verdict counts as harmful, or as no refusal. n/a: the examples or the verdicts lack the class that the score is "
    "about."
)
ABOUT_LENGTHS = "Length of the reasoning, and the share of its runs of words that stood before. Dotted: the median."
ABOUT_CATEGORIES = (
    "Categories are the source's own; an example may have several. Where all of a category's examples are positive, F1 says no "
    "more than recall. Intervals of a handful of examples are too narrow."
)


@dataclass(frozen=True)
class QuestionAudit:
    """One question, over the examples with a label for it.

    Attributes:
        positive, negative: its verdict words.
        categories: those of the source, the largest first; None are the examples without one, last.
        disagreements: examples on which most samples differ from people, the clearest first: `id`, `label_positive`, and how
            many samples `differ` and are `unparsable`.
    """

    positive: str
    negative: str
    result: Result
    categories: list[tuple[str | None, Result]]
    disagreements: list[dict[str, Any]]


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        about, examples: the run, the teacher, the sampling; how many were judged.
        completions: counts over all of them: `total`, `unparsable`, `cut` by the server, `without_reasoning`,
            `invented_responses` (judge one that is not there), tokens, and `failed_checks` of the filter.
        questions: those that an example has a label for.
        lengths: "words", "sentences" and "repeated_share" of the reasoning.
    """

    about: dict[str, Any]
    examples: int
    completions: dict[str, Any]
    questions: dict[Question, QuestionAudit]
    lengths: dict[str, dict[str, Any]]


def audit(config: Config) -> Audit:
    """Request blind verdicts on a sample of data.train from the teacher, score them; write audit.json, audit.md and audit.html.

    The sample is seeded, of the examples whose verdict people gave. One whose only answer is that it has no response is left
    out: there is nothing to agree on.

    Raises:
        JaxguardError: as `distill`; or a template that shows the labels, or no example with a label to judge.
    """
    job, folder = load_job(config), config.folder / "audit"
    wanted = job.settings.audit
    settings = job.settings.model_copy(update={"rounds": 1, "candidates": wanted.samples, "judge": None})
    job, prompt = replace(job, settings=settings), blind_prompt(wanted.prompt)
    labelled = {task.example.id: task for task in job.tasks if any(word != ABSENT for _, word in task.labels)}
    if not labelled:
        raise JaxguardError(f"none of the {len(job.tasks)} examples has a prompt's or a response's label")
    examples = [task.example for task in labelled.values()]
    tasks = [labelled[x.id] for x in subset(examples, min(wanted.examples, len(examples)), wanted.seed)]
    asyncio.run(generate(job, prompt, tasks, folder / "attempts", provenance(job, prompt), exhaustive=True))
    names = {"prompt_name": prompt.name, "policy_name": job.policy.name}
    sample = {"seed": wanted.seed, "samples": wanted.samples, "available": len(labelled)}
    about = {"run": config.name, **provenance(job, prompt), **names, **sample}
    result = score(tasks, read_answers(folder / "attempts", tasks, settings), about)
    page = report(result)
    write_atomically(folder / "audit.json", json.dumps(asdict(result), indent=2, allow_nan=False) + "\n")
    blocks.write_markdown(folder / "audit.md", page)
    blocks.write_page(folder / "audit.html", page)
    return result


def blind_prompt(name: str) -> TeacherPrompt:
    """The audit's template, which must not show the labels."""
    prompt = load_prompt(name)
    revealing = sorted(prompt.placeholders & {"labels", "trace"})
    if revealing:
        raise JaxguardError(
            f"distill.audit.prompt={name}: its template contains ${revealing[0]}, which gives the verdict away; an audit hides "
            "the labels: take `audit`, or leave that value out"
        )
    return prompt


def read_answers(folder: Path, tasks: Sequence[Task], settings: DistillConfig) -> list[dict[str, Any]]:
    """What the report needs of each answer, from the store: all samples of the first task, of the second, ..."""
    by_id, samples = {task.example.id: task for task in tasks}, settings.audit.samples
    answers: dict[tuple[str, int], dict[str, Any]] = {}
    for attempt in read_attempts(folder):
        task = by_id.get(attempt.example_id)
        if task and attempt.round == 0 and attempt.candidate < samples:
            answers[attempt.example_id, attempt.candidate] = _answer(attempt, task, settings.filter.ngram)
    missing = len(tasks) * samples - len(answers)
    if missing:
        raise JaxguardError(f"{folder} lacks {missing} of {len(tasks) * samples} answers: run again to request them")
    return [answers[task.example.id, i] for task in tasks for i in range(samples)]


def _answer(attempt: Attempt, task: Task, ngram: int) -> dict[str, Any]:
    """The verdict on each question, what is counted, and the lengths of the reasoning."""
    has_response, reasoning = task.example.response is not None, words(attempt.trace)
    verdict = parse(attempt.answer, task.questions, Mode.DIRECT, has_response=has_response)
    problems = {problem.partition(":")[0] for problem in verdict.problems}
    verdicts = {q: POSITIVE if getattr(verdict, q) == CHOICES[q][0] else NEGATIVE for q in QUESTIONS}
    judged = (verdict.response_harm, verdict.response_refusal) != (None, None)
    return {
        "verdicts": {q: UNPARSABLE if q in problems else value for q, value in verdicts.items()},
        "unparsable": bool(problems),
        "cut": attempt.finish_reason != "stop",
        "without_reasoning": not reasoning,
        "invented_responses": judged and not has_response and not problems,
        "prompt_tokens": attempt.prompt_tokens,
        "completion_tokens": attempt.completion_tokens,
        "failed_checks": list(attempt.failures),
        "words": len(reasoning),
        "sentences": len(split_sentences(attempt.trace)),
        "repeated_share": repeated_share(reasoning, ngram),
    }


def score(tasks: Sequence[Task], answers: Sequence[dict[str, Any]], about: dict[str, Any]) -> Audit:
    """All numbers of the report, of the answers that read_answers gives."""
    counted = ("unparsable", "cut", "without_reasoning", "invented_responses", "prompt_tokens", "completion_tokens")
    counts = {name: sum(answer[name] for answer in answers) for name in counted}
    failed = Counter(check for answer in answers for check in answer["failed_checks"])
    widths = {name: -(-(max(answer[name] for answer in answers) + 1) // BINS) for name in ("words", "sentences")}
    widths |= {"repeated_share": 0.05}
    questions = {question: _question(question, tasks, answers, about["seed"]) for question in QUESTIONS}
    return Audit(
        about=about,
        examples=len(tasks),
        completions={"total": len(answers), **counts, "failed_checks": dict(failed.most_common())},
        questions={question: result for question, result in questions.items() if result is not None},
        lengths={name: spread([answer[name] for answer in answers], width) for name, width in widths.items()},
    )


def _question(
    question: Question, tasks: Sequence[Task], answers: Sequence[dict[str, Any]], seed: int
) -> QuestionAudit | None:
    """One question over the examples that have something to judge; None if there are none."""
    positive, negative = CHOICES[question]
    labels = [dict(task.labels).get(question, ABSENT) for task in tasks]
    rows = [i for i, label in enumerate(labels) if label != ABSENT]
    if not rows:
        return None
    verdicts = np.array([answer["verdicts"][question] for answer in answers], np.int8).reshape(len(tasks), -1)
    votes = count_votes(np.array([label == positive for label in labels]), verdicts, question)[np.array(rows)]
    members: dict[str | None, list[int]] = {}
    for i, row in enumerate(rows):
        for name in dict.fromkeys(tasks[row].example.categories or (None,)):
            members.setdefault(name, []).append(i)
    by_size = sorted(members, key=lambda name: (name is None, -len(members[name]), name or ""))
    numbers = {"differ": (~votes.right).sum(axis=1), "unparsable": (~votes.parsed).sum(axis=1)}
    ids = [tasks[row].example.id for row in rows]
    each = pd.DataFrame({"id": ids, "label_positive": votes.labels, **numbers})
    differ = each[2 * each.differ > verdicts.shape[1]]
    differ = differ.sort_values(["unparsable", "differ", "id"], ascending=[True, False, True])
    categories = [(name, measure(votes[np.array(members[name])], seed)) for name in by_size]
    return QuestionAudit(positive, negative, measure(votes, seed), categories, differ.to_dict("records"))


# The report: the same tables in both formats, figures for HTML only.


def audit_table(audit: Audit) -> blocks.Table:
    """The scores of each question, for a terminal."""
    table = blocks.Table(("", "examples", "F1 and 95 % interval", "Cohen's κ", "Fleiss' κ"), "The teacher and people")
    for question, each in audit.questions.items():
        scores, fleiss = each.result.scores, each.result.consistency["fleiss"]
        table.add(TITLES[question], scores.examples, scores.f1, number(scores.kappa.value), fleiss)
    numbers = audit.completions
    table.note = f"{count(numbers['total'], 'answer')}, {numbers['unparsable']:,} unparsable, {numbers['cut']:,} cut"
    return table


def report(audit: Audit) -> blocks.Page:
    """The same numbers give the same page."""
    about, numbers, samples = audit.about, audit.completions, audit.about["samples"]
    tiles: list[Sequence[str]] = []
    scores = blocks.Table(("question", "examples", "positive", *SCORES.values()), "Agreement with people")
    own = blocks.Table(("", *(TITLES[question] for question in audit.questions)), "Agreement with itself")
    for name, title in CONSISTENCY.items():
        own.add(title, *(each.result.consistency[name] for each in audit.questions.values()))
    confusions, categories, disagreements = list[blocks.Content](), list[blocks.Content](), list[blocks.Content]()
    for question, each in audit.questions.items():
        title, result, pair = TITLES[question], each.result, (each.positive, each.negative)
        f1, kappa, fleiss = result.scores.f1, result.scores.kappa.value, result.consistency["fleiss"]
        notes = (interval(f1.low, f1.high), f"Cohen's κ {number(kappa)}", f"Fleiss' κ {number(fleiss)}")
        tiles.append((f"{title}, F1", number(f1.value), *filter(None, notes)))
        scores.add(title, *_scores(result))
        confusion = blocks.Table((f"{title}: people say", *pair, "unparsable"), f"{title}: verdicts")
        for i, counts in enumerate(result.confusion):
            tones = ("bad", "good", "faint") if i else ("good", "bad", "faint")
            toned = zip(counts, tones, strict=True)
            confusion.add(pair[i], *(blocks.Cell(f"{n:,}", share(n, sum(counts)), tone=tone) for n, tone in toned))
        confusions.append(confusion)
        by_category = blocks.Table(("category", "examples", "positive", *SCORES.values()), f"{title} by category")
        for category, of_category in each.categories[:MOST_CATEGORIES]:
            by_category.add(category or NO_CATEGORY, *_scores(of_category))
        left_out = len(each.categories) - MOST_CATEGORIES
        more = f"{left_out} more categories are in audit.json." if left_out > 0 else None
        categories.append(blocks.Details(f"{title}: all scores by category", [by_category, more]))
        differ = blocks.Table(("example", "people say", "samples that differ", "of them unparsable"), left=2)
        for one in each.disagreements[:MOST_DISAGREEMENTS]:
            label = each.positive if one["label_positive"] else each.negative
            differ.add(one["id"], label, f"{one['differ']} of {samples}", one["unparsable"])
        left_out = len(each.disagreements) - MOST_DISAGREEMENTS
        more = f"{left_out} more examples are in audit.json." if left_out > 0 else None
        of = f"{len(each.disagreements):,} of {count(each.result.scores.examples, 'example')}"
        disagreements.append(blocks.Details(f"{title}: {of}", [differ, more] if differ.rows else ["None."]))
    of_all = f"{numbers['unparsable']:,} of {numbers['total']:,}"
    part = share(numbers["unparsable"], numbers["total"])
    tiles.append(("Unparsable answers", part, of_all, f"{numbers['cut']:,} were cut"))
    facts = {
        "Run": about["run"],
        "Teacher": about["teacher"] + ("" if about["version"] is None else f", version {about['version']}"),
        "Sampling": ", ".join(f"{name} {value}" for name, value in about["sampling"].items()),
        "Prompt": f"{about['prompt_name']} ({about['prompt'][:12]})",
        "Policy": f"{about['policy_name']} ({about['policy'][:12]})",
        "Examples": f"{audit.examples:,} of {about['available']:,} with a label, seed {about['seed']}",
        "Answers": f"{numbers['total']:,}; {numbers['unparsable']:,} unparsable, {numbers['cut']:,} cut by the server",
        "Without reasoning": f"{numbers['without_reasoning']:,}",
        "Judge a response that is not there": f"{numbers['invented_responses']:,}",
        "Tokens": f"{numbers['prompt_tokens']:,} of prompts, {numbers['completion_tokens']:,} of completions",
    }
    several: list[blocks.Content] = [_right(audit), own] if samples > 1 else ["One sample cannot disagree with itself."]
    return blocks.Page(f"Audit of {about['teacher']}", [
        f"{count(audit.examples, 'example')}, {count(samples, 'answer')} to each, requested without the labels of people.",
        blocks.Only("html", [blocks.Tiles(tiles)]),
        blocks.Section("Agreement with people", [blocks.note(ABOUT_SCORES), scores, blocks.Beside(confusions)]),
        blocks.Section("F1 by category", [blocks.note(ABOUT_CATEGORIES), _f1(audit), *categories]),
        blocks.Section("Agreement with itself", several),
        blocks.Section("Reasoning", _reasoning(audit)),
        blocks.Section("Where most samples differ from people", [
            blocks.note("By id, without texts. A label may be wrong as well as the teacher."), *disagreements,
        ]),
        blocks.Section("Settings", [blocks.Facts(list(facts.items()))]),
    ])  # fmt: skip


def _scores(result: Result) -> list[blocks.Value]:
    scores = result.scores
    return [scores.examples, scores.positives, *(getattr(scores, name) for name in SCORES)]


@style()
def _f1(audit: Audit) -> blocks.Drawing:
    """F1 with its interval: all examples first, then the largest categories that have one."""
    sizes: dict[str | None, int] = {}
    for each in audit.questions.values():
        for name, result in each.categories:
            if result.scores.f1.value is not None:
                sizes[name] = max(result.scores.examples, sizes.get(name, 0))
    drawn = sorted(sizes, key=lambda name: (name is None, -sizes[name], name or NO_CATEGORY))[:MOST_DRAWN]
    labels = ["all examples", *(short(name or NO_CATEGORY, 34) for name in drawn)]
    figure = Figure(figsize=(8.6, 0.9 + 0.26 * len(labels)))
    for i, (question, each) in enumerate(audit.questions.items()):
        axes, by_name = figure.add_subplot(1, len(audit.questions), i + 1), dict(each.categories)
        for y, row in enumerate([each.result, *(by_name.get(name) for name in drawn)]):
            colour = FAINT if y else COLOURS[0]
            draw_interval(axes, y, row.scores.f1 if row else None, color=colour, marker="o", markersize=5)
        axes.set_yticks(range(len(labels)), labels if i == 0 else [""] * len(labels))
        axes.set(ylim=(len(labels) - 0.5, -0.5), xlim=(-0.03, 1.03), title=TITLES[question])
        axes.grid(visible=False, axis="y")
    alt = "F1 with its interval of all examples and of the largest categories; the tables have the numbers"
    return blocks.Drawing("", inline_svg(figure, "f1", alt), wide=True)


@style()
def _right(audit: Audit) -> blocks.Drawing:
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
    axes.set(ylim=(len(questions) - 0.5, -0.5), xlim=(0, 1))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(visible=False)
    alt = "Share of the examples by how many samples say what people say; the table has the agreement"
    return blocks.Drawing(f"How many of {samples} samples say what people say", inline_svg(figure, "right", alt))


@style()
def _reasoning(audit: Audit) -> list[blocks.Content]:
    table = blocks.Table(("per answer", "mean", "5 %", "median", "95 %", "most"), "Reasoning")
    figure = Figure(figsize=(8.6, 2.4))
    for i, (name, title) in enumerate(LENGTHS.items(), start=1):
        axes, each, is_share = figure.add_subplot(1, len(LENGTHS), i), audit.lengths[name], name == "repeated_share"
        values = (each["mean"], each["p5"], each["p50"], each["p95"], each["most"])
        table.add(title, *(share(v) if is_share else f"{v:,.1f}".removesuffix(".0") for v in values))
        axes.stairs(each["counts"], each["edges"], fill=True, color=COLOURS[0])
        axes.axvline(each["p50"], color=INK, linewidth=1, linestyle=":")
        axes.set(title=title, xlim=(0, max(each["edges"][-1], 0.25 if is_share else 0)))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        if is_share:
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        axes.grid(visible=False, axis="x")
    figure.supylabel("answers", fontsize=9)
    failed = blocks.Table(("check", "answers", "share"), "What the filter would reject")
    for check, n in audit.completions["failed_checks"].items():
        failed.add(check, n, share(n, audit.completions["total"]))
    leaks = "The teacher knew no labels, so what labels_leaked finds here are false alarms of that check."
    svg = inline_svg(figure, "lengths", "Histograms of the reasoning; the table has their percentiles")
    return [
        blocks.note(ABOUT_LENGTHS),
        blocks.Drawing("", svg),
        table,
        blocks.Section("What the filter would reject", [blocks.note(leaks), failed] if failed.rows else ["Nothing."]),
    ]
