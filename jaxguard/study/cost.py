"""Estimate the cost of a study: steps, tokens, device-hours. The teacher's work is counted separately.

Steps are exact. Tokens of an example and the speed are assumptions of the study's file, or measured: by `--measure`, or in runs
of the study that have trained.
"""

import json
import operator
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from statistics import median

from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.config.hardware import peak_flops
from jaxguard.config.study import CostConfig
from jaxguard.data.files import read_local
from jaxguard.data.packing import total_steps
from jaxguard.data.policies import load_policy
from jaxguard.evaluate.benchmarks.schema import read_benchmark
from jaxguard.guards.baselines import BASELINES
from jaxguard.guards.loading import modes_of
from jaxguard.study.grid import Run, Study
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically

SPEED_FILE = "speed.json"
WARMUP_STEPS = 2
"""The first steps of a run compile and are not timed."""


@dataclass(frozen=True)
class Work:
    """The work of a run.

    Attributes:
        steps: of training.
        trained: tokens trained on.
        predictions: examples to predict, once for each mode.
        read: tokens of prompts, and of all that is read again for the probabilities of verdicts.
        generated: tokens to generate.
        stages: to start.
        assumed: a number of examples is assumed, not counted.
    """

    steps: int = 0
    trained: int = 0
    predictions: int = 0
    read: int = 0
    generated: int = 0
    stages: int = 0
    assumed: bool = False

    def __add__(self, other: "Work") -> "Work":
        return Work(*map(operator.add, astuple(self), astuple(other)))


@dataclass(frozen=True)
class Speed:
    """Tokens per second of all devices together, and where the numbers come from."""

    trained: float
    read: float
    generated: float
    source: str


def work(run: Run) -> Work:
    """Return the work of a run from the start."""
    total = Work(stages=len(run.stages))
    if "train" in run.stages:
        total += _training(run)
    if "evaluate" in run.stages:
        total += _evaluation(run)
    if "mine" in run.stages:
        count, assumed = training_examples(run)
        generations = run.config.mine.generations if run.config.mine else 4
        total += _predictions(count, generations, _traced_share(run), 1, run.cost, assumed)
    return total


def seconds(amount: Work, speed: Speed, cost: CostConfig) -> float:
    """Return how long some work takes."""
    return (
        amount.trained / speed.trained
        + amount.read / speed.read
        + amount.generated / speed.generated
        + amount.stages * cost.start_seconds
    )


def estimate(study: Study) -> list[tuple[Run, Work, float]]:
    """Return (run, its work, its seconds) of every run."""
    speed = speed_of(study)
    works = [(run, work(run)) for run in study.runs]
    return [(run, amount, seconds(amount, speed, run.cost)) for run, amount in works]


def training_examples(run: Run) -> tuple[int, bool]:
    """Return the number of training examples, and whether it is assumed."""
    data = run.config.data
    count, assumed = _available(run)
    held_out = 0 if data.validation or data.subset is not None else data.validation_size
    return max(0, count - held_out), assumed


def _available(run: Run) -> tuple[int, bool]:
    """Count a run's examples: its subset, the rows of its files, or what the row says."""
    data = run.config.data
    if data.subset is not None:
        return data.subset, False
    paths = [Path(source.path or "") for source in data.train]
    if all(path.is_file() for path in paths):
        return sum(map(_rows, paths)), False
    return run.row.examples or 0, True


@cache
def _rows(path: Path) -> int:
    return len(read_local(path, ()).rows)


def _traced_share(run: Run) -> float:
    """Return the share of a run's answers with reasoning."""
    data = run.config.data
    return {"direct": 0.0, "reasoning": 1.0, "dual": data.dual_reasoning_share}[data.mode]


def _training(run: Run) -> Work:
    train, cost = run.config.train, run.cost
    count, assumed = training_examples(run)
    steps = total_steps(count, train.batch_size, train.epochs, train.max_steps)
    tokens = cost.prompt_tokens + _traced_share(run) * cost.trace_tokens + cost.answer_tokens
    return Work(steps=steps, trained=round(steps * train.batch_size * tokens), assumed=assumed)


def _evaluation(run: Run) -> Work:
    settings, total = run.config.evaluate or EvaluateConfig(), Work()
    asked = load_policy(run.config.data.policy).asks if settings.ask == "policy" else ()
    for benchmark in settings.benchmarks:
        question = read_benchmark(benchmark.name).question
        count, assumed = _benchmark_examples(benchmark.name, benchmark.path, run.cost)
        count = min(count, settings.limit or count)
        for guard in settings.guards:
            earlier = asked.index(question) if guard.format == "jaxguard" and question in asked else 0
            for mode in modes_of(guard, run.config) if guard.format not in BASELINES else ():
                traced, points = float(mode == "reasoning"), 2 ** (earlier + 1) - 1
                total += _predictions(count, settings.generations, traced, points, run.cost, assumed)
    return total


def _predictions(count: int, generations: int, traced: float, points: int, cost: CostConfig, assumed: bool) -> Work:
    """Return the work of predicting `count` examples, without any reuse of a cache.

    A verdict's probability is read at `points` decision points, one for each combination of earlier verdict lines: after each
    generation's reasoning, or once for the share of examples that is not `traced`.
    """
    prompt = cost.prompt_tokens
    scored = points * (traced * max(generations, 1) * (prompt + cost.trace_tokens) + (1 - traced) * prompt)
    read = scored + (prompt if generations else 0)
    generated = generations * (traced * cost.trace_tokens + cost.answer_tokens)
    return Work(predictions=count, read=round(count * read), generated=round(count * generated), assumed=assumed)


def teacher_work(run: Run) -> Work:
    """Return the teacher's work in a distillation: each example once, and once for each budget."""
    count, assumed = _available(run)
    budgets, cost = len(run.config.distill.budgets) if run.config.distill else 0, run.cost
    return Work(
        predictions=count,
        read=count * ((1 + budgets) * cost.prompt_tokens + budgets * cost.trace_tokens),
        generated=count * (1 + budgets) * (cost.trace_tokens + cost.answer_tokens),
        assumed=assumed,
    )


@cache
def _benchmark_examples(name: str, path: str | None, cost: CostConfig) -> tuple[int, bool]:
    if path and Path(path).is_file():
        return _rows(Path(path)), False
    expected = read_benchmark(name).expected
    if expected.total is not None:
        return expected.total, False
    if expected.positive is not None and expected.negative is not None:
        return expected.positive + expected.negative, False
    return cost.benchmark_examples, True


def speed_of(study: Study) -> Speed:
    """Return the speed from the best source: --measure, runs that have trained, or the study's assumptions."""
    cost, measured = study.definition.cost, study.folder / SPEED_FILE
    trained = [speed for run in study.runs for speed in speeds(run.folder / "metrics.jsonl")]
    if measured.is_file():
        rate, source = float(json.loads(measured.read_text())["tokens_per_second"]), "measured by --measure"
    elif trained:
        rate, source = median(trained), f"median of {len(trained)} steps of this study"
    elif cost.tokens_per_second is not None:
        rate, source = cost.tokens_per_second, "an assumption of the study's file"
    else:
        flops = cost.peak_flops or peak_flops(cost.device)
        if flops is None:
            raise JaxguardError(
                f"cost.device={cost.device!r} is unknown; set cost.peak_flops or cost.tokens_per_second"
            )
        peak, forward = cost.devices * flops, 2 * cost.parameters
        source = (
            f"{cost.devices} × {cost.device}, assumed to train at {cost.mfu:.0%} and to generate at {cost.generate_mfu:.0%} of "
            f"{flops / 1e12:g} TFLOP/s, 6 and 2 FLOPs for each of {cost.parameters:.3g} parameters and token"
        )
        return Speed(
            peak * cost.mfu / forward / 3, peak * cost.mfu / forward, peak * cost.generate_mfu / forward, source
        )
    # A forward pass costs a third of a training step; training says nothing of the speed of generation.
    generated = cost.generated_per_second or rate
    source = f"{rate:,.0f} trained tokens/s ({source}), {generated:,.0f} generated tokens/s (assumed)"
    return Speed(rate, 3 * rate, generated, source)


def speeds(metrics: Path) -> list[float]:
    """Read trained tokens per second of a run's steps after its first ones."""
    if not metrics.is_file():
        return []
    values = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a line that was being written when the run was killed
            continue
        if "speed" in record:
            values.append(float(record["speed"]["tokens_per_second"]))
    return values[WARMUP_STEPS:]


def save_speed(folder: Path, metrics: Path) -> None:
    """Save the speed of a short run for `speed_of`.

    Raises:
        JaxguardError: it made too few steps.
    """
    values = speeds(metrics)
    if not values:
        raise JaxguardError(f"{metrics} has no step after the first {WARMUP_STEPS}: nothing can be measured")
    write_atomically(folder / SPEED_FILE, json.dumps({"tokens_per_second": median(values)}) + "\n")


def clock(duration: float) -> str:
    """Format seconds as minutes or hours."""
    return f"{duration / 60:.0f} min" if duration < 3600 else f"{duration / 3600:.1f} h"
