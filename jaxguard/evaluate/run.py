"""Evaluate guards: predict every benchmark's examples, score the predictions, write the report.

runs/NAME/evaluate/
  predictions/GUARD/MODE/BENCHMARK.jsonl   every prediction, appended as soon as it is there
  predictions/GUARD/guard.json             with evaluate.validation: operating points; beside local weights as well
  results.json  report.md  report.html
"""

import asyncio
import datetime
import hashlib
import itertools
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from jaxguard.config import Config
from jaxguard.config.base import first_repeated
from jaxguard.config.evaluate import EvaluateConfig, GuardConfig
from jaxguard.data.benchmarks.loading import Benchmark, load_benchmarks
from jaxguard.data.benchmarks.schema import read_group
from jaxguard.data.encoding import TOKENIZER_FILES
from jaxguard.data.examples import Example
from jaxguard.data.files import weights_digest
from jaxguard.data.format.dialogue import LABEL, Mode
from jaxguard.data.guard_files import is_complete, trained_together
from jaxguard.data.inputs import check_inputs
from jaxguard.data.policies import Question, load_policy
from jaxguard.data.prepare import load_sources
from jaxguard.data.questions import NOT_RECORDED
from jaxguard.evaluate.report.card import refresh_cards
from jaxguard.evaluate.report.page import write_report
from jaxguard.evaluate.report.published import nearest_row, read_published
from jaxguard.evaluate.scores.escalation import compare_modes, judge_auto
from jaxguard.evaluate.scores.results import Evaluation
from jaxguard.evaluate.scores.scoring import PointsOf, PredictedExamples, choose_points, score
from jaxguard.guards.baselines import BASELINES
from jaxguard.guards.loading import (
    cache_key,
    checkpoint_of,
    computed_in,
    examples_key,
    modes_of,
    open_guard,
    open_predictions,
)
from jaxguard.guards.operating_points import POINTS, Asked, OperatingPoints, Points, read_points, write_points
from jaxguard.guards.protocol import UNPARSABLE, Prediction, Predictor, Request, UnsupportedError
from jaxguard.utils import hub
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import lock_folder
from jaxguard.utils.progress import Progress
from jaxguard.utils.secrets import published
from jaxguard.utils.terminal import Console

SET_NAMES = {"wildguardmix": "WildGuardMix", "aegis2": "Aegis 2.0", "nemotron_safety": "Aegis 2.0"}
"""Kind of source -> the paper's name for it."""


class Task(NamedTuple):
    """Examples to predict, as many as evaluate.limit takes of a benchmark's; or validation examples, of no benchmark."""

    label: str
    question: Question
    examples: Sequence[Example]
    benchmark: Benchmark | None = None


def evaluate(config: Config) -> Evaluation:
    """Predict every benchmark with every guard, and write the report; predictions on disk are reused.

    Raises:
        JaxguardError: anything that the user can correct.
    """
    settings, folder = config.evaluate or EvaluateConfig(), config.folder / "evaluate"
    check(config)
    tasks = read_tasks(settings, config)
    with lock_folder(folder, "evaluation"):
        predictions, points, left_out = asyncio.run(predict_all(tasks, config, settings, folder))
        cells, averages = score(predictions, settings, points)
        evaluation = Evaluation(
            name=config.name,
            models={guard.name: describe(guard, config) for guard in settings.guards},
            benchmarks=tuple(task.label for task in tasks if task.benchmark),
            cells=cells,
            averages=averages,
            cascades=tuple(compare_modes(predictions, cells, settings, points)),
            settings=published(settings.model_dump(mode="json")),
            finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            hardware=hardware(settings),
            paper_rows=paper_rows(settings, config),
            folder=folder,
            left_out=left_out,
        )
        write_report(evaluation, folder)
        refresh_cards(evaluation, config, {task.label: task.benchmark.definition for task in tasks if task.benchmark})
    return evaluation


def check(config: Config) -> None:
    """Check what costs nothing to check: settings, policy, local paths, names of benchmarks, and that the guards are there."""
    settings = config.evaluate or EvaluateConfig()
    check_inputs(config, "evaluate")
    for each in settings.benchmarks:
        read_group(each.name)
    paper_rows(settings, config)
    if config.mesh.hosts != "single" and settings.backend == "jax" and not all(g.endpoint for g in settings.guards):
        raise JaxguardError(
            f"mesh.hosts={config.mesh.hosts}: JAX evaluates on the devices of one host. Set mesh.hosts=single where the guard "
            "fits one host, else serve it: evaluate.backend=sglang, or an endpoint"
        )
    for guard in settings.guards:
        modes = modes_of(guard, config)  # also finds unknown formats
        if settings.generations == 0 and Mode.REASONING in modes:
            raise JaxguardError(
                f"evaluate.generations=0 takes verdicts from probabilities alone, but in reasoning mode, in which guard "
                f"{guard.name!r} is evaluated, they depend on the reasoning: set its modes=[direct], or sample"
            )
        if guard.format not in BASELINES:
            checkpoint_of(guard, config)
    if settings.backend == "jax" and not all(guard.endpoint or guard.format in BASELINES for guard in settings.guards):
        from jaxguard.models.sharding import make_mesh  # loads JAX

        make_mesh(config.mesh)


def read_tasks(settings: EvaluateConfig, config: Config) -> list[Task]:
    """Read all benchmarks of the config, and the labelled validation examples of each question of the policy."""
    tasks = []
    for each in settings.benchmarks:
        benchmarks = load_benchmarks(each.name, None if each.path is None else Path(each.path))
        for benchmark in benchmarks:
            definition, examples = benchmark.definition, _limited(benchmark.examples, settings)
            label = each.label and each.label + (f"_{definition.question}" if len(benchmarks) > 1 else "")
            tasks.append(Task(label or definition.name, definition.question, examples, benchmark))
    if (repeated := first_repeated([task.label for task in tasks])) is not None:
        raise JaxguardError(f"evaluate.benchmarks: {repeated!r} is given twice; give one of them a label")
    if settings.validation:
        examples = load_sources(settings.validation, "validation")[0]
        for question in load_policy(config.data.policy).asks:
            labelled = [example for example in examples if getattr(example, LABEL[question])]
            if labelled:
                tasks.append(Task(f"validation-{question}", question, labelled))
    return tasks


async def predict_all(
    tasks: Sequence[Task], config: Config, settings: EvaluateConfig, folder: Path
) -> tuple[list[PredictedExamples], PointsOf, dict[str, str]]:
    """All predictions of all guards in all their modes, their points, and what a guard does not support: title -> reason."""
    policy = load_policy(config.data.policy)
    predicted: list[PredictedExamples] = []
    points: dict[tuple[str, Mode, Question], OperatingPoints] = {}
    left_out: dict[str, str] = {}
    for guard in settings.guards:
        async with open_guard(guard, config, settings) as predictor:
            key = await cache_key(guard, config, settings)
            known = key["guard"]
            for mode, task in itertools.product(modes_of(guard, config), tasks):
                title, path = f"{guard.name} {mode} {task.label}", folder / "predictions" / guard.name / mode
                requests = [Request(example, (task.question,), mode) for example in task.examples]
                of_all = examples_key(task.benchmark.examples if task.benchmark else task.examples, policy)
                try:
                    predictions = await predict(predictor, requests, path / f"{task.label}.jsonl", key | of_all, title)
                except UnsupportedError as error:
                    left_out[title] = str(error)
                else:
                    predicted.append(PredictedExamples(guard.name, mode, *task, predictions, computed_in(known)))
            validation = [each for each in predicted if each.guard == guard.name and each.benchmark is None]
            both = len({each.mode for each in validation}) == len(Mode)
            chosen = [x for x in (choose_points(each, policy, settings, both) for each in validation) if x is not None]
            chosen = judge_auto(validation, chosen, settings)
            by_asked = keep_points(guard, config, known.get("weights"), chosen, folder / "predictions" / guard.name)
            for mode, question in itertools.product(modes_of(guard, config), policy.asks):
                if (asked := Asked.of(policy, question, mode, settings)) in by_asked:
                    points[guard.name, mode, question] = by_asked[asked]
    return predicted, points, left_out


def keep_points(
    guard: GuardConfig, config: Config, weights: str | None, chosen: Sequence[OperatingPoints], folder: Path
) -> Points:
    """Store the points that were chosen, in `folder` and beside local weights; return them, and others that were stored there."""
    stored: Points = {}
    if guard.format == "jaxguard":
        source = hub.fetch(checkpoint_of(guard, config), guard.revision, TOKENIZER_FILES)
        stored, reason = read_points(source, weights)
        if chosen and weights is not None:
            write_points(folder, weights, chosen)
            local = source == hub.local_folder(checkpoint_of(guard, config))
            if local and is_complete(source) and weights_digest(source) == weights:
                write_points(source, weights, chosen)
        elif reason and (source / POINTS).exists():
            Console(stderr=True).print(f"note: {reason}", soft_wrap=True)
    return {**stored, **{each.asked: each for each in chosen}}


async def predict(
    predictor: Predictor, requests: Sequence[Request], path: Path, key: dict[str, Any], title: str
) -> list[Prediction]:
    """Predictions in the order of the requests; those in the file are reused, others are appended to it.

    Long texts come first, so that those that do not fit fail at once. Examples of one policy, of which each token is computed
    once, and among these texts of similar length share a batch.
    """

    def length(request: Request) -> int:
        example = request.example
        return sum(len(text or "") for text in (example.prompt, example.response, example.policy))

    with open_predictions(path, key) as stored:
        waiting = [request for request in requests if request.example.id not in stored.answers]
        waiting.sort(key=length, reverse=True)
        longest: dict[str | None, int] = {}
        for request in waiting:
            longest.setdefault(request.example.policy, length(request))
        waiting.sort(key=lambda request: (-longest[request.example.policy], request.example.policy or ""))
        done, tokens, unparsable = len(requests) - len(waiting), 0, 0
        with Progress(title, len(requests), done, Console(stderr=True)) as progress:
            last = time.monotonic()
            async for prediction in predictor(waiting):
                now = time.monotonic()
                prediction, last = replace(prediction, wall=now - last), now
                stored.append(prediction)
                done, tokens = done + 1, tokens + prediction.prompt_tokens + prediction.completion_tokens
                unparsable += sum(each.count(UNPARSABLE) for each in prediction.verdicts.values())
                progress.update(done, f"unparsable: {unparsable}", tokens=tokens)
        return [stored.answers[request.example.id] for request in requests]


def describe(guard: GuardConfig, config: Config) -> str:
    """Describe a guard for the report's head."""
    if guard.format in BASELINES:
        return f"{guard.format}, fitted to the run's training examples"
    served = f" at {guard.endpoint}" if guard.endpoint else ""
    checkpoint, unknown = checkpoint_of(guard, config), ""
    if guard.format == "jaxguard" and not trained_together(hub.fetch(checkpoint, guard.revision, TOKENIZER_FILES)):
        unknown = f"; {NOT_RECORDED}"
    return f"{published(checkpoint)}{served}, format {guard.format}{unknown}"


def hardware(settings: EvaluateConfig) -> str:
    """Describe what the guards without an endpoint ran on."""
    if settings.backend == "sglang":
        return f"{platform.processor() or platform.machine()} and what SGLang finds there"
    import jax

    return f"{jax.device_count()} × {jax.devices()[0].device_kind}"


def paper_rows(settings: EvaluateConfig, config: Config) -> dict[str, str]:
    """The row of the paper to compare each "guard/mode" with: the one that the config names, or the nearest."""
    published, paper_set, data = read_published(), paper_data(config), config.data
    rows: dict[str, str] = {}
    for guard in settings.guards:
        for mode in modes_of(guard, config):
            row = guard.paper_row
            if row is None and paper_set is not None and guard.format == "jaxguard" and guard.checkpoint is None:
                nearest = nearest_row(published, config.model.checkpoint, paper_set, data.mode, mode, data.subset)
                row = nearest.id if nearest else None
            if row is not None:
                rows[f"{guard.name}/{mode}"] = row
    unknown = set(rows.values()) - {row.id for row in published.rows}
    if unknown:
        raise JaxguardError(f"evaluate.guards: paper_row {unknown.pop()!r} is not in configs/published/paper.yaml")
    return rows


def paper_data(config: Config) -> str | None:
    """The paper's name for the training set of a run that has the paper's recipe.

    None if the set is another or unknown, as files in our own format are, or if the recipe is a variant.
    """
    names = {SET_NAMES.get(source.kind) for source in config.data.train}
    traces = {(source.teacher, source.trace) for source in config.data.train}
    plain = (config.train.epochs, config.train.max_steps) == (5, None)
    return names.pop() if plain and len(names) == 1 and traces == {("deepseek_r1_0528", "full")} else None


def _limited(examples: Sequence[Example], settings: EvaluateConfig) -> Sequence[Example]:
    """As many examples as evaluate.limit says, drawn by a hash of the seed and the id."""

    def rank(example: Example) -> bytes:
        return hashlib.sha256(f"evaluate\0{settings.seed}\0{example.id}".encode()).digest()

    return examples if settings.limit is None else sorted(examples, key=rank)[: settings.limit]
