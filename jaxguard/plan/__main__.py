"""`jaxguard plan --config NAME --target a100-80gb:8`: estimate whether a run fits, how fast it is and what it costs.

`jaxguard plan measure --config NAME` runs the same step on 1, 2, 4 … of the devices that are here.
"""

import argparse
import json
import shlex
import sys
from functools import partial
from pathlib import Path

from jaxguard.cli import Command, stage, suggest
from jaxguard.config import Config
from jaxguard.config.base import CONFIG_FOLDER, names
from jaxguard.config.hardware import GIB, read_hardware
from jaxguard.data.inputs import check_inputs
from jaxguard.report import write_markdown, write_page
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically
from jaxguard.utils.terminal import Console

DESCRIPTION = (
    "Compile the training step for hardware that is not attached. `sweep NAME` does so for growing clusters, `measure` runs it on "
    "growing numbers of the devices that are here."
)
MEASURE = (
    "Run the same steps on 1, 2, 4 … of this machine's devices: tokens a second, MFU and efficiency, beside the plan's."
)
SWEEP = "Compile a run's step for growing clusters. Points are compiled once, so it may be stopped at any time."
DOES_NOT_FIT = 1


def _plan(options: argparse.Namespace, config: Config) -> int:
    """Compile, print and write the plans; the exit code says whether all fit."""
    from jaxguard.plan.run import PlanReport, plan, search  # JAX is loaded only when there is something to do

    if options.search and options.compare:
        raise JaxguardError("--search compares what it finds: leave --compare out, or plan without --search")
    for path in filter(None, (options.json, options.html)):
        if not path.absolute().parent.is_dir():
            raise JaxguardError(f"{path}: there is no folder {path.parent}; make it first")
    console = Console()
    settings = {"rows": options.rows, "target_tokens": options.targets, "price": options.price}
    if options.search:
        results = []
        for target in options.target:
            with console.status(f"searching for the fastest way to train {config.name} on {target} …"):
                result = search(
                    config, target, **settings, on_candidate=lambda text: console.print(text, soft_wrap=True)
                )
            if result.ranking:
                console.print(f"{config.name} on {target}", result.table().rich())
            results.append(result.best)
        report = PlanReport([p for r in results for p in r.plans], [each for r in results for each in r.refusals])
    else:
        try:
            compare = [shlex.split(text) for text in options.compare]
        except ValueError as error:
            raise JaxguardError(f"--compare {options.compare} is malformed: {error}") from None
        with console.status("") as status:
            report = plan(config, options.target, compare=compare, **settings, on_start=status.update)
    console.print(report.render())
    if options.json:
        write_atomically(options.json, json.dumps(report.to_json(), indent=1) + "\n")
    if options.html:
        write_page(options.html, report.page())
    return 0 if report.fits else DOES_NOT_FIT


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _options(parser: argparse.ArgumentParser) -> None:
    target = parser.add_argument(
        "--target", required=True, action="append", metavar="NAME:SHAPE",
        help="devices to compile for, may be repeated: a100-80gb:8, h100:4x8 (hosts x GPUs of each), v5e:16, v5p:8x8x16, "
        f"v5e:2*16x16 (slices * chips of each); known: {', '.join(read_hardware().targets)}",
    )  # fmt: skip
    suggest(target, lambda _: [f"{name}:" for name in read_hardware().targets])
    rows = "rows of the batch; default: of the largest batch if the data are local, else one for each example"
    parser.add_argument("--rows", type=_count, help=rows)
    parser.add_argument("--targets", type=_count, help="target tokens of a row; default: all of them")
    parser.add_argument("--price", type=float, metavar="DOLLARS", help="of a device for an hour")
    compare = "plan the run with these changes too, beside it; may be repeated"
    parser.add_argument("--compare", action="append", default=[], metavar="'FIELD=VALUE ...'", help=compare)
    search = "compile meshes, remat policies and accumulations, and rank those that fit"
    parser.add_argument("--search", action="store_true", help=search)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the plans as data")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write them as a page with figures")


def _sweep_options(parser: argparse.ArgumentParser) -> None:
    name = parser.add_argument("sweep", metavar="NAME|PATH", help="a file of configs/sweeps, or any YAML file")
    suggest(name, lambda _: names(CONFIG_FOLDER / "sweeps"))
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: runs/sweeps/NAME")
    parser.add_argument("--dry-run", action="store_true", help="print the points and stop")


def _sweep(options: argparse.Namespace) -> int:
    from jaxguard.plan.sweeps import SWEEP_OUTPUT, Point, Result, points, read_sweep, sweep
    from jaxguard.report.figures import save_figure

    console = Console(soft_wrap=True)
    folder = options.output or SWEEP_OUTPUT / Path(options.sweep).stem
    if options.dry_run:
        for point in points(read_sweep(options.sweep)):
            mesh = "×".join(map(str, (point.config.mesh.data, point.config.mesh.fsdp, point.config.mesh.tensor)))
            console.print(f"{point.series}: {point.cluster.name}, mesh {mesh}, {point.rows:,} rows")
        return 0

    def on_point(point: Point, result: Result) -> None:
        text = result.get("error") or f"{result['peak'] / GIB:.1f} GiB, {result['estimate']['step']:.3g} s a step"
        console.print(f"{point.series}, {point.cluster.devices:,} devices: {text}")

    report = sweep(options.sweep, folder, on_point)
    write_markdown(folder / "sweep.md", report.page())
    write_page(folder / "sweep.html", report.page())
    save_figure(report.figure(), folder / "sweep.svg")
    console.print("\n".join(f"{folder}/sweep.{kind}" for kind in ("md", "svg", "html")))
    return 0


def _measure_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--devices", type=_counts, default=(), metavar="N,N,…", help="default: 1, 2, 4 … all")
    parser.add_argument(
        "--rows", type=_count, help="rows of the batch that all devices share; default: train.batch_size"
    )
    parser.add_argument("--weak", action="store_true", help="the fewest devices have --rows rows, and more have more")
    parser.add_argument("--steps", type=_count, default=10, help="steps to time; default: 10")
    target = parser.add_argument(
        "--target", metavar="NAME", help="the data sheet to predict by; default: that of the devices"
    )
    suggest(target, lambda _: list(read_hardware().targets))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as data")


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _measure(options: argparse.Namespace, config: Config) -> int:
    from jaxguard.plan.measure import measure

    console = Console()
    settings = {"rows": options.rows, "weak": options.weak, "steps": options.steps, "target": options.target}
    with console.status("") as status:
        report = measure(config, options.devices, **settings, on_start=status.update)
    console.print(report.table().rich())
    if options.json:
        write_atomically(options.json, json.dumps(report.to_json(), indent=1) + "\n")
    return 0


COMMANDS = {
    "sweep": Command("plan sweep", SWEEP, _sweep, _sweep_options),
    "measure": stage("plan measure", MEASURE, _measure, _measure_options, check=partial(check_inputs, stage="plan")),
}
main = stage("plan", DESCRIPTION, _plan, _options, COMMANDS, partial(check_inputs, stage="plan"))

if __name__ == "__main__":
    sys.exit(main())
