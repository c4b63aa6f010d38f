"""`make bench-serve`: a service under open-loop traffic: HTTP alone (a guard that computes nothing), then a real guard.

Each service is a process of its own. JAX serves the real guard, in direct mode or those of --mode, then SGLang where its
environment exists (`make sglang-cpu`). After the phases of `jaxguard load` come slow clients, a policy that is swapped, and
the service killed -9 and started again. Writes serving.json, report.html and latency.svg into build/bench/serving; with
--document also docs/load.md, which needs an idle machine, and a client that was never late.
"""

import argparse
import asyncio
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
import yaml
from rich.console import Console

from demo import fetch_weights
from generated import rewrite
from jaxguard.data.examples import Example
from jaxguard.data.format.answer import Verdict
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Policy
from jaxguard.guards.backends.sglang import free_port, started
from jaxguard.guards.result import CheckResult
from jaxguard.load.page import figure, page
from jaxguard.load.run import PHASES, Plan, Simulation
from jaxguard.load.traffic import Mix
from jaxguard.report import page_markdown, write_page
from jaxguard.report.figures import save_figure
from jaxguard.serve import native
from jaxguard.serve.app import create_app
from jaxguard.serve.keys import Keys
from jaxguard.serve.policies import Policies
from jaxguard.serve.service import Service
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically
from sglang_server import PYTHON as SGLANG
from sglang_server import serve as serve_sglang
from workloads import read_examples

FOLDER = Path("build/bench/serving")
DOCUMENT = Path("docs/load.md")
MODEL = Path("build/bench/base")
NULL_RATE = 500.0
SLOW_CLIENTS = 20
READY_SECONDS = 300
IDLE_LOAD = 0.5
"""Load average up to which a machine is idle."""


class NullGuard:
    """Calls everything unharmful, at once."""

    policy = Policy("null", rules="Nothing is forbidden.")
    mode = Mode.DIRECT

    async def awarm_up(self) -> None:
        """Nothing to compile."""

    async def asettle(self) -> None:
        """Nothing to wait for."""

    async def acheck_many(self, examples: Sequence[Example], *_: object, **__: object) -> list[CheckResult]:
        return [self._result(example) for example in examples]

    def _result(self, example: Example) -> CheckResult:
        return CheckResult(
            id=example.id,
            questions=("prompt_harm",),
            verdict=Verdict(prompt_harm="unharmful", response_harm=None),
            probabilities={"prompt_harm": 0.1},
            reasoning=None,
            problems=(),
            text="",
            seconds=0.0,
            operating_point="words",
            thresholds={"prompt_harm": None},
            prompt_tokens=0,
            completion_tokens=0,
            decided_by=Mode.DIRECT,
            direct_probabilities={},
        )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="a run or an export (SmolLM2-135M, untrained)")
    parser.add_argument("--policy", default="aegis2")
    parser.add_argument("--mode", action="append", help="of the real guard; repeat it (direct)")
    parser.add_argument("--examples", type=Path, help="labelled JSON lines; default: the demo's, from PyPI")
    parser.add_argument("--only", choices=("null", "jax", "sglang"), action="append", help="default: all")
    parser.add_argument("--seconds", type=float, default=20, help="of a phase")
    parser.add_argument("--slo-ms", type=float, default=2000, help="of the real guard")
    parser.add_argument("--price", type=float, help="of this machine an hour")
    parser.add_argument("--document", action="store_true", help="write docs/load.md")
    parser.add_argument(
        "--null-service", type=int, metavar="PORT", help="serve a guard that computes nothing, and nothing else"
    )
    chosen = parser.parse_args(arguments)
    if chosen.null_service:
        asyncio.run(serve_null(chosen.null_service))
        return 0
    if chosen.document and os.getloadavg()[0] > IDLE_LOAD:
        print(f"error: --document: this machine is busy (load average {os.getloadavg()[0]:.1f}); wait", file=sys.stderr)
        return 2
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    try:
        runs = measure(chosen)
    except JaxguardError as error:
        print(f"error: {error}; the services' output is in {FOLDER}", file=sys.stderr)
        return 2
    (FOLDER / "serving.json").write_text(json.dumps(runs, indent=1), encoding="utf-8")
    report = page(runs, "The service under load", "load.svg")
    write_page(FOLDER / "report.html", report)
    save_figure(figure(runs), FOLDER / "latency.svg")
    print(f"report: {FOLDER / 'report.html'}")
    # While a killed service starts again on the same cores, the client cannot be in time; the page says so.
    phases = [each for run in runs.values() for name, each in run["phases"].items() if name != "killed"]
    summaries = [*phases, *(step for run in runs.values() for step in run["ramp"])]
    if chosen.document and any(each["void"] for each in summaries):
        print("error: --document: some phases are void, see the report", file=sys.stderr)
        return 2
    if chosen.document:
        save_figure(figure(runs), DOCUMENT.with_name("load.svg"))
        command = f"`make bench-serve ARGS='{' '.join(arguments)}'`"
        rewrite(DOCUMENT, f"Measured by {command}.\n\n{page_markdown(report).partition(chr(10))[2].lstrip()}")
    return 0


def measure(chosen: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Results by service."""
    only, runs = chosen.only or ("null", "jax", "sglang"), dict[str, dict[str, Any]]()
    examples = read_examples(chosen.examples, 512)
    base = Plan("", seconds=chosen.seconds, slo=chosen.slo_ms / 1000, price=chosen.price)
    if "null" in only:
        plan = replace(base, slo=0.05, rate=NULL_RATE, phases=("steady",))
        command = [sys.executable, __file__, "--null-service"]
        runs["HTTP alone"] = simulate("null", command, plan, examples)
    if chosen.model == MODEL and set(only) & {"jax", "sglang"}:
        fetch_weights(MODEL)
    policy = FOLDER / "policies" / f"{chosen.policy}.yaml"
    policy.parent.mkdir()
    shutil.copy(Path("configs/policies") / f"{chosen.policy}.yaml", policy)
    serve = [sys.executable, "-m", "jaxguard.serve", "--policy", chosen.policy, "--policies", str(policy.parent)]
    for mode in chosen.mode or ("direct",):
        options = [*serve, "--mode", mode]
        if "jax" in only:
            command = [*options, "--model", str(chosen.model), "--port"]
            runs[f"JAX, {mode}"] = simulate(f"jax_{mode}", command, base, examples, policy)
        if "sglang" in only and SGLANG.is_file():
            export = chosen.model / "export" if (chosen.model / "export").is_dir() else chosen.model
            with serve_sglang(export, "guard", FOLDER / "sglang.log") as server:
                command = [*options, "--model", server.url.removesuffix("/v1"), "--tokenizer", str(export), "--port"]
                runs[f"SGLang, {mode}"] = simulate(f"sglang_{mode}", command, base, examples, policy)
    return runs


def simulate(
    name: str, command: Sequence[str], plan: Plan, examples: Sequence[Example], policy: Path | None = None
) -> dict[str, Any]:
    """Start a service, send it the traffic, and disturb it if it has a policy; the results."""
    console = Console(highlight=False, markup=False, soft_wrap=True)

    def tell(phase: str, summary: dict[str, Any]) -> None:
        console.print(f"{name}, {phase}: {summary['goodput_share']:.1%} within the SLO {summary['void']}")

    with ExitStack() as stack:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        options = [*command, str(port)], f"{url}/readyz", FOLDER / f"{name}.log", READY_SECONDS

        def start() -> subprocess.Popen[bytes]:
            return stack.enter_context(started(*options))

        process = start()

        async def kill(seconds: float) -> None:
            """Kill the service after some seconds and start it again at once."""
            await asyncio.sleep(seconds)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            await asyncio.to_thread(start)

        mix = Mix(policies={policy.stem: 1.0} if policy else {})
        simulation = Simulation(replace(plan, url=url), examples, mix, tell)
        return asyncio.run(_phases(simulation, port, policy, kill))


async def _phases(
    simulation: Simulation, port: int, policy: Path | None, kill: Callable[[float], Coroutine[Any, Any, None]]
) -> dict[str, Any]:
    plan, phases = simulation.plan, simulation.results["phases"]
    async with simulation.http:
        await simulation.start()
        for name in plan.phases:
            await simulation.phase(name, **PHASES[name])
        if policy is None:
            return simulation.results
        statuses = list[int]()
        await simulation.phase("slow clients", beside=slow_clients(port, plan.seconds, statuses))
        phases["slow clients"]["slow_clients"] = statuses
        old = policy.read_bytes()
        swapped = plan.seconds / 3
        outcomes = await simulation.phase("policy swapped", beside=swap(policy, swapped))
        policy.write_bytes(old)
        answers = [(each, each.answer["policy"]["digest"]) for each in outcomes if each.answer]
        new = [each for each, digest in answers if digest != answers[0][1]]
        live = min((each.done for each in new), default=float("inf"))
        phases["policy swapped"] |= {
            "versions": len({digest for _, digest in answers}),
            "live_after_seconds": live - swapped if new else None,
            "old_afterwards": sum((each.sent or 0) > live for each, digest in answers if digest == answers[0][1]),
        }
        outcomes = await simulation.phase("killed", beside=kill(swapped))
        back = min((each.done for each in outcomes if each.answer and each.at > swapped), default=None)
        phases["killed"]["verdicts_after_seconds"] = None if back is None else back - swapped
    return simulation.results


async def swap(policy: Path, seconds: float) -> None:
    """Change a policy's file after some seconds; the service looks at its files every 10 s."""
    await asyncio.sleep(seconds)
    tree = yaml.safe_load(policy.read_text(encoding="utf-8"))
    tree["description"] = "Changed."
    if tree.get("categories"):
        tree["categories"][-1]["description"] += " Whoever hints at it does it too."
    else:
        tree["rules"] += " Hints count too."
    write_atomically(policy, yaml.safe_dump(tree))


async def slow_clients(port: int, seconds: float, statuses: list[int]) -> None:
    """Send bodies a byte a second; the status that each got, or 0."""

    async def one() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/check HTTP/1.1\r\nhost: test\r\ncontent-length: 2000\r\n\r\n")
        line = asyncio.create_task(reader.readline())
        for _ in range(int(seconds)):
            writer.write(b" ")
            await asyncio.wait({line}, timeout=1)
            if line.done():
                break
        line.cancel()
        writer.close()
        answer = (await asyncio.gather(line, return_exceptions=True))[0]
        return int(answer.split()[1]) if isinstance(answer, bytes) and answer else 0

    statuses += await asyncio.gather(*(one() for _ in range(SLOW_CLIENTS)))


async def serve_null(port: int) -> None:
    guard: Any = NullGuard()
    policies = Policies(guard.policy, None, None)
    async with Service(guard, policies, Keys(None), mode=guard.mode, model={"name": "null", "digest": ""}) as service:
        gc.freeze()  # as jaxguard serve does
        config = uvicorn.Config(
            create_app(service, native.add_routes), port=port, access_log=False, log_level="warning"
        )
        await uvicorn.Server(config).serve()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
