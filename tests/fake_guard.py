"""A guard that answers what a test wants, in the place of a model."""

import json
from contextlib import asynccontextmanager

import pytest

from jaxguard.config import load
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.guard_files import write_guard_files
from jaxguard.data.policies import QUESTIONS, load_policy
from jaxguard.data.questions import QuestionSet
from jaxguard.guards import loading as guards
from jaxguard.guards.operating_points import F1, Asked, OperatingPoint, OperatingPoints, write_points
from jaxguard.guards.protocol import Prediction

SETTINGS = EvaluateConfig(generations=1, temperature=0.0)
"""How `check` samples."""


@pytest.fixture
def run(tmp_path):
    """A run's folder with an export: config.json and no weights, trained in direct mode on the policy `short`."""
    (tmp_path / "short.yaml").write_text("name: short\nrules: No bread.\n", encoding="utf-8")
    export = tmp_path / "run" / "export"
    export.mkdir(parents=True)
    (export / "config.json").write_text(json.dumps({"max_position_embeddings": 4096}), encoding="utf-8")
    tree = {
        "name": "run",
        "model": {"checkpoint": "some/base", "compute_dtype": "float32"},
        "data": {
            "train": [{"kind": "jsonl", "path": "gone.jsonl"}],
            "policy": str(tmp_path / "short.yaml"),
            "mode": "direct",
            "direct_marker": "/verdict",
            "max_seq_len": 512,
            "subset": 8,
        },
        "train": {"batch_size": 4},
    }
    trained = {"mode": Mode.DIRECT, "questions": ("prompt_harm", "response_harm"), "examples": 8}
    write_guard_files(export, load(tree), [QuestionSet(response=response, **trained) for response in (False, True)])
    return tmp_path / "run"


def add_points(run, mode=Mode.DIRECT, weights=b"some", thresholds=(0.2, 0.3), **changes):
    """Give a run's export weights, and a guard.json for `weights` with thresholds of f1 and 0.05 for prompts."""
    export = run / "export"
    (export / "model.safetensors").write_bytes(b"some")
    (run / "model.safetensors").write_bytes(weights)
    asked = Asked.of(load_policy(str(export / "policy.yaml")), "prompt_harm", mode, SETTINGS)
    points = OperatingPoints(
        asked=asked.model_copy(update=changes),
        precision="float32",
        positives=20,
        negatives=40,
        examples_sha256="0",
        platt=None,
        points={
            F1: OperatingPoint(threshold=thresholds[0]),
            "0.01": OperatingPoint(),
            "0.05": OperatingPoint(threshold=thresholds[1]),
        },
    )
    write_points(export, guards.weights_digest(run), [points])
    return points


class FakeGuard:
    """Answers what `says` makes of a Request, the last one first; keeps what it was opened with and asked.

    fails_at: the request that fails; answers then come in order.
    """

    def __init__(self):
        self.opened, self.asks, self.cut, self.fails_at = [], [], False, None
        self.chances = dict.fromkeys(QUESTIONS, 0.125) | {"prompt_harm": 0.25}
        self.chance = lambda ask, question: self.chances[question]
        self.says = lambda ask: "Prompt harm: unharmful\nResponse harm: unharmful"

    @asynccontextmanager
    async def open(self, guard, config, settings, **_):
        self.opened.append((guard, config, settings))

        async def judge(asks):
            self.asks += asks
            for ask in asks if self.fails_at else reversed(asks):
                if ask.example.id == self.fails_at:
                    raise RuntimeError(ask.example.id)
                yield Prediction(
                    ask.example.id,
                    verdicts=dict.fromkeys(ask.questions, (0,)),
                    probabilities={q: self.chance(ask, q) for q in ask.questions},
                    texts=(self.says(ask),),
                    cut=self.cut,
                    seconds=0.5,
                )

        yield judge


@pytest.fixture
def guard(monkeypatch):
    fake = FakeGuard()
    monkeypatch.setattr(guards, "open_guard", fake.open)
    return fake
