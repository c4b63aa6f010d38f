"""`python -m jaxguard.plan --config NAME --target a100-80gb:8`: will the run's step fit there, and what does it cost?"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from jaxguard.cli import exit_code, run_stage
from jaxguard.config import Config, load
from jaxguard.config.hardware import GIB
from jaxguard.plan.compile import OutOfMemoryError, compile_step, find_spec
from jaxguard.plan.page import page
from jaxguard.plan.search import search
from jaxguard.plan.show import Planned, Refused, as_json, line, ranking, remedies, show
from jaxguard.plan.sweep import Place, Point, places, read_sweep, run_sweep
from jaxguard.plan.sweep_page import figure, markdown
from jaxguard.plan.sweep_page import page as page_of_sweep
from jaxguard.plan.targets import find_cluster, read_targets
from jaxguard.plan.work import work_of
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically

DOES_NOT_FIT = 1
NOTHING_FITS = (
    "nothing that was tried does; take more devices or those with more memory, fewer rows (train.batch_size) or shorter "
    "ones (data.max_seq_len)"
)


def plan(options: argparse.Namespace, config: Config) -> int:
    """Compile, print, write, and say by the exit code whether all fit."""
    console = Console()
    clusters = [find_cluster(text) for text in options.target]
    variants = [[], *(_changes(text) for text in options.compare)]
    spec = find_spec(config.model)

    def vary(overrides: Sequence[str]) -> Config:
        return load(options.config, [*options.overrides, *overrides])

    planned: list[Planned] = []
    refused: list[Refused] = []
    for cluster in clusters:
        if options.search:
            with console.status(f"looking for the best way to train {config.name} on {cluster.name} …"):
                best = search(
                    vary, spec, cluster, options.rows, options.targets, lambda choice: console.print(line(choice))
                )
            if best:
                console.print(ranking(config.name, cluster, best))
            else:
                refused.append(Refused(config.name, cluster.name, NOTHING_FITS))
            planned += [
                (choice.plan, work_of(vary(choice.overrides), cluster.devices, options.price))
                for choice in best[:1]
                if choice.plan
            ]
            continue
        for changes in variants:
            other, name = vary(changes), " ".join([config.name, *changes])
            work = work_of(other, cluster.devices, options.price)
            try:
                with console.status(f"compiling {name} for {cluster.name} …"):
                    found = compile_step(other, spec, cluster, options.rows, options.targets, work.largest)
                planned.append((replace(found, name=name), work))
            except OutOfMemoryError as error:
                why = f"{error}; {remedies(other.model.remat)}"
                refused.append(Refused(name, cluster.name, why, error.largest))
    console.print(show(planned, refused))
    if options.json:
        write_atomically(options.json, json.dumps(as_json(planned, refused), indent=1) + "\n")
    if options.html:
        write_atomically(options.html, page(planned, refused))
    return DOES_NOT_FIT if refused or not all(found.fits for found, _ in planned) else 0


def _changes(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise JaxguardError(f"--compare {text!r} cannot be read: {error}") from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target",
        required=True,
        action="append",
        metavar="NAME:SHAPE",
        help="what to compile for, may be given again: a100-80gb:8, h100:4x8 (hosts x GPUs of each), v5e:16, v5p:8x8x16, "
        "v5e:2*16x16 (slices * chips of each); "
        f"known: {', '.join(read_targets())}",
    )
    parser.add_argument(
        "--rows",
        type=_count,
        help="rows of the batch; default: of the largest batch if the data are here, else one for each example",
    )
    parser.add_argument("--targets", type=_count, help="target tokens of a row; default: all of them")
    parser.add_argument("--price", type=float, metavar="DOLLARS", help="of a device for an hour")
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="'FIELD=VALUE ...'",
        help="plan the run with these changes too, beside it; may be given again",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="compile meshes, remat policies and accumulations, and rank those that fit",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plans there too, as data")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write them there too, as a page with figures")


def sweep(argv: Sequence[str]) -> int:
    """The door of `python -m jaxguard.plan sweep`."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxguard.plan sweep",
        description="Compile a run's step for growing clusters. What is compiled already is not compiled again: stop it whenever "
        "you like.",
        allow_abbrev=False,
    )
    parser.add_argument("sweep", metavar="NAME|PATH", help="a file of configs/sweeps, or any YAML file")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: runs/sweeps/NAME")
    parser.add_argument("--dry-run", action="store_true", help="print the points and stop")
    options = parser.parse_args(argv)
    return exit_code(lambda: _sweep(options))


def _sweep(options: argparse.Namespace) -> int:
    console = Console()
    fields = read_sweep(options.sweep)
    todo = list(places(fields))
    if options.dry_run:
        for one in todo:
            mesh = " × ".join(map(str, (one.config.mesh.data, one.config.mesh.fsdp, one.config.mesh.tensor)))
            console.print(f"{one.series}: {one.cluster.name}, mesh {mesh}, {one.rows:,} rows", soft_wrap=True)
        return 0
    folder = options.output or Path("runs/sweeps") / Path(options.sweep).stem

    def tell(place: Place, point: Point) -> None:
        said = point.get("error") or f"{point['peak'] / GIB:.1f} GiB, {point['estimate']['step']:.3g} s an update"
        progress.console.print(f"{place.series}, {place.cluster.devices:,} devices: {said}", soft_wrap=True)
        progress.advance(task)

    folder.mkdir(parents=True, exist_ok=True)
    with Progress(console=console) as progress:
        task = progress.add_task(fields.title, total=len(todo))
        points = run_sweep(fields, folder, tell)
    write_atomically(folder / "sweep.md", markdown(fields.title, points))
    write_atomically(folder / "sweep.svg", figure(points))
    write_atomically(folder / "sweep.html", page_of_sweep(fields.title, points))
    console.print("\n".join(f"{folder}/sweep.{kind}" for kind in ("md", "svg", "html")), soft_wrap=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    description = "Compile the training step for hardware that is not here. `sweep NAME` does so for growing clusters."
    return run_stage("plan", description, plan, _options, argv, commands={"sweep": sweep})


if __name__ == "__main__":
    sys.exit(main())
