"""`jaxguard mine --config NAME`: find the training examples that a guard gets right only sometimes."""

import argparse
import sys
from collections.abc import Sequence

from jaxguard.cli import run_stage
from jaxguard.config import Config

DESCRIPTION = """\
Request a trained guard about its own training examples, each several times, in the mode in which it was trained on them. Those that
it judges right in some answers only are difficult: a second round of training takes them once more. Those that it never judges
right may be labelled wrongly: look at them. Train first; then this writes into runs/NAME/mine:

  answers/MODE.jsonl   every answer, as soon as it is there: killed and started again, it goes on
  difficult.jsonl      the difficult examples with their traces, ready for data.train or build.sets[].append
  never_right.jsonl    those that were never judged right, with what the guard said
  train.jsonl          what the run was trained on; held_out.jsonl what it was validated on
  report.md            counts by number of right answers, source, category and label; report.json, right.png

The second round is a config that extends the first, starts from its export and trains on train.jsonl and difficult.jsonl.

examples:
  jaxguard mine --config smollm_demo
  jaxguard train --config smollm_continual
  jaxguard mine --config gemma4b_5k mine.balance=class mine.most=500
  jaxguard mine --config gemma4b_5k evaluate.backend=sglang evaluate.server.python=.venv-sglang/bin/python
"""


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("mine", DESCRIPTION, _mine, argv=argv)


def _mine(_: argparse.Namespace, config: Config) -> int:
    from jaxguard.mine.run import mine  # JAX is loaded only when there is something to do

    return mine(config)


if __name__ == "__main__":
    sys.exit(main())
