"""`make bench`: compare training with other trainers on this machine's CPU, each in its own environment.

All fine-tune all weights of SmolLM2-135M, in float32, on the same examples in the same order, 32 a step. A round runs one
process of each contender after the other, so that other load on the machine affects all alike. Each contender times its own steps.
The first is not counted, and the speed is the median of the others: jaxguard compiles a program for each of few shapes, beside the
steps before it, and trains more of them for the median to be one that nothing is compiled beside.
The losses of the first step must agree, which shows that all do the same work. Tunix's cannot, since it weights all
examples equally. The workloads of dpo and grpo are updates alone, in float32 (updates.py): there the losses of the second step must
agree, too, which follow from the first one's gradient. The whole benchmark takes hours: --resume continues a stopped one.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from rich.console import Console

import updates
from demo import fetch_weights
from generated import rewrite
from jaxguard.report import Page, Table, page_markdown
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically
from workloads import WORKLOADS, Job, Workload, write

ROOT = Path(__file__).resolve().parent.parent.parent
BENCH = ROOT / "tools" / "bench"
OUTPUT = Path("build") / "bench"
RESULTS = OUTPUT / "training.jsonl"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
TOLERANCE = 0.02
"""Relative; bfloat16 products differ from float32 ones by less."""
UPDATE_TOLERANCE = 1e-4
"""Absolute, of the losses of updates in float32."""


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


CONTENDERS = {
    "sft": (
        Contender("jaxguard", "shared", sys.prefix, "ours.py", steps=10),
        Contender("jaxguard", "plain", sys.prefix, "ours.py"),
        Contender("TRL", "packed", ".venv-bench-trl", "peers/with_trl.py"),
        Contender("TRL", "padded", ".venv-bench-trl", "peers/with_trl.py"),
        Contender("torch loop", "padded", ".venv-bench-trl", "peers/with_torch.py"),
        Contender("LlamaFactory", "packed", ".venv-bench-llamafactory", "peers/with_llamafactory.py"),
        Contender("LlamaFactory", "padded", ".venv-bench-llamafactory", "peers/with_llamafactory.py"),
        Contender("Tunix", "padded", ".venv-bench-tunix", "peers/with_tunix.py"),
    ),
    "dpo": (
        Contender("jaxguard", "shared", sys.prefix, "updates.py", steps=3),
        Contender("TRL", "2 answers at a time", ".venv-bench-trl", "peers/updates_with_trl.py"),
    ),
    "grpo": (
        Contender("jaxguard", "shared", sys.prefix, "updates.py", steps=3),
        Contender("TRL", "2 answers at a time", ".venv-bench-trl", "peers/updates_with_trl.py"),
        Contender("Tunix", "2 answers at a time", ".venv-bench-tunix", "peers/updates_with_tunix.py"),
    ),
}
"""By the workload's objective; the first of each is ours."""


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
        """Examples a second: the median over the largest steps but for the first; NaN where there is none."""
        counted = list(zip(self.examples[1:], self.seconds[1:], strict=True))
        rates = [examples / seconds for examples, seconds in counted if examples == max(self.examples)]
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
    parser.add_argument(
        "--document", action="store_true", help="write what is known of updates into docs/benchmarks.md"
    )
    chosen = parser.parse_args(arguments)
    console = Console(highlight=False)
    try:
        fetch_weights(OUTPUT / "base")
        known = measured(RESULTS) if chosen.resume else []
        write_atomically(RESULTS, "".join(_line(run) for run in known))
        for workload in WORKLOADS:
            if workload.name in (chosen.workload or names):
                source, model, folder = chosen.data, OUTPUT / "base", OUTPUT / workload.name
                if workload.objective == "sft":
                    job = write(workload, source, model, 8, folder)
                else:
                    job = updates.write(workload, source, model, folder, keep=chosen.resume)
                runs = list(measure(job, _chosen(chosen.only, workload), chosen.rounds, console, known))
                console.print(table(runs).rich())
        if chosen.document:
            updated = [workload.name for workload in WORKLOADS if workload.objective != "sft"]
            runs_of = {name: [run for run in measured(RESULTS) if run.workload == name] for name in updated}
            page = page_markdown(Page("", [table(runs) for runs in runs_of.values() if runs]))
            rewrite(DOCUMENT, page.partition("\n")[2].lstrip())
    except JaxguardError as error:
        console.print(f"[bold red]error:[/] {error}")
        return 2
    return 0


def _chosen(only: Sequence[str] | None, workload: Workload) -> list[Contender]:
    contenders = CONTENDERS[workload.objective]
    matching = [c for c in contenders if not only or c.label.startswith(tuple(only))]
    if not matching:
        raise JaxguardError(f"--only {only}: no such contender; known: {', '.join(c.label for c in contenders)}")
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
    objective = next(workload.objective for workload in WORKLOADS if workload.name == runs[0].workload)
    supervised, label_of_ours = objective == "sft", CONTENDERS[objective][0].label
    compared, tolerance = (1, {"rel_tol": TOLERANCE}) if supervised else (2, {"abs_tol": UPDATE_TOLERANCE})
    title, loss = f"{runs[0].workload}: examples a second", "first loss" if supervised else "second loss"
    result = Table((title, "examples/s", "shared / this", "peak GiB", loss))
    ours = {run.round: run for run in runs if run.contender == label_of_ours}
    expected = next(iter(ours.values())).losses[:compared] if ours else ()
    for label in dict.fromkeys(run.contender for run in runs):
        own = [run for run in runs if run.contender == label]
        good = [run for run in own if run.error is None]
        if not good:
            result.add(label, own[0].error or "", "", "", "")
            continue
        ratios = sorted(ours[run.round].speed / run.speed for run in good if run.round in ours)
        losses = good[0].losses[:compared]
        agree = all(math.isclose(*both, **tolerance) for both in zip(expected, losses, strict=False))
        result.add(
            label,
            f"{median(run.speed for run in good):.3f}",
            f"{median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]" if ratios else "",
            f"{max(run.peak_gib for run in good):.1f}",
            f"{losses[-1]:.4f}" + ("" if agree else " (differs)"),
        )
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
