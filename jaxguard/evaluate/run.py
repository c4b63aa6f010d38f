"""An evaluation from start to end: guards are asked, answers kept, everything scored, a report written.

runs/NAME/evaluate/
  predictions/GUARD/MODE/BENCHMARK.jsonl   every answer, as soon as it is there
  results.json  report.md  report.html
"""

import asyncio
import datetime
import hashlib
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxguard.config import Config
from jaxguard.config.evaluate import EvaluateConfig, GuardConfig
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import QUESTIONS, Question, load_policy
from jaxguard.data.prepare import load_sources
from jaxguard.evaluate.benchmarks.loading import LABEL, Benchmark, load_benchmark
from jaxguard.evaluate.report.page import write_report
from jaxguard.evaluate.report.published import nearest_row, read_published
from jaxguard.evaluate.report.tables import summary_table
from jaxguard.evaluate.scores.results import Evaluation
from jaxguard.evaluate.scores.scoring import GuardPredictions, Validation, score
from jaxguard.guards.baselines import BASELINES
from jaxguard.guards.loading import cache_key, checkpoint_of, examples_key, modes_of, open_guard
from jaxguard.guards.predictions import open_predictions
from jaxguard.guards.protocol import UNPARSABLE, Prediction, Predictor, Request, UnsupportedError
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import lock_folder
from jaxguard.utils.progress import Progress

SET_NAMES = {"wildguardmix": "WildGuardMix", "aegis2": "Aegis 2.0", "nemotron_safety": "Aegis 2.0"}
"""What the paper calls a kind of source."""
PAPER_EPOCHS = 5
"""Of its rows without a variant."""


@dataclass(frozen=True)
class Bench:
    """A benchmark as the config wants it: its label, and the examples to judge."""

    label: str
    benchmark: Benchmark
    examples: tuple[Example, ...]


def evaluate(config: Config) -> int:
    """Request every guard about every benchmark and write the report; what was asked before is not asked again.

    Raises:
        JaxguardError: anything that the user can mend.
    """
    settings = config.evaluate or EvaluateConfig()
    check_settings(settings, config)
    console = Console()
    benches = load_benches(settings)
    validation = load_validation(settings, config)
    with evaluation_folder(config) as folder:
        found: list[GuardPredictions] = []
        thresholds: dict[tuple[str, Mode], Validation] = {}
        for guard in settings.guards:
            judgements, known = asyncio.run(ask_guard(guard, config, settings, benches, validation, folder, console))
            found += judgements
            thresholds |= known
        cells, averages = score(found, thresholds, settings)
        evaluation = Evaluation(
            name=config.name,
            models={guard.name: describe(guard, config) for guard in settings.guards},
            benchmarks=tuple(bench.label for bench in benches),
            cells=cells,
            averages=averages,
            settings=settings.model_dump(mode="json"),
            finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            hardware=hardware(settings),
            paper_rows=paper_rows(settings, config),
        )
        write_report(evaluation, folder)
    console.print(summary_table(evaluation).rich())
    console.print(f"report: {folder / 'report.html'}, {folder / 'report.md'}", highlight=False)
    return 0


def check_settings(settings: EvaluateConfig, config: Config) -> None:
    """What the sections cannot check by themselves.

    Raises:
        JaxguardError: verdicts from probabilities alone, of a guard that thinks first; a mesh of several hosts; no such format.
    """
    if config.mesh.hosts != "single" and settings.backend == "jax" and not all(g.endpoint for g in settings.guards):
        raise JaxguardError(
            f"mesh.hosts={config.mesh.hosts}: JAX evaluates on the devices of one host. Set mesh.hosts=single where the guard "
            "fits one host, else serve it: evaluate.backend=sglang, or an endpoint"
        )
    for guard in settings.guards:
        modes = modes_of(guard, config)  # also finds formats that are none
        if settings.generations == 0 and Mode.REASONING in modes:
            raise JaxguardError(
                f"evaluate.generations=0 takes verdicts from probabilities alone, but guard {guard.name!r} is asked in "
                "reasoning mode, where they depend on the thought: set its modes=[direct], or sample"
            )


def load_benches(settings: EvaluateConfig) -> list[Bench]:
    """Read all benchmarks, before anything is computed."""
    benches = []
    for one in settings.benchmarks:
        benchmark = load_benchmark(one.name, None if one.path is None else Path(one.path))
        examples = benchmark.examples
        if settings.limit is not None:
            examples = tuple(sorted(examples, key=lambda e: _hash(settings.seed, e.id))[: settings.limit])
        benches.append(Bench(one.label or benchmark.name, benchmark, examples))
    return benches


def load_validation(settings: EvaluateConfig, config: Config) -> dict[Question, list[Example]]:
    """The labelled validation examples by the question that they answer."""
    if not settings.validation:
        return {}
    examples, _ = load_sources(settings.validation, "validation")
    if settings.limit is not None:
        examples = sorted(examples, key=lambda e: _hash(settings.seed, e.id))[: settings.limit]
    asked = load_policy(config.data.policy).asks
    found = {q: [e for e in examples if getattr(e, LABEL[q])] for q in QUESTIONS if q in asked}
    return {question: labelled for question, labelled in found.items() if labelled}


@contextmanager
def evaluation_folder(config: Config) -> Iterator[Path]:
    """runs/NAME/evaluate, for this process alone.

    Raises:
        JaxguardError: another process evaluates there, or it cannot be written.
    """
    folder = config.folder / "evaluate"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder, "evaluation")
    except OSError as error:
        raise JaxguardError(f"cannot write to {folder}: {error.strerror or error}") from None
    with lock:
        yield folder


async def ask_guard(
    guard: GuardConfig,
    config: Config,
    settings: EvaluateConfig,
    benches: Sequence[Bench],
    validation: dict[Question, list[Example]],
    folder: Path,
    console: Console,
) -> tuple[list[GuardPredictions], dict[tuple[str, Mode], Validation]]:
    """One guard in all its modes about everything that it can be asked."""
    policy = load_policy(config.data.policy)
    found: list[GuardPredictions] = []
    thresholds: dict[tuple[str, Mode], Validation] = {}
    async with open_guard(guard, config, settings) as judge:
        common = await cache_key(guard, config, settings)
        for mode in modes_of(guard, config):
            place = folder / "predictions" / guard.name / mode
            for bench in benches:
                asks = [Request(example, (bench.benchmark.question,), mode) for example in bench.examples]
                head = {
                    **common,
                    **examples_key(bench.benchmark.examples, policy),
                }  # whatever evaluate.limit takes of them
                answers = await answered(judge, asks, place / f"{bench.label}.jsonl", head, console)
                if answers is not None:
                    took = sum(answer.wall for answer in answers)
                    found.append(
                        GuardPredictions(guard.name, mode, bench.label, bench.benchmark, bench.examples, answers, took)
                    )
            known: dict[Question, tuple[Sequence[Example], Sequence[Prediction]]] = {}
            for question, examples in validation.items():
                asks = [Request(example, (question,), mode) for example in examples]
                head = {**common, **examples_key(examples, policy)}
                answers = await answered(judge, asks, place / f"validation-{question}.jsonl", head, console)
                if answers is not None:
                    known[question] = (examples, answers)
            thresholds[guard.name, mode] = known
    return found, thresholds


async def answered(
    judge: Predictor, asks: Sequence[Request], path: Path, head: dict[str, Any], console: Console
) -> list[Prediction] | None:
    """The answers to all asks in their order, from the file where they are there; None if the guard cannot be asked that.

    Long texts come first, so that what does not fit shows at once, and texts of like length share a batch.
    """
    title = f"{path.parent.parent.name} {path.parent.name} {path.stem}"
    with open_predictions(path, head) as predictions:
        waiting = [ask for ask in asks if ask.example.id not in predictions.answers]
        waiting.sort(key=lambda ask: -_length(ask.example))
        try:
            done, tokens, unparsable = len(asks) - len(waiting), 0, 0
            with Progress(title, len(asks), done, console) as progress:
                last = time.monotonic()
                async for answer in judge(waiting):
                    now = time.monotonic()
                    answer, last = replace(answer, wall=now - last), now
                    predictions.append(answer)
                    done, tokens = done + 1, tokens + answer.prompt_tokens + answer.completion_tokens
                    unparsable += sum(each.count(UNPARSABLE) for each in answer.verdicts.values())
                    progress.update(done, f"unparsable: {unparsable}", tokens=tokens)
        except UnsupportedError as error:
            console.print(f"{title} is left out: {error}", markup=False, highlight=False)
            return None
        return [predictions.answers[ask.example.id] for ask in asks]


def describe(guard: GuardConfig, config: Config) -> str:
    """A guard in words, for the report's head."""
    if guard.format in BASELINES:
        return f"{guard.format}, fitted to the run's training examples"
    served = f" at {guard.endpoint}" if guard.endpoint else ""
    return f"{checkpoint_of(guard, config)}{served}, format {guard.format}"


def hardware(settings: EvaluateConfig) -> str:
    """What the guards without an endpoint ran on, in words."""
    if settings.backend == "sglang":
        return f"{platform.processor() or platform.machine()} and what SGLang found there"
    import jax

    return f"{jax.device_count()} × {jax.devices()[0].device_kind}"


def paper_rows(settings: EvaluateConfig, config: Config) -> dict[str, str]:
    """Guard and mode -> the row of the paper that it stands beside: the one that the config names, or the nearest."""
    published, data = read_published(), papers_data(config)
    found: dict[str, str] = {}
    for guard in settings.guards:
        for mode in modes_of(guard, config):
            row = guard.paper_row
            if row is None and data is not None and guard.format == "jaxguard" and guard.checkpoint is None:
                base, subset = config.model.checkpoint, config.data.subset
                nearest = nearest_row(published, base, data, config.data.mode, mode, subset)
                row = None if nearest is None else nearest.id
            if row is not None:
                found[f"{guard.name}/{mode}"] = row
    unknown = set(found.values()) - {row.id for row in published.rows}
    if unknown:
        raise JaxguardError(f"evaluate.guards: paper_row {unknown.pop()!r} is not in configs/published/paper.yaml")
    return found


def papers_data(config: Config) -> str | None:
    """What the paper calls the data of a run that is trained as its plain rows are.

    None if the data are others or unknown, as those of files in our own format, or if the run is a variant.
    """
    names = {SET_NAMES.get(source.kind) for source in config.data.train}
    traces = {(source.teacher, source.trace) for source in config.data.train}
    plain = (config.train.epochs, config.train.max_steps) == (PAPER_EPOCHS, None)
    return names.pop() if plain and len(names) == 1 and traces == {("deepseek_r1_0528", "full")} else None


def _length(example: Example) -> int:
    return len(example.prompt) + len(example.response or "") + len(example.policy or "")


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"evaluate\0{seed}\0{name}".encode()).digest()
