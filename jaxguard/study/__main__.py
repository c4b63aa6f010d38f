"""`python -m jaxguard.study run NAME`: a paper's rows, trained and evaluated one after the other, and what came of them."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from jaxguard.cli import exit_code

if TYPE_CHECKING:
    from jaxguard.study.grid import Study

DESCRIPTION = """\
A study is a list of rows, each a training config with changes, and the grids that they span (configs/paper).

  cost     what it takes: updates, tokens, device-hours, and what these are reckoned from
  run      prints that, then prepares data, trains and evaluates run after run, into runs/STUDY/RUN; what is done is
           skipped, what was killed goes on, and a run that fails does not keep the others from running
  report   writes runs/STUDY/report.md and report.html of the results that are there

exit codes: 0 all done, 1 some runs failed, 2 a mistake to mend, 75 stopped by SIGTERM or Ctrl-C (start it again).
"""
EPILOG = """\
overrides:
  Any field of the rows' configs, for all of them; the field of an axis takes a list, which replaces its values; name=,
  run_folder= and metric= are the study's own, cost.… is what its cost is reckoned from:
      'data.subset=[500,1000]' 'data.subset_seed=[0,1]' evaluate.limit=200 cost.devices=4
  report takes the same ones as run.

examples:
  python -m jaxguard.study cost paper/main
  python -m jaxguard.study run paper/sample_efficiency --scale smollm
  python -m jaxguard.study report paper/sample_efficiency --scale smollm
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_intermixed_args(sys.argv[1:] if argv is None else argv)
    return exit_code(lambda: _act(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxguard.study",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=("run", "report", "cost"))
    parser.add_argument("study", metavar="NAME|PATH", help="a file of configs/, such as paper/main, or any YAML file")
    parser.add_argument("--scale", metavar="NAME", help="a smaller version that the study's file describes")
    parser.add_argument(
        "--dry-run", action="store_true", help="print every command that the study consists of, and stop"
    )
    parser.add_argument("--measure", action="store_true", help="run: first time a few updates on this machine")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="change a field of every run")
    return parser


def _act(options: argparse.Namespace) -> int:
    # Imported late: reckoning with batches loads JAX.
    from jaxguard.study.grid import open_study
    from jaxguard.study.run import run_study, show_commands, show_cost

    console = Console(highlight=False)
    study = open_study(options.study, options.scale, options.overrides)
    if options.dry_run:
        show_commands(study, print)
        return 0
    if options.command == "run":
        return run_study(study, console, options.measure)
    if options.command == "cost":
        show_cost(study, console)
        return 0
    return _report(study, console)


def _report(study: "Study", console: Console) -> int:
    from jaxguard.evaluate.report.published import read_published
    from jaxguard.evaluate.scores.results import read_results
    from jaxguard.study.report import write_report

    for path in write_report(study, read_results, read_published()):
        console.print(Text(str(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
