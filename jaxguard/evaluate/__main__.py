"""`jaxguard evaluate --config NAME`: score guards on benchmarks, beside the published results."""

import argparse
import sys
from collections.abc import Sequence

from jaxguard.cli import run_stage
from jaxguard.config import Config

DESCRIPTION = """\
Request guards about benchmarks, several times each, and lay their F1 beside the paper's: runs/NAME/evaluate/report.html and .md.

By default the guard is the run's own export, in the modes that it was trained in, computed by JAX; with
evaluate.backend=sglang an SGLang server is started for it. Every answer is kept in runs/NAME/evaluate/predictions; kill it
whenever you like: started again, it goes on. --config takes the config that the guard was trained with.

examples:
  jaxguard evaluate --config gemma4b_5k evaluate.limit=50
  jaxguard evaluate --config gemma4b_dual_5k evaluate.backend=sglang evaluate.server.python=sglang/bin/python
  jaxguard evaluate --config gemma4b_5k 'evaluate.guards=[{endpoint: http://node1:30000}]'
  jaxguard evaluate --config gemma4b_5k 'evaluate.guards=[{name: ours}, {name: words, format: tfidf}]'
  jaxguard evaluate --config smollm_demo 'evaluate.benchmarks=[{name: xstest_prompt, path: my/xstest.csv}]'
"""


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("evaluate", DESCRIPTION, _evaluate, argv=argv)


def _evaluate(_: argparse.Namespace, config: Config) -> int:
    from jaxguard.evaluate.run import evaluate  # what computes is loaded only when there is something to do

    return evaluate(config)


if __name__ == "__main__":
    sys.exit(main())
