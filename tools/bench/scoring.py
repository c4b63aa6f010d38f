"""`make bench-scoring`: verdict probabilities of 1,000 examples, beside transformers' batched forward pass, in float32.

Both get the same token ids, 17-category policy included, and for each example the two tokens between which the verdict is
chosen. Every measurement is a process of its own; reading the checkpoint is not counted, compiling is.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypedDict

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.special import expit

from demo import fetch_weights
from jaxguard.config import Config
from jaxguard.data.dialogue import Mode
from jaxguard.data.encode import Encoder
from jaxguard.data.examples import Example
from jaxguard.errors import JaxguardError
from jaxguard.evaluate.jax_engine import load_engine
from jaxguard.evaluate.judging import Ask
from jaxguard.evaluate.ours import OurFormat
from jaxguard.evaluate_sections import EvaluateConfig
from workloads import Job, ours, read_examples

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = Path("build/bench/scoring")
MODEL = Path("build/bench/base")
PEER = (".venv-bench-trl", "tools/bench/peers/with_transformers.py")
TOLERANCE = 1e-4
ASKED = EvaluateConfig(ask="benchmark")


class Scored(TypedDict):
    """What a contender prints: its time, and of each example the log-probability of the first token less the second's."""

    seconds: float
    odds: list[float]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--data", type=Path, help="labelled JSON lines; default: the demo's, from PyPI")
    parser.add_argument("--one", type=Path, metavar="JOB", help="score these here with jaxguard and print JSON")
    chosen = parser.parse_args(arguments)
    if chosen.one:
        print(json.dumps(_score(json.loads(chosen.one.read_text(encoding="utf-8")))))
        return 0
    try:
        fetch_weights(MODEL)
        job = write(read_examples(chosen.data, chosen.examples))
    except JaxguardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    commands = {
        "jaxguard": [sys.executable, __file__, "--one", str(job)],
        "transformers": [str(ROOT / PEER[0] / "bin" / "python"), PEER[1], str(job)],
    }
    found: dict[str, list[Scored]] = {name: [] for name in commands}
    for _ in range(chosen.rounds):
        for name, command in commands.items():
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603 (our own)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    Console().print(table(found))
    return 0


def settings() -> Config:
    """The training benchmark's model and policy, in float32."""
    job = Job("direct", str(MODEL), "unused", "unused", "shared", str(FOLDER))
    return ours(job, "model.compute_dtype=float32", "model.query_chunk=256")


def write(examples: Sequence[Example]) -> Path:
    """A job: the checkpoint's folder, and for each example the tokens before its verdict and the two to choose from."""
    config = settings()
    asked = OurFormat.of(Encoder.load(MODEL, config.data), ASKED)
    asks = [Ask(e, "prompt_harm" if e.prompt_label else "response_harm", Mode.DIRECT) for e in examples]
    choices = [asked.choices(ask, "")[-1] for ask in asks]
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "job.json"
    job = {
        "model": str(MODEL),
        "prompts": [list(choice.prefix) for choice in choices],
        "pairs": [[choice.positive_id, choice.negative_id] for choice in choices],
    }
    path.write_text(json.dumps(job), encoding="utf-8")
    return path


def _score(job: dict[str, Any]) -> Scored:
    engine = load_engine(Path(job["model"]), settings(), ASKED)
    started = time.perf_counter()
    odds = asyncio.run(engine.log_odds(job["prompts"], job["pairs"]))
    return {"seconds": time.perf_counter() - started, "odds": odds}


def table(found: dict[str, list[Scored]]) -> Table:
    """A row for each contender: medians over rounds, and how far it is from ours at most."""
    ours, *_ = found
    odds = {name: np.array(runs[0]["odds"]) for name, runs in found.items()}
    count = len(odds[ours])
    result = Table("contender", title=f"{count} verdicts", title_justify="left")
    for heading in ("examples/s", f"{ours} / this", "probabilities differ by", "log-odds by"):
        result.add_column(heading, justify="right")
    for name, runs in found.items():
        ratios = sorted(b["seconds"] / a["seconds"] for a, b in zip(found[ours], runs, strict=True))
        furthest = np.abs(expit(odds[ours]) - expit(odds[name])).max()
        result.add_row(
            name,
            f"{count / median(run['seconds'] for run in runs):.2f}",
            f"{median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]",
            f"{furthest:.1e}" + ("" if furthest <= TOLERANCE else " (differs)"),
            f"{np.abs(odds[ours] - odds[name]).max():.1e}",
        )
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
