"""A real SGLang server on this machine's CPU, for the tests and the demo: `make sglang-cpu` makes its environment.

Its scheduler, HTTP layer, grammar engine and radix cache are the real ones; its CUDA kernels are absent, and PyTorch's
operators do their work.

    python tools/sglang_server.py --checkpoint runs/demo/smollm2 --name smollm2 --port 30000
"""

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jaxguard.errors import JaxguardError

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
STUB = ROOT / "tools" / "sglang_cpu" / "stub"
READY_SECONDS = 240


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--name", required=True, help="what it is served as")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--log", type=Path, default=Path("runs/sglang.log"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with serve(options.checkpoint, options.name, options.log, options.port) as server:
            print(f"serving {options.checkpoint} as {options.name!r} at {server.url}; Ctrl-C ends it", flush=True)
            signal.pause()
    except JaxguardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


@dataclass(frozen=True)
class Server:
    """A server that runs: its address, with /v1, and its first process."""

    url: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """End it as a crash would."""
        os.killpg(self.process.pid, signal.SIGKILL)


@contextmanager
def serve(
    checkpoint: Path,
    name: str,
    log: Path,
    port: int = 0,
    arguments: Sequence[str] = (),
    threads: int = os.cpu_count() or 1,
) -> Iterator[Server]:
    """Start a server, wait until it answers, and stop it at the end.

    Args:
        checkpoint: a Hugging Face folder.
        name: what it is served as.
        log: where its output goes.
        port: 0 takes a free one.
        arguments: more of sglang.launch_server's.
        threads: that compute.

    Raises:
        JaxguardError: there is no environment for it, or it does not come up.
    """
    port = port or free_port()
    flags = {
        "--model-path": str(checkpoint),
        "--served-model-name": name,
        "--device": "cpu",
        "--host": "127.0.0.1",
        "--port": str(port),
        "--mem-fraction-static": "0.1",
        "--max-total-tokens": "32768",
        "--max-running-requests": "32",
    }
    command = ["sglang.launch_server", *(word for flag in flags.items() for word in flag)]
    command += ["--enable-metrics", "--constrained-json-disable-any-whitespace", *arguments]
    with started(command, f"http://127.0.0.1:{port}/health_generate", log, threads) as process:
        yield Server(f"http://127.0.0.1:{port}/v1", process)


@contextmanager
def route(workers: Sequence[Server], log: Path) -> Iterator[Server]:
    """SGLang's router before the workers."""
    port = free_port()
    urls = [worker.url.removesuffix("/v1") for worker in workers]
    command = ["sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port), "--worker-urls", *urls]
    command += ["--policy", "cache_aware", "--retry-max-retries", "3"]
    with started(command, f"http://127.0.0.1:{port}/readiness", log) as process:
        yield Server(f"http://127.0.0.1:{port}/v1", process)


@contextmanager
def started(module: Sequence[str], health: str, log: Path, threads: int = 1) -> Iterator[subprocess.Popen[bytes]]:
    """Run a module of the environment in a process group of its own, from its first healthy answer to the end.

    Raises:
        JaxguardError: no environment; the process ends early; it is not healthy in time.
    """
    if not PYTHON.is_file():
        raise JaxguardError(f"{PYTHON} is absent: run `make sglang-cpu`")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 (our own command)
            [str(PYTHON), "-m", *module],
            env=_environment(os.environ, threads),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    try:
        _wait(process, health, log)
        yield process
    finally:
        for what in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, what)
                process.wait(timeout=10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def _end_with_parent() -> None:
    """Whatever ends the process that started this one, kill -9 included, ends this one too."""
    parent_death_signal = 1
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)


def _environment(outer: Mapping[str, str], threads: int) -> dict[str, str]:
    return {
        **outer,
        "HF_HUB_OFFLINE": "1",
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(STUB),
        "NO_PROXY": "127.0.0.1",
    }


def _wait(process: subprocess.Popen[bytes], health: str, log: Path) -> None:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise JaxguardError(f"the server ended with code {process.returncode}; the end of {log}:\n{_tail(log)}")
        try:
            with urllib.request.urlopen(health, timeout=30):  # noqa: S310 (our own address)
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise JaxguardError(f"the server was not ready in {READY_SECONDS} s; the end of {log}:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
    return port


if __name__ == "__main__":
    sys.exit(main())
