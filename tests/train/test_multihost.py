"""`python -m jaxguard.train` in several processes: what one process learns, and what is left when one of them is killed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEVICES = 4
UPDATES = 40
BOUND = 120
"""Seconds within which the others end; jax's heartbeat alone takes up to 100."""


class Job:
    """One run in `count` processes, which have four devices in all."""

    def __init__(self, config: Path, count: int, folder: Path) -> None:
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count}"}
        command = [sys.executable, "-m", "jaxguard.train", "--config", str(config), f"run_folder={folder}"]
        self.run, self.processes, self.logs = folder / "tiny", [], []
        for rank in range(count):
            hosts = [f"mesh.coordinator=localhost:{port}", f"mesh.processes={count}", f"mesh.process={rank}"]
            log = folder.with_name(f"{folder.name}-{port}-{rank}.log")
            with log.open("w") as file:
                process = subprocess.Popen(
                    [*command, "mesh.hosts=explicit", *hosts], cwd=ROOT, env=environment, stdout=file, stderr=file
                )
            self.processes.append(process)
            self.logs.append(log)

    def said(self) -> list[str]:
        return [log.read_text() for log in self.logs]

    def end(self, seconds: float = 400) -> list[int]:
        """Exit codes; whoever still runs after `seconds` is killed, and fails the test."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(0, deadline - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def kill(self, rank: int, after: int) -> None:
        """SIGKILL a process once `after` updates are logged."""
        while len(losses(self.run)) < after:
            assert all(process.poll() is None for process in self.processes), self.said()
            time.sleep(0.01)
        self.processes[rank].send_signal(signal.SIGKILL)


def losses(run: Path) -> list[float]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [record["loss"] for line in lines if line.endswith("\n") and "loss" in (record := json.loads(line))]


def finish(config: Path, count: int, folder: Path) -> list[float]:
    """Run to the end; its losses."""
    job = Job(config, count, folder)
    assert job.end() == [0] * count, job.said()
    return losses(job.run)


@pytest.mark.slow
def test_processes_learn_what_one_learns_and_a_killed_one_ends_them_all(tiny_files, tmp_path):
    config = tiny_files(
        tmp_path,
        mesh={"data": 2, "fsdp": 2},
        train={"max_steps": UPDATES, "epochs": UPDATES, "evaluate_every": 0, "export": False},
        checkpoint={"every": 4},
    )
    alone = finish(config, 1, tmp_path / "one")
    assert len(alone) == UPDATES
    assert finish(config, 2, tmp_path / "two") == pytest.approx(alone, rel=1e-5)

    for rank, after in ((3, 6), (0, 14)):  # one of the others, and the one that they all found each other through
        job = Job(config, 4, tmp_path / "four")
        job.kill(rank, after)
        codes = job.end(BOUND)
        assert codes.pop(rank) == -signal.SIGKILL
        assert codes == [75] * 3, job.said()
        told = job.said()
        assert told.pop(rank)
        assert all("another process of this run has died" in one for one in told), told
        if rank:
            for count in (1, 2):
                other = tmp_path / f"four-then-{count}"
                shutil.copytree(tmp_path / "four", other)
                assert finish(config, count, other) == pytest.approx(alone, rel=1e-5)
    assert finish(config, 4, tmp_path / "four") == pytest.approx(alone, rel=1e-5)
