"""Estimate the cost of a study: steps, tokens, device-hours.

Steps are exact. Tokens of an example and the speed are assumptions of the study's file, or of runs that have trained.
"""

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

from jaxguard.config.data import SourceConfig
from jaxguard.config.evaluate import EvaluateConfig, MineConfig
from jaxguard.config.hardware import peak_flops
from jaxguard.config.reinforce import ReinforceConfig
from jaxguard.data.benchmarks.schema import read_benchmark, read_group
from jaxguard.data.files import read_local
from jaxguard.data.packing import total_steps
from jaxguard.guards.baselines import BASELINES
from jaxguard.guards.loading import modes_of
from jaxguard.report import Table
from jaxguard.study.grid import Run, Study
from jaxguard.study.training import read_metrics
from jaxguard.utils.errors import JaxguardError


@dataclass(frozen=True)
class _Speed:
    tokens_per_second: float


@dataclass(frozen=True)
class _Record:
    """A line of metrics.jsonl, as far as it is used."""

    speed: _Speed | None = None


WARMUP_STEPS = 2
"""The first steps of a run compile and are not timed."""


def cost_table(study: Study) -> Table:
    """Return the work and time of every run and of all, and the assumptions behind it; a teacher's work is not included."""
    cost, (trained, generated, source) = study.definition.cost, speed_of(study)
    note = (
        "trained, read and generated are tokens, trained those that are computed; without a teacher's. *: the number of examples "
        f"is an assumption of the study's file, or a default. Assumed: {cost.prompt_tokens} tokens a prompt, "
        f"{cost.policy_tokens} of them the policy's, {cost.trace_tokens} a trace, {cost.answer_tokens} a verdict, "
        f"and {cost.start_seconds} s to start a stage, unless a row says otherwise; {cost.devices} {cost.device} train "
        f"{trained:,.0f} tokens/s ({source}) and generate {generated:,.0f}."
    )
    columns = ("run", "steps", "trained", "predictions", "read", "generated", "device-h")
    table = Table(columns, title=study.definition.title, note=note)
    amounts = {run.name: work(run) for run in study.runs}
    for run in study.runs:
        amount = amounts[run.name]
        # A forward pass costs a third of a training step.
        seconds = (amount["trained"] + amount["read"] / 3) / trained + amount["generated"] / generated
        amount["seconds"] = round(seconds + len(run.row.stages) * run.cost.start_seconds)
    total = sum(amounts.values(), Counter[str]())
    for name, amount in (*amounts.items(), (f"{len(study.runs)} runs", total)):
        counts = [amount[kind] for kind in ("trained", "read", "generated")]
        tokens = [f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count / 1e3:,.0f} k" for count in counts]
        hours = f"{amount['seconds'] / 3600 * cost.devices:,.2f}"
        star = " *" if amount["assumed"] else ""
        table.add(name + star, amount["steps"], tokens[0], amount["predictions"], *tokens[1:], hours)
    return table


def work(run: Run) -> Counter[str]:
    """Count the work of a run from the start: steps of training; tokens trained, read and generated; predictions.

    Predictions are examples, once for each mode; `assumed` is above 0 if a number of examples is assumed, not counted.
    """
    config, cost, data, total = run.config, run.cost, run.config.data, Counter[str]()
    known = _examples(data.train)
    examples = data.subset or known or run.row.examples or 0
    if not data.subset and not data.validation:
        examples = max(0, examples - data.validation_size)
    traced = {"direct": 0.0, "reasoning": 1.0, "dual": data.dual_reasoning_share}[data.mode]
    if {"train", "reinforce", "mine"} & set(run.row.stages):
        total["assumed"] += not (known or data.subset)
    own, answer = cost.prompt_tokens - cost.policy_tokens, traced * cost.trace_tokens + cost.answer_tokens
    predictions: list[tuple[int, int, float, bool]] = []  # examples, generations of each, share with a trace, scored
    if {"train", "reinforce"} & set(run.row.stages) and examples:
        train, reinforce = config.train, config.reinforce or ReinforceConfig()
        total["steps"] = steps = total_steps(examples, train.batch_size, train.epochs, train.max_steps)
        answers = 2 if train.objective.is_preference else 1
        if "reinforce" in run.row.stages:
            exact = reinforce.reward.kind != "sampled"
            sampled = train.batch_size * reinforce.answers * answer * (traced if exact else 1)
            total["generated"] += round(steps * reinforce.candidates * sampled)
            answers = 2 if exact and not traced else reinforce.answers  # where nothing is sampled, both verdicts
        total["trained"] = round(steps * _batch_tokens(run, own, answers * answer))
        if train.objective.is_preference:  # the reference, once
            total["read"] += round(examples * (own + answers * answer))
    if "mine" in run.row.stages:
        mine = config.mine or MineConfig()
        mined = mine.subset or _examples(mine.sources) if mine.sources else examples
        total["assumed"] += not mined
        predictions.append((mined or run.row.examples or 0, mine.generations, traced, False))
    if "evaluate" in run.row.stages:
        settings = config.evaluate or EvaluateConfig()
        guards = [guard for guard in settings.guards if guard.format not in BASELINES]
        modes = [mode for guard in guards for mode in modes_of(guard, config)]
        for benchmark in settings.benchmarks:
            path = Path(benchmark.path or "")
            of_each = (read_benchmark(name).expected for name in read_group(benchmark.name))
            published = sum(each.total or (each.positive or 0) + (each.negative or 0) for each in of_each)
            known = _rows(path) if path.is_file() else published
            count = min(known or cost.benchmark_examples, settings.limit or sys.maxsize)
            total["assumed"] += not known
            predictions += [(count, settings.generations, float(mode == "reasoning"), True) for mode in modes]
    for count, generations, share, scored in predictions:
        # The prompt is read to generate, and with all its traces for the probability; the policy is computed once.
        read = bool(generations) * own + scored * (own + share * max(generations, 1) * cost.trace_tokens)
        total["predictions"] += count
        total["read"] += round(count * read)
        total["generated"] += round(count * generations * (share * cost.trace_tokens + cost.answer_tokens))
    return total


def _examples(sources: Sequence[SourceConfig]) -> int:
    """How many rows the sources hold; 0 where that is unknown, since they are not local files."""
    paths = [Path(source.path or "") for source in sources]
    return sum(map(_rows, paths)) if all(path.is_file() for path in paths) else 0


def _batch_tokens(run: Run, prompt: float, answers: float) -> float:
    """The tokens that a batch computes, of examples with a prompt and answers of so many: the policy's once a row, if shared."""
    cost, data, batch = run.cost, run.config.data, run.config.train.batch_size
    own = prompt + answers
    per_row = max(1, int((data.max_seq_len - cost.policy_tokens) / own)) if data.share_prefixes else 1
    return batch * own + math.ceil(batch / per_row) * cost.policy_tokens


@cache
def _rows(path: Path) -> int:
    return len(read_local(path, ()).rows)


def speed_of(study: Study) -> tuple[float, float, str]:
    """Return tokens per second of all devices, trained and generated, and where the first is from: what is measured comes first."""
    cost = study.definition.cost
    measured: list[float] = []
    for run in study.runs:
        speeds = [record.speed.tokens_per_second for record in read_metrics(run.folder, _Record) if record.speed]
        measured += [speed for speed in speeds[WARMUP_STEPS:] if math.isfinite(speed)]
    if measured:
        rate = median(measured)
        return rate, cost.generated_per_second or rate, f"median of {len(measured)} steps of this study"
    if cost.tokens_per_second:
        rate = cost.tokens_per_second
        return rate, cost.generated_per_second or rate, "an assumption of the study's file"
    flops, parameters = peak_flops(cost.device), _parameters(study, cost.parameters)
    if flops is None:
        raise JaxguardError(f"cost.device={cost.device!r} is unknown; set cost.tokens_per_second")
    # 6 FLOPs for each parameter and token in training, 2 in generation.
    per_token = cost.devices * flops / (2 * parameters)
    source = f"at {cost.mfu:.0%} of {flops / 1e12:g} TFLOP/s, and {cost.generate_mfu:.0%} in generation: assumptions"
    return per_token * cost.mfu / 3, per_token * cost.generate_mfu, source


def _parameters(study: Study, assumed: float) -> float:
    """Those of the checkpoint of the study's runs, where one is a local folder."""
    folders = (Path(run.config.model.checkpoint) for run in study.runs)
    folder = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    if folder is None:
        return assumed
    from jaxguard.models import weights  # loads JAX, for a local model alone
    from jaxguard.models.spec import read_spec

    return float(weights.count(weights.abstract(read_spec(folder))))
