"""What a store holds, in numbers: from examples to traces."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jaxguard.distill.store import read_attempts
from jaxguard.report import Table


@dataclass(frozen=True)
class Summary:
    """The way from examples to traces.

    Attributes:
        examples: those with a task.
        attempts: completions of the teacher.
        failed: failed check -> attempts that failed it; one attempt may fail several.
        traced: examples with an accepted trace.
        never_passed: example without one -> why its last attempt failed, check -> reason.
        prompt_tokens, completion_tokens: of all attempts.
        judge_tokens: completion tokens of the judge.
        seconds: from request to response, summed over all attempts.
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


def summarize(store: Path, examples: Iterable[str]) -> Summary:
    """Read a store through once; `examples` are the ids of those with a task."""
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


def summary_table(summary: Summary, name: str) -> Table:
    """The summary for people; of what never passed, five examples with their reasons."""
    table = Table(("", "count"), title=f"{name}: from examples to traces")
    table.add("examples", summary.examples)
    table.add("attempts", summary.attempts)
    for check, count in summary.failed.items():
        table.add(f"  failed {check}", count)
    table.add("examples with a trace", summary.traced)
    table.add("never passed", len(summary.never_passed))
    for example, reasons in list(summary.never_passed.items())[:5]:
        table.add(f"  {example}", "; ".join(f"{check}: {why}" for check, why in reasons.items()))
    table.add("prompt tokens", summary.prompt_tokens)
    table.add("completion tokens", summary.completion_tokens)
    if summary.judge_tokens:
        table.add("judge's tokens", summary.judge_tokens)
    return table
