"""Every prediction of a guard on disk, one checksummed line each, appended as soon as it is there.

The first line holds the settings that all predictions share. A line that a kill cut off is dropped at the next start, and its
example is predicted again.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxguard.guards.protocol import Prediction
from jaxguard.utils.store import Store, open_store, read_records

_REMEDY = "Take the old values back, give the guard or the run another name, or delete the file."


@dataclass
class Predictions:
    """An open file of predictions.

    Attributes:
        answers: example id -> prediction.
    """

    answers: dict[str, Prediction]
    _store: Store

    def append(self, prediction: Prediction) -> None:
        """Add a prediction: once this returns, killing the process does not lose it.

        Raises:
            JaxguardError: it cannot be written.
        """
        self._store.append(asdict(prediction))
        self.answers[prediction.example_id] = prediction


@contextmanager
def open_predictions(path: Path, settings: Mapping[str, Any]) -> Iterator[Predictions]:
    """Open a file of predictions to add to, or begin it. The caller holds a lock on the folder.

    Args:
        path: the file.
        settings: what decides the predictions: guard, sampling, examples. JSON.

    Raises:
        JaxguardError: it was begun with other settings, or cannot be written.
    """
    with open_store(path, settings, _REMEDY) as store:
        records = read_records(path, _prediction)
        yield Predictions({prediction.example_id: prediction for prediction in records}, store)


def _prediction(record: dict[str, Any]) -> Prediction:
    verdicts = {question: tuple(each) for question, each in record["verdicts"].items()}
    return Prediction(**{**record, "verdicts": verdicts, "texts": tuple(record["texts"])})
