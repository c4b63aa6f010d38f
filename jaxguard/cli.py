"""The command line of every stage: its grammar, and how results and errors become exit codes.

`jaxguard STAGE ...` is `python -m jaxguard.STAGE ...`. A stage is a package with a `__main__.py` that has `main(argv) -> int`.

`python -m jaxguard.STAGE [COMMAND] --config NAME [field=value ...]` is the whole grammar. A stage adds options of its own only
for what is not a property of the run, such as `--show-text`.
"""

import argparse
import ast
import difflib
import errno
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

import jaxguard
from jaxguard.config import READS, Config, dump, load
from jaxguard.config.lookup import CONFIG_FOLDER, names
from jaxguard.utils.errors import JaxguardError, ProvenanceError

USER_ERROR = 2
PROVENANCE_CHANGED = 3
INTERRUPTED = 130

EPILOG = """\
overrides:
  Any field of the config, dotted, after the options or between them:
      train.epochs=3 optimizer.learning_rate=2e-6 'data.validation=[]' data.train.0.path=my/data.jsonl
  Quote what holds brackets or spaces. The last one given to a field wins. --dry-run shows what came out.

configs in {folder}/: {known}
"""


def main(argv: list[str] | None = None) -> int:
    """Run a stage and return its exit code; with no stage, or --help, list them."""
    arguments = sys.argv[1:] if argv is None else argv
    known = stages()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(known))
        return 0
    stage, *rest = arguments
    if stage == "--version":
        print(f"jaxguard {jaxguard.__version__}")
        return 0
    if stage not in known:
        close = difflib.get_close_matches(stage, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        print(f"error: no stage {stage!r}; {hint}known: {', '.join(known)}", file=sys.stderr)
        return USER_ERROR
    code: int = importlib.import_module(f"jaxguard.{stage}.__main__").main(rest)
    return code


def stages() -> dict[str, str]:
    """Stage -> what it does, from the first line of its docstring."""
    known = sorted(Path(__file__).parent.glob("*/__main__.py"))
    return {file.parent.name: _first_line(file) for file in known}


def usage(known: dict[str, str]) -> str:
    """How to call it, and one line for each stage."""
    width = max(map(len, known))
    lines = [f"  {stage:<{width}}  {what}" for stage, what in known.items()]
    return "\n".join(
        [
            "usage: jaxguard STAGE --config NAME [field=value ...]",
            "",
            *lines,
            "",
            "jaxguard STAGE --help tells more.",
        ]
    )


def _first_line(file: Path) -> str:
    """The first line of a file's docstring, without the command that it opens with."""
    line = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    command, separator, what = line.partition("`: ")
    return what if separator and command.startswith("`") else line


def run_stage(
    stage: str,
    description: str,
    main: Callable[[argparse.Namespace, Config], int | None],
    extend: Callable[[argparse.ArgumentParser], None] | None = None,
    argv: Sequence[str] | None = None,
    commands: Mapping[str, Callable[[Sequence[str]], int]] | None = None,
) -> int:
    """Parse a stage's command line, load the config, run `main`, and return the process's exit code.

    Args:
        stage: the package's name under jaxguard.
        description: what the stage does, for --help.
        main: gets the options and the resolved config; what it returns is the exit code, None meaning 0.
        extend: adds the stage's own options to the parser.
        argv: arguments without the program's name; None takes the process's.
        commands: doors behind this one: `python -m jaxguard.STAGE COMMAND ...` opens commands[COMMAND].

    Returns:
        main's code; 2 after a JaxguardError or a full disk, whose message went to stderr, 3 after an ProvenanceError;
        130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if commands and arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    parser = stage_parser(stage, description)
    if extend is not None:
        extend(parser)

    def run() -> int | None:
        options, unknown = parser.parse_known_intermixed_args(arguments)
        check_arguments(parser, unknown)
        reader = stage if stage in READS else stage.partition(" ")[0]  # `distill audit` reads what `distill` does
        config = load(options.config, options.overrides, stage=reader)
        if options.dry_run:
            sys.stdout.write(dump(config, reader))
            return 0
        return main(options, config)

    return exit_code(run)


def exit_code(run: Callable[[], int | None]) -> int:
    """What `run` returns, None meaning 0; else the code of what it raised, said on stderr: see `run_stage`."""
    try:
        return run() or 0
    except ProvenanceError as error:
        return _complain(str(error), PROVENANCE_CHANGED)
    except JaxguardError as error:
        return _complain(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _complain(
            f"the disk is full: writing {error.filename or 'a file'} failed; free some space and run again"
        )
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED


def stage_parser(stage: str, description: str) -> argparse.ArgumentParser:
    """The options that every stage has."""
    known = ", ".join(name for name in names(CONFIG_FOLDER) if "/" not in name)
    parser = argparse.ArgumentParser(
        prog=f"python -m jaxguard.{stage}",
        description=description,
        epilog=EPILOG.format(folder=CONFIG_FOLDER, known=known),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, metavar="NAME|PATH", help="a file of configs/, by name, or any YAML file"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="change a field of the config")
    return parser


def check_arguments(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
    """Refuse what the parser did not know.

    Raises:
        JaxguardError: names the first unknown option, and those that there are.
    """
    if not unknown:
        return
    option = unknown[0]
    if "=" in option and "." in option:
        raise JaxguardError(
            f"unknown option {option!r}: an override is written without dashes, as {option.lstrip('-')}"
        )
    known = ", ".join(sorted(name for name in parser._option_string_actions if name.startswith("--")))
    raise JaxguardError(f"unknown option {option!r}; known: {known}")


def _complain(message: str, code: int = USER_ERROR) -> int:
    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble(("error: ", "bold red"), message))
    return code
