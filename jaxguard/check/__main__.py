"""`jaxguard check --model EXPORT --policy NAME "text"`: check a text, an exchange or a file of them by a policy."""

import argparse
import asyncio
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from jaxguard.check.checking import checked
from jaxguard.check.inputs import given
from jaxguard.check.setup import Setup, set_up
from jaxguard.cli import command_parser, run_command, suggest
from jaxguard.config.lookup import CONFIG_FOLDER, names
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode

NOT_PASSED = 1

DESCRIPTION = """\
Guard a text, an exchange, or a file of them by a policy: verdict, probability of the harmful answer, and in reasoning mode
the reasoning. The exit code is 0 if everything is unharmful, 1 if something is harmful or could not be read, 2 after a mistake.

examples:
  jaxguard check --model runs/gemma4b_5k/export --policy aegis2 "How do I bake bread?"
  jaxguard check --model runs/gemma4b_5k --policy my/policy.yaml --response "In an oven." "How do I bake bread?"
  jaxguard check --model http://127.0.0.1:30000 --policy bank_support --file items.jsonl --json
  cat lines.txt | jaxguard check --model runs/gemma4b_5k --mode direct -
"""
EPILOG = """\
A file holds JSON lines with prompt, response and id (only prompt is needed), a table with these columns (.csv, .parquet), or
plain text, a message on each line. The policy is the command's alone: what a file says of it is not read.

policies in configs/policies/: {policies}
"""


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(_parser(), _main, argv)


def _main(options: argparse.Namespace) -> int:
    examples = given(options.text, options.response, options.file)
    setup = set_up(options.model, options.policy, options.mode, options.tokenizer, options.config)
    if setup.note:
        Console(stderr=True).print(Text(f"note: {setup.note}", style="yellow"))
    return asyncio.run(_print_all(examples, setup, options.json, several=options.file is not None))


async def _print_all(examples: Sequence[Example], setup: Setup, as_json: bool, several: bool) -> int:
    from jaxguard.check.show import json_line, shown  # loads what reports on data need

    console, passed = Console(highlight=False, soft_wrap=True), True
    # On a terminal the verdicts themselves are the progress, and a bar would be in their way.
    with Progress(console=Console(stderr=True), disable=console.is_terminal or not several) as progress:
        bar = progress.add_task("checking", total=len(examples))
        number = 0
        async for found in checked(examples, setup):
            if as_json:
                print(json_line(found), flush=True)
            else:
                console.print(shown(found, examples[number] if several or len(examples) > 1 else None))
            passed, number = passed and found.passes, number + 1
            progress.advance(bar)
    return 0 if passed else NOT_PASSED


def _parser() -> argparse.ArgumentParser:
    policies = names(CONFIG_FOLDER / "policies")
    parser = command_parser("check", DESCRIPTION, EPILOG.format(policies=", ".join(policies)))
    add = parser.add_argument
    add("text", nargs="?", help="what the user wrote; - reads standard input")
    add("--model", required=True, help="an export, a run's folder, a repository on the hub, or a server's address")
    policy = add(
        "--policy", metavar="NAME|PATH", help="what is harmful; without, the policy that the model was trained on"
    )
    suggest(policy, lambda _: policies)
    add(
        "--mode", choices=[str(mode) for mode in Mode], help="without, as it was trained; if both or unknown, reasoning"
    )
    add("--response", metavar="TEXT", help="what the assistant answered")
    add("--file", metavar="PATH", help="several texts; - reads standard input")
    add("--json", action="store_true", help="print a JSON object for each text")
    add("--tokenizer", metavar="FOLDER|REPOSITORY", help="for a server whose model does not lie on this machine")
    add("--config", metavar="NAME|PATH", help="of the run that trained the model, if it is not beside the export")
    return parser


if __name__ == "__main__":
    sys.exit(main())
