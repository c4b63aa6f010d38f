"""The command `jaxguard serve` with a guard that is trained for it."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from jaxguard.guards.backends.sglang import free_port, started

QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
"""Compile quickly: the guard is tiny."""


class Running(NamedTuple):
    url: str
    process: subprocess.Popen


@contextmanager
def running(log, *arguments, port=None):
    """The command with a real guard, from when it is ready."""
    port = port or free_port()
    command = [sys.executable, "-m", "jaxguard.serve", *map(str, arguments), "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    environment = {"XLA_FLAGS": QUICK, "JAX_COMPILATION_CACHE_DIR": str(log.parent.parent / "programs")}
    with started(command, f"{url}/readyz", log, 300, environment) as process:
        yield Running(url, process)


@pytest.fixture(scope="package")
def export(tiny_files, tmp_path_factory):
    """Of a guard that calls harmful what mentions a lamp, in both modes."""
    if name := os.environ.get("JAXGUARD_SERVE_EXPORT"):
        return Path(name)
    folder = tmp_path_factory.mktemp("guard")
    changes = {"max_steps": 200, "epochs": 1000, "evaluate_every": 0}
    config = tiny_files(folder, train=changes, checkpoint={"every": 1000})
    command = [sys.executable, "-m", "jaxguard.train", "--config", config]
    subprocess.run(command, env={**os.environ, "XLA_FLAGS": ""}, check=True)
    return folder / "runs" / "tiny" / "export"
