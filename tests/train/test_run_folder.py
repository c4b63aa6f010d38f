"""The run folder: one run, one writer, and no surprise on a second start."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxguard.config import Config, load
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.config.reinforce import ReinforceConfig
from jaxguard.train.run_folder import FREE, ROUNDING, Resume, begin_run, open_run
from jaxguard.utils.errors import JaxguardError, ProvenanceError
from jaxguard.utils.store import differences


def config_in(folder: Path, **sections: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {
        "name": "tiny",
        "run_folder": str(folder),
        "model": {"checkpoint": "somewhere"},
        "data": {"train": [{"kind": "jsonl", "path": "a.jsonl"}]},
    }
    for name, fields in sections.items():
        tree[name] = {**tree.get(name, {}), **fields}
    return load(tree)


def manifest(data: str = "bread", weights: str = "flour") -> dict[str, Any]:
    return {"train": {"tokens_sha256": data}, "weights": weights}


def start(config: Config, resume: Resume = "auto", data: str = "bread", steps: int = 1, weights: str = "flour") -> Path:
    """Begin a run in its folder, record a number of steps, and leave it."""
    with open_run(config, resume) as folder:
        begin_run(folder, config, manifest(data, weights), "xla")
        with (folder / "metrics.jsonl").open("a") as file:
            file.writelines(f'{{"step": {step}}}\n' for step in range(steps + 1))
        return folder


def test_new_run_explains_itself(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    with open_run(config) as folder:
        assert folder == tmp_path / "tiny"
        assert [path.name for path in folder.iterdir()] == [".lock"]
        begin_run(folder, config, manifest(), "xla")
    assert load(str(folder / "config.yaml")) == config
    assert json.loads((folder / "data.json").read_text()) == manifest()
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["devices"] == ["cpu"]
    assert versions["device_count"] == 8
    assert versions["attention"] == "xla"
    assert {"jax", "flax", "orbax-checkpoint", "python", "jaxguard", "commit"} <= set(versions)
    assert versions["before"] == []


def test_auto_goes_on_and_never_refuses(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    start(config, "never")
    start(config, "auto")
    with pytest.raises(JaxguardError, match="--resume is never"):
        start(config, "never")
    start(config, "auto")  # the refusal let go of the lock


@pytest.mark.parametrize("steps", [0, -1])
def test_a_start_that_failed_is_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: int) -> None:
    """It may even have validated the base, before the first step: nothing was trained."""
    failed = start(config_in(tmp_path, optimizer={"learning_rate": 2e-6}), data="cake", steps=steps)
    (failed / "versions.json").write_text('{"jax": "0.0.1", "before": []}')
    corrected = config_in(tmp_path)
    start(corrected, "never", steps=steps)
    assert load(str(failed / "config.yaml")) == corrected
    assert json.loads((failed / "data.json").read_text()) == manifest()
    assert json.loads((failed / "versions.json").read_text())["before"] == []
    assert caplog.text == ""


@pytest.mark.parametrize("trace", ["checkpoints/10", "export/jaxguard.json"])
def test_what_was_saved_or_exported_is_a_run(tmp_path: Path, trace: str) -> None:
    folder = start(config_in(tmp_path), steps=0)
    (folder / trace).mkdir(parents=True) if trace.startswith("check") else (folder / "export").mkdir()
    (folder / "export/jaxguard.json").write_text("{}") if trace.startswith("export") else None
    with pytest.raises(JaxguardError, match=r"optimizer\.learning_rate"):
        start(config_in(tmp_path, optimizer={"learning_rate": 2e-6}))
    with pytest.raises(JaxguardError, match="--resume is never"):
        start(config_in(tmp_path), "never")


def test_other_data_are_refused(tmp_path: Path) -> None:
    folder = start(config_in(tmp_path))
    with pytest.raises(ProvenanceError, match=r"data\.json"):
        start(config_in(tmp_path), data="cake")
    assert json.loads((folder / "data.json").read_text()) == manifest()


def test_a_base_that_was_trained_again_is_refused(tmp_path: Path) -> None:
    """The run would go on from the old one, by preferences relative to the new one."""
    folder = start(config_in(tmp_path))
    with pytest.raises(ProvenanceError, match=r"model\.checkpoint=somewhere have changed"):
        start(config_in(tmp_path), weights="rye")
    (folder / "data.json").write_text(json.dumps({"train": {"tokens_sha256": "bread"}}))  # of an earlier version
    start(config_in(tmp_path), weights="rye")


def test_always_needs_a_checkpoint(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    with pytest.raises(JaxguardError, match="--resume"):
        start(config, "always")
    folder = start(config)
    (folder / "checkpoints/10.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(JaxguardError, match="--resume"):
        start(config, "always")
    (folder / "checkpoints/10").mkdir()
    start(config, "always")


def test_another_run_is_refused_by_field(tmp_path: Path) -> None:
    start(config_in(tmp_path))
    other = config_in(tmp_path, optimizer={"learning_rate": 2e-6}, data={"subset": 500}, log={"tensorboard": False})
    with pytest.raises(JaxguardError) as caught:
        start(other)
    message = str(caught.value)
    assert "optimizer.learning_rate: 1e-06 there, 2e-06 now" in message
    assert "data.subset: None there, 500 now" in message
    assert "log.tensorboard" not in message
    assert "Choose another name" in message
    assert load(str(tmp_path / "tiny" / "config.yaml")) == config_in(tmp_path)


def test_fields_without_effect_may_change_and_rounding_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(config_in(tmp_path))
    harmless = config_in(
        tmp_path,
        checkpoint={"every": 7},
        log={"tensorboard": False},
        data={"prefetch": 2},
        distill={"teacher": {"model": "teacher"}},
    )
    with caplog.at_level(logging.WARNING, "jaxguard"):
        start(harmless)
    assert caplog.text == ""
    rounded = config_in(tmp_path, mesh={"fsdp": 4}, train={"accumulation": 2})
    with caplog.at_level(logging.WARNING, "jaxguard"):
        start(rounded)
    assert "train.accumulation, mesh.fsdp" in caplog.text
    assert load(str(tmp_path / "tiny" / "config.yaml")) == rounded


def test_processes_may_meet_elsewhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for coordinator in ("first:1234", "second:1234"):
        hosts = {"hosts": "explicit", "coordinator": coordinator, "processes": 2, "process": 0}
        start(config_in(tmp_path, mesh=hosts))
    assert caplog.text == ""


def test_field_lists_name_real_fields() -> None:
    tree = (
        config_in(Path("runs"))
        .model_copy(update={"reinforce": ReinforceConfig(), "evaluate": EvaluateConfig()})
        .model_dump(mode="json")
    )
    fields = differences(tree, {})
    leaves = [
        name
        for top in fields
        for name in ([top] if not isinstance(tree[top], dict) else [f"{top}.{k}" for k in tree[top]])
    ]
    for field in (*FREE, *ROUNDING):
        known = field in tree or any(
            leaf == field or (field.endswith(".") and leaf.startswith(field)) for leaf in leaves
        )
        assert known, field


HOLDER = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
from test_run_folder import config_in
from jaxguard.train.run_folder import open_run
with open_run(config_in(Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_process_is_refused_until_the_first_dies(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    command = [sys.executable, "-c", HOLDER.format(here=str(Path(__file__).parent)), str(tmp_path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(JaxguardError, match=f"in use by another process \\(process {holder.pid} on "):
        start(config)
    holder.kill()
    holder.communicate()
    start(config)


def test_changed_versions_are_told_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_in(tmp_path)
    path = start(config) / "versions.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "jax": "0.0.1"}))
    with caplog.at_level(logging.WARNING, "jaxguard"):
        start(config)
    assert "jax 0.0.1 -> " in caplog.text
    start(config)
    found = json.loads(path.read_text())
    assert [before["jax"] for before in found["before"]] == ["0.0.1"]
    assert found["jax"] != "0.0.1"


def test_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "tiny").write_text("a file")
    with pytest.raises(JaxguardError, match="is not a folder"):
        start(config_in(tmp_path))


def test_unreadable_config_is_not_overwritten(tmp_path: Path) -> None:
    start(config_in(tmp_path))
    (tmp_path / "tiny" / "config.yaml").write_text("model: {nonsense: 1}")
    with pytest.raises(JaxguardError, match=r"model\.nonsense"):
        start(config_in(tmp_path))
    assert (tmp_path / "tiny" / "config.yaml").read_text() == "model: {nonsense: 1}"
