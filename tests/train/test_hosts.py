"""Stopping on SIGTERM and Ctrl-C."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from jaxguard.cli import INTERRUPTED
from jaxguard.config import load
from jaxguard.data.prepare import prepare
from jaxguard.train.hosts import REQUEUE, compare_hosts, graceful_stop
from jaxguard.utils.errors import JaxguardError


def test_requeue_is_ex_tempfail() -> None:
    assert REQUEUE == os.EX_TEMPFAIL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_sets_the_flag_and_handlers_are_restored(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with graceful_stop() as flag:
        assert not flag.should_stop(1)
        signal.raise_signal(number)
        assert flag.should_stop(2)
        assert flag.signal_name == number.name
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    # Written before the block had ended.
    assert f"{number.name}: stopping after what is being computed" in capfd.readouterr().err


def interrupt_twice() -> None:
    with graceful_stop():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_second_interrupt_raises() -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupt_twice()


def test_repeated_sigterm_stays_graceful() -> None:
    with graceful_stop() as flag:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # the first one by hand
        assert flag.should_stop(1)


SLOW = """
import ctypes, sys, time
from jaxguard.cli import INTERRUPTED
from jaxguard.train.hosts import end_together, graceful_stop

def run():
    with graceful_stop() as flag:
        print("ready", flush=True)
        sleep = ctypes.CDLL(None).usleep  # as XLA: the main thread runs no Python meanwhile
        for _ in range(300):
            sleep(1_000_000) if sys.argv[1] == "blocked" else None
        while not flag.should_stop(1):
            time.sleep(0.05)
        print("saved", flush=True)

end_together(run) if sys.argv[2] == "command" else run()
"""


def interrupt(blocked: str, owner: str) -> tuple[subprocess.Popen[str], str]:
    """Start a run, send it a Ctrl-C, and return it with the lines of its answer."""
    command = [sys.executable, "-c", SLOW, blocked, owner]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stderr
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    return process, process.stderr.readline()


def test_ctrl_c_is_answered_in_the_midst_of_a_step_and_the_second_stops_it() -> None:
    process, answer = interrupt("blocked", "command")
    assert "stopping after what is being computed" in answer
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)  # the step takes minutes
    assert (process.returncode, out) == (INTERRUPTED, "")
    assert "without saving" in err


def test_ctrl_c_once_saves() -> None:
    process, answer = interrupt("free", "command")
    assert "stopping after what is being computed" in answer
    assert (process.communicate(timeout=10)[0], process.returncode) == ("saved\n", 0)


def test_a_notebook_survives_the_second_ctrl_c() -> None:
    process, _ = interrupt("blocked", "notebook")
    for _ in range(20):  # two signals that arrive while no Python runs are one
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(1.5)
    process.kill()
    _, err = process.communicate()
    assert "\nKeyboardInterrupt\n" in err  # which a cell catches


def test_processes_agree_on_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes stop at the coordinator's step, and SIGTERM is left to jax's watcher."""
    got: list[int] = []
    terms: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: terms.append(number))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: got.append(step) or step == 3)
    try:
        with graceful_stop() as flag:
            signal.raise_signal(signal.SIGINT)
            assert [flag.should_stop(step) for step in (1, 2, 3)] == [False, False, True]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [1, 2, 3]
    assert terms == [signal.SIGTERM]


def test_other_threads_set_no_handlers() -> None:
    """As in a notebook that trains in a thread of its own: Python refuses handlers there."""
    flags = []

    def run() -> None:
        with graceful_stop() as flag:
            flags.append(flag.should_stop(1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert flags == [False]


# --- the hosts are compared -------------------------------------------------------------------------------------------


@pytest.fixture
def compare(monkeypatch):
    """compare([(config, checkpoint), ...]): what all processes with these say, each a thread and named node0, node1, ..."""
    own = threading.local()

    def compare(processes):
        barrier, values = threading.Barrier(len(processes)), [None] * len(processes)

        def gather(x):
            values[own.process] = x
            barrier.wait()
            everyones = np.stack(values)
            barrier.wait()
            return everyones

        def run(process):
            own.process = process
            config, checkpoint = processes[process]
            try:
                compare_hosts(config, checkpoint, prepare(config, checkpoint).manifest)
            except JaxguardError as error:
                return str(error)
            return ""

        monkeypatch.setattr(jax, "process_count", lambda: len(processes))
        monkeypatch.setattr(multihost_utils, "process_allgather", gather)
        monkeypatch.setattr(socket, "gethostname", lambda: f"node{own.process}")
        with ThreadPoolExecutor(len(processes)) as pool:
            (message,) = set(pool.map(run, range(len(processes))))
        return message

    return compare


def test_equal_hosts_agree_whatever_is_their_own(compare, tiny_config, tiny_checkpoint):
    mesh = ["mesh.hosts=explicit", "mesh.processes=2"]
    configs = [
        load(str(tiny_config), [*mesh, f"mesh.process={i}", f"mesh.coordinator=node{i}:1", f"log.tensorboard={i == 0}"])
        for i in range(2)
    ]
    assert compare([(config, tiny_checkpoint) for config in configs]) == ""


@pytest.mark.parametrize("odd", [0, 2])
def test_the_host_with_another_seed_is_named(compare, tiny_config, tiny_checkpoint, odd):
    configs = [load(str(tiny_config), [f"seed={7 if i == odd else 3}"]) for i in range(3)]
    message = compare([(config, tiny_checkpoint) for config in configs])
    assert f"process {odd} on node{odd}: config.seed is 7, elsewhere 3" in message
    assert all(f"node{i}" not in message for i in range(3) if i != odd)


def test_a_stale_file_is_named(compare, tiny_config, tiny_checkpoint, tmp_path):
    """The same path on both hosts, with other contents: here a second file in the place of the first."""
    config = load(str(tiny_config))
    path = tiny_config.parent / "train.jsonl"
    stale = tmp_path / "stale.jsonl"
    stale.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    data = config.data.model_copy(update={"train": (config.data.train[0].model_copy(update={"path": str(stale)}),)})
    message = compare([(config, tiny_checkpoint), (config.model_copy(update={"data": data}), tiny_checkpoint)])
    assert "process 1 on node1" in message
    assert "data.train.tokens_sha256" in message
    assert "data.sources" in message


def test_another_tokenizer_and_other_weights_are_named(compare, tiny_config, tiny_checkpoint, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    path = other / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "chat_template": fields["chat_template"].replace("user", "User")}))
    config = load(str(tiny_config))
    message = compare([(config, tiny_checkpoint), (config, other)])
    assert "checkpoint.tokenizer_config.json" in message
    assert "safetensors" not in message
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "checkpoint.model.safetensors" in compare([(config, tiny_checkpoint), (config, other)])
