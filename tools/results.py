"""Rewrites the tables of docs/results.md and docs/results.svg from the runs of a study: `python tools/results.py`.

First `jaxguard study run results/pool_sizes`, which takes hours on two cores and resumes; `--run-folder` says where its runs are.
The results of every finished run are kept in docs/results, without texts, and the page is written from those: a run's folder
may go, and other machines may add theirs.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from generated import rewrite
from jaxguard.evaluate.scores.metrics import Difference
from jaxguard.evaluate.scores.results import Cell, read_results, write_results
from jaxguard.guards.operating_points import F1
from jaxguard.report import Cell as TableCell
from jaxguard.report import Page, Section, Table, page_markdown
from jaxguard.report.figures import COLOURS, save_figure, style
from jaxguard.report.text import ABSENT, interval, number, signed
from jaxguard.study.grid import Run, Study, open_study
from jaxguard.utils.files import write_atomically
from jaxguard.utils.statistics import Estimate, Scores

DOCS = Path(__file__).resolve().parent.parent / "docs"
OURS, WORDS = "ours", "words"
OVER_REFUSAL = "xstest"
"""Harmless prompts that sound alarming, and harmful ones that contrast with them."""


class Result(NamedTuple):
    """A run of the study with what came of it: guard -> benchmark -> cell, and the seconds of its training steps."""

    run: Run
    cells: dict[str, dict[str, Cell]]
    seconds: list[float]

    @property
    def rows(self) -> int:
        return int(self.run.labels["data.subset"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="results/pool_sizes")
    parser.add_argument("--run-folder", default="runs")
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    study = open_study(options.study, overrides=[f"run_folder={options.run_folder}"])
    for run in study.runs:
        if (run.folder / "evaluate" / "results.json").is_file():
            keep(run.folder, options.docs / "results" / run.name)
    results = read(study, options.docs / "results")
    if not results:
        raise SystemExit(f"{study.folder} has no results yet: jaxguard study run {options.study}")
    save_figure(figure(results), options.docs / "results.svg")
    rewrite(options.docs / "results.md", tables(results))


def tables(results: Sequence[Result]) -> str:
    """All tables, in Markdown."""
    largest = [each for each in results if each.run.row.series == results[0].run.row.series]
    largest = [each for each in largest if each.rows == max(each.rows for each in largest)]
    sections = [
        Section(f"Beside a bag of words, {largest[0].rows:,} rows", [beside(largest)]),
        Section("Recall, and harmless texts called harmful", [rates(largest)]),
        Section("Harmless texts that sound alarming, by their kind", [kinds(largest)]),
        Section("By number of rows", [by_size(results)]),
        Section("AUPRC minus that of the bag of words, of each run", [differences(results)]),
        Section("What it cost", [costs(results)]),
    ]
    # The page's own title stands above the mark.
    return page_markdown(Page("", sections)).partition("\n")[2].lstrip()


def keep(run_folder: Path, folder: Path) -> None:
    """Copy what the page needs of a run: its results without texts, and the loss and the seconds of each training step."""
    evaluation = read_results(run_folder / "evaluate" / "results.json")
    steps = [
        {"step": line["step"], "loss": round(line["loss"], 4), "seconds": round(line["speed"]["seconds"], 2)}
        for line in map(json.loads, (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        if "speed" in line
    ]
    folder.mkdir(parents=True, exist_ok=True)
    cells = (
        replace(cell, wrong=(), right=(), slices=cell.slices if cell.benchmark == OVER_REFUSAL else {})
        for cell in evaluation.cells
    )
    write_results(replace(evaluation, cells=tuple(cells)), folder / "results.json")
    write_atomically(folder / "steps.jsonl", "".join(json.dumps(step) + "\n" for step in steps))


def read(study: Study, kept: Path) -> list[Result]:
    """Read what was kept of the study's runs, in their order."""
    results = []
    for run in study.runs:
        if (folder := kept / run.name).is_dir():
            cells = read_results(folder / "results.json").cells
            by_guard = {guard: {c.benchmark: c for c in cells if c.guard == guard} for guard in (OURS, WORDS)}
            steps = map(json.loads, (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines())
            results.append(Result(run, by_guard, [step["seconds"] for step in steps]))
    return results


def beside(results: Sequence[Result]) -> Table:
    """AUPRC and F1 of the guard and of the bag of words on every set, and the paired differences."""
    columns = (
        "set and subset",
        "AUPRC",
        "words",
        "difference",
        "F1 at P > 0.5",
        "F1 at valid's threshold",
        "words",
        "difference",
    )
    table = Table(columns)
    for name, each in judged(results):
        ours, words = (each.cells[guard][name] for guard in (OURS, WORDS))
        versus = words.versus
        assert versus is not None
        table.add(
            f"subset {each.run.labels['data.subset_seed']}",
            *(value(cell.calibration.auprc if cell.calibration else None) for cell in (ours, words)),
            turned(versus.auprc),
            value(ours.result.scores.f1),
            *(value(cell.thresholded.result.scores.f1 if cell.thresholded else None) for cell in (ours, words)),
            turned(versus.f1_at_threshold),
            group=ours.heading,
        )
    return table


def judged(results: Sequence[Result]) -> list[tuple[str, Result]]:
    """Each set with every run that was evaluated on it."""
    return [(name, each) for name in results[0].cells[OURS] for each in results if name in each.cells[OURS]]


def rates(results: Sequence[Result]) -> Table:
    """Recall at fixed false-positive rates, and recall and false-positive rate at thresholds that validation chose."""
    columns = (
        "set and guard",
        "recall at 1 % FPR",
        "at 5 % FPR",
        "at valid's best F1: recall",
        "false-positive rate",
        "at valid's 1 % FPR: recall",
        "false-positive rate",
    )
    table = Table(columns)
    for (name, each), guard in product(judged(results), (OURS, WORDS)):
        cell = each.cells[guard][name]
        recall = cell.calibration.recall_at if cell.calibration else {}
        points = [cell.thresholded.points.get(point) if cell.thresholded else None for point in (F1, "0.01")]
        at_points = [score for at in points for score in ((at.recall, at.false_positive_rate) if at else (None, None))]
        subset = TableCell(guard, f"subset {each.run.labels['data.subset_seed']}")
        table.add(subset, recall.get("0.01"), recall.get("0.05"), *at_points, group=cell.heading)
    return table


def kinds(results: Sequence[Result]) -> Table:
    """Share of each of XSTest's kinds that is called harmful at P > 0.5, a mean over subsets; the harmless kinds first."""
    prefix = "category: "
    known = [
        (name, cut) for name, cut in results[0].cells[OURS][OVER_REFUSAL].slices.items() if name.startswith(prefix)
    ]
    table = Table(("kind", "examples", "called harmful by the guard", "by the words"))
    for harmful, (name, cut) in product((False, True), known):
        if bool(cut.scores.positives) is harmful:
            called = [
                np.mean([called_harmful(each.cells[guard][OVER_REFUSAL].slices[name].scores) for each in results])
                for guard in (OURS, WORDS)
            ]
            kind = name.removeprefix(prefix).replace("_", " ")
            table.add(kind, cut.scores.examples, *map(float, called), group="harmful" if harmful else "harmless")
    return table


def called_harmful(scores: Scores) -> float:
    """The share of examples of one label that is called harmful."""
    return (scores.recall if scores.positives else scores.false_positive_rate).value or 0.0


def by_size(results: Sequence[Result]) -> Table:
    """Means over subsets: AUPRC of both guards on every set, and over-refusal."""
    names = list(results[0].cells[OURS])
    table = Table(("rows and guard", *(f"AUPRC, {name}" for name in names), f"false-positive rate, {OVER_REFUSAL}"))
    for series, size, group in series_of(results):
        for guard in (OURS, WORDS):
            cells = [each.cells[guard] for each in group]
            scores = [np.mean([auprc(each.get(name)) for each in cells]) for name in names]
            refused = [each[OVER_REFUSAL].thresholded for each in cells if OVER_REFUSAL in each]
            known = [at.result.scores.false_positive_rate.value for at in refused if at]
            rate = np.mean([x for x in known if x is not None]) if known else None
            table.add(
                TableCell(f"{size:,}", guard),
                *(None if np.isnan(score) else float(score) for score in scores),
                None if rate is None else float(rate),
                group=series,
            )
    return table


def differences(results: Sequence[Result]) -> Table:
    """The guard's AUPRC minus that of the bag of words on every set, paired, of every run."""
    names = list(results[0].cells[OURS])
    table = Table(("rows and subset", *names))
    for series, size, group in series_of(results):
        for each in group:
            known = [
                versus.auprc if cell and (versus := cell.versus) else None for cell in map(each.cells[WORDS].get, names)
            ]
            label = TableCell(f"{size:,}", f"subset {each.run.labels['data.subset_seed']}")
            table.add(label, *map(turned, known), group=series)
    return table


def costs(results: Sequence[Result]) -> Table:
    """Steps and minutes of training, means over subsets."""
    table = Table(("rows", "steps", "minutes of training"))
    for series, size, group in series_of(results):
        steps, minutes = np.mean([(len(each.seconds), sum(each.seconds) / 60) for each in group], axis=0)
        table.add(f"{size:,}", int(steps), f"{minutes:.0f}", group=series)
    return table


def series_of(results: Iterable[Result]) -> list[tuple[str, int, list[Result]]]:
    """Series, number of rows, and the runs that differ only in their subset."""
    groups: dict[tuple[str, int], list[Result]] = {}
    for each in results:
        groups.setdefault((each.run.row.series or each.run.key, each.rows), []).append(each)
    return [(series, size, group) for (series, size), group in groups.items()]


def auprc(cell: Cell | None) -> float:
    known = cell.calibration.auprc.value if cell and cell.calibration else None
    return float("nan") if known is None else known


def value(score: Estimate | None) -> TableCell:
    """A score without its interval."""
    return TableCell(number(None if score is None else score.value))


def turned(difference: Difference | None) -> TableCell:
    """The guard minus the bag of words, where the results hold the opposite."""
    if difference is None or difference.value is None or difference.low is None or difference.high is None:
        return TableCell(ABSENT)
    swapped = replace(difference, value=-difference.value, low=-difference.high, high=-difference.low)
    assert swapped.value is not None
    return TableCell(signed(swapped.value), interval(swapped.low, swapped.high, difference=True))


@style()
def figure(results: Sequence[Result]) -> Figure:
    """AUPRC over rows on every set, a dot for each run."""
    names = list(results[0].cells[OURS])
    drawn = Figure(figsize=(2.4 * len(names), 3.2))
    groups = series_of(results)
    lines = [(OURS, series) for series in dict.fromkeys(series for series, _, _ in groups)] + [(WORDS, groups[0][0])]
    for axes, name in zip(drawn.subplots(1, len(names)), names, strict=True):
        for color, (guard, series) in zip(COLOURS, lines, strict=False):
            runs = sorted(((x, group) for s, x, group in groups if s == series), key=lambda size: size[0])
            points = [(x, auprc(each.cells[guard].get(name))) for x, group in runs for each in group]
            means = [np.mean([y for at, y in points if at == x]) for x, _ in runs]
            axes.plot(
                [x for x, _ in runs], means, color=color, label=f"guard, {series}" if guard == OURS else "bag of words"
            )
            axes.scatter(*zip(*points, strict=True), color=color, s=12)
        axes.set(xscale="log", title=name, xlabel="rows")
        axes.set_xticks(
            sorted({size for _, size, _ in groups}), [f"{x:,}" for x in sorted({s for _, s, _ in groups})], rotation=45
        )
        axes.minorticks_off()
    drawn.axes[0].set_ylabel("AUPRC")
    drawn.axes[0].legend()
    return drawn


if __name__ == "__main__":
    main()
