"""Estimate the cost of a study: steps, tokens, device-hours.

Steps are exact. Tokens of an example and the speed are assumptions of the study's file, or measured in runs of the study that have
trained.
"""

import json
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from statistics import median

from jaxguard.config.evaluate import EvaluateConfig, MineConfig
from jaxguard.config.hardware import peak_flops
from jaxguard.data.files import read_local
from jaxguard.data.packing import total_steps
from jaxguard.evaluate.benchmarks.schema import read_benchmark
from jaxguard.guards.baselines import BASELINES
from jaxguard.guards.loading import modes_of
from jaxguard.report import Table
from jaxguard.study.grid import Run, Study
from jaxguard.utils.errors import JaxguardError

WARMUP_STEPS = 2
"""The first steps of a run compile and are not timed."""


def cost_table(study: Study) -> Table:
    """Return the work and time of every run and of all, and the assumptions behind it.

    What is prepared takes tokens of a teacher, which runs on devices of its own: they are not in the sum.
    """
    cost = study.definition.cost
    trained, generated, source = speed_of(study)
    note = (
        "trained, read and generated are tokens; a teacher's are without retries, and not in the sum. *: the number of examples "
        f"is an assumption of the study's file, or a default. Assumed: {cost.prompt_tokens} tokens a prompt, {cost.trace_tokens} "
        f"a trace, {cost.answer_tokens} a verdict, and {cost.start_seconds} s to start a stage, unless a row says otherwise; "
        f"{cost.devices} {cost.device} train {trained:,.0f} tokens/s ({source}) and generate {generated:,.0f}."
    )
    rows = []
    total = Counter[str]()
    distilled = [run for run in study.prepared if "distill" in run.stages]
    for run in (*distilled, *study.runs):
        amount = work(run)
        rows.append((run.name + (" *" if amount["assumed"] else ""), amount))
        if not run.prepared:
            # A forward pass costs a third of a training step.
            seconds = (amount["trained"] + amount["read"] / 3) / trained + amount["generated"] / generated
            amount["seconds"] = round(seconds + len(run.stages) * run.cost.start_seconds)
            total += amount
    columns = ("run", "steps", "trained", "predictions", "read", "generated", "device-h")
    table = Table(columns, title=study.definition.title, note=note)
    for name, amount in (*rows, (f"{len(study.runs)} runs", total)):
        counts = [amount[kind] for kind in ("trained", "read", "generated")]
        tokens = [f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count / 1e3:,.0f} k" for count in counts]
        hours = f"{amount['seconds'] / 3600 * cost.devices:,.2f}" if amount["seconds"] else "-"
        table.add(name, amount["steps"], tokens[0], amount["predictions"], *tokens[1:], hours)
    return table


def work(run: Run) -> Counter[str]:
    """Count the work of a run from the start.

    Returns:
        steps of training; tokens trained, read and generated; predictions: examples, once for each mode; assumed: above 0 if a
        number of examples is assumed, not counted.
    """
    config, cost, data = run.config, run.cost, run.config.data
    paths = [Path(source.path or "") for source in data.train]
    local = all(path.is_file() for path in paths)
    available = data.subset or (sum(map(_rows, paths)) if local else run.row.examples or 0)
    held_out = 0 if data.subset or data.validation else data.validation_size
    examples, assumed = max(0, available - held_out), not (local or data.subset)
    traced = {"direct": 0.0, "reasoning": 1.0, "dual": data.dual_reasoning_share}[data.mode]

    def predict(count: int, generations: int, traced: float) -> Counter[str]:
        # The probability of a verdict is read after each generation's trace, or once where there is none.
        scored = (
            traced * max(generations, 1) * (cost.prompt_tokens + cost.trace_tokens) + (1 - traced) * cost.prompt_tokens
        )
        read = scored + (cost.prompt_tokens if generations else 0)
        generated = generations * (traced * cost.trace_tokens + cost.answer_tokens)
        return Counter(predictions=count, read=round(count * read), generated=round(count * generated))

    total = Counter(assumed=assumed and set(run.stages) != {"evaluate"})
    if "distill" in run.stages:  # each example once, and once more for each budget, which shortens its trace
        budgets = len(config.distill.budgets) if config.distill else 0
        read = (1 + budgets) * cost.prompt_tokens + budgets * cost.trace_tokens
        generated = (1 + budgets) * (cost.trace_tokens + cost.answer_tokens)
        total += Counter(predictions=available, read=available * read, generated=available * generated)
    if "train" in run.stages:
        steps = total_steps(examples, config.train.batch_size, config.train.epochs, config.train.max_steps)
        tokens = cost.prompt_tokens + traced * cost.trace_tokens + cost.answer_tokens
        total += Counter(steps=steps, trained=round(steps * config.train.batch_size * tokens))
    if "mine" in run.stages:
        total += predict(examples, (config.mine or MineConfig()).generations, traced)
    if "evaluate" in run.stages:
        settings = config.evaluate or EvaluateConfig()
        guards = [guard for guard in settings.guards if guard.format not in BASELINES]
        modes = [mode for guard in guards for mode in modes_of(guard, config)]
        for chosen in settings.benchmarks:
            expected, path = read_benchmark(chosen.name).expected, Path(chosen.path or "")
            known = (
                _rows(path) if path.is_file() else expected.total or (expected.positive or 0) + (expected.negative or 0)
            )
            count = min(known or cost.benchmark_examples, settings.limit or sys.maxsize)
            total += Counter(assumed=not known)
            for mode in modes:
                total += predict(count, settings.generations, float(mode == "reasoning"))
    return total


@cache
def _rows(path: Path) -> int:
    return len(read_local(path, ()).rows)


def speed_of(study: Study) -> tuple[float, float, str]:
    """Return tokens per second of all devices, trained and generated, and where the first is from: what is measured comes first."""
    cost = study.definition.cost
    measured: list[float] = []
    for path in (run.folder / "metrics.jsonl" for run in study.runs):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be cut
        measured += [record["speed"]["tokens_per_second"] for record in records if "speed" in record][WARMUP_STEPS:]
    if measured:
        rate = median(measured)
        return rate, cost.generated_per_second or rate, f"median of {len(measured)} steps of this study"
    if cost.tokens_per_second:
        rate = cost.tokens_per_second
        return rate, cost.generated_per_second or rate, "an assumption of the study's file"
    flops = peak_flops(cost.device)
    if flops is None:
        raise JaxguardError(f"cost.device={cost.device!r} is unknown; set cost.tokens_per_second")
    # 6 FLOPs for each parameter and token in training, 2 in generation.
    per_token = cost.devices * flops / (2 * cost.parameters)
    assumption = (
        f"at {cost.mfu:.0%} of {flops / 1e12:g} TFLOP/s, and {cost.generate_mfu:.0%} in generation: assumptions"
    )
    return per_token * cost.mfu / 3, per_token * cost.generate_mfu, assumption
