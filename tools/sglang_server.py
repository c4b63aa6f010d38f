"""A real SGLang server on this machine's CPU, for the tests and the demo: `make sglang-cpu` makes its environment.

Its scheduler, HTTP layer, grammar backend and radix cache are the real ones; its CUDA kernels are absent, and PyTorch's
operators do their work.

    python tools/sglang_server.py --checkpoint runs/demo/base --name smollm2 --port 30000

An evaluation starts such a server by itself with

    evaluate.backend=sglang $(python tools/sglang_server.py --overrides)
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from jaxguard.guards.backends.sglang import free_port, launch_command, started
from jaxguard.utils.errors import JaxguardError

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
CPU_PYTHON = ROOT / "tools" / "sglang_cpu" / "python"
"""PYTHON with the environment that SGLang needs on a CPU."""
CPU_ARGUMENTS = (
    "--device=cpu",
    "--dtype=float32",
    "--mem-fraction-static=0.1",
    "--max-total-tokens=32768",
    "--max-running-requests=32",
    "--sleep-on-idle",
)
"""SGLang would by itself compute what is stored as float32 in half precision, and keep a core busy while nobody asks."""
READY_SECONDS = 240


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a Hugging Face folder")
    parser.add_argument("--name", help="what it is served as")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--log", type=Path, default=Path("runs/sglang.log"))
    parser.add_argument("--overrides", action="store_true", help="print the fields of an evaluation's config, and end")
    options = parser.parse_args()
    if options.overrides:
        python = os.path.relpath(CPU_PYTHON)
        print(f"evaluate.server.python={python} evaluate.server.arguments=[{','.join(CPU_ARGUMENTS)}]")
        return 0
    if not (options.checkpoint and options.name):
        parser.error("--checkpoint and --name must be given")
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
    more = ("--enable-metrics", "--constrained-json-disable-any-whitespace", *arguments)
    command = launch_command(str(CPU_PYTHON), checkpoint, name, port, (*CPU_ARGUMENTS, *more))
    with _started(command, f"http://127.0.0.1:{port}/health_generate", log, threads) as process:
        yield Server(f"http://127.0.0.1:{port}/v1", process)


@contextmanager
def route(workers: Sequence[Server], log: Path) -> Iterator[Server]:
    """SGLang's router before the workers."""
    port = free_port()
    urls = [worker.url.removesuffix("/v1") for worker in workers]
    command = [str(CPU_PYTHON), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-urls", *urls, "--policy", "cache_aware", "--retry-max-retries", "3"]
    with _started(command, f"http://127.0.0.1:{port}/readiness", log, threads=1) as process:
        yield Server(f"http://127.0.0.1:{port}/v1", process)


def _started(
    command: Sequence[str], health: str, log: Path, threads: int
) -> AbstractContextManager[subprocess.Popen[bytes]]:
    if not PYTHON.is_file():
        raise JaxguardError(f"{PYTHON} is absent: run `make sglang-cpu`")
    return started(command, health, log, READY_SECONDS, {"OMP_NUM_THREADS": str(threads)})


if __name__ == "__main__":
    sys.exit(main())
