"""`jaxguard mine --config NAME`: find the training examples that a guard gets right only sometimes."""

import argparse
import sys
from functools import partial

from rich.text import Text

from jaxguard.cli import stage
from jaxguard.config import Config
from jaxguard.data.inputs import check_inputs
from jaxguard.utils.terminal import Console

DESCRIPTION = """\
Ask a trained guard about its own training examples, each several times, in the mode in which it was trained on them; or about
those of `mine.sources`. Those that it judges right in some answers only are hard: a second round of training takes them once more.
Those that it never judges right may be labelled wrongly: look at them. Train first; then this writes into runs/NAME/mine:

  answers/MODE.jsonl   every answer, as soon as it is there: killed and started again, it resumes
  hard.jsonl           the hard examples with their traces, ready for data.train or build.sets[].append
  never_right.jsonl    those that were never judged right, with the guard's answers
  examples.jsonl       what was mined, each with the number of its right answers
  train.jsonl          what the run was trained on; held_out.jsonl what it was validated on
  report.md            counts by number of right answers, source, category and label; report.json, right.png

The second round is a config that extends the first, starts from its export and trains on train.jsonl and hard.jsonl; `mine pairs`
makes preference pairs of the answers.

examples:
  jaxguard mine --config smollm_demo
  jaxguard train --config smollm_continual
  jaxguard mine --config gemma4b_5k 'mine.sources=[{kind: nemotron_safety}]'
  jaxguard mine --config gemma4b_5k mine.balance=class mine.most=500
  jaxguard mine --config gemma4b_5k evaluate.backend=sglang evaluate.server.python=.venv-sglang/bin/python
"""

PAIRS_DESCRIPTION = """\
Make preference pairs of the answers that `mine` stored: a right and a wrong answer to each example that has both, for
train.objective.kind=dpo. Nothing is generated, so it takes seconds and may be run again with other settings. Writes into
runs/NAME/mine:

  pairs.jsonl          the pairs, each with a weight, and with the tokens that the guard sampled where they are known
  pairs.md             counts, lengths and weights by mode, label and source
  pairs.json           the manifest: inputs with their sha256, settings, counts, versions

examples:
  jaxguard mine pairs --config gemma4b_5k
  jaxguard mine pairs --config gemma4b_5k mine.pairs=longest
  jaxguard mine pairs --config gemma4b_5k 'mine.ensemble=[runs/gemma4b_other/mine]'
"""


def _mine(_: argparse.Namespace, config: Config) -> int:
    from jaxguard.mine.run import mine, right_table  # JAX and matplotlib are loaded only when there is something to do

    result, console = mine(config), Console(soft_wrap=True)
    console.print(right_table(result).rich())
    console.print(Text(f"{len(result.taken):,} hard examples: {result.folder / 'hard.jsonl'}"))
    console.print(Text(f"{len(result.never_right):,} never right: {result.folder / 'never_right.jsonl'}"))
    console.print(Text(f"report: {result.folder / 'report.md'}"))
    return 0


def _check(config: Config) -> None:
    from jaxguard.mine.run import check

    check(config)


def _pairs(_: argparse.Namespace, config: Config) -> int:
    from jaxguard.mine.pairs import build_pairs

    result, console = build_pairs(config), Console(soft_wrap=True)
    for reason, count in result.without.items():
        console.print(Text(f"{count:,} examples without a pair: {reason}"))
    console.print(Text(f"{len(result.pairs):,} preference pairs: {result.folder / 'pairs.jsonl'}"))
    console.print(Text(f"report: {result.folder / 'pairs.md'}"))
    return 0


PAIRS = stage("mine pairs", PAIRS_DESCRIPTION, _pairs, check=partial(check_inputs, stage="mine pairs"))
main = stage("mine", DESCRIPTION, _mine, commands={"pairs": PAIRS}, check=_check)

if __name__ == "__main__":
    sys.exit(main())
