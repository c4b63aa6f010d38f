"""The processes of a run, one on each host: how they find each other, stop together on a signal, and end together on an error."""

import hashlib
import json
import os
import signal
import socket
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxguard.cli import INTERRUPTED, exit_code
from jaxguard.config import READS, Config
from jaxguard.config.train import MeshConfig
from jaxguard.data.encoding import TOKENIZER_FILES
from jaxguard.data.files import file_digest
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.store import differences

Result = TypeVar("Result")

REQUEUE = 75
"""Exit code after a stop by signal with the state saved: EX_TEMPFAIL of sysexits.h, "try again later"."""

START_TIMEOUT = 300
"""Seconds in which all processes of a run must have started."""

HOSTS_OWN: Final[dict[str, Any]] = {"mesh": {"coordinator", "process"}, "data": {"prefetch"}, "log": True}
"""Fields in which the hosts may differ: no batch depends on them."""

LAST_BYTES = 2**20
"""Bytes at the end of a file of weights that are compared over the hosts."""

MOST_DIFFERENCES = 20
"""Lines of an error that says in what the hosts differ."""

NO_ALL_REDUCE_COMBINER = "--xla_disable_hlo_passes=cpu-all-reduce-combiner"
"""For XLA_FLAGS. A CPU's all-reduce of several arrays continues with the next array when one has failed because a process
has died: processes that are still at the one before then wait for 100 seconds, or Gloo aborts them (jaxlib 0.10.2)."""


def start_hosts(config: MeshConfig) -> None:
    """Join the other hosts of the job, before anything else uses JAX's devices.

    When the others do not come, JAX ends the process with a message of its own; so this prints first what it waits for.

    Raises:
        JaxguardError: jax.distributed could not be initialized.
    """
    if config.hosts == "single" or jax.distributed.is_initialized():
        return
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {NO_ALL_REDUCE_COMBINER}"
    sys.stderr.write(f"mesh.hosts={config.hosts}: waiting up to {START_TIMEOUT} s for all processes of the run\n")
    try:
        explicit = (config.coordinator, config.processes, config.process)
        cluster = explicit if config.hosts == "explicit" else (None, None, None)
        jax.distributed.initialize(*cluster, initialization_timeout=START_TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise JaxguardError(
            f"mesh.hosts={config.hosts}: jax.distributed could not start: {error}; under SLURM, GKE or on a TPU pod use "
            "mesh.hosts=auto, elsewhere mesh.hosts=explicit with mesh.coordinator, mesh.processes and mesh.process"
        ) from error


def compare_hosts(config: Config, checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """Compare config, data and checkpoint over all processes, before the first step; call it on every one of them.

    Of the checkpoint's weights only sizes and last bytes are compared: they may be hundreds of GB.

    Raises:
        JaxguardError: on every process, where one differs from most others; it says which one, in what.
    """
    if jax.process_count() == 1:
        return
    files = sorted({path for pattern in (*TOKENIZER_FILES, "*.safetensors") for path in checkpoint.glob(pattern)})
    facts = {
        "config": config.model_dump(mode="json", include=set(READS["train"]), exclude=HOSTS_OWN),
        "data": manifest,
        "checkpoint": {path.name: _file_fact(path) for path in files if path.is_file()},
    }
    own = np.frombuffer(json.dumps([socket.gethostname(), facts], sort_keys=True).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(own.size))
    texts = multihost_utils.process_allgather(np.pad(own, (0, int(sizes.max()) - own.size)))
    hosts = [json.loads(text[:size].tobytes()) for text, size in zip(texts, sizes, strict=True)]
    usual = json.loads(Counter(json.dumps(each) for _, each in hosts).most_common(1)[0][0])
    lines = [
        f"  process {process} on {name}: {field} is {here!r}, elsewhere {there!r}"
        for process, (name, each) in enumerate(hosts)
        for field, (here, there) in differences(each, usual).items()
    ]
    if lines:
        more = [f"  and {len(lines) - MOST_DIFFERENCES} more"] * (len(lines) > MOST_DIFFERENCES)
        remedy = "Start every process with the same config, and copy the same files to all hosts."
        raise JaxguardError(
            "\n".join(["the processes would train on different batches:", *lines[:MOST_DIFFERENCES], *more, remedy])
        )


def _file_fact(path: Path) -> str:
    """A small file's hash; of weights their size and the hash of their last bytes."""
    if path.suffix != ".safetensors":
        return file_digest(path)
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - LAST_BYTES))
        return f"{path.stat().st_size} bytes, {hashlib.file_digest(stream, 'sha256').hexdigest()}"


OWNS_PROCESS: ContextVar[bool] = ContextVar("owns_process", default=False)
"""Whether the command line runs a training in this process, and nothing else."""


@dataclass
class StopFlag:
    """Whether a signal asked the run to stop: the name of the one that this process received, or None; whether one was Ctrl-C."""

    signal_name: str | None = None
    interrupted: bool = False

    def should_stop(self, step: int) -> bool:
        """Whether to stop after this step; call it once a step, on every process.

        Schedulers signal the processes of a job at different moments, or only one of them. So several processes agree
        on a step through the coordinator, which watches SIGTERM by itself.
        """
        if jax.process_count() == 1:
            return self.signal_name is not None
        return bool(multihost_utils.reached_preemption_sync_point(step))


@contextmanager
def graceful_stop() -> Iterator[StopFlag]:
    """Turn SIGTERM and the first SIGINT into a flag and answer at once; the second SIGINT stops now.

    In a process that the command line owns it then ends the process, as SIGKILL would: nothing that is being written is lost by it.
    Elsewhere, as in a notebook, it raises KeyboardInterrupt as soon as Python runs.

    With several processes, enter it after jax.distributed is initialized: SIGTERM then stays with JAX's own watcher, and a
    Ctrl-C (which only some launchers pass to every process) goes to that watcher as a SIGTERM. Python allows signal handlers
    in the main thread only; in another one this does nothing. The previous handlers are restored at the end.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    alone = jax.process_count() == 1

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and flag.interrupted:
            raise KeyboardInterrupt
        flag.signal_name = signal.Signals(number).name
        flag.interrupted = flag.interrupted or number == signal.SIGINT
        if not alone:
            signal.raise_signal(signal.SIGTERM)

    watched = (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,)
    # Python calls a handler between two of its instructions, but a step or a compilation may take minutes. What it writes
    # into this socket is written at once.
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    answering = threading.Thread(target=_answer, args=(reader, watched, OWNS_PROCESS.get()), daemon=True)
    answering.start()
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, on_signal) for number in watched}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        writer.shutdown(socket.SHUT_WR)  # ends the thread, also where a forked process has the socket too
        answering.join()  # a process that ends now has answered
        writer.close()


def _answer(signals: socket.socket, watched: Sequence[int], owns_process: bool) -> None:
    """Say what each signal does; the second SIGINT ends a process that the command line owns. Runs in a thread."""
    interrupts, answered = 0, False
    with signals:
        while numbers := signals.recv(1):
            interrupts += numbers[0] == signal.SIGINT
            if interrupts == 2:
                os.write(2, b"\nstopped without saving: the same command resumes from the last checkpoint\n")
                if owns_process:
                    if sys.stdout.isatty():
                        os.write(1, b"\x1b[?25h")  # the cursor, which a progress bar hides
                    os._exit(INTERRUPTED)
            elif numbers[0] in watched and not answered:
                answered, again = True, "; again: stop now without saving" if interrupts else ""
                os.write(
                    2, f"\n{signal.Signals(numbers[0]).name}: stopping after what is being computed{again}\n".encode()
                )


def end_together(run: Callable[[], Result]) -> Result:
    """Return what `run` returns, in a process that is this run's; when it fails on one of several hosts, print why and end at once.

    The usual exit waits for the other processes, and they wait for this one, in a collective; or one of them has died, and
    this process waits for it. A process that has exited makes the collectives and the heartbeat of the others fail, so they
    end too: all within JAX's 100 seconds.
    """
    owns = OWNS_PROCESS.set(True)
    try:
        return run()
    except BaseException as error:
        if not jax.distributed.is_initialized() or jax.process_count() == 1:
            raise
        text, problem = "".join(traceback.format_exception(error)), error

        def raise_again() -> None:
            raise problem

        try:
            code = exit_code(raise_again)  # prints what the CLI knows
        except Exception:
            code = 1
            sys.stderr.write(
                f"{text}error: process {jax.process_index()} of {jax.process_count()} stops, for the reason above. "
                "If a collective could not reach the others, another process of this run has died: its own output says why. "
                "Restart all of them: the run resumes from its last checkpoint\n"
            )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    finally:
        OWNS_PROCESS.reset(owns)
