"""`jaxguard train --config NAME`: fine-tune a guard and export it."""

import argparse
import sys
from collections.abc import Sequence

from jaxguard.cli import run_stage
from jaxguard.config import Config

DESCRIPTION = """\
Fine-tune a Hugging Face checkpoint into a guard: labelled safety data in, a Hugging Face folder out.

The run lives in runs/NAME. Kill it whenever you like: started again, it goes on from its last checkpoint.
exit codes: 0 finished, 2 a mistake to mend, 3 the folder holds another run, 75 stopped by SIGTERM or Ctrl-C with its state saved
(start it again).
"""


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("train", DESCRIPTION, _train, _options, argv)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        choices=("auto", "always", "never"),
        default="auto",
        help="auto: go on if the folder holds this run; always: insist on it; never: insist on a new folder",
    )


def _train(options: argparse.Namespace, config: Config) -> int:
    from jaxguard.train.hosts import end_together  # JAX is loaded only when there is something to do
    from jaxguard.train.loop import train

    return end_together(lambda: train(config, options.resume))


if __name__ == "__main__":
    sys.exit(main())
