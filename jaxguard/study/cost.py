"""What a study takes, before it starts: updates, tokens, device-hours. What a teacher takes is reckoned apart.

Updates are exact. Tokens an example and the speed are assumptions of the study's file, or measured: by `--measure`, or in runs of
the same study that have trained already.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

from jaxguard.config import Config
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.config.study import CostConfig
from jaxguard.data.files import read_local
from jaxguard.data.packing import total_steps
from jaxguard.data.policies import load_policy
from jaxguard.evaluate.benchmarks.schema import read_benchmark
from jaxguard.guards.loading import modes_of
from jaxguard.study.grid import Run, Study
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically

SPEED_FILE = "speed.json"
FLOORS = ("tfidf", "majority")
"""Guards without a model."""
COMPILED_AFTER = 2
"""The first updates of a run compile; their speed says nothing."""


@dataclass(frozen=True)
class Work:
    """What a run has to do.

    Attributes:
        updates, trained: updates, and tokens that they see.
        judged, read, generated: examples judged, counted once for each mode; tokens of their prompts, and of all that is read
            again for the probabilities of verdicts; tokens generated.
        stages: that have to start.
        guessed: something that nobody could count was assumed.
    """

    updates: int = 0
    trained: int = 0
    judged: int = 0
    read: int = 0
    generated: int = 0
    stages: int = 0
    guessed: bool = False

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.updates + other.updates,
            self.trained + other.trained,
            self.judged + other.judged,
            self.read + other.read,
            self.generated + other.generated,
            self.stages + other.stages,
            self.guessed or other.guessed,
        )


@dataclass(frozen=True)
class Speed:
    """Tokens a second of all devices together, and where the numbers come from."""

    trained: float
    read: float
    generated: float
    said: str


def work(run: Run) -> Work:
    """What a run has to do if none of it is done."""
    found = Work(stages=len(run.stages))
    if "train" in run.stages:
        found += _training(run)
    if "evaluate" in run.stages:
        found += _judging(run.config, run.cost)
    if "mine" in run.stages:
        found += _mining(run)
    return found


def seconds(found: Work, speed: Speed, cost: CostConfig) -> float:
    """How long that takes."""
    return (
        found.trained / speed.trained
        + found.read / speed.read
        + found.generated / speed.generated
        + found.stages * cost.start_seconds
    )


def examples_of(run: Run) -> tuple[int, bool]:
    """Training examples, and whether that is a guess: the subset, what the files hold, or what the study's file says."""
    data = run.config.data
    given, guessed = _given(run)
    held = 0 if data.validation or data.subset is not None else data.validation_size
    return max(0, given - held), guessed


def _given(run: Run) -> tuple[int, bool]:
    """The same with those that are held out."""
    data = run.config.data
    if data.subset is not None:
        return data.subset, False
    paths = [Path(source.path or "") for source in data.train]
    if all(path.is_file() for path in paths):
        return sum(map(_rows, paths)), False
    return run.fields.examples or 0, True


@cache
def _rows(path: Path) -> int:
    return len(read_local(path, ()).rows)


def traced_share(mode: str, share: float) -> float:
    """How many of the answers have a thought in a mode of data.mode; `share` is that of dual mode."""
    return {"direct": 0.0, "reasoning": 1.0, "dual": share}[mode]


def _training(run: Run) -> Work:
    train, data = run.config.train, run.config.data
    examples, guessed = examples_of(run)
    updates = total_steps(examples, train.batch_size, train.epochs, train.max_steps)
    traced = traced_share(data.mode, data.dual_reasoning_share)
    tokens = run.cost.prompt_tokens + traced * run.cost.trace_tokens + run.cost.answer_tokens
    return Work(updates=updates, trained=round(updates * train.batch_size * tokens), guessed=guessed)


def _judging(config: Config, cost: CostConfig) -> Work:
    settings, found = config.evaluate or EvaluateConfig(), Work()
    asked = load_policy(config.data.policy).asks if settings.ask == "policy" else ()
    for benchmark in settings.benchmarks:
        question = read_benchmark(benchmark.name).question
        count, guessed = _benchmark_examples(benchmark.name, benchmark.path, cost)
        count = min(count, settings.limit or count)
        for guard in settings.guards:
            earlier = asked.index(question) if guard.format == "jaxguard" and question in asked else 0
            for mode in modes_of(guard, config) if guard.format not in FLOORS else ():
                traced = float(mode == "reasoning")
                found += _answering(count, settings.generations, traced, 2 ** (earlier + 1) - 1, cost, guessed)
    return found


def _answering(count: int, generations: int, traced: float, places: int, cost: CostConfig, guessed: bool) -> Work:
    """Asking about `count` examples.

    A verdict's probability is read at each of `places`, every way through the lines before it counted; after each thought, or,
    of the share of examples that is not `traced`, once. Nothing of it is taken to be reused.
    """
    once = cost.prompt_tokens
    scored = places * (traced * max(generations, 1) * (once + cost.trace_tokens) + (1 - traced) * once)
    read = scored + (once if generations else 0)
    generated = generations * (traced * cost.trace_tokens + cost.answer_tokens)
    return Work(judged=count, read=round(count * read), generated=round(count * generated), guessed=guessed)


def _mining(run: Run) -> Work:
    examples, guessed = examples_of(run)
    data, generations = run.config.data, run.config.mine.generations if run.config.mine else 4
    traced = traced_share(data.mode, data.dual_reasoning_share)
    return _answering(examples, generations, traced, 1, run.cost, guessed)


def teaching(run: Run) -> Work:
    """What a distillation has a teacher do, once for each example and each budget; the thought is the trace."""
    examples, guessed = _given(run)
    budgets, cost = len(run.config.distill.budgets) if run.config.distill else 0, run.cost
    passes = 1 + budgets
    return Work(
        judged=examples,
        read=examples * (passes * cost.prompt_tokens + budgets * cost.trace_tokens),
        generated=examples * passes * (cost.trace_tokens + cost.answer_tokens),
        guessed=guessed,
    )


@cache
def _benchmark_examples(name: str, path: str | None, cost: CostConfig) -> tuple[int, bool]:
    local = Path(path) if path else None
    if local and local.is_file():
        return _rows(local), False
    expected = read_benchmark(name).expected
    if expected.total is not None:
        return expected.total, False
    if expected.positive is not None and expected.negative is not None:
        return expected.positive + expected.negative, False
    return cost.benchmark_examples, True


def speed_of(study: Study) -> Speed:
    """The best that is known of this machine's speed."""
    cost = study.fields.cost
    measured = study.folder / SPEED_FILE
    if measured.is_file():
        return _from_training(
            float(json.loads(measured.read_text())["tokens_per_second"]), cost, "measured by --measure"
        )
    trained = [s for run in study.runs for s in speeds(run.folder / "metrics.jsonl")]
    if trained:
        return _from_training(median(trained), cost, f"median of {len(trained)} updates of this study")
    if cost.tokens_per_second is not None:
        return _from_training(cost.tokens_per_second, cost, "an assumption of the study's file")
    peak = cost.devices * cost.peak_flops
    said = (
        f"{cost.devices} × {cost.device}, assumed to train at {cost.mfu:.0%} and to generate at {cost.generate_mfu:.0%} of "
        f"{cost.peak_flops / 1e12:g} TFLOP/s, 6 and 2 FLOPs for each of {cost.parameters:.3g} parameters and token"
    )
    forward = 2 * cost.parameters
    return Speed(peak * cost.mfu / forward / 3, peak * cost.mfu / forward, peak * cost.generate_mfu / forward, said)


def _from_training(tokens_per_second: float, cost: CostConfig, how: str) -> Speed:
    """Reading costs a third of training; generating is another matter, of which training says nothing."""
    generated = cost.generated_per_second or tokens_per_second
    said = f"{tokens_per_second:,.0f} trained tokens/s ({how}), {generated:,.0f} generated tokens/s (assumed)"
    return Speed(tokens_per_second, 3 * tokens_per_second, generated, said)


def speeds(metrics: Path) -> list[float]:
    """Trained tokens a second of each update of a run, without the first ones; none where there is no such file."""
    if not metrics.is_file():
        return []
    found = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a line that was being written when the run was killed
            continue
        if "speed" in record:
            found.append(float(record["speed"]["tokens_per_second"]))
    return found[COMPILED_AFTER:]


def keep_speed(folder: Path, metrics: Path) -> float:
    """Keep the speed of a short run for `speed_of`.

    Raises:
        JaxguardError: it made too few updates.
    """
    found = speeds(metrics)
    if not found:
        raise JaxguardError(f"{metrics} has no update after the first {COMPILED_AFTER}: nothing can be measured")
    write_atomically(folder / SPEED_FILE, json.dumps({"tokens_per_second": median(found)}) + "\n")
    return median(found)


def costs(runs: Iterable[Run], speed: Speed) -> list[tuple[Run, Work, float]]:
    """(run, what it has to do, its seconds)."""
    return [(run, found := work(run), seconds(found, speed, run.cost)) for run in runs]


def total(found: Sequence[tuple[Run, Work, float]]) -> tuple[Work, float]:
    return sum((w for _, w, _ in found), Work()), sum(s for _, _, s in found)
