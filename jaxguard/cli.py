"""The command line of every stage: its grammar, its completion, and how results and errors become exit codes.

`jaxguard STAGE ...` is `python -m jaxguard.STAGE ...`. A stage is a package whose `__main__.py` has a Command named `main`.
"""

import argparse
import ast
import errno
import importlib
import os
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import argcomplete
from rich.text import Text

import jaxguard
from jaxguard.config import READS, Config, dump, load
from jaxguard.config.base import CONFIG_FOLDER, find_yaml, names
from jaxguard.utils.errors import JaxguardError, ProvenanceError
from jaxguard.utils.parse import find_field, leaves, nearest
from jaxguard.utils.terminal import Console, show_warnings

USER_ERROR = 2
_FILE_ERRORS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space and run again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change its permissions, or choose another path"),
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP), "choose another path"
    ),
}
PROVENANCE_CHANGED = 3
INTERRUPTED = 130
BROKEN_PIPE = 141
COMPLETING = "_ARGCOMPLETE" in os.environ
"""Whether the shell asks for completions."""

EPILOG = """\
overrides:
  Any field of the config that the stage reads, dotted, after the options or between them:
      train.epochs=3 optimizer.learning_rate=2e-6 'data.validation=[]' data.train.0.path=my/data.jsonl
  Quote what holds brackets or spaces. The last one given to a field wins. --dry-run shows the result.

configs: {known}
"""


@dataclass(frozen=True)
class Command:
    """A command line, `jaxguard NAME [COMMAND] ...`; called with its arguments, it returns the process's exit code.

    Attributes:
        name: what follows `jaxguard`, such as `data build`.
        description: what it does, for --help.
        run: gets the parsed options; what it returns is the exit code, None meaning 0.
        add_options: adds the options to the parser.
        commands: `jaxguard NAME COMMAND ...` calls commands[COMMAND].
    """

    name: str
    description: str
    run: Callable[[argparse.Namespace], int | None]
    add_options: Callable[[argparse.ArgumentParser], None]
    commands: Mapping[str, "Command"] = field(default_factory=dict)

    def parser(self) -> argparse.ArgumentParser:
        parser = _Parser(
            prog=f"jaxguard {self.name}",
            description=self.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_options(parser)
        return parser

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Parse arguments, by default the process's, with positional ones before, after or between the options, and run."""
        arguments = sys.argv[1:] if argv is None else argv
        if COMPLETING:
            arguments = _next_word(self.commands)
        if arguments and arguments[0] in self.commands:
            return self.commands[arguments[0]](arguments[1:])
        parser = self.parser()
        argcomplete.autocomplete(parser)

        def parse_and_run() -> int | None:
            try:
                # What follows `--` is text, whatever it looks like; the other method would read it as options.
                parse = parser.parse_known_args if "--" in arguments else parser.parse_known_intermixed_args
                options, unknown = parse(arguments)
            except UsageError as error:
                hints = (f"; a config is named by --config {word}" for word in arguments if _is_config(word))
                hint = next(hints, "") if "--config" in str(error) else ""
                raise JaxguardError(f"{error}{hint}; jaxguard {self.name} --help lists the options") from None
            if not unknown:
                return self.run(options)
            if not unknown[0].startswith("-"):
                hint = f"quote a text that has spaces; jaxguard {self.name} --help lists the options"
                raise JaxguardError(f"there is one word too many, {unknown[0]!r}: {hint}")
            raise JaxguardError(f"unknown option {unknown[0]!r}; {self._option_hint(parser, unknown[0], arguments)}")

        return exit_code(parse_and_run)

    def _option_hint(self, parser: argparse.ArgumentParser, unknown: str, arguments: Sequence[str]) -> str:
        """Say how the field that an unknown option stands for is written, if there is one, else which options there are."""
        known = sorted(name for name in parser._option_string_actions if name.startswith("--"))
        name, equals, value = unknown.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if any(action.dest == "overrides" for action in parser._actions):
            field = name if "." in name else find_field(Config, name)
            following = "".join(arguments[list(arguments).index(unknown) + 1 :][:1])
            if field:
                return f"an override is written without dashes: {field}={value if equals else following}"
        return f"{nearest(unknown, known)}known: {', '.join(known)}"


class UsageError(Exception):
    """What argparse says of a command line that it cannot parse."""


class _Parser(argparse.ArgumentParser):
    """A parser that raises its message rather than to end the process."""

    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(message)


def _is_config(word: str) -> bool:
    """Whether a word of the command line names a config."""
    try:
        return "=" not in word and bool(find_yaml(word, CONFIG_FOLDER, "config"))
    except JaxguardError:
        return False


def stage(
    name: str,
    description: str,
    run: Callable[[argparse.Namespace, Config], int | None],
    add_options: Callable[[argparse.ArgumentParser], None] = lambda _: None,
    commands: Mapping[str, Command] | None = None,
    check: Callable[[Config], object] = lambda _: None,
) -> Command:
    """Return the command of a stage, `jaxguard NAME [COMMAND] --config NAME [field=value ...]`.

    Its name is a key of READS, or one with a command after it. `run` also gets the resolved config. Options are only for what
    is not a property of the run, such as `--show-text`. `check` raises what is wrong and costs nothing to know: before `run`, and
    after --dry-run has printed the config.
    """
    reader = name if name in READS else name.partition(" ")[0]  # `distill audit` reads what `distill` does

    def add_all_options(parser: argparse.ArgumentParser) -> None:
        configs = [name for name in names(CONFIG_FOLDER) if "/" not in name]
        parser.epilog = EPILOG.format(known=", ".join(configs))
        config = parser.add_argument(
            "--config", required=True, metavar="NAME|PATH", help="a file of configs/, by name, or any YAML file"
        )
        suggest(config, lambda _: configs)
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="print what the stage reads of the config, check policy, local paths and mesh, and stop",
        )
        overrides = parser.add_argument(
            "overrides", nargs="*", metavar="field=value", help="change a field of the config"
        )
        suggest(overrides, lambda prefix: [*(commands or ()), *_assignments(READS[reader], "=" in prefix)])
        add_options(parser)

    def load_and_run(options: argparse.Namespace) -> int | None:
        config = load(options.config, options.overrides, stage=reader)
        if options.dry_run:
            sys.stdout.write(dump(config, reader))
            sys.stdout.flush()
        check(config)
        return 0 if options.dry_run else run(options, config)

    return Command(name, description, load_and_run, add_all_options, commands or {})


def main(argv: Sequence[str] | None = None) -> int:
    """Run a stage and return its exit code; with no stage, or --help, list them."""
    arguments = sys.argv[1:] if argv is None else argv
    known = stages()
    if COMPLETING:
        arguments = _next_word(known)
        if not arguments:
            parser = argparse.ArgumentParser()
            parser.add_argument("stage", choices=known)
            argcomplete.autocomplete(parser)
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, known))
        print("usage: jaxguard STAGE --config NAME [field=value ...]\n")
        print(*(f"  {stage:<{width}}  {summary}" for stage, summary in known.items()), sep="\n")
        print("\njaxguard STAGE --help tells more.")
        return 0
    if arguments[0] == "--version":
        print(f"jaxguard {jaxguard.__version__}")
        return 0
    if arguments[0] not in known:
        hint = nearest(arguments[0], known)
        return _complain(f"no stage {arguments[0]!r}; {hint}known: {', '.join(known)}")
    command: Command = importlib.import_module(f"jaxguard.{arguments[0]}.__main__").main
    return command(arguments[1:])


def stages() -> dict[str, str]:
    """Return stage -> what it does: the first line of its docstring, without the command that it begins with."""
    summaries = {}
    for file in sorted(Path(__file__).parent.glob("*/__main__.py")):
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        summaries[file.parent.name] = docstring.partition("\n")[0].partition("`: ")[2]
    return summaries


def exit_code(run: Callable[[], int | None]) -> int:
    """Return what `run` returns, None meaning 0, or the code of what it raised, whose message goes to stderr.

    2 is a JaxguardError or a file that cannot be read or written, 3 a ProvenanceError, 130 is Ctrl-C, 141 a closed pipe.
    """
    show_warnings()
    try:
        return run() or 0
    except JaxguardError as error:
        return _complain(str(error), PROVENANCE_CHANGED if isinstance(error, ProvenanceError) else USER_ERROR)
    except BrokenPipeError:  # of `jaxguard ... | head`: nobody reads what is left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in _FILE_ERRORS:
            raise
        return _complain(
            f"cannot read or write {error.filename or 'a file'}: {error.strerror}; {_FILE_ERRORS[error.errno]}"
        )
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)


def _complain(message: str, code: int = USER_ERROR) -> int:
    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble(("error: ", "bold red"), message))
    return code


def suggest(argument: argparse.Action, values: Callable[[str], Iterable[str]]) -> None:
    """Complete an argument with values, a function of what is typed of it."""
    vars(argument)["completer"] = lambda prefix, **_: list(values(prefix))


def _next_word(known: Iterable[str]) -> list[str]:
    """Return the finished word that follows the command on the line to complete, if it is known.

    It then belongs to the command: argcomplete takes the words after the first _ARGCOMPLETE ones for the parser's.
    """
    start, line = int(os.environ["_ARGCOMPLETE"]), os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    finished = line.split() if line.endswith(" ") else line.split()[:-1]
    words = [word for word in finished[start : start + 1] if word in known]
    os.environ["_ARGCOMPLETE"] = str(start + len(words))
    return words


def _assignments(fields: Iterable[str], with_values: bool) -> Iterator[str]:
    """Yield `field=` for every dotted field, or `field=value` for each value of those that have few."""
    for name, annotation in leaves(Config, fields):
        values = ("true", "false") if annotation is bool else typing.get_args(annotation)
        yield from (f"{name}={value}" for value in values if isinstance(value, str)) if with_values else (f"{name}=",)
