"""A distillation from start to end: examples in, traces filtered and stored, a training file out."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from jaxguard import hub
from jaxguard.config import Config
from jaxguard.data.encode import TOKENIZER_FILES, Encoder
from jaxguard.data.examples import Example
from jaxguard.data.policies import load_policy
from jaxguard.data.prepare import load_sources, subset
from jaxguard.disk import write_atomically
from jaxguard.distill.filters import Filters
from jaxguard.distill.generate import Funnel, Generation, tasks_for
from jaxguard.distill.prompts import TeacherPrompt, load_prompt
from jaxguard.distill.store import open_store, read_attempts
from jaxguard.errors import JaxguardError
from jaxguard.sections import DistillConfig

try:
    from jaxguard.distill.teacher import open_teacher
except ImportError as error:
    raise JaxguardError(f"the teacher's client is not installed ({error}): pip install -e '.[distill]'") from None


def distill(config: Config) -> int:
    """Get a trace for each training example that has a label.

    Returns:
        0; examples that never got one are counted and named.

    Raises:
        JaxguardError: anything that the user can mend.
    """
    if config.distill is None:
        raise JaxguardError("the config has no distill section: it needs at least distill.teacher.model")
    prompt, policy = load_prompt(config.distill.prompt), load_policy(config.data.policy)
    tokenizer = hub.fetch(config.model.checkpoint, config.model.revision, TOKENIZER_FILES)
    dialogue = Encoder.load(tokenizer, config.data).dialogue
    examples, _ = load_sources(config.data.train, "train")
    if config.data.subset is not None:
        examples = subset(examples, config.data.subset, config.data.subset_seed)
    tasks = list(tasks_for(examples, policy))
    if not tasks:
        raise JaxguardError(f"none of the {len(examples)} examples has a label for what policy {policy.name!r} asks")
    folder, console = config.folder / "traces", Console()

    async def generate(settings: DistillConfig) -> Funnel:
        async with open_teacher(settings.teacher) as teacher:
            await teacher.check()
            with (
                open_store(folder, common(settings, prompt, policy.digest)) as store,
                bar(len(tasks), console) as progress,
            ):
                filters = Filters(settings.filter, dialogue)
                shared = (teacher, prompt, dialogue, filters, store, settings.rounds, settings.candidates)
                return await Generation(*shared).run(tasks, progress)

    funnel = asyncio.run(generate(config.distill))
    output = config.folder / "traces.jsonl"
    written = write_traced(output, folder, [task.example for task in tasks])
    console.print(funnel_table(folder, len(tasks), funnel))
    console.print(f"{written} examples with traces: {output}", highlight=False)
    return 0


def common(settings: DistillConfig, prompt: TeacherPrompt, policy: str) -> dict[str, object]:
    """What all attempts of one store must have in common: whatever decides their text, and whether it is accepted."""
    teacher = settings.teacher
    return {
        "teacher": teacher.model,
        "version": teacher.version,
        "sampling": {"temperature": teacher.temperature, "top_p": teacher.top_p, "max_tokens": teacher.max_tokens},
        "prompt": prompt.digest,
        "policy": policy,
        "filter": settings.filter.model_dump(mode="json"),
    }


def write_traced(path: Path, store: Path, examples: list[Example]) -> int:
    """Write the examples that have an accepted trace, each with its first, in their order; returns their number."""
    traces: dict[str, tuple[int, int, str]] = {}
    for attempt in read_attempts(store):
        if attempt.accepted:
            mine = (attempt.round, attempt.candidate, attempt.trace)
            traces[attempt.example_id] = min(traces.get(attempt.example_id, mine), mine)
    traced = [replace(example, trace=traces[example.id][2]) for example in examples if example.id in traces]
    write_atomically(path, "".join(json.dumps(example.to_json(), ensure_ascii=False) + "\n" for example in traced))
    return len(traced)


@contextmanager
def bar(total: int, console: Console) -> Iterator["Shown"]:
    """A progress bar over the examples; on no terminal it shows nothing, the table at the end says it all."""
    columns = (
        TextColumn("traces"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Shown(progress, total)


class Shown:
    """Shows a funnel as it fills."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("traces", total=total, numbers="")

    def __call__(self, funnel: Funnel) -> None:
        """Show the newest numbers."""
        seconds = self._progress.tasks[0].elapsed or 1e-9
        failed = "  ".join(f"{name} {count}" for name, count in funnel.failed.most_common(3))
        numbers = f"{funnel.completion_tokens / seconds:,.0f} tokens/s  failed: {failed or 'none'}"
        self._progress.update(self._task, completed=funnel.accepted + len(funnel.unfinished), numbers=numbers)


def funnel_table(store: Path, total: int, funnel: Funnel) -> Table:
    """From examples to traces, over all that the store holds."""
    counted, with_trace = Funnel(), set()
    for attempt in read_attempts(store):
        counted.add(attempt)
        if attempt.accepted:
            with_trace.add(attempt.example_id)
    table = Table("", "", title="From examples to traces", title_justify="left", show_header=False)
    table.columns[1].justify = "right"
    table.add_row("examples", f"{total:,}")
    table.add_row("attempts", f"{counted.attempts:,}")
    for name, count in counted.failed.most_common():
        table.add_row(f"  failed {name}", f"{count:,}")
    table.add_row("examples with a trace", f"{len(with_trace):,}", style="bold")
    table.add_row("never passed", f"{len(funnel.unfinished):,}")
    for name in funnel.unfinished[:5]:
        table.add_row(f"  {name}", "")
    table.add_row("prompt tokens", f"{counted.prompt_tokens:,}")
    table.add_row("completion tokens", f"{counted.completion_tokens:,}")
    return table
