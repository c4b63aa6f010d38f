"""Both rounds with a real model: trained, mined by the JAX sampler, trained once more."""

import json

import pytest
import yaml

from jaxguard.mine.__main__ import main as mine
from jaxguard.train.__main__ import main as train


@pytest.mark.slow
def test_a_run_is_trained_mined_and_trained_again(tiny_files, tmp_path):
    first = tiny_files(tmp_path, train={"max_steps": 3, "batch_size": 8}, mesh={"fsdp": -1})
    assert train(["--config", str(first)]) == 0
    # Whatever so small and hardly trained a guard says is hard here.
    sampling = ["mine.generations=2", "mine.hard=[0,1,2]", "mine.most=5"]
    assert mine(["--config", str(first), *sampling, "evaluate.reasoning_tokens=8", "evaluate.verdict_tokens=16"]) == 0
    folder = tmp_path / "runs/tiny/mine"
    report = json.loads((folder / "report.json").read_text())
    trained = json.loads((tmp_path / "runs/tiny/data.json").read_text())["train"]["examples"]
    assert report["examples"] == sum(report["right"]) == trained
    answers = [line for path in (folder / "answers").iterdir() for line in path.read_text().splitlines()[1:]]
    assert len(answers) == trained
    tree = yaml.safe_load(first.read_text())
    tree["name"] = "second"
    tree["model"]["checkpoint"] = str(tmp_path / "runs/tiny/export")
    sources = {name: {"kind": "jsonl", "path": str(folder / f"{name}.jsonl")} for name in ("train", "hard", "held_out")}
    tree["data"] |= {
        "train": [sources["train"], sources["hard"]],
        "validation": [sources["held_out"]],
        "subset": None,
    }
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(tree))
    assert train(["--config", str(tmp_path / "second.yaml")]) == 0
    again = json.loads((tmp_path / "runs/second/data.json").read_text())
    before = json.loads((tmp_path / "runs/tiny/data.json").read_text())
    assert again["train"]["examples"] == trained + 5
    assert again["validation"]["tokens_sha256"] == before["validation"]["tokens_sha256"]
