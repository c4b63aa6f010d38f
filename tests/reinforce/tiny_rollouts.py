"""Rollouts of a tiny guard whose answers have verdicts, without a run."""

from pathlib import Path

import pytest
import yaml

from jaxguard.config import load
from jaxguard.config.train import MeshConfig
from jaxguard.data.prepare import prepare
from jaxguard.models.hf_io.checkpoints import read_weights
from jaxguard.models.sharding import make_mesh
from jaxguard.models.spec import read_spec
from jaxguard.reinforce.rollouts import Rollouts
from jaxguard.reinforce.sampling import Sampler, fingerprint
from jaxguard.train.__main__ import main as train
from jaxguard.train.step import build_program

MESH = {"fsdp": 4, "tensor": 2}
DIRECT = ["data.mode=direct", "data.validation_size=6"]
RUN = [
    "train.batch_size=8", "train.max_steps=4", "checkpoint.every=2", "train.evaluate_every=0", "reinforce.answers=4",
    "reinforce.max_tokens=32", "train.objective.kind=grpo",
]  # fmt: skip


@pytest.fixture(scope="module")
def guard(tiny_files, tmp_path_factory) -> Path:
    """A config whose checkpoint was trained until its answers have verdicts."""
    folder = tmp_path_factory.mktemp("guard")
    path = tiny_files(folder, mesh=MESH)
    options = [
        "name=first",
        "optimizer.learning_rate=1e-2",
        "train.epochs=50",
        "train.max_steps=80",
        "train.evaluate_every=0",
    ]
    assert train(["--config", str(path), *DIRECT, *options, "checkpoint.every=80"]) == 0
    config = yaml.safe_load(path.read_text())
    config["model"]["checkpoint"] = str(folder / "runs/first/export")
    path.write_text(yaml.safe_dump(config))
    return path


def opened(path: Path, *overrides: str) -> tuple[Rollouts, dict]:
    config = load(path, [*DIRECT, *RUN, *overrides], stage="reinforce")
    source = Path(config.model.checkpoint)
    mesh, spec, data = make_mesh(MeshConfig(**MESH)), read_spec(source), prepare(config, source)
    program = build_program(config, spec, mesh, 4)
    weights = read_weights(source, spec, {path: x.sharding for path, x in program.state["weights"].items()})
    return Rollouts.open(config, source, data, program, 4, 4), weights


def sampler(rollouts: Rollouts, weights: dict) -> Sampler:
    parts = rollouts.config, rollouts.program, rollouts.encoder, weights, 4, rollouts.source, fingerprint(weights)
    return Sampler(*parts)
