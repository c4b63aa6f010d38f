"""`jaxguard check --model EXPORT --policy NAME "text"`: check a text, an exchange or a file of them by a policy."""

import argparse
import sys

from rich.console import Console
from rich.text import Text

from jaxguard.check.inputs import read_inputs
from jaxguard.cli import Command, suggest
from jaxguard.config.base import CONFIG_FOLDER, names
from jaxguard.data.format.dialogue import Mode
from jaxguard.guards.guard import Guard, set_up
from jaxguard.utils.progress import track

NOT_PASSED = 1

DESCRIPTION = """\
Check a text, an exchange, or a file of them against a policy: verdict, probability of harmful, and in reasoning mode the
reasoning. The exit code is 0 if everything is unharmful, 1 if something is harmful or unparsable, 2 after a mistake.

examples:
  jaxguard check --model runs/gemma4b_5k/export --policy aegis2 "How do I bake bread?"
  jaxguard check --model runs/gemma4b_5k --policy my/policy.yaml --response "In an oven." "How do I bake bread?"
  jaxguard check --model http://127.0.0.1:30000 --policy bank_support --file items.jsonl --json
  cat lines.txt | jaxguard check --model runs/gemma4b_5k --mode direct -
"""
EPILOG = """\
A file holds JSON lines with prompt, response and id (only prompt is needed), a table with these columns (.csv, .parquet), or
plain text, a message on each line. A policy that a file names is not read.

policies in configs/policies/: {policies}
"""


def _check(options: argparse.Namespace) -> int:
    examples = read_inputs(options.text, options.response, options.file)
    setup = set_up(options.model, options.policy, options.mode, options.tokenizer, options.config)
    if setup.warning:
        Console(stderr=True).print(Text(f"note: {setup.warning}", style="yellow"))
    from jaxguard.check.render import json_line, render  # loads what reports on data need

    console, passed, several = Console(highlight=False, soft_wrap=True), True, options.file is not None
    with Guard(setup) as guard:
        # On a terminal the verdicts themselves are the progress, and a bar would be in their way.
        tracked = examples if console.is_terminal else track(examples, "checking", least=2)
        for example, result in zip(tracked, guard.stream(examples), strict=True):
            if options.json:
                print(json_line(result), flush=True)
            else:
                console.print(render(result, example if several else None))
            passed = passed and result.passes
    return 0 if passed else NOT_PASSED


def _options(parser: argparse.ArgumentParser) -> None:
    policies = names(CONFIG_FOLDER / "policies")
    parser.epilog = EPILOG.format(policies=", ".join(policies))
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


main = Command("check", DESCRIPTION, _check, _options)

if __name__ == "__main__":
    sys.exit(main())
