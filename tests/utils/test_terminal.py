"""Terminal escapes in texts are shown, not sent."""

import io
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from jaxguard.cli import exit_code
from jaxguard.report.text import visible
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.progress import Progress
from jaxguard.utils.terminal import CONTROL, Console, shown

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = [
    "\x1b[2J\x1b[H",  # clears the screen
    "\x1b]0;root\x07",  # sets the title
    "\x1b]52;c;cm0gLXJmIH4=\x07",  # writes the clipboard
    "\x1b]8;;https://example.org\x1b\\click\x1b]8;;\x1b\\",
    "\x9b31m",  # one character for ESC [
    "\x1b[6n",  # makes the terminal answer, as if typed
    "safe\u202eevil",
    "\x85\u2028\x00\x7f",
]


def printed(console, *renderables):
    for renderable in renderables:
        console.print(renderable)
    return console.file.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
def test_escapes_are_shown(text, monkeypatch, capsys):
    table = RichTable(title=text, caption=text)
    table.add_column(text)
    table.add_row(text)
    console = Console(file=io.StringIO(), width=300)
    output = printed(console, text, Text(text), table, Group(text, Text(text)), f"[link=https://x]{text}[/link]")
    with Progress(text, 1, console=console) as progress:
        progress.say(text)
        progress.update(1, text)
    logging.getLogger("jaxguard.test").warning("%s", text)

    def fail():
        raise JaxguardError(text)

    assert exit_code(fail) == 2
    output += console.file.getvalue() + "".join(capsys.readouterr())
    assert not CONTROL.search(output)
    escape = re.search(r"\\(x|u)[0-9a-f]{2}", shown(text))[0]
    assert output.count(escape) > 8
    assert "[link=https://x]" in output


def test_a_terminal_gets_richs_own_escapes_alone():
    console = Console(file=io.StringIO(), width=300, force_terminal=True)
    output = printed(console, Text("\x1b]0;root", "bold red"))
    assert "\x1b]" not in output
    assert "\x1b[" in output


def test_pages_replace_what_terminals_show():
    for text in HOSTILE:
        assert not CONTROL.search(visible(text))
        assert "\ufffd" in visible(text)


def test_warnings_of_a_command_are_shown(tmp_path):
    code = (
        "import logging; from jaxguard.cli import exit_code; "
        "exit_code(lambda: logging.getLogger('jaxguard.x').warning('\\x1b[2J bread'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "\\x1b[2J bread\n"


def test_whatever_is_printed_goes_through_one_console():
    for path in (ROOT / "jaxguard").rglob("*.py"):
        if path.name != "terminal.py":
            assert not re.search(r"rich\.console import .*\bConsole\b", path.read_text()), path
