"""Every attempt of the teacher on disk, appended and never changed.

    STORE/
      store.json             what all attempts have in common: teacher, prompts, sampling
      attempts-00000.jsonl   one attempt a line, with a checksum

A start of the program opens a shard of its own, so nothing is ever written behind a line that a kill cut in half. Such a
line, or one whose checksum is wrong, counts as never written: its attempt is made again.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Self

from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import lock_folder, sealed, unsealed, write_atomically
from jaxguard.utils.provenance import differences, refuse_others

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Attempt:
    """One answer of the teacher and what became of it.

    Attributes:
        example_id: what it was about.
        round: how often the example had been tried before, from 0.
        candidate: which of the round's answers, from 0.
        trace: the thought, without its tags.
        answer: what followed the thought.
        finish_reason: why the server stopped.
        failures: name of each failed check -> what is wrong; empty for an accepted trace.
        prompt_tokens, completion_tokens: as the server counts them.
        seconds: from request to answer, retries included.
        time: when it was answered, ISO 8601, UTC.
        judge_tokens: what the judge wrote about it.
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
"""Example, round and candidate: what makes two attempts the same."""


@dataclass
class TraceStore:
    """A store that this process writes to.

    Attributes:
        folder: where it lies.
        done: attempts that are in it.
        accepted: examples that have an accepted trace.
    """

    folder: Path
    done: set[Key] = field(default_factory=set)
    accepted: set[str] = field(default_factory=set)
    _shard: FileIO | None = None

    def append(self, attempt: Attempt) -> None:
        """Add an attempt: once this returns, killing the process loses it no more.

        Raises:
            JaxguardError: the attempt is there already, or cannot be written.
        """
        if attempt.key in self.done:
            raise JaxguardError(f"{self.folder} holds attempt {attempt.key} already")
        try:
            if self._shard is None or self._shard.tell() > SHARD_BYTES:
                self._next_shard()
            assert self._shard is not None
            rest = memoryview(_line(attempt))
            while rest:
                rest = rest[self._shard.write(rest) :]
        except OSError as error:
            if self._shard is not None:
                self._shard.close()
                self._shard = None  # its last line may be half a one: nothing is written behind it
            raise JaxguardError(
                f"cannot write to the trace store {self.folder}: {error.strerror or error}; free some space and run "
                "again: what is there is kept"
            ) from None
        self._index(attempt)

    def _index(self, attempt: Attempt) -> None:
        self.done.add(attempt.key)
        if attempt.accepted:
            self.accepted.add(attempt.example_id)

    def close(self) -> None:
        """Bring the shard to the disk."""
        if self._shard is not None:
            os.fsync(self._shard.fileno())
            self._shard.close()
            self._shard = None

    def _next_shard(self) -> None:
        self.close()
        taken = [int(path.stem.removeprefix("attempts-")) for path in shards(self.folder)]
        name = f"attempts-{max(taken, default=-1) + 1:05}.jsonl"
        self._shard = (self.folder / name).open("xb", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def open_store(folder: Path, settings: Mapping[str, Any]) -> Iterator[TraceStore]:
    """Open a store to write to, or create it.

    Args:
        folder: where it lies, or shall lie.
        settings: what decides the text of an attempt: teacher, prompt template, sampling. JSON.

    Raises:
        JaxguardError: another process writes to it, or it was begun with other settings.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder, "store")
    except OSError as error:
        raise JaxguardError(f"cannot write to the trace store {folder}: {error.strerror or error}") from None
    with lock:
        _check_settings(folder / "store.json", settings)
        with TraceStore(folder) as store:
            for attempt in read_attempts(folder):
                store._index(attempt)
            yield store


def read_attempts(folder: Path) -> Iterator[Attempt]:
    """All attempts of a store, oldest first; what cannot be read is skipped, with a warning that says how much.

    Safe while another process writes. Memory does not grow with the store.
    """
    for path in shards(folder):
        broken = 0
        with path.open("rb") as file:
            for line in file:
                attempt = _parse(line)
                if attempt is None:
                    broken += 1
                else:
                    yield attempt
        if broken:
            logger.warning("%s: %d unreadable lines are left out; their attempts will be made again", path, broken)


def read_settings(folder: Path) -> dict[str, Any]:
    """What the store was begun with.

    Raises:
        JaxguardError: there is no store, or its settings cannot be read.
    """
    path = folder / "store.json"
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JaxguardError(f"{folder} is not a trace store: it has no store.json") from None
    except (OSError, ValueError) as error:
        raise JaxguardError(f"{path} cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise JaxguardError(f"{path} cannot be read: it holds no JSON object")
    return settings


def shards(folder: Path) -> list[Path]:
    """The store's files, oldest first."""
    return sorted(folder.glob("attempts-[0-9]*.jsonl"), key=lambda path: int(path.stem.removeprefix("attempts-")))


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(settings))
    if not path.exists():
        if shards(path.parent):
            raise JaxguardError(f"{path.parent} holds attempts but no store.json: nobody knows whose they are")
        write_atomically(path, json.dumps(now, indent=2, ensure_ascii=False) + "\n")
        return
    refuse_others(
        differences(read_settings(path.parent), now),
        f"{path.parent} holds attempts that were made otherwise:",
        "Take the old values back, or choose another store.",
    )


def _line(attempt: Attempt) -> bytes:
    return sealed("attempt", asdict(attempt))


def _parse(line: bytes) -> Attempt | None:
    """The line's attempt; None if the line is not as it was written."""
    record = unsealed("attempt", line)
    try:
        return None if record is None else Attempt(**record)
    except TypeError:
        return None
