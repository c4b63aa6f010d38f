"""`jaxguard STAGE ...` is `python -m jaxguard.STAGE ...`.

A stage is a package here with a `__main__.py` that has `main(argv) -> int`; nothing else lists them. Only the one that
is asked for is imported.
"""

import ast
import difflib
import importlib
import sys
from pathlib import Path

import jaxguard

USER_ERROR = 2


def main(argv: list[str] | None = None) -> int:
    """Run a stage and return its exit code; with no stage, or --help, list them."""
    arguments = sys.argv[1:] if argv is None else argv
    doors = stages()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(doors))
        return 0
    stage, *rest = arguments
    if stage == "--version":
        print(f"jaxguard {jaxguard.__version__}")
        return 0
    if stage not in doors:
        close = difflib.get_close_matches(stage, doors, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        print(f"error: no stage {stage!r}; {hint}known: {', '.join(doors)}", file=sys.stderr)
        return USER_ERROR
    code: int = importlib.import_module(f"jaxguard.{stage}.__main__").main(rest)
    return code


def stages() -> dict[str, str]:
    """Stage -> what it does, from the first line of its door's docstring."""
    doors = sorted(Path(__file__).parent.glob("*/__main__.py"))
    return {door.parent.name: _first_line(door) for door in doors}


def usage(doors: dict[str, str]) -> str:
    """How to call it, and one line for each stage."""
    width = max(map(len, doors))
    lines = [f"  {stage:<{width}}  {what}" for stage, what in doors.items()]
    return "\n".join(
        [
            "usage: jaxguard STAGE --config NAME [field=value ...]",
            "",
            *lines,
            "",
            "jaxguard STAGE --help tells more.",
        ]
    )


def _first_line(door: Path) -> str:
    """The first line of a file's docstring, without the command that it opens with."""
    line = (ast.get_docstring(ast.parse(door.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    command, separator, what = line.partition("`: ")
    return what if separator and command.startswith("`") else line


if __name__ == "__main__":
    sys.exit(main())
