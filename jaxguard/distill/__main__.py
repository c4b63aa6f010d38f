"""`jaxguard distill --config NAME`: get reasoning traces from a teacher; shorten, audit and inspect them."""

import argparse
import sys

from rich.text import Text

from jaxguard.cli import stage
from jaxguard.config import Config
from jaxguard.utils.terminal import Console

DESCRIPTION = """\
Request a reasoning trace of every training example from a teacher behind an OpenAI-style server, such as SGLang; filter the
traces, and request again what fails. Every attempt is stored in runs/NAME/traces; a run that was killed resumes when started again.
At the end runs/NAME/traces.jsonl holds the examples with their traces, ready for data.train: {kind: jsonl, path: ...}, and
with distill.budgets=[1,3] runs/NAME/traces_1.jsonl and traces_3.jsonl hold them with traces of that many sentences.

commands:
  audit    evaluate the teacher without telling it the labels: how far it agrees with people, and with itself
  inspect  the trace store as one HTML page

examples:
  jaxguard distill --config wildguard_traces
  jaxguard distill --config wildguard_traces 'distill.teacher.endpoints=[http://node1:30000/v1]'
  jaxguard distill --config wildguard_traces name=aegis_traces data.train.0.kind=aegis2 data.policy=aegis2
  jaxguard distill audit --config wildguard_traces distill.audit.examples=500
  jaxguard distill inspect --config wildguard_traces
"""
AUDIT = """\
Evaluate the teacher on a seeded sample of data.train without telling it the labels, several times each, and report how far it
agrees with people and with itself: runs/NAME/audit/audit.html, audit.md and audit.json. Resumes where it was stopped.
"""
INSPECT = """\
Write runs/NAME/traces.html: what failed and why, lengths, and a searchable list of attempts whose text stays hidden until it
is opened. One file that loads nothing; also while a distillation runs.
"""


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store", default="traces", help="which store of the run, such as traces_1; the page is called after it"
    )


# Modules are imported only when they are needed, so that --help is quick.
def _distill(_: argparse.Namespace, config: Config) -> None:
    from jaxguard.distill.run import distill
    from jaxguard.distill.store import summary_table

    result, console = distill(config), Console(soft_wrap=True)
    for traces in (result.traces, *result.shortened.values()):
        console.print(summary_table(traces.summary, traces.path.stem).rich())
        console.print(Text(f"{len(traces.tasks)} examples with traces: {traces.path}"))


def _audit(_: argparse.Namespace, config: Config) -> None:
    from jaxguard.evaluate.audit import audit, audit_table

    console = Console(soft_wrap=True)
    console.print(audit_table(audit(config)).rich())
    for name in ("audit.html", "audit.md", "audit.json"):
        console.print(Text(str(config.folder / "audit" / name)))


def _inspect(options: argparse.Namespace, config: Config) -> None:
    from jaxguard.distill.page import write_store_page

    path = config.folder / f"{options.store}.html"
    write_store_page(config.folder / options.store, path)
    Console(soft_wrap=True).print(Text(str(path)))


def _check(config: Config) -> None:
    from jaxguard.data.inputs import check_inputs

    check_inputs(config, "distill")


COMMANDS = {
    "audit": stage("distill audit", AUDIT, _audit, check=_check),
    "inspect": stage("distill inspect", INSPECT, _inspect, _inspect_options),
}
main = stage("distill", DESCRIPTION, _distill, commands=COMMANDS, check=_check)

if __name__ == "__main__":
    sys.exit(main())
