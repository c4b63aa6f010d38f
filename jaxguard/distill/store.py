"""Every attempt of the teacher on disk, appended and never changed.

    STORE/attempts.jsonl   a line of settings that all attempts share (teacher, prompt, sampling), then one attempt a line

An attempt whose line is damaged counts as never made: it is made again.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import lock_folder
from jaxguard.utils.store import Store, open_store, read_records, read_settings


@dataclass(frozen=True)
class Attempt:
    """One completion of the teacher and what became of it.

    Attributes:
        example_id: the example.
        round: how often the example had been tried before, from 0.
        candidate: which of the round's completions, from 0.
        trace: the reasoning, without its tags.
        answer: what followed the reasoning.
        finish_reason: why the server stopped.
        failures: name of each failed check -> what is wrong; empty for an accepted trace.
        prompt_tokens, completion_tokens: as the server counts them.
        seconds: from request to response, retries included.
        time: when it was answered, ISO 8601, UTC.
        judge_tokens: completion tokens of the judge.
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

    @property
    def accepted(self) -> bool:
        return not self.failures

    @property
    def key(self) -> "Key":
        return self.example_id, self.round, self.candidate


Key = tuple[str, int, int]
"""Example, round and candidate identify an attempt."""


@dataclass
class TraceStore:
    """A store that this process appends to.

    Attributes:
        done: the attempts in it.
        accepted: the examples that have an accepted trace.
    """

    _store: Store
    done: set[Key] = field(default_factory=set)
    accepted: set[str] = field(default_factory=set)

    def append(self, attempt: Attempt) -> None:
        """Add an attempt: once this returns, killing the process does not lose it.

        Raises:
            JaxguardError: the attempt is there already, or cannot be written.
        """
        if attempt.key in self.done:
            raise JaxguardError(f"{self._store.path} holds attempt {attempt.key} already")
        self._store.append(asdict(attempt))
        self._index(attempt)

    def _index(self, attempt: Attempt) -> None:
        self.done.add(attempt.key)
        if attempt.accepted:
            self.accepted.add(attempt.example_id)


@contextmanager
def open_traces(folder: Path, settings: Mapping[str, Any]) -> Iterator[TraceStore]:
    """Open a trace store to append to, or create it.

    Args:
        folder: its folder.
        settings: what decides the text of an attempt: teacher, prompt template, sampling. JSON.

    Raises:
        JaxguardError: another process writes to it, or it was begun with other settings.
    """
    if (folder / "store.json").exists():
        raise JaxguardError(f"{folder} is a trace store of an earlier version: move it away, or choose another name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder, "store")
    except OSError as error:
        raise JaxguardError(f"cannot write to the trace store {folder}: {error.strerror or error}") from None
    remedy = "Take the old values back, or choose another store."
    with lock, open_store(attempts_file(folder), settings, remedy) as store:
        traces = TraceStore(store)
        for attempt in read_attempts(folder):
            traces._index(attempt)
        yield traces


def read_attempts(folder: Path) -> Iterator[Attempt]:
    """All attempts of a trace store, oldest first; safe while another process appends."""
    return read_records(attempts_file(folder), lambda record: Attempt(**record))


def store_settings(folder: Path) -> dict[str, Any]:
    """The settings that a trace store was begun with.

    Raises:
        JaxguardError: there is no store, or its settings are damaged.
    """
    if not attempts_file(folder).is_file():
        raise JaxguardError(f"{folder} is not a trace store: it has no attempts.jsonl")
    return read_settings(attempts_file(folder))


def attempts_file(folder: Path) -> Path:
    return folder / "attempts.jsonl"
