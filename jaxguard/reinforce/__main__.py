"""`jaxguard reinforce --config NAME`: train a guard on its own answers, by their rewards, and export it."""

import argparse
import sys

from jaxguard.cli import stage
from jaxguard.config import Config
from jaxguard.train.__main__ import add_options, print_run

DESCRIPTION = """\
Reinforcement learning on labelled prompts: each step samples answers, rewards their verdicts, and trains on them.

The run folder is runs/NAME, with every answer in rollouts/. A run may be interrupted at any moment: the same command resumes it,
and it ends with the same weights.
exit codes: 0 finished, 2 a mistake to correct, 3 the folder holds another run, 75 stopped by SIGTERM or Ctrl-C with the state
saved (run the command again).
"""


def _reinforce(options: argparse.Namespace, config: Config) -> int:
    from jaxguard.reinforce.run import reinforce  # loads JAX
    from jaxguard.train.hosts import REQUEUE, end_together

    run = end_together(lambda: reinforce(config, options.resume))
    print_run(run)
    return 0 if run.finished else REQUEUE


def _check(config: Config) -> None:
    from jaxguard.train.loop import check  # loads JAX

    check(config, samples=True)


main = stage("reinforce", DESCRIPTION, _reinforce, add_options, check=_check)

if __name__ == "__main__":
    sys.exit(main())
