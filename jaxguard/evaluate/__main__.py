"""`jaxguard evaluate --config NAME`: score guards on benchmarks, beside the published results."""

import argparse
import sys

from jaxguard.cli import stage
from jaxguard.config import Config

DESCRIPTION = """\
Evaluate guards on benchmarks with several generations each, and compare their F1 with the paper's:
runs/NAME/evaluate/report.html and report.md.

By default the guard is the run's own export, in the modes that it was trained in, computed by JAX; with
evaluate.backend=sglang an SGLang server is started for it. Every prediction is stored in runs/NAME/evaluate/predictions: an
interrupted evaluation resumes. --config takes the config that the guard was trained with.

examples:
  jaxguard evaluate --config gemma4b_5k evaluate.limit=50
  jaxguard evaluate --config gemma4b_dual_5k evaluate.backend=sglang evaluate.server.python=sglang/bin/python
  jaxguard evaluate --config gemma4b_5k 'evaluate.guards=[{endpoint: http://node1:30000}]'
  jaxguard evaluate --config gemma4b_5k 'evaluate.guards=[{name: ours}, {name: words, format: tfidf}]'
  jaxguard evaluate --config smollm_demo 'evaluate.benchmarks=[{name: xstest_prompt, path: my/xstest.csv}]'
"""


def _evaluate(_: argparse.Namespace, config: Config) -> int:
    from jaxguard.evaluate.report.tables import summary_table
    from jaxguard.evaluate.run import evaluate  # imported late: it loads JAX
    from jaxguard.utils.terminal import Console

    evaluation, console = evaluate(config), Console()
    for title, reason in evaluation.left_out.items():
        console.print(f"{title} is left out: {reason}")
    console.print(summary_table(evaluation).rich())
    console.print(f"report: {evaluation.report}", soft_wrap=True)
    return 0


def _check(config: Config) -> None:
    from jaxguard.evaluate.run import check

    check(config)


main = stage("evaluate", DESCRIPTION, _evaluate, check=_check)

if __name__ == "__main__":
    sys.exit(main())
