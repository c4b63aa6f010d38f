"""A guard that answers what a test wants, in the place of a model."""

import json
from contextlib import asynccontextmanager

import pytest

from jaxguard.config import load
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.guard_files import write_guard_files
from jaxguard.data.questions import QuestionSet
from jaxguard.guards import loading as guards
from jaxguard.guards.protocol import Prediction


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


class FakeGuard:
    """Answers what `says` makes of a Request, the last one first; keeps what it was opened with and asked.

    fails_at: the request that fails; answers then come in order.
    """

    def __init__(self):
        self.opened, self.asks, self.cut, self.fails_at = [], [], False, None
        self.says = lambda ask: "Prompt harm: unharmful\nResponse harm: unharmful"

    @asynccontextmanager
    async def open(self, guard, config, settings):
        self.opened.append((guard, config, settings))

        async def judge(asks):
            self.asks += asks
            for ask in asks if self.fails_at else reversed(asks):
                if ask.example.id == self.fails_at:
                    raise RuntimeError(ask.example.id)
                yield Prediction(
                    ask.example.id,
                    verdicts=dict.fromkeys(ask.questions, (0,)),
                    probabilities={q: 0.25 if q == "prompt_harm" else 0.125 for q in ask.questions},
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
