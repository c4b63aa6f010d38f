"""A small study in a folder of its own, whose stages are a stub."""

import json
from pathlib import Path

import pytest
import yaml

from jaxguard.study import run as study_run
from jaxguard.study.grid import open_study

ROOT = Path(__file__).parents[2]
STUB = Path(__file__).with_name("stub.py")

STUDY = {
    "title": "Bread",
    "config": "bread.yaml",
    "rows": {
        "base": {"stages": ["evaluate"]},
        "bread": {"axes": {"data.subset": [8, 16], "data.subset_seed": [0, 1]}},
        "more": {"after": ["base"], "set": {"model.checkpoint": "{study}/base/export"}},
    },
    "curve": {"axis": "data.subset", "label": "loaves"},
    "metric": "own_responses",
    "scales": {"tiny": {"about": "Less bread.", "rows": {"more": None, "bread": {"axes": {"data.subset": [4]}}}}},
}
CONFIG = {
    "model": {"checkpoint": "baker/oven"},
    "data": {"train": [{"kind": "jsonl", "path": "bread.jsonl"}], "mode": "direct", "validation_size": 0},
    "train": {"batch_size": 4},
    "evaluate": {"benchmarks": [{"name": str(ROOT / "configs/benchmarks/own_responses.yaml"), "path": "bread.jsonl"}]},
}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """study(*overrides, scale=None, **changes): the study, in a new working directory; changes are fields of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_run, "ENTRY", (str(STUB),))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "stub").mkdir()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    Path("bread.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    row = {"prompt": "How?", "response": "So.", "response_label": "unharmful"}
    Path("bread.jsonl").write_text("".join(json.dumps({**row, "id": i}) + "\n" for i in range(20)), encoding="utf-8")

    def make(*overrides, scale=None, **changes):
        Path("study.yaml").write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False), encoding="utf-8")
        return open_study("study.yaml", scale, overrides)

    return make


@pytest.fixture
def behave():
    """behave(**{"RUN STAGE": what}): make the stub behave so."""

    def behave(behaviour):
        Path("stub/behaviour.json").write_text(json.dumps(behaviour), encoding="utf-8")

    return behave


@pytest.fixture
def calls():
    """calls(): what the stub was asked for since the last question, in order."""
    seen = [0]

    def calls():
        path = Path("stub/calls.txt")
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        new, seen[0] = lines[seen[0] :], len(lines)
        return new

    return calls
