"""Two processes under jax.distributed: they stop at one step, and take one checkpoint, when only one has a reason."""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROCESS = """
import os, signal, sys, time
from pathlib import Path
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxguard.config import load
from jaxguard.config.train import CheckpointConfig
from jaxguard.train.checkpoints import open_checkpoints
from jaxguard.train.run_folder import open_run
from jaxguard.train.hosts import graceful_stop

rank, port, folder, steps, term = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
jax.distributed.initialize(f"localhost:{port}", 2, rank)
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))

def state(step):
    def put(value, spec):
        return jax.make_array_from_callback(value.shape, NamedSharding(mesh, spec), lambda index: value[index])
    noise = np.random.default_rng(step).normal(size=(64, 128)).astype(np.float32)
    return {"weights": {"w": put(noise, P("fsdp"))}, "step": put(np.asarray(step, np.int32), P())}

abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
data = {"train": [{"kind": "jsonl", "path": "a.jsonl"}]}
config = load({"name": "two", "run_folder": folder, "model": {"checkpoint": "x"}, "data": data})
with (
    open_run(config) as run_folder,
    open_checkpoints(run_folder / "checkpoints", CheckpointConfig(), "two") as checkpoints,
    graceful_stop() as flag,
):
    found = checkpoints.restore(abstract)
    step = found[0] if found else 0
    for restored, expected in zip(jax.tree.leaves(found and found[1]), jax.tree.leaves(state(step))):
        for a, b in zip(restored.addressable_shards, expected.addressable_shards):
            assert np.array_equal(a.data, b.data)
    print(f"from {step}", flush=True)
    while step < steps:
        step += 1
        time.sleep(0.05)
        if step % 5 == 0:
            checkpoints.save(step, state(step))
        if rank == 1 and step == term:
            os.kill(os.getpid(), signal.SIGTERM)
        if flag.should_stop(step):
            checkpoints.save(step, state(step))
            break
print(f"at {step}", flush=True)
"""


def run_two(folder: Path, steps: int, term: int = 0) -> list[tuple[int, int]]:
    """(first step, last step) of each process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(port), str(folder), str(steps), str(term)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    found = []
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        told = dict(line.split() for line in output.splitlines() if line.startswith(("from ", "at ")))
        found.append((int(told["from"]), int(told["at"])))
    return found


@pytest.mark.slow
def test_two_processes_stop_together_and_fall_back_together(tmp_path: Path) -> None:
    first, second = run_two(tmp_path, steps=1000, term=12)
    assert first == second
    stopped = first[1]
    assert 12 <= stopped < 100
    newest = tmp_path / "two" / "checkpoints" / str(stopped)
    files = sorted(newest.glob("weights/ocdbt.process_1/d/*"), key=lambda path: path.stat().st_size)
    raw = bytearray(files[-1].read_bytes())  # process 1's shards alone
    raw[random.Random(0).randrange(len(raw) // 4, len(raw) // 2)] ^= 1
    files[-1].write_bytes(raw)
    first, second = run_two(tmp_path, steps=stopped + 5)
    assert first == second
    before = (stopped - 1) // 5 * 5
    assert first == (before, stopped + 5)
    assert newest.with_name(f"{stopped}.corrupt").is_dir()
