"""`python -m jaxguard.plan --config NAME --target a100-80gb:8`: will the run's step fit there?"""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from jaxguard.config import Config
from jaxguard.doors import run_door
from jaxguard.plan.compile import Plan, compile_step, find_spec
from jaxguard.plan.targets import GIB, TARGETS

DOES_NOT_FIT = 1


def plan(options: argparse.Namespace, config: Config) -> int:
    """Compile, print, and say by the exit code whether it fits."""
    console = Console()
    with console.status(f"compiling {config.name} for {options.target} …"):
        rows = options.rows or config.train.batch_size
        result = compile_step(config, find_spec(config.model), options.target, rows, options.targets)
    console.print(show(config, result))
    return 0 if result.fits else DOES_NOT_FIT


def show(config: Config, result: Plan) -> Table:
    """The plan as a table of facts."""
    table = Table(title=f"{config.name} on {result.target}", show_header=False)
    rows = {
        "batch": f"{result.shape.rows} rows of {result.shape.tokens:,} tokens, {result.shape.targets:,} targets each",
        "mesh": ", ".join(f"{axis} {size}" for axis, size in result.mesh.items()),
        "attention": result.attention,
        "state and batch": f"{result.arguments / GIB:.2f} GiB a device",
        "temporaries": f"{result.temporaries / GIB:.2f} GiB",
        "peak": f"{result.peak / GIB:.2f} GiB of {result.usable / GIB:.1f} usable: {_verdict(result)}",
        "collectives": _counted(result.collectives),
        "vendor kernels": _counted(result.kernels),
        "compiled in": f"{result.seconds:.0f} s",
    }
    for fact, value in rows.items():
        table.add_row(fact, value)
    return table


def _verdict(result: Plan) -> str:
    return "[green]fits[/]" if result.fits else "[red]does not fit[/]"


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target", required=True, metavar="NAME:DEVICES", help=f"what to compile for; known: {', '.join(TARGETS)}"
    )
    parser.add_argument(
        "--rows", type=int, help="rows of the batch; default: train.batch_size, as if nothing was packed"
    )
    parser.add_argument("--targets", type=int, help="target tokens of a row; default: all of them")


def main(argv: list[str] | None = None) -> int:
    return run_door("plan", "Compile the training step for hardware that is not here.", plan, _options, argv)


if __name__ == "__main__":
    sys.exit(main())
