"""SGLang in a process of its own, from its first healthy answer to the end of the block that started it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2

from jaxguard.config.evaluate import ServerConfig
from jaxguard.utils.errors import JaxguardError

_HOST = "127.0.0.1"
_LINES = 15
_END_SECONDS = 10

# Asks the kernel for SIGKILL at the parent's death, since SGLang lets SIGTERM wait for its requests, and becomes the command.
# A process of its own does this: code between fork and exec is unsafe beside JAX's threads.
_DIE_WITH_PARENT = (
    "import ctypes, os, sys; parent = int(sys.argv[1]); ctypes.CDLL(None).prctl(1, 9); "
    "os.getppid() == parent and os.execv(sys.argv[2], sys.argv[2:])"
)


@contextmanager
def serve(checkpoint: Path, name: str, log: Path, settings: ServerConfig) -> Iterator[str]:
    """Serve a checkpoint with the SGLang of `settings.python`; the value is the server's address.

    Args:
        checkpoint: a Hugging Face folder.
        name: the name it is served under.
        log: where the server's output goes.
        settings: the interpreter, more arguments, and how long to wait.

    Raises:
        JaxguardError: no such interpreter, no SGLang in it, or the server does not come up.
    """
    python, port = shutil.which(str(Path(settings.python).expanduser())), free_port()
    if python is None:
        raise JaxguardError(f"evaluate.server.python: {settings.python!r} is no interpreter")
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sglang') is None)"
    check = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603 (the user's own)
    if check.returncode:
        last = check.stderr.strip().splitlines()[-1:]
        raise JaxguardError(
            f"evaluate.server.python: {settings.python!r} has no SGLang{f' ({last[0]})' if last else ''}. Install it into an "
            "environment of its own, `python -m venv .venv-sglang && .venv-sglang/bin/pip install sglang`, and name that "
            "environment's python; on a CPU run `make sglang-cpu`, and take what `python tools/sglang_server.py --overrides` "
            "prints"
        )
    command = launch_command(python, checkpoint, name, port, settings.arguments)
    with started(command, f"http://{_HOST}:{port}/health_generate", log, settings.ready_seconds):
        yield f"http://{_HOST}:{port}"


def launch_command(python: str, checkpoint: Path, name: str, port: int, arguments: Sequence[str]) -> list[str]:
    """The command that starts an SGLang server on this machine."""
    flags = {"--model-path": checkpoint, "--served-model-name": name, "--host": _HOST, "--port": port}
    words = [str(word) for flag in flags.items() for word in flag]
    return [python, "-m", "sglang.launch_server", *words, *arguments]


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as listener:
        listener.bind((_HOST, 0))
        port: int = listener.getsockname()[1]
    return port


@contextmanager
def started(
    command: Sequence[str], health: str, log: Path, seconds: float, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server in a process group of its own, from its first healthy answer to the end of the block.

    It dies with the thread that started it, even where that is killed.

    Args:
        command: the path of a program, and its arguments.
        health: an address that answers 200 once the server is ready.
        log: where its output goes.
        seconds: how long it may take to be ready.
        environment: variables besides the inherited ones.

    Raises:
        JaxguardError: it ends early, or is not healthy in time; shows the end of the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    no_proxy = ",".join(filter(None, (os.environ.get("NO_PROXY"), _HOST)))  # servers also ask themselves how they are
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 (the caller's own command)
            [sys.executable, "-c", _DIE_WITH_PARENT, str(os.getpid()), *command],
            env={**os.environ, "NO_PROXY": no_proxy, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + seconds
        while not _healthy(health):
            problem = "" if time.monotonic() < end else f"was not ready in {seconds:g} s"
            if process.poll() is not None:
                problem = f"ended with code {process.returncode}"
            if problem:
                tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LINES:])
                raise JaxguardError(f"the server {problem}; the end of {log}:\n{tail}")
            time.sleep(0.5)
        yield process
    finally:
        # End the whole group: a server that crashed may leave processes.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(timeout=_END_SECONDS)


def _healthy(health: str) -> bool:
    try:
        return httpx2.get(health, timeout=30, trust_env=False).is_success  # whatever proxy there is
    except httpx2.RequestError:
        return False
