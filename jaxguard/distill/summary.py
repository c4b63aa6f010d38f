"""What a store holds, in numbers: from examples to traces."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from jaxguard.distill.store import read_attempts


@dataclass(frozen=True)
class Summary:
    """The way from examples to traces.

    Attributes:
        examples: how many were asked about.
        attempts: answers of the teacher.
        failed: failed check -> attempts that failed it; one attempt may fail several.
        traced: examples with an accepted trace.
        never_passed: example without one -> why its last attempt failed, check -> reason.
        prompt_tokens, completion_tokens: of all attempts.
        judge_tokens: what the judge wrote.
        seconds: from request to answer, summed over all attempts.
    """

    examples: int
    attempts: int
    failed: dict[str, int]
    traced: int
    never_passed: dict[str, dict[str, str]]
    prompt_tokens: int
    completion_tokens: int
    judge_tokens: int
    seconds: float


def summarise(store: Path, examples: Iterable[str]) -> Summary:
    """Read a store through once; `examples` are the ids that were asked about."""
    names = set(examples)
    failed, totals, attempts = Counter[str](), Counter[str](), 0
    traced, last = set[str](), dict[str, dict[str, str]]()
    for attempt in read_attempts(store):
        attempts += 1
        failed.update(attempt.failures.keys())
        for total in ("prompt_tokens", "completion_tokens", "judge_tokens", "seconds"):
            totals[total] += getattr(attempt, total)
        if attempt.accepted:
            traced.add(attempt.example_id)
            last.pop(attempt.example_id, None)
        elif attempt.example_id not in traced:
            last[attempt.example_id] = dict(attempt.failures)
    return Summary(
        examples=len(names),
        attempts=attempts,
        failed=dict(failed.most_common()),
        traced=len(traced & names),
        never_passed={name: last[name] for name in sorted(last.keys() & names)},
        prompt_tokens=totals["prompt_tokens"],
        completion_tokens=totals["completion_tokens"],
        judge_tokens=totals["judge_tokens"],
        seconds=round(float(totals["seconds"]), 3),
    )


def summary_table(summary: Summary, title: str) -> Table:
    """The summary for people; of what never passed, five examples with their reasons."""
    table = Table("", "", title=f"{title}: from examples to traces", title_justify="left", show_header=False)
    table.columns[1].justify = "right"
    table.add_row("examples", f"{summary.examples:,}")
    table.add_row("attempts", f"{summary.attempts:,}")
    for name, count in summary.failed.items():
        table.add_row(f"  failed {name}", f"{count:,}")
    table.add_row("examples with a trace", f"{summary.traced:,}", style="bold")
    table.add_row("never passed", f"{len(summary.never_passed):,}")
    for name, reasons in list(summary.never_passed.items())[:5]:
        table.add_row(Text(f"  {name}"), Text("\n".join(f"{check}: {why}" for check, why in reasons.items())))
    table.add_row("prompt tokens", f"{summary.prompt_tokens:,}")
    table.add_row("completion tokens", f"{summary.completion_tokens:,}")
    if summary.judge_tokens:
        table.add_row("judge's tokens", f"{summary.judge_tokens:,}")
    return table
