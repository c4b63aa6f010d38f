"""Training in several processes: they learn what one learns, from every row once; when one ends, the others do."""

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
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DEVICES = 4
UPDATES = 16
HEARTBEAT = 100
"""Seconds after which JAX misses a process."""
BOUND = 2 * HEARTBEAT
"""Seconds within which the others end, starting included."""

# `python -m jaxguard.train`, which also notes the rows that this process's devices get: a line for each step.
COMMAND = """
import json, sys
import numpy as np
from jaxguard.train import __main__, loop

shard_batch = loop.shard_batch

def log_rows(batch, sharding):
    placed = shard_batch(batch, sharding)
    shards = [(x.index[0].start or 0, np.asarray(x.data).tolist()) for x in placed.tokens_BT.addressable_shards]
    with open(sys.argv[1], "a") as file:
        print(json.dumps([[first + i, row] for first, rows in shards for i, row in enumerate(rows)]), file=file)
    return placed

loop.shard_batch = log_rows
sys.exit(__main__.main(sys.argv[2:]))
"""


CHANGES_FOLDER = "import os, sys; sys.path[0] = os.getcwd(); os.chdir(sys.argv[1]); sys.argv[1] += '/rows'\n"
"""Before COMMAND: each process in a folder of its own."""


def start(code: str, count: int, logs: Path, *arguments: str) -> list[subprocess.Popen]:
    """`count` Python processes that have four devices in all; rank, count and address come last in their arguments."""
    with socket.create_server(("localhost", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={DEVICES // count}",
    }
    logs.mkdir(parents=True)
    processes = []
    for rank in range(count):
        mesh_fields = (f"mesh.process={rank}", f"mesh.processes={count}", f"mesh.coordinator={address}")
        command = [sys.executable, "-c", code, *(x.format(rank=rank) for x in arguments), *mesh_fields]
        with (logs / f"{rank}.log").open("w") as log:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    return processes


def end(processes: list[subprocess.Popen], seconds: float) -> list[int]:
    """Exit codes; whoever still runs after `seconds` is killed, and fails the test."""
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(max(0, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


def said(logs: Path) -> list[str]:
    return [path.read_text() for path in sorted(logs.glob("*.log"))]


def start_training(config: Path, count: int, folder: Path, logs: Path) -> list[subprocess.Popen]:
    run = ["--config", str(config), f"run_folder={folder}", "mesh.hosts=explicit"]
    return start(COMMAND, count, logs, str(logs / "{rank}.rows"), *run)


def finish(config: Path, count: int, folder: Path) -> tuple[list[float], list[list]]:
    """Train to the end: losses of all steps, and the rows of those that this start did."""
    logs = folder / f"finish-{count}"
    processes = start_training(config, count, folder, logs)
    assert end(processes, 450) == [0] * count, said(logs)
    records = [json.loads(line) for line in (folder / "tiny/metrics.jsonl").read_text().splitlines()]
    each = [[json.loads(line) for line in (logs / f"{rank}.rows").read_text().splitlines()] for rank in range(count)]
    assert [len(process) for process in each] == [len(each[0])] * count
    together = [[row for rows in step for row in rows] for step in zip(*each, strict=True)]
    return [record["loss"] for record in records if "loss" in record], together


def check_missed(codes: list[int], others: list[str]) -> None:
    """These ended because one of them was gone, and say so: by themselves, or JAX was faster to end them."""
    assert set(codes) <= {1, -signal.SIGABRT}, others
    assert all("another process of this run has died" in x or "another task died" in x for x in others), others


def kill_one(config: Path, folder: Path, rank: int) -> None:
    """Train in four processes and SIGKILL one after the first checkpoint; the others must end, and say why."""
    logs = folder / "kill"
    processes = start_training(config, 4, folder, logs)
    while not [path for path in folder.glob("tiny/checkpoints/*") if path.name.isdigit()]:
        assert [process.poll() for process in processes] == [None] * 4, said(logs)
        time.sleep(0.02)
    processes[rank].send_signal(signal.SIGKILL)
    codes = end(processes, BOUND)
    assert codes.pop(rank) == -signal.SIGKILL
    others = said(logs)
    others.pop(rank)
    check_missed(codes, others)


@pytest.fixture(scope="module")
def config(tiny_files, tmp_path_factory) -> Path:
    return tiny_files(
        tmp_path_factory.mktemp("multihost"),
        mesh={"data": 2, "fsdp": 2},
        train={"batch_size": 4, "max_steps": UPDATES, "epochs": UPDATES, "evaluate_every": 0, "export": False},
        checkpoint={"every": 2},
    )


@pytest.fixture(scope="module")
def alone(config) -> tuple[list[float], list[list]]:
    """Losses and rows of one process."""
    losses, rows = finish(config, 1, config.parent / "one")
    assert len(losses) == len(rows) == UPDATES
    return losses, rows


def check_same(resumed: tuple[list[float], list[list]], alone: tuple[list[float], list[list]]) -> None:
    """Equal losses, and equal rows in the steps that this start did, each on one device, in the order of the mesh."""
    assert resumed[0] == pytest.approx(alone[0], rel=1e-5)
    assert resumed[1] == alone[1][UPDATES - len(resumed[1]) :]


def test_two_processes_learn_what_one_learns(config, alone, tmp_path):
    check_same(finish(config, 2, tmp_path), alone)


def test_a_checkpoint_of_four_goes_on_in_one_and_in_two(config, alone, tmp_path):
    kill_one(config, tmp_path / "four", rank=3)
    for count in (1, 2):
        folder = tmp_path / str(count)
        shutil.copytree(tmp_path / "four", folder)
        resumed = finish(config, count, folder)
        assert 0 < len(resumed[1]) < UPDATES
        check_same(resumed, alone)


def test_four_go_on_after_the_first_of_them_was_killed(config, alone, tmp_path):
    kill_one(config, tmp_path, rank=0)  # through whom the others found each other
    resumed = finish(config, 4, tmp_path)
    assert 0 < len(resumed[1]) < UPDATES
    check_same(resumed, alone)


@pytest.mark.parametrize("odd", ["seed", "file", "tokenizer"])
def test_hosts_that_differ_do_not_train(config, tmp_path, odd):
    """Two processes whose second has another seed, a stale file or another tokenizer at the same path."""
    tree = yaml.safe_load(config.read_text()) | {"run_folder": str(tmp_path / "runs")}
    places = {"file": Path(tree["data"]["train"][0]["path"]), "tokenizer": Path(tree["model"]["checkpoint"])}
    for rank in range(2):
        shutil.copytree(places["tokenizer"], tmp_path / f"{rank}/checkpoint")
        shutil.copy(places["file"], tmp_path / f"{rank}/train.jsonl")
    tree["data"]["train"][0]["path"], tree["model"]["checkpoint"] = "train.jsonl", "./checkpoint"
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    second = tmp_path / "1"
    if odd == "file":
        lines = (second / "train.jsonl").read_text().splitlines(keepends=True)
        (second / "train.jsonl").write_text("".join(lines[1:]))
    elif odd == "tokenizer":
        path = second / "checkpoint/tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    seed = "seed={rank}" if odd == "seed" else "seed=0"
    run = ["--config", str(tmp_path / "tiny.yaml"), "mesh.hosts=explicit", seed]
    processes = start(CHANGES_FOLDER + COMMAND, 2, tmp_path / "logs", str(tmp_path / "{rank}"), *run)
    assert end(processes, BOUND) == [2, 2], said(tmp_path / "logs")
    expected = {"seed": "config.seed is 1", "file": "data.train.examples", "tokenizer": "checkpoint.tokenizer.json"}
    for text in said(tmp_path / "logs"):
        assert "process 1 on" in text
        assert expected[odd] in text
    assert not (tmp_path / "runs/tiny/data.json").exists()


# Four processes that add numbers up, until one of them has a mistake to report, or stands still. They add up two arrays of
# unlike sizes, which XLA would combine: see hosts.NO_ALL_REDUCE_COMBINER.
ADD = """
import os, signal, sys, time
import jax
import jax.numpy as jnp
import numpy as np
from jaxguard.utils.errors import JaxguardError
from jaxguard.config.train import MeshConfig
from jaxguard.train.hosts import end_together, start_hosts
from jaxguard.models.sharding import batch_sharding, make_mesh, shard_batch

fields = dict(x.removeprefix("mesh.").split("=") for x in sys.argv[2:])
config = MeshConfig(data=4, fsdp=1, hosts="explicit", **fields)

def run():
    start_hosts(config)
    numbers = shard_batch(np.ones((4, 32), np.float32), batch_sharding(make_mesh(config)))
    add = jax.jit(lambda x: (x.sum(0), jnp.square(x).sum()))
    for step in range(10_000):
        columns, squares = add(numbers)
        assert np.asarray(columns).tolist() == [4] * 32 and float(squares) == 128
        if step == 10 and config.process == 3:
            if sys.argv[1] == "stand still":
                os.kill(os.getpid(), signal.SIGSTOP)
            raise JaxguardError("a mistake of this host alone")
        if step == 10:
            time.sleep(2)  # the others find it gone

sys.exit(end_together(run))
"""


def test_an_error_on_one_host_ends_the_others_at_once(tmp_path):
    processes = start(ADD, 4, tmp_path / "logs", "stop")
    try:
        processes[3].wait(BOUND)
    finally:
        codes = end(processes, HEARTBEAT / 2)
    others = said(tmp_path / "logs")
    assert codes.pop(3) == 2
    assert "error: a mistake of this host alone" in others.pop(3)
    check_missed(codes, others)


def test_a_host_that_stands_still_ends_the_others(tmp_path):
    processes = start(ADD, 4, tmp_path / "logs", "stand still")
    still = processes.pop(3)
    try:
        codes = end(processes, BOUND)
    finally:
        still.kill()
        still.wait()
    others = said(tmp_path / "logs")
    others.pop(3)
    check_missed(codes, others)
