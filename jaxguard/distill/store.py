"""Every attempt of the teacher on disk, in STORE/attempts.jsonl: appended and never changed.

An attempt whose line is damaged counts as never made: it is made again.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jaxguard.report import Table
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import lock_folder
from jaxguard.utils.store import Store, open_store, read_records

Key = tuple[str, int, int]
"""Example, round and candidate identify an attempt."""


@dataclass(frozen=True)
class Attempt:
    """One completion of the teacher and what became of it.

    Attributes:
        round, candidate: how often the example had been tried before, and which of the round's completions it is; from 0.
        trace, answer: the reasoning without its tags, and what followed it.
        finish_reason: why the server stopped.
        failures: name of each failed check -> what is wrong; empty for an accepted trace.
        prompt_tokens, completion_tokens, judge_tokens: as the servers count them.
        seconds: from request to response, retries included.
        time: when it was answered, ISO 8601, UTC.
        task: digest of what it was about; empty in stores of earlier versions.
    """

    example_id: str
    round: int
    candidate: int
    trace: str
    answer: str
    finish_reason: str
    failures: Mapping[str, str]
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    time: str
    judge_tokens: int = 0
    task: str = ""

    def answers(self, tasks: Mapping[str, str]) -> bool:
        """Whether it is about its example as it is now; `tasks`: example id -> digest of its task."""
        return self.task in ("", tasks.get(self.example_id))

    @property
    def accepted(self) -> bool:
        return not self.failures

    @property
    def key(self) -> Key:
        return self.example_id, self.round, self.candidate


@dataclass
class TraceStore:
    """A store that this process appends to: the attempts that are `done`, the examples with an `accepted` trace.

    Attempts at an example whose text, labels or policy were others do not count.
    """

    _store: Store
    done: set[Key] = field(default_factory=set)
    accepted: set[str] = field(default_factory=set)

    def append(self, attempt: Attempt) -> None:
        """Add an attempt, which must be new: once this returns, killing the process does not lose it."""
        if attempt.key in self.done:
            raise JaxguardError(f"{self._store.path} holds attempt {attempt.key} already")
        self._store.append(asdict(attempt))
        self.index(attempt)

    def index(self, attempt: Attempt) -> None:
        self.done.add(attempt.key)
        if attempt.accepted:
            self.accepted.add(attempt.example_id)


@contextmanager
def open_traces(folder: Path, settings: Mapping[str, Any], tasks: Mapping[str, str]) -> Iterator[TraceStore]:
    """Open a trace store to append to, or create it.

    `settings` is what decides the text of an attempt, JSON; `tasks` are the digests of the tasks by example id. It is an error if
    another process writes to it, or if it was begun with other settings.
    """
    remedy = "Take the old values back, or choose another store."
    with lock_folder(folder, "store"), open_store(attempts_file(folder), settings, remedy) as store:
        traces = TraceStore(store)
        for attempt in read_attempts(folder):
            if attempt.answers(tasks):
                traces.index(attempt)
        yield traces


def read_attempts(folder: Path) -> Iterator[Attempt]:
    """Yield all attempts of a trace store, oldest first; safe while another process appends."""
    return read_records(attempts_file(folder), Attempt)


def attempts_file(folder: Path) -> Path:
    return folder / "attempts.jsonl"


def summarize(folder: Path, tasks: Mapping[str, str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Read a store through once; `tasks` are the digests of the tasks by example id.

    Returns:
        Example id -> its first accepted trace; and the contents of traces.summary.json, where "failed" counts attempts by failed
        check, "never_passed" says why an example's last attempt failed, and tokens and seconds are those of all attempts.
    """
    failed, totals = Counter[str](), Counter[str]()
    traces, last_failures = dict[str, str](), dict[str, dict[str, str]]()
    for attempt in read_attempts(folder):
        failed.update(attempt.failures.keys())
        totals["attempts"] += 1
        for name in ("prompt_tokens", "completion_tokens", "judge_tokens", "seconds"):
            totals[name] += getattr(attempt, name)
        if not attempt.answers(tasks):
            continue
        last_failures[attempt.example_id] = dict(attempt.failures)
        if attempt.accepted:
            traces.setdefault(attempt.example_id, attempt.trace)
    never_passed = sorted((last_failures.keys() - traces.keys()) & tasks.keys())
    return traces, {
        "examples": len(tasks),
        "attempts": totals["attempts"],
        "failed": dict(failed.most_common()),
        "traced": len(traces.keys() & tasks.keys()),
        "never_passed": {name: last_failures[name] for name in never_passed},
        **{name: totals[name] for name in ("prompt_tokens", "completion_tokens", "judge_tokens")},
        "seconds": round(float(totals["seconds"]), 3),
    }


def summary_table(summary: Mapping[str, Any], name: str) -> Table:
    """Show a summary to people; of what never passed, five examples with their reasons."""
    rows: list[tuple[str, Any]] = [("examples", summary["examples"]), ("attempts", summary["attempts"])]
    rows += [(f"  failed {check}", count) for check, count in summary["failed"].items()]
    rows += [("examples with a trace", summary["traced"]), ("never passed", len(summary["never_passed"]))]
    for example, reasons in list(summary["never_passed"].items())[:5]:
        rows.append((f"  {example}", "; ".join(f"{check}: {why}" for check, why in reasons.items())))
    tokens = [(f"{name} tokens", summary[f"{name}_tokens"]) for name in ("prompt", "completion")]
    judge = [("judge's tokens", summary["judge_tokens"])] if summary["judge_tokens"] else []
    return Table.of(("", "count"), [*rows, *tokens, *judge], f"{name}: from examples to traces")
