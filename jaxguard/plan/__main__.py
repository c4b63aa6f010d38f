"""`python -m jaxguard.plan --config NAME --target a100-80gb:8`: will the run's step fit there, and what does it cost?"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from jaxguard.config import Config
from jaxguard.disk import write_atomically
from jaxguard.doors import run_door
from jaxguard.plan.compile import compile_step, find_spec
from jaxguard.plan.estimate import work_of
from jaxguard.plan.show import as_json, show
from jaxguard.plan.targets import find_cluster, read_targets

DOES_NOT_FIT = 1


def plan(options: argparse.Namespace, config: Config) -> int:
    """Compile for every target, print, and say by the exit code whether all fit."""
    console = Console()
    spec, work = find_spec(config.model), work_of(config, options.price)
    plans = []
    for cluster in [find_cluster(text) for text in options.target]:
        with console.status(f"compiling {config.name} for {cluster.name} …"):
            found = compile_step(config, spec, cluster, options.rows or config.train.batch_size, options.targets)
        console.print(show(found, work))
        plans.append((found, work))
    if options.json:
        write_atomically(options.json, json.dumps(as_json(plans), indent=1) + "\n")
    return 0 if all(found.fits for found, _ in plans) else DOES_NOT_FIT


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target",
        required=True,
        action="append",
        metavar="NAME:SHAPE",
        help="what to compile for, may be given again: a100-80gb:8, h100:4x8 (hosts x GPUs of each), v5e:16, v5p:8x8x16; "
        f"known: {', '.join(read_targets())}",
    )
    parser.add_argument(
        "--rows", type=int, help="rows of the batch; default: train.batch_size, as if nothing was packed"
    )
    parser.add_argument("--targets", type=int, help="target tokens of a row; default: all of them")
    parser.add_argument("--price", type=float, metavar="DOLLARS", help="of a device for an hour")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plans there too")


def main(argv: list[str] | None = None) -> int:
    return run_door("plan", "Compile the training step for hardware that is not here.", plan, _options, argv)


if __name__ == "__main__":
    sys.exit(main())
