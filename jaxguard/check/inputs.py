"""What is to be checked: from the command line, a file, or standard input."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from jaxguard.data.examples import Example
from jaxguard.data.files import SUFFIXES, Row, read_local, text
from jaxguard.utils.errors import JaxguardError

STDIN: Final = "-"


def read_inputs(prompt: str | None, response: str | None, file: str | None) -> list[Example]:
    """The one exchange of the command line, or those of a file; `-` for either is standard input.

    Raises:
        JaxguardError: nothing to check, or both; an empty text; a line that is no exchange.
    """
    if prompt == STDIN and file is None:
        prompt, file = None, STDIN
    if (prompt is None) == (file is None):
        raise JaxguardError('give either a text or --file: jaxguard check --model MODEL --policy NAME "text"')
    if file is None:
        return [_example({"prompt": prompt, "response": response}, "the text", 1)]
    if response is not None:
        raise JaxguardError("--response goes with a text; a file has its own")
    rows = list(_rows(file))
    if not rows:
        raise JaxguardError(f"{_name(file)} holds no text")
    return [_example(row, where, number) for number, (where, row) in enumerate(rows, 1)]


def _rows(file: str) -> Iterable[tuple[str, Row]]:
    """(where, row): tables by their columns, everything else by lines."""
    if file == STDIN:
        return _lines(sys.stdin, STDIN)
    path = Path(file).expanduser()
    if path.name.endswith(SUFFIXES) or not path.is_file():
        return read_local(path, ()).rows
    try:
        return _lines(path.read_text(encoding="utf-8").splitlines(), file)
    except UnicodeDecodeError as error:
        raise JaxguardError(f"{path}: not UTF-8 text ({error})") from None


def _lines(lines: Iterable[str], file: str) -> Iterator[tuple[str, Row]]:
    """JSON lines if the first one is a JSON object, else a text on each line; blank ones do not count."""
    as_json = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{_name(file)}:{number}"
        if as_json is None:
            as_json = line.lstrip().startswith("{")
        yield where, _object(line, where) if as_json else {"prompt": line.strip()}


def _object(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise JaxguardError(f"{where}: not JSON ({error}), although the first line looks like it") from None
    if not isinstance(row, dict):
        raise JaxguardError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def _example(row: Row, where: str, number: int) -> Example:
    # Its policy is not read: who writes the texts must not choose what they are judged by.
    prompt, response = text(row, "prompt", where), text(row, "response", where)
    if prompt is None or not prompt.strip():
        raise JaxguardError(f"{where} is empty: there must be a prompt to judge")
    name = row.get("id")
    return Example(id=str(number if name is None else name), source="check", prompt=prompt, response=response)


def _name(file: str) -> str:
    return "standard input" if file == STDIN else file
