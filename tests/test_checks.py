"""What costs nothing to know is said at once, at once for all of it, and also by --dry-run."""

import pytest

from jaxguard.cli import main
from jaxguard.evaluate import run as evaluation

EXPORTED = "evaluate.guards=[{name: most, format: majority}]"
OWN = "evaluate.benchmarks=[{name: own_prompts, path: nowhere.jsonl}]"
MISTAKES = [
    ("train", ["data.policy=lampz"], ["data.policy", "lampz"]),
    (
        "train",
        ["data.train.0.path=nowhere.jsonl", "data.policy=lampz"],
        ["data.train.0.path", "nowhere.jsonl", "lampz"],
    ),
    ("train", ["model.checkpoint=./nowhere"], ["model.checkpoint", "./nowhere"]),
    ("train", ["mesh.fsdp=3"], ["mesh.fsdp=3"]),
    ("train", ["train.accumulation=9"], ["train.accumulation=9"]),
    ("data", ["data.train.0.path=nowhere.jsonl"], ["data.train.0.path", "nowhere.jsonl"]),
    ("data build", ["build.benchmarks=[{kind: jsonl, path: nowhere.jsonl}]"], ["build.benchmarks.0.path"]),
    ("distill", ["distill.teacher.model=x", "data.policy=lampz"], ["lampz"]),
    ("mine", [], ["runs/tiny holds no trained guard"]),
    ("evaluate", [], ["runs/tiny holds no trained guard"]),
    ("evaluate", [OWN], ["evaluate.benchmarks.0.path", "nowhere.jsonl"]),
    ("evaluate", ["evaluate.guards=[{checkpoint: ./nowhere}]"], ["evaluate.guards.0.checkpoint", "./nowhere"]),
    ("evaluate", [EXPORTED, "evaluate.benchmarks=[{name: own_promts}]"], ["own_promts", "did you mean 'own_prompts'"]),
    ("evaluate", ["evaluate.guards=[{name: most, format: majority, paper_row: x}]"], ["paper_row"]),
]


@pytest.mark.parametrize(("stage", "overrides", "words"), MISTAKES)
@pytest.mark.parametrize("dry", [True, False])
def test_a_mistake_is_said_before_any_work(tiny_config, monkeypatch, capsys, stage, overrides, words, dry):
    monkeypatch.setattr(evaluation, "read_tasks", lambda *_: pytest.fail("benchmarks may have to be downloaded"))
    devices = ["mesh.fsdp=-1"] if stage in ("train", "evaluate", "mine") else []
    options = ["--config", str(tiny_config), *devices, *overrides, *["--dry-run"] * dry]
    assert main([*stage.split(), *options]) == 2
    printed = capsys.readouterr()
    assert all(printed.err.count(word) == 1 for word in words), printed.err
    assert printed.out.startswith("name: tiny") == dry
    assert not (tiny_config.parent / "runs").exists()


def test_a_dry_run_of_what_can_run(tiny_config, capsys):
    for stage in ("train", "data"):
        assert main([stage, "--config", str(tiny_config), "--dry-run", *["mesh.fsdp=-1"] * (stage == "train")]) == 0
    assert capsys.readouterr().err == ""
