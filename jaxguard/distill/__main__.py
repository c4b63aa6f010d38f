"""`python -m jaxguard.distill --config NAME`: get reasoning traces from a teacher."""

import argparse
import sys
from collections.abc import Sequence

from jaxguard.config import Config
from jaxguard.doors import run_door

DESCRIPTION = """\
Ask a teacher behind an OpenAI-style server, such as SGLang, for a reasoning trace of every training example; filter them, and
ask again for what fails. Everything is kept in runs/NAME/traces; kill it whenever you like: started again, it goes on.
At the end runs/NAME/traces.jsonl holds the examples with their traces, ready for data.train: {kind: jsonl, path: ...}.

examples:
  python -m jaxguard.distill --config wildguard_traces
  python -m jaxguard.distill --config wildguard_traces distill.teacher.endpoints=[http://node1:30000/v1]
  python -m jaxguard.distill --config wildguard_traces name=aegis_traces data.train.0.kind=aegis2 data.policy=aegis2
"""


def main(argv: Sequence[str] | None = None) -> int:
    return run_door("distill", DESCRIPTION, _distill, argv=argv)


def _distill(options: argparse.Namespace, config: Config) -> int:  # noqa: ARG001 (every door gets its options)
    from jaxguard.distill.run import distill  # the teacher's client is an extra

    return distill(config)


if __name__ == "__main__":
    sys.exit(main())
