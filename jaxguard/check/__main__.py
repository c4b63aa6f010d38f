"""`jaxguard check --model EXPORT --policy NAME "text"`: check a text, an exchange or a file of them by a policy."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from jaxguard.cli import Command, suggest
from jaxguard.config.base import CONFIG_FOLDER, names
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import TITLES, single_message
from jaxguard.guards.modes import MODES
from jaxguard.report.text import visible
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import nearest, parse_json
from jaxguard.utils.progress import track
from jaxguard.utils.terminal import Console

if TYPE_CHECKING:  # it loads transformers, which neither --help nor a mistake has to wait for
    from jaxguard.guards.result import CheckResult

NOT_PASSED = 1

DESCRIPTION = """\
Check a text, an exchange, or a file of them against a policy: verdict, probability of harmful, and in reasoning mode the
reasoning. The exit code is 0 if everything is unharmful, 1 if something is harmful, unparsable or not judged, 2 after a mistake.

examples:
  jaxguard check --model runs/gemma4b_5k/export --policy aegis2 "How do I bake bread?"
  jaxguard check --model runs/gemma4b_5k --policy my/policy.yaml --response "In an oven." "How do I bake bread?"
  jaxguard check --model http://127.0.0.1:30000 --policy bank_support --file items.jsonl --json
  cat lines.txt | jaxguard check --model runs/gemma4b_dual_5k --mode direct -
"""
EPILOG = """\
A file holds JSON lines with prompt, response and id (only prompt is needed), a table with these columns (.csv, .parquet), or
plain text, a message on each line, which ends with a line feed. A policy that a file names is not read.

policies in configs/policies/: {policies}
"""
_STYLES = {"harmful": "bold red", "unharmful": "bold green"}
_BEGINNING = 72


def _check(options: argparse.Namespace) -> int:
    from jaxguard.guards.guard import Guard

    examples = read_inputs(options.text, options.response, options.file)
    console, passed, several = Console(soft_wrap=True), True, options.file is not None
    choices = (options.policy, options.mode, options.tokenizer, options.config, options.operating_point)
    with Guard.load(options.model, *choices) as guard:
        if guard.warning:
            Console(stderr=True).print(Text(f"note: {guard.warning}", style="yellow"))
        # On a terminal the verdicts themselves are the progress, and a bar would be in their way.
        tracked = examples if console.is_terminal else track(examples, "checking", least=2)
        for example, result in zip(tracked, guard.stream(examples), strict=True):
            if options.json:  # ASCII only; a question that does not apply is null
                words = {str(q): getattr(result.verdict, q) if q in result.questions else None for q in TITLES}
                tree = {
                    "id": result.id,
                    **words,
                    "passes": result.passes,
                    "probabilities": {q: None if p is None else round(p, 6) for q, p in result.probabilities.items()},
                    "decided_by": result.decided_by,
                    "direct_probabilities": {q: p and round(p, 6) for q, p in result.direct_probabilities.items()},
                    "operating_point": result.operating_point,
                    "thresholds": {q: None if t is None else round(t, 6) for q, t in result.thresholds.items()},
                    "reasoning": result.reasoning,
                    "problems": list(result.problems),
                    "seconds": round(result.seconds, 3),
                }
                print(json.dumps(tree), flush=True)
            else:
                console.print(render(result, example if several else None))
            passed = passed and result.passes
    return 0 if passed else NOT_PASSED


def read_inputs(prompt: str | None, response: str | None, file: str | None) -> list[Example]:
    """The one exchange of the command line, or those of a file; `-` for either is standard input.

    JaxguardError: nothing to check, or both; an empty text; a line that is no exchange.
    """
    from jaxguard.data.files import text

    if prompt == "-" and file is None:
        prompt, file = None, "-"
    if (prompt is None) == (file is None):
        raise JaxguardError('give either a text or --file: jaxguard check --model MODEL --policy NAME "text"')
    if file is not None and response is not None:
        raise JaxguardError("--response goes with a text; a file has its own")
    rows = [("the text", {"prompt": prompt, "response": response})] if file is None else list(_rows(file))
    if not rows:
        raise JaxguardError(f"{'standard input' if file == '-' else file} holds no text")
    examples = []
    for number, (where, row) in enumerate(rows, 1):
        # Its policy is not read: who writes the texts must not choose what they are judged by.
        prompt, response, own_id = text(row, "prompt", where), text(row, "response", where), row.get("id")
        if "prompt" not in row:
            hint = nearest("prompt", row) or "rename the column that holds what the user wrote; "
            raise JaxguardError(f"{where}: no column 'prompt'; {hint}it has: {', '.join(map(str, row))}")
        if prompt is None or not prompt.strip():
            raise JaxguardError(f"{where} is empty: there must be a prompt to judge")
        examples.append(Example(str(number if own_id is None else own_id), "check", single_message(prompt), response))
    return examples


def _rows(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a table, of JSON lines if the first one is a JSON object, else of a text on each line."""
    from jaxguard.data.files import SUFFIXES, Row, read_local

    path = Path(file).expanduser()
    if file != "-" and (path.name.endswith(SUFFIXES) or not path.is_file()):
        yield from read_local(path, ()).rows
        return
    name = "standard input" if file == "-" else str(path)
    try:
        # Bytes: only a line feed ends a message, no other character that Python takes for the end of a line.
        lines = (sys.stdin.buffer.read() if file == "-" else path.read_bytes()).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise JaxguardError(f"{name}: not UTF-8 text ({error})") from None
    filled = [(f"{name}:{number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    for where, line in filled:
        yield where, parse_json(line, Row, where) if filled[0][1].startswith("{") else {"prompt": line}


def render(result: "CheckResult", example: Example | None = None) -> RenderableType:
    """A line for each question, the problems, and the reasoning; an example puts its id and beginning above.

    Whatever a text or a model says is shown as text and never interpreted.
    """
    width = max((len(TITLES[question]) for question in result.questions), default=0)
    parts: list[RenderableType] = []
    if example is not None:
        line = " ".join(visible(f"{result.id}: {example.prompt}").split())
        parts.append(Text(line if len(line) <= _BEGINNING else f"{line[:_BEGINNING]}…", style="bold"))
    for question in result.questions:
        word = getattr(result.verdict, question) or "None"
        verdict = Text(f"{TITLES[question]:<{width}}  ")
        verdict.append(f"{word:<10}", style=_STYLES.get(word, "bold"))
        probability, threshold = result.probabilities[question], result.thresholds[question]
        verdict.append("" if probability is None else f"  {probability:.3f}")
        if (direct := result.direct_probabilities.get(question)) is not None:
            verdict.append(f"  {direct:.3f} directly")
        parts.append(
            verdict.append("" if threshold is None else f"  threshold {threshold:.3f} ({result.operating_point})")
        )
    parts += [Text(visible(problem), style="yellow") for problem in result.problems]
    if result.reasoning:
        parts.append(Text("\n".join(f"  {line}" for line in visible(result.reasoning).splitlines()), style="dim"))
    return Group(*parts)


def _options(parser: argparse.ArgumentParser) -> None:
    policies = names(CONFIG_FOLDER / "policies")
    parser.epilog = EPILOG.format(policies=", ".join(policies))
    add = parser.add_argument
    add("text", nargs="?", help="what the user wrote; - reads standard input")
    add("--model", required=True, help="an export, a run's folder, a repository on the hub, or a server's address")
    policy = add("--policy", metavar="NAME|PATH", help="what is harmful; without, the policy the model was trained on")
    suggest(policy, lambda _: policies)
    add(
        "--mode",
        choices=list(map(str, MODES)),
        help="auto: direct where certified; without, as it was trained, else reasoning",
    )
    points = (
        "threshold in the export's guard.json: f1, a false-positive rate such as 0.01, or words for the answer's own"
    )
    add("--operating-point", metavar="NAME", help=f"{points}; without, f1 where there is one")
    add("--response", metavar="TEXT", help="what the assistant answered")
    add("--file", metavar="PATH", help="several texts; - reads standard input")
    add("--json", action="store_true", help="print a JSON object for each text")
    add("--tokenizer", metavar="FOLDER|REPOSITORY", help="for a server whose model does not lie on this machine")
    add("--config", metavar="NAME|PATH", help="of the run that trained the model, if it is not beside the export")


main = Command("check", DESCRIPTION, _check, _options)

if __name__ == "__main__":
    sys.exit(main())
