"""`jaxguard study run NAME`: train and evaluate the rows of a study, and report on them."""

import argparse
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxguard.cli import Command, suggest
from jaxguard.config.lookup import names
from jaxguard.config.study import STUDIES, STUDY_FOLDER

if TYPE_CHECKING:
    from jaxguard.study.cost import Work
    from jaxguard.study.grid import Study

DESCRIPTION = """\
A study is a list of rows, each a training config with changes, and the grids that they span (configs/paper).

  cost     print steps, tokens, device-hours, and the assumptions behind them
  run      print the cost, then prepare data, train and evaluate run after run, into runs/STUDY/RUN; finished stages are
           skipped, stopped ones resume, and a run that fails does not keep others from running
  report   write runs/STUDY/report.md and report.html of the results so far

exit codes: 0 all done, 1 some runs failed, 2 a mistake to fix, 75 stopped by SIGTERM or Ctrl-C (run it again).
"""
EPILOG = """\
overrides:
  Any field of the rows' configs, for all of them; the field of an axis takes a list, which replaces its values; name=,
  run_folder=, metric= and cost.… belong to the study:
      'data.subset=[500,1000]' 'data.subset_seed=[0,1]' evaluate.limit=200 cost.devices=4
  report takes the same ones as run.

examples:
  jaxguard study cost paper/main
  jaxguard study run paper/sample_efficiency --scale smollm
  jaxguard study report paper/sample_efficiency --scale smollm
"""


def _options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("command", choices=("run", "report", "cost"))
    name = parser.add_argument(
        "study", metavar="NAME|PATH", help="a file of configs/, such as paper/main, or any YAML file"
    )
    suggest(name, lambda _: [f"{STUDIES}/{study}" for study in names(STUDY_FOLDER / STUDIES)])
    parser.add_argument("--scale", metavar="NAME", help="a smaller version that the study's file describes")
    parser.add_argument("--dry-run", action="store_true", help="print every command of the study, and stop")
    parser.add_argument("--measure", action="store_true", help="run: first time a few steps on this machine")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="change a field of every run")


def _study(options: argparse.Namespace) -> int:
    # Imported late: this loads JAX.
    from jaxguard.evaluate.report.published import read_published
    from jaxguard.evaluate.scores.results import read_results
    from jaxguard.study.grid import open_study
    from jaxguard.study.report import write_report
    from jaxguard.study.run import commands, measure_speed, run_study
    from jaxguard.study.stages import REQUEUE

    console = Console(highlight=False)

    def log(text: str) -> None:
        console.print(Text(text), soft_wrap=True)

    study = open_study(options.study, options.scale, options.overrides)
    if options.dry_run:
        print(*commands(study), sep="\n")
        return 0
    if options.command == "report":
        for path in write_report(study, read_results, read_published()):
            log(str(path))
        return 0
    if options.command == "run" and options.measure and not measure_speed(study, log):
        return REQUEUE
    print_cost(study, console)
    if options.command == "cost":
        return 0
    result = run_study(study, log)
    done = len(study.runs) - len(result.failed)
    for name, reason in result.failed.items():
        log(f"error: {name}: {reason}")
    if result.stopped:
        log("stopped; run the same command again to resume")
        return REQUEUE
    log(f"{done} of {len(study.runs)} runs are done: {study.folder}")
    return 1 if result.failed else 0


def print_cost(study: "Study", console: Console) -> None:
    """Print the work of every run and of all, and the assumptions behind it."""
    from jaxguard.study.cost import Work, clock, estimate, speed_of, teacher_work

    costs, cost = estimate(study), study.definition.cost
    total, duration = sum((amount for _, amount, _ in costs), Work()), sum(seconds for *_, seconds in costs)
    table = Table(title=study.definition.title, title_justify="left", show_footer=True)
    table.add_column("run", f"{len(costs)} runs", overflow="fold")
    columns = ("steps", "trained", "predictions", "read", "generated", "device-h")
    for column, footer in zip(columns, _cells(total, duration * cost.devices), strict=True):
        table.add_column(column, footer, justify="right", no_wrap=True)
    for run, amount, seconds in costs:
        table.add_row(Text(run.name + (" *" if amount.assumed else "")), *_cells(amount, seconds * cost.devices))
    console.print(table)
    lines = ["trained, read and generated are tokens; read: prompts, and what the probabilities of verdicts need"]
    for run in (*study.prepared, *study.runs):
        if "distill" in run.stages:
            amount = teacher_work(run)
            lines.append(
                f"{run.name} needs a teacher, which is not in the table: {amount.predictions:,} examples, "
                f"{_tokens(amount.read)} tokens read and {_tokens(amount.generated)} generated, without retries"
            )
    if total.assumed:
        lines.append("* the number of examples is an assumption of the study's file, or a default")
    lines.append(
        f"{clock(duration)} on {cost.devices} {cost.device}, from the start. Assumed: {cost.prompt_tokens} tokens a prompt, "
        f"{cost.trace_tokens} a trace, {cost.answer_tokens} a verdict, and {cost.start_seconds} s to start a stage, unless a row "
        f"says otherwise. Speed: {speed_of(study).source}."
    )
    for line in (*lines, study.definition.about.strip()):
        console.print(Text(line), soft_wrap=True)


def _cells(amount: "Work", device_seconds: float) -> tuple[str, ...]:
    trained, read, generated = map(_tokens, (amount.trained, amount.read, amount.generated))
    return (f"{amount.steps:,}", trained, f"{amount.predictions:,}", read, generated, f"{device_seconds / 3600:,.2f}")


def _tokens(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count / 1e3:,.0f} k"


main = Command("study", DESCRIPTION, _study, _options)

if __name__ == "__main__":
    sys.exit(main())
