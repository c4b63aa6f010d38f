"""`jaxguard distill --config NAME`: get reasoning traces from a teacher; shorten, audit and inspect them."""

import argparse
import sys
from collections.abc import Sequence

from jaxguard.cli import run_stage
from jaxguard.config import Config

DESCRIPTION = """\
Ask a teacher behind an OpenAI-style server, such as SGLang, for a reasoning trace of every training example; filter them, and
ask again for what fails. Everything is kept in runs/NAME/traces; kill it whenever you like: started again, it goes on.
At the end runs/NAME/traces.jsonl holds the examples with their traces, ready for data.train: {kind: jsonl, path: ...}, and
with distill.budgets=[1,3] runs/NAME/traces_1.jsonl and traces_3.jsonl hold them with traces of that many sentences.

commands:
  audit    how far the teacher agrees with people, and with itself, when it is not told their labels
  inspect  the trace store as one HTML page

examples:
  jaxguard distill --config wildguard_traces
  jaxguard distill --config wildguard_traces 'distill.teacher.endpoints=[http://node1:30000/v1]'
  jaxguard distill --config wildguard_traces name=aegis_traces data.train.0.kind=aegis2 data.policy=aegis2
  jaxguard distill audit --config wildguard_traces distill.audit.examples=500
  jaxguard distill inspect --config wildguard_traces
"""
AUDIT = """\
Let the teacher judge a seeded sample of data.train without the labels, several times each, and report how far it agrees with
people and with itself: runs/NAME/audit/audit.html, audit.md and audit.json. Goes on where it was stopped.
"""
INSPECT = """\
Write runs/NAME/traces.html: what was asked, what failed and why, lengths, and a searchable table of attempts whose text stays
hidden until it is clicked. One file that loads nothing; also while a distillation runs.
"""


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage(
        "distill", DESCRIPTION, _distill, argv=argv, commands={"audit": _audit_command, "inspect": _inspect_command}
    )


def _audit_command(argv: Sequence[str]) -> int:
    return run_stage("distill audit", AUDIT, _audit, argv=argv)


def _inspect_command(argv: Sequence[str]) -> int:
    return run_stage("distill inspect", INSPECT, _inspect, _extend_inspect, argv)


def _extend_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store", default="traces", help="which store of the run, such as traces_1; the page is called after it"
    )


# The teacher's client is an extra, so what needs it is imported only then.


def _distill(_: argparse.Namespace, config: Config) -> int:
    from jaxguard.distill.run import distill

    return distill(config)


def _audit(_: argparse.Namespace, config: Config) -> int:
    from jaxguard.distill.audit import audit

    return audit(config)


def _inspect(options: argparse.Namespace, config: Config) -> int:
    from jaxguard.distill.page import inspect

    return inspect(config, options.store)


if __name__ == "__main__":
    sys.exit(main())
