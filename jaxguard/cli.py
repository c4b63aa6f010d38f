"""The command line of every stage: its grammar, its completion, and how results and errors become exit codes.

`jaxguard STAGE ...` is `python -m jaxguard.STAGE ...`. A stage is a package with a `__main__.py` that has `main(argv) -> int`.

`jaxguard STAGE [COMMAND] --config NAME [field=value ...]` is the grammar of stages that read a config. They have options of
their own only for what is not a property of the run, such as `--show-text`.
"""

import argparse
import ast
import errno
import importlib
import os
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

import jaxguard
from jaxguard.config import READS, Config, dump, load
from jaxguard.config.base import Schema, inner_schema
from jaxguard.config.lookup import CONFIG_FOLDER, names, nearest
from jaxguard.utils.errors import JaxguardError, ProvenanceError

USER_ERROR = 2
PROVENANCE_CHANGED = 3
INTERRUPTED = 130

EPILOG = """\
overrides:
  Any field of the config that the stage reads, dotted, after the options or between them:
      train.epochs=3 optimizer.learning_rate=2e-6 'data.validation=[]' data.train.0.path=my/data.jsonl
  Quote what holds brackets or spaces. The last one given to a field wins. --dry-run shows the result.

configs: {known}
"""


def main(argv: list[str] | None = None) -> int:
    """Run a stage and return its exit code; with no stage, or --help, list them."""
    arguments = sys.argv[1:] if argv is None else argv
    known = stages()
    if _completing():
        arguments = _next_word(known)
        if not arguments:
            parser = argparse.ArgumentParser()
            parser.add_argument("stage", choices=known)
            complete(parser)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(known))
        return 0
    stage, *rest = arguments
    if stage == "--version":
        print(f"jaxguard {jaxguard.__version__}")
        return 0
    if stage not in known:
        print(f"error: no stage {stage!r}; {nearest(stage, known)}known: {', '.join(known)}", file=sys.stderr)
        return USER_ERROR
    code: int = importlib.import_module(f"jaxguard.{stage}.__main__").main(rest)
    return code


def stages() -> dict[str, str]:
    """Return stage -> what it does, from the first line of its docstring."""
    known = sorted(Path(__file__).parent.glob("*/__main__.py"))
    return {file.parent.name: _first_line(file) for file in known}


def usage(known: Mapping[str, str]) -> str:
    """Return how to call it, and one line for each stage."""
    width = max(map(len, known))
    lines = [f"  {stage:<{width}}  {what}" for stage, what in known.items()]
    first = "usage: jaxguard STAGE --config NAME [field=value ...]"
    return "\n".join([first, "", *lines, "", "jaxguard STAGE --help tells more."])


def _first_line(file: Path) -> str:
    """Return the first line of a file's docstring, without the command that it begins with."""
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
        stage: a key of READS, or one with a command after it.
        description: what the stage does, for --help.
        main: gets the options and the resolved config; what it returns is the exit code, None meaning 0.
        extend: adds the stage's own options to the parser.
        argv: arguments without the program's name; None takes the process's.
        commands: `jaxguard STAGE COMMAND ...` calls commands[COMMAND].

    Returns:
        As `exit_code`.
    """
    arguments = sys.argv[1:] if argv is None else argv
    commands = commands or {}
    if _completing():
        arguments = _next_word(commands)
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    reader = stage if stage in READS else stage.partition(" ")[0]  # `distill audit` reads what `distill` does
    configs = [name for name in names(CONFIG_FOLDER) if "/" not in name]
    parser = command_parser(stage, description, EPILOG.format(known=", ".join(configs)))
    config_option = parser.add_argument(
        "--config", required=True, metavar="NAME|PATH", help="a file of configs/, by name, or any YAML file"
    )
    suggest(config_option, lambda _: configs)
    parser.add_argument("--dry-run", action="store_true", help="print what the stage reads of the config, and stop")
    overrides = parser.add_argument("overrides", nargs="*", metavar="field=value", help="change a field of the config")
    suggest(overrides, lambda prefix: [*commands, *_assignments(Config, READS[reader], "=" in prefix)])
    if extend is not None:
        extend(parser)

    def run(options: argparse.Namespace) -> int | None:
        config = load(options.config, options.overrides, stage=reader)
        if options.dry_run:
            sys.stdout.write(dump(config, reader))
            return 0
        return main(options, config)

    return run_command(parser, run, arguments)


def command_parser(command: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """Return the parser of a command, such as `data build`, without arguments."""
    return argparse.ArgumentParser(
        prog=f"jaxguard {command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def run_command(
    parser: argparse.ArgumentParser,
    main: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse a command line, with positional arguments before, after or between the options, and run `main`.

    Returns:
        As `exit_code`.
    """
    complete(parser)

    def run() -> int | None:
        options, unknown = parser.parse_known_intermixed_args(argv)
        _refuse(parser, unknown)
        return main(options)

    return exit_code(run)


def exit_code(run: Callable[[], int | None]) -> int:
    """Return what `run` returns, None meaning 0, or the code of what it raised, whose message goes to stderr.

    2 is a JaxguardError or a full disk, 3 a ProvenanceError, 130 is Ctrl-C.
    """
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
        return _complain("interrupted", INTERRUPTED)


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell's request for completions and exit; without one, do nothing."""
    if _completing():
        import argcomplete

        argcomplete.autocomplete(parser)


def suggest(argument: argparse.Action, values: Callable[[str], Iterable[str]]) -> None:
    """Complete an argument with values, a function of what is typed of it."""
    vars(argument)["completer"] = lambda prefix, **_: list(values(prefix))


def _completing() -> bool:
    return "_ARGCOMPLETE" in os.environ


def _next_word(known: Iterable[str]) -> list[str]:
    """Return the finished word that follows the command on the line to complete, if it is known.

    It then belongs to the command: argcomplete takes the words after the first _ARGCOMPLETE ones for the parser's.
    """
    line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    count = int(os.environ["_ARGCOMPLETE"])
    word = [*line.split(), ""][count] if len(line.split()) + line.endswith(" ") > count + 1 else ""
    if word not in known:
        return []
    os.environ["_ARGCOMPLETE"] = str(count + 1)
    return [word]


def _assignments(schema: type[Schema], fields: Iterable[str], with_values: bool, prefix: str = "") -> Iterator[str]:
    """Yield `field=` for every dotted field, or `field=value` for each value of those that have few."""
    for name in fields:
        annotation = schema.model_fields[name].annotation
        inner = inner_schema(annotation)
        if inner is not None:
            index = "0." if typing.get_origin(annotation) is tuple else ""
            yield from _assignments(inner, inner.model_fields, with_values, f"{prefix}{name}.{index}")
        elif with_values:
            values = ("true", "false") if annotation is bool else typing.get_args(annotation)
            yield from (f"{prefix}{name}={value}" for value in values if isinstance(value, str))
        else:
            yield f"{prefix}{name}="


def _refuse(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
    """Raise a JaxguardError that names the first unknown option, and those that there are."""
    if not unknown:
        return
    option = unknown[0]
    if "=" in option and "." in option:
        raise JaxguardError(f"unknown option {option!r}: an override is written without dashes: {option.lstrip('-')}")
    known = ", ".join(sorted(name for name in parser._option_string_actions if name.startswith("--")))
    raise JaxguardError(f"unknown option {option!r}; known: {known}")


def _complain(message: str, code: int = USER_ERROR) -> int:
    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble(("error: ", "bold red"), message))
    return code
