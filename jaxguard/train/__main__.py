"""`jaxguard train --config NAME`: fine-tune a guard and export it."""

import argparse
import sys
from typing import TYPE_CHECKING

from jaxguard.cli import stage
from jaxguard.config import Config
from jaxguard.utils.terminal import Console

if TYPE_CHECKING:
    from jaxguard.train.loop import TrainedRun

DESCRIPTION = """\
Fine-tune a Hugging Face checkpoint into a guard: labelled safety data in, a Hugging Face folder out.

The run folder is runs/NAME. A run may be interrupted at any moment: the same command resumes it from its last checkpoint.
exit codes: 0 finished, 2 a mistake to correct, 3 the folder holds another run, 75 stopped by SIGTERM or Ctrl-C with the state
saved (run the command again).
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        choices=("auto", "always", "never"),
        default="auto",
        help="auto: resume if the folder holds this run; always: require a checkpoint; never: require a new folder",
    )


def _train(options: argparse.Namespace, config: Config) -> int:
    import jax  # only when there is something to do

    from jaxguard.train.hosts import REQUEUE, end_together
    from jaxguard.train.loop import train

    run = end_together(lambda: train(config, options.resume))
    if jax.process_index() == 0:
        print_run(run)
    return 0 if run.finished else REQUEUE


def print_run(run: "TrainedRun") -> None:
    """Print the validation metrics and how training changed them, and where everything is."""
    from jaxguard.train.logging import distinct

    console = Console(soft_wrap=True)
    if not run.finished:
        console.print(
            f"stopped by {run.stopped_by} after step {run.step} of {run.steps}; run the same command to resume"
        )
        return
    before = distinct(run.before)
    for name, value in distinct(run.after).items():
        console.print(f"{name:32} {value:8.4f}  ({value - before[name]:+.4f})")
    if run.changed_fraction is not None:
        console.print(f"{run.changed_fraction:.2%} of the exported weights differ from the base")
    for name, path in (("log", run.folder / "metrics.jsonl"), ("curves", run.curves), ("export", run.export)):
        if path is not None:
            console.print(f"{name}: {path}")


def _check(config: Config) -> None:
    from jaxguard.train.loop import check  # loads JAX

    check(config)


main = stage("train", DESCRIPTION, _train, add_options, check=_check)

if __name__ == "__main__":
    sys.exit(main())
