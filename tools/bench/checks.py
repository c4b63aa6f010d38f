"""`make bench-checks`: a service beside the guard in this process, and beside the same weights in SGLang's /v1/decisions.

    make bench-checks ARGS='--model runs/smollm_demo --policy demo'

One check at a time, the three by turns, each with texts that it has not seen: over HTTP from `jaxguard serve`, `Guard.check` on a
loaded model, and, where `make sglang-cpu` made its environment, as many questions with the policy to SGLang. Then many at once:
the service with --open requests under way, beside `check_many`. Medians, and ratios of each round's. Wants an idle machine.
"""

import argparse
import asyncio
import itertools
import json
import shutil
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from demo import fetch_weights
from jaxguard import Guard
from jaxguard.data.examples import Example
from jaxguard.guards.backends.sglang import free_port, started
from jaxguard.guards.protocol import applicable
from jaxguard.load.client import Client
from jaxguard.report import Table
from sglang_server import PYTHON as SGLANG
from sglang_server import serve as serve_sglang
from workloads import read_examples

FOLDER = Path("build/bench/checks")
MODEL = Path("build/bench/base")
READY_SECONDS = 300
WARM = 3


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/smollm_demo"), help="a run with an export")
    parser.add_argument("--policy", help="default: what the model was trained on")
    parser.add_argument("--examples", type=Path, help="labelled JSON lines; default: the demo's, from PyPI")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--single", type=int, default=20, help="checks one after the other, in a round")
    parser.add_argument("--many", type=int, default=128, help="checks at once, in a round")
    parser.add_argument("--open", type=int, default=32, help="requests under way")
    chosen = parser.parse_args(arguments)
    if not (chosen.model / "export").is_dir():
        parser.error(f"--model: {chosen.model} has no export; `make demo` makes runs/smollm_demo")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        port = free_port()
        command = [sys.executable, "-m", "jaxguard.serve", "--model", str(chosen.model), "--mode", "direct"]
        command += ["--port", str(port), "--timeout", "120", *(["--policy", chosen.policy] if chosen.policy else [])]
        stack.enter_context(started(command, f"http://127.0.0.1:{port}/readyz", FOLDER / "serve.log", READY_SECONDS))
        guard = stack.enter_context(Guard.load(chosen.model, chosen.policy, mode="direct"))
        guard.check("warm up", "warm up")  # programs are compiled for policies that were judged by
        asyncio.run(guard.awarm_up())
        decisions = None
        if SGLANG.is_file():
            server = serve_sglang(plain(chosen.model / "export"), "guard", FOLDER / "sglang.log")
            decisions = stack.enter_context(server).url.removesuffix("/v1")
        results = asyncio.run(measure(chosen, guard, f"http://127.0.0.1:{port}", decisions))
    (FOLDER / "checks.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    report(chosen, results)
    return 0


def plain(export: Path) -> Path:
    """The export's weights with the base model's tokenizer, since the guard's chat template takes no question but its own."""
    folder = FOLDER / "plain"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    fetch_weights(MODEL)
    for path in (*MODEL.iterdir(), *export.glob("*.safetensors*")):
        (folder / path.name).unlink(missing_ok=True)
        (folder / path.name).symlink_to(path.resolve())
    return folder


async def measure(
    chosen: argparse.Namespace, guard: Guard, service: str, decisions: str | None
) -> dict[str, list[float]]:
    """Seconds of each round: medians of single checks, and checks a second of many."""
    results: dict[str, list[float]] = {}
    async with Client(service, {}) as http, Client(decisions or service, {}) as sglang:

        async def serve(example: Example) -> None:
            await post(http, "/v1/check", {"prompt": example.prompt, "response": example.response})

        async def check(example: Example) -> None:
            await guard.acheck(example.prompt, example.response)

        async def decide(example: Example) -> None:
            text = example.prompt if example.response is None else f"{example.prompt}\n\n{example.response}"
            asked = [
                {"id": question, "type": "yes_no", "question": f"Is {question} present?\n{guard.policy.taxonomy}"}
                for question in applicable(example, guard.policy)
            ]
            await post(sglang, "/v1/decisions", {"model": "guard", "input": text, "questions": asked})

        ways = {"service": serve, "check": check} | ({"SGLang": decide} if decisions else {})
        needed = chosen.rounds * (chosen.single * len(ways) + 2 * chosen.many) + WARM * len(ways)
        fresh = iter(read_examples(chosen.examples, needed))
        for way in ways.values():
            await seconds(way, itertools.islice(fresh, WARM))
        for _ in range(chosen.rounds):
            singles: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(chosen.single):
                for name, way in ways.items():
                    singles[name] += await seconds(way, itertools.islice(fresh, 1))
            for name, each in singles.items():
                results.setdefault(name, []).append(float(np.median(each)))
            for name, run in {"service, many": many_by(serve, chosen.open), "check_many": guard.acheck_many}.items():
                examples = list(itertools.islice(fresh, chosen.many))
                started_at = time.perf_counter()
                await run(examples)
                results.setdefault(name, []).append(chosen.many / (time.perf_counter() - started_at))
    return results


async def seconds(way: Callable[[Example], Awaitable[None]], examples: Iterator[Example]) -> list[float]:
    """Of each check, one after the other."""
    each = []
    for example in examples:
        started_at = time.perf_counter()
        await way(example)
        each.append(time.perf_counter() - started_at)
    return each


def many_by(way: Callable[[Example], Awaitable[None]], at_once: int) -> Callable[[list[Example]], Awaitable[Any]]:
    """All checks, so many under way."""

    async def run(examples: list[Example]) -> None:
        waiting = iter(examples)

        async def work() -> None:
            for example in waiting:
                await way(example)

        await asyncio.gather(*(work() for _ in range(at_once)))

    return run


async def post(http: Client, path: str, body: Mapping[str, Any]) -> None:
    status, answer = await http.request("POST", path, json.dumps(body).encode())
    if status != 200:
        raise SystemExit(f"{path} answered {status}: {answer[:500]!r}")


def report(chosen: argparse.Namespace, results: Mapping[str, Sequence[float]]) -> None:
    def spread(values: Sequence[float]) -> str:
        return f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    def ratio(a: str, b: str) -> str:
        return spread([x / y for x, y in zip(results[a], results[b], strict=True)])

    table = Table((f"{chosen.rounds} rounds, median and range", "", "ratio of the service"))
    for name in ("service", "check", "SGLang"):
        if name in results:
            table.add(f"{name}: ms of one check", spread([1000 * x for x in results[name]]), ratio("service", name))
    for name in ("service, many", "check_many"):
        table.add(f"{name}: checks a second", spread(results[name]), ratio("service, many", name))
    Console(width=120).print(table.rich())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
