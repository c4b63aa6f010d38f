"""Rewrites the tables of docs/cascade.md and docs/cascade.svg from the runs of a study: `python tools/cascade.py`.

First `python tools/pool_reasons.py` and `jaxguard study run results/cascade`; `--run-folder` says where its runs are. As for
docs/results.md, the results of every finished run are kept in docs/results, without texts.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from generated import rewrite
from jaxguard import report as blocks
from jaxguard.evaluate.report import cascade
from jaxguard.evaluate.scores.results import Evaluation, read_results
from jaxguard.report.figures import save_figure
from jaxguard.study.grid import Study, open_study
from results import DOCS, keep


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-folder", default="runs")
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    study = open_study("results/cascade", overrides=[f"run_folder={options.run_folder}"])
    for run in study.runs:
        if (run.folder / "evaluate" / "results.json").is_file():
            keep(run.folder, options.docs / "results" / run.name)
    evaluations = read(study, options.docs / "results")
    if not evaluations:
        raise SystemExit(f"{study.folder} has no results yet: jaxguard study run results/cascade")
    drawn = [
        replace(each, guard=form.removeprefix("answer "))
        for form, evaluation in evaluations.items()
        for each in evaluation.cascades
    ]
    save_figure(cascade.figure(tuple(drawn)), options.docs / "cascade.svg")
    rewrite(options.docs / "cascade.md", tables(evaluations))


def read(study: Study, kept: Path) -> dict[str, Evaluation]:
    """What was kept of the study's runs, by their answer format."""
    folders = {f"answer format {run.labels['data.answer_format']}": kept / run.name for run in study.runs}
    return {form: read_results(folder / "results.json") for form, folder in folders.items() if folder.is_dir()}


def tables(evaluations: Mapping[str, Evaluation]) -> str:
    """All tables, in Markdown."""
    sections: list[blocks.Content] = [blocks.Section("Each mode by itself", [modes(evaluations)])]
    for form, evaluation in evaluations.items():
        found = cascade.section(evaluation)
        assert found is not None
        sections.append(
            blocks.Section(f"The cascade, {form}", [x for x in found.blocks if not isinstance(x, blocks.Beside)])
        )
    # The page's own title stands above the mark.
    return blocks.page_markdown(blocks.Page("", sections)).partition("\n")[2].lstrip()


def modes(evaluations: Mapping[str, Evaluation]) -> blocks.Table:
    """Scores and costs of both modes on every benchmark."""
    table = blocks.Table((
        "mode", "AUPRC", "F1 at valid's threshold", "false-positive rate there", "unparsable", "generated tokens", "seconds",
    ))  # fmt: skip
    for benchmark in dict.fromkeys(chain.from_iterable(each.benchmarks for each in evaluations.values())):
        for form, evaluation in evaluations.items():
            for cell in evaluation.by_benchmark.get(benchmark, ()):
                at = cell.thresholded.result.scores if cell.thresholded else None
                table.add(
                    blocks.Cell(cell.mode, form),
                    cell.calibration.auprc if cell.calibration else None,
                    at.f1 if at else None,
                    at.false_positive_rate if at else None,
                    cell.result.unparsable,
                    f"{cell.cost.completion_tokens:.1f}",
                    f"{cell.cost.seconds + cell.cost.scoring:.2f}",
                    group=cell.heading,
                )
    return table


if __name__ == "__main__":
    main()
