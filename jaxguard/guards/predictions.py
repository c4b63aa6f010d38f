"""Every answer of a guard on disk, one checksummed line each, appended as soon as it is there.

The first line says what all answers have in common. A line that a kill cut in half is dropped at the next start, and its
example judged again.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from jaxguard.guards.protocol import Prediction
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import sealed, unsealed
from jaxguard.utils.provenance import differences, refuse_others

logger = logging.getLogger(__name__)


@dataclass
class Predictions:
    """An open file of answers.

    Attributes:
        path: where it lies.
        answers: example id -> answer.
    """

    path: Path
    answers: dict[str, Prediction]
    _file: IO[bytes]

    def append(self, answer: Prediction) -> None:
        """Add an answer: once this returns, killing the process loses it no more.

        Raises:
            JaxguardError: it cannot be written.
        """
        try:
            rest = memoryview(sealed("answer", asdict(answer)))
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise JaxguardError(
                f"cannot write to {self.path}: {error.strerror or error}; free some space and run again: what is there is "
                "kept"
            ) from None
        self.answers[answer.example_id] = answer


@contextmanager
def open_predictions(path: Path, settings: Mapping[str, Any]) -> Iterator[Predictions]:
    """Open a file of answers to add to, or begin it. Who calls holds a lock on the folder.

    Args:
        path: the file.
        settings: what decides the answers: guard, sampling, examples. JSON.

    Raises:
        JaxguardError: it was begun with other settings, or cannot be written.
    """
    head = sealed("settings", settings)
    answers: dict[str, Prediction] = {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            begun, answers, broken = _read(path)
            if begun is not None:
                refuse_others(
                    differences(begun, unsealed("settings", head)),
                    f"{path} holds answers that were got otherwise:",
                    "Take the old values back, give the guard or the run another name, or delete the file.",
                )
            if broken:
                logger.warning("%s: %d unreadable lines are dropped; their examples are judged again", path, broken)
        # Written anew, so that nothing is ever appended to half a line.
        draft = path.with_suffix(".tmp")
        with draft.open("wb") as file:
            file.write(head)
            file.writelines(sealed("answer", asdict(answer)) for answer in answers.values())
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        stream = path.open("ab", buffering=0)
    except OSError as error:
        raise JaxguardError(f"cannot write to {path}: {error.strerror or error}") from None
    with stream:
        yield Predictions(path, answers, stream)


def _read(path: Path) -> tuple[dict[str, Any] | None, dict[str, Prediction], int]:
    """Settings (None: unreadable, and then no answer counts), answers, and the number of broken lines."""
    with path.open("rb") as file:
        begun = unsealed("settings", file.readline())
        answers: dict[str, Prediction] = {}
        broken = 0
        for line in file:
            answer = _answer(line)
            if answer is None or begun is None:
                broken += 1
            else:
                answers[answer.example_id] = answer
    return begun, answers, broken


def _answer(line: bytes) -> Prediction | None:
    record = unsealed("answer", line)
    try:
        if record is None:
            return None
        return Prediction(**{**record, "verdicts": tuple(record["verdicts"]), "texts": tuple(record["texts"])})
    except (TypeError, KeyError):
        return None
