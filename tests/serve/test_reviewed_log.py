"""The loop: a service's log with texts, a reviewer's labels, an evaluation's and mining's data, a training source."""

import asyncio
import json
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import yaml

from jaxguard.config import CONFIG_FOLDER, load
from jaxguard.config.data import SourceConfig
from jaxguard.data.benchmarks.loading import load_benchmark
from jaxguard.data.format.dialogue import TITLES
from jaxguard.data.guard_files import write_guard_files
from jaxguard.data.policies import load_policy
from jaxguard.data.prepare import select
from jaxguard.data.sources import load_examples
from jaxguard.guards.protocol import Prediction
from jaxguard.mine.__main__ import main
from jaxguard.serve.__main__ import main as serve
from jaxguard.serve.telemetry import Audit

TRAINED = [
    {"id": f"t{i}", "prompt": f"loaf {i}", "prompt_label": "unharmful", "response": None, "policy": None}
    for i in range(8)
]


@asynccontextmanager
async def open_guard(*_, **__):
    """The guard of the service: a text with `harm` in it is harmful."""

    async def predict(requests):
        for request in requests:
            texts = {"prompt_harm": request.example.prompt, "response_harm": request.example.response}
            words = {q: "harmful" if "harm" in texts[q] else "unharmful" for q in request.questions}
            answer = "\n".join(f"{TITLES[q]}: {word}" for q, word in words.items())
            yield Prediction(request.example.id, dict.fromkeys(words, (1,) * 4), dict.fromkeys(words), (answer,) * 4)

    yield predict


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run that was trained on eight loaves by the policy aegis2."""
    (tmp_path / "configs").symlink_to(CONFIG_FOLDER.resolve())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jaxguard.mine.run.open_guard", open_guard)
    write("data.jsonl", *TRAINED)
    data = {
        "train": [{"kind": "jsonl", "path": "data.jsonl"}],
        "policy": "aegis2",
        "mode": "direct",
        "validation_size": 1,
    }
    config = {"model": {"checkpoint": "unused"}, "train": {"batch_size": 2}, "data": data}
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (tmp_path / "runs/first/export").mkdir(parents=True)
    (tmp_path / "runs/first/export/model.safetensors").write_bytes(b"weights")
    write_guard_files(tmp_path / "runs/first/export", load("first.yaml"), [])
    return tmp_path


def write(name, *rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_a_service_got_wrong_is_trained_on(run, served, guard):
    guard.policy = load_policy("aegis2")
    (run / "law").mkdir()
    (run / "law/oven.yaml").write_text("name: oven\nrules: Nobody may talk about ovens.\n", encoding="utf-8")
    bodies = [
        {"prompt": "a harmless loaf"},  # the guard is wrong
        {"prompt": "a harmful loaf", "response": "No."},
        {"prompt": "a bad loaf", "history": [{"role": "user", "content": "rye"}], "policy": "oven"},  # wrong again
        {"prompt": "a loaf that nobody reviews"},
    ]

    async def check():
        async with served(policies=run / "law", audit=Audit(run / "audit.jsonl", texts=True)) as s:
            return [(await s.check(**body)).json() for body in bodies]

    answers = asyncio.run(check())
    rows = read(run / "audit.jsonl")
    assert [row["audit"]["probabilities"] for row in rows] == [answer["probabilities"] for answer in answers]
    assert [row["policy"] for row in rows] == ["aegis2", "aegis2", "Nobody may talk about ovens.", "aegis2"]
    first, second, third, _ = (answer["id"] for answer in answers)
    labels = [
        {"id": first, "prompt_label": "unharmful"},
        {"id": second, "prompt_label": "harmful", "response_label": "unharmful"},
        {"id": third, "prompt_label": "harmful"},
    ]
    write("reviewed.jsonl", *rows, *labels)

    benchmark = load_benchmark("own_prompts", run / "reviewed.jsonl")
    assert [example.id for example in benchmark.examples] == [first, second, third]
    assert benchmark.skipped == {"no label": 1}
    change = "mine.sources=[{kind: jsonl, path: reviewed.jsonl}]"
    assert main(["--config", "first.yaml", change, "mine.hard=[0,1,2,3]"]) == 0
    hard = load_examples(SourceConfig(kind="jsonl", path="runs/first/mine/hard.jsonl"))
    assert {example.id: example.prompt_label for example in hard} == {first: "unharmful", third: "harmful"}
    assert "rye" in next(example.prompt for example in hard if example.id == third)
    files = [{"kind": "jsonl", "path": f"runs/first/mine/{name}.jsonl"} for name in ("train", "hard")]
    second_round = select(load("first.yaml", [f"data.train={json.dumps(files)}"]))
    assert {first, third} < {example.id for example, _ in second_round.train + second_round.validation}


def test_texts_need_a_file(capsys):
    assert serve(["--model", "unused", "--audit-texts"]) == 2
    assert "--audit" in capsys.readouterr().err
