"""Stands in for jaxguard.evaluate.predictions where there is none: the same contract, in few lines."""

import importlib.util
import json
import sys
import types
from contextlib import contextmanager
from dataclasses import asdict

from jaxguard.errors import JaxguardError
from jaxguard.evaluate.judging import Answer


class Predictions:
    def __init__(self, path, answers):
        self.path, self.answers = path, answers

    def append(self, answer):
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(answer)) + "\n")
        self.answers[answer.example_id] = answer


@contextmanager
def open_predictions(path, settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps(settings) + "\n"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else [head]
    if lines[0] != head:
        raise JaxguardError(f"{path} holds answers that were got otherwise")
    lines = [line for line in lines if line.endswith("\n")]
    path.write_text("".join(lines))
    rows = [{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(line).items()} for line in lines[1:]]
    yield Predictions(path, {row["example_id"]: Answer(**row) for row in rows})


if importlib.util.find_spec("jaxguard.evaluate.predictions") is None:
    module = types.ModuleType("jaxguard.evaluate.predictions")
    module.open_predictions = open_predictions
    sys.modules[module.__name__] = module
