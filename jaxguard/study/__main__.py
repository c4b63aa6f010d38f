"""`jaxguard study run NAME`: train and evaluate the rows of a study, and report on them."""

import argparse
import shlex
import sys

from jaxguard.cli import Command, suggest
from jaxguard.config.base import names
from jaxguard.config.study import STUDIES
from jaxguard.utils.secrets import mask
from jaxguard.utils.terminal import Console

DESCRIPTION = """\
A study is a list of rows, each a training config with changes, and the grids that they span (configs/studies).

  cost     print steps, tokens, device-hours, and the assumptions behind them
  run      print the cost, then prepare data, train and evaluate run after run, into runs/STUDY/RUN; finished stages are
           skipped, stopped ones resume, and a run that fails does not keep others from running
  report   write runs/STUDY/report.md and report.html of the results so far

Overrides change any field of the rows' configs, for all of them; the field of an axis takes a list, which replaces its values;
name=, run_folder=, metric= and cost.… belong to the study: 'data.subset=[500,1000]' evaluate.limit=200 cost.devices=4

exit codes: 0 all done, 1 some runs failed, 2 a mistake to fix, 75 stopped by SIGTERM or Ctrl-C (run it again).
"""


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("command", choices=("run", "report", "cost"))
    name = parser.add_argument("study", metavar="NAME|PATH", help="a study, such as paper/main, or any YAML file")
    suggest(name, lambda _: names(STUDIES))
    parser.add_argument("--scale", metavar="NAME", help="a smaller version that the study's file describes")
    parser.add_argument("--dry-run", action="store_true", help="print every command of the study, and stop")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="change a field of every run")


def _study(options: argparse.Namespace) -> int:
    # Imported late: this loads JAX.
    from jaxguard.evaluate.report.published import read_published
    from jaxguard.evaluate.scores.results import read_results
    from jaxguard.study.cost import cost_table
    from jaxguard.study.grid import open_study
    from jaxguard.study.report import write_report
    from jaxguard.study.run import check_study, command, run_study

    study, console = open_study(options.study, options.scale, options.overrides), Console(soft_wrap=True)
    if options.dry_run:
        for run in (*study.prepared, *study.runs):
            console.print(*(mask(f"python {shlex.join(command(run, stage))}") for stage in run.row.stages), sep="\n")
        check_study(study)
        return 0
    if options.command == "report":
        console.print(*write_report(study, read_results, read_published()), sep="\n")
        return 0
    console.print(cost_table(study).rich(), soft_wrap=False)
    console.print(study.definition.about.strip())
    return run_study(study, console.print) if options.command == "run" else 0


main = Command("study", DESCRIPTION, _study, _options)

if __name__ == "__main__":
    sys.exit(main())
