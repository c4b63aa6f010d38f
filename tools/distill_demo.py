"""`make distill-demo`: from nothing to a guard that was trained on reasoning, with a real SGLang server on this CPU.

    serve     SmolLM2-135M-Instruct as the teacher
    distill   python -m jaxguard.distill --config smollm_traces: traces for 50 judged answers, filtered and asked again
    build     python -m jaxguard.data build --config smollm_traces: a dual-mode set
    train     python -m jaxguard.train --config smollm_dual: a few updates

It shows that the parts fit. So small a teacher's traces pass the filter and teach little. What is done is not done again.
Arguments are overrides of smollm_traces.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from demo import clock, fetch_data, fetch_weights, run, stage
from jaxguard.cli import exit_code
from jaxguard.config import load
from sglang_server import serve

TRACES, STUDENT = "smollm_traces", "smollm_dual"


def main(overrides: Sequence[str]) -> int:
    return exit_code(lambda: traces_to_student(overrides))


def traces_to_student(overrides: Sequence[str]) -> None:
    console = Console(highlight=False)
    started = time.monotonic()
    config = load(TRACES, overrides)
    base = Path(config.model.checkpoint)
    data = Path(str(config.data.train[0].path)).parent
    stage(console, f"weights: SmolLM2-135M-Instruct -> {base}", lambda: fetch_weights(base))
    stage(console, f"data: judged answers -> {data}", lambda: fetch_data(data))
    stage(console, f"teacher: SGLang, then traces -> {config.folder}", lambda: distill(base, config.folder, overrides))
    stage(console, f"build -> {config.folder / 'dataset'}", lambda: build(overrides))
    stage(console, f"train -> runs/{STUDENT}", lambda: train(config.folder))
    console.print(f"\nlook at the traces: {config.folder / 'traces.html'}")
    console.print(f"done in {clock(time.monotonic() - started)}")


def distill(base: Path, folder: Path, overrides: Sequence[str]) -> None:
    with serve(base, "smollm2", folder / "sglang.log") as server:
        endpoint = f"distill.teacher.endpoints=[{server.url}]"
        run([sys.executable, "-m", "jaxguard.distill", "--config", TRACES, endpoint, *overrides])
    run([sys.executable, "-m", "jaxguard.distill", "inspect", "--config", TRACES, *overrides])


def build(overrides: Sequence[str]) -> None:
    run([sys.executable, "-m", "jaxguard.data", "build", "--config", TRACES, *overrides])


def train(folder: Path) -> None:
    source = f"data.train.0.path={folder / 'dataset' / 'dual' / 'all.parquet'}"
    run([sys.executable, "-m", "jaxguard.train", "--config", STUDENT, source])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
