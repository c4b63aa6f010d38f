"""A run that is stopped or interrupted ends with the same bits as one that never was; tests/fuzz/test_kills.py kills it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxguard.train.checkpoints import read_checkpoint_weights
from jaxguard.train.hosts import REQUEUE
from jaxguard.train.logging import read_metrics

PATIENCE = 300  # seconds that anything may take on a busy machine
STEPS = 12


def start(config: Path, *overrides: str, devices: int = 1) -> subprocess.Popen:
    """`python -m jaxguard.train`, with a compilation cache, since every start compiles the same programs."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(config.parent / f"programs-{devices}"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "jaxguard.train", "--config", str(config), *overrides]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, output
    return output


def deterministic(run: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "speed"} for record in read_metrics(run / "metrics.jsonl")]


def assert_same_run(found: Path, expected: Path) -> None:
    assert deterministic(found) == deterministic(expected)
    ours, theirs = (read_checkpoint_weights(run, step=STEPS) for run in (found, expected))
    for path, weight in theirs.items():
        np.testing.assert_array_equal(np.asarray(ours[path]), np.asarray(weight), err_msg=path)
    for file in sorted(expected.glob("export/*")):
        if file.name not in ("README.md", "config.yaml", "jaxguard.json"):  # hold the run's name
            assert (found / "export" / file.name).read_bytes() == file.read_bytes(), file.name


def logged_steps(run: Path) -> int:
    """Lines in the log, half-written ones included."""
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def wait_for_progress(process: subprocess.Popen, run: Path, lines: int) -> bool:
    """Wait until the log has that many lines; False when the run ended before."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None:
        assert time.monotonic() < deadline, "the run makes no progress"
        if logged_steps(run) >= lines:
            return True
        time.sleep(0.002)
    return False


@pytest.fixture(scope="module")
def tiny_config(tiny_files: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One config for all runs here, which differ in name."""
    return tiny_files(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def uninterrupted(tiny_config: Path) -> Path:
    finish(start(tiny_config, "name=whole"))
    return tiny_config.parent / "runs/whole"


@pytest.mark.slow
def test_sigterm_saves_and_asks_to_be_started_again(tiny_config: Path, uninterrupted: Path) -> None:
    run = tiny_config.parent / "runs/stopped"
    # No checkpoint is due before the end: what is found on disk was saved because of the signal.
    rare = ("name=stopped", "checkpoint.every=1000")
    process = start(tiny_config, *rare)
    assert wait_for_progress(process, run, 3)
    process.send_signal(signal.SIGTERM)
    output = finish(process, REQUEUE)
    assert "stopped by SIGTERM" in output
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit()]
    assert "resuming from" in finish(start(tiny_config, *rare))
    assert_same_run(run, uninterrupted)


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_devices(tiny_config: Path, uninterrupted: Path) -> None:
    """8 devices, then 4, then 1: the same data in the same order; sums differ in rounding only."""
    run = tiny_config.parent / "runs/moved"
    for devices in (8, 4, 1):
        process = start(tiny_config, "name=moved", f"mesh.fsdp={devices}", devices=devices)
        if devices > 1:
            assert wait_for_progress(process, run, 4 if devices == 8 else 8)
            process.send_signal(signal.SIGTERM)
            finish(process, REQUEUE)
        else:
            output = finish(process)
    assert "resuming from" in output
    ours, theirs = deterministic(run), deterministic(uninterrupted)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    np.testing.assert_allclose([r.get("loss", 0) for r in ours], [r.get("loss", 0) for r in theirs], rtol=1e-4)
