"""The phases of a simulation: find the rate that a service holds, then its steady state, and what disturbs it."""

import asyncio
import gc
import os
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

import numpy as np

from jaxguard.data.examples import Example
from jaxguard.load.client import Client, Outcome, send
from jaxguard.load.summary import HELD, knee, summarize
from jaxguard.load.traffic import Mix, Source, arrivals
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.secrets import mask

STEADY: Final = 0.7
"""Of the knee."""
PHASES: Final[Mapping[str, Mapping[str, Any]]] = {
    "steady": {},
    "bursts": {"burstiness": 3.0},
    "overload": {"times": 3.0},
    "recovered": {"pause": 2.0},
    "long": {"long": 0.2},
}
"""Arguments of `Simulation.phase`."""
_STEP, _MOST_STEPS, _IDLE = 1.5, 14, 20


@dataclass(frozen=True)
class Plan:
    """What to simulate.

    Attributes:
        url: of the service.
        phases: of PHASES, after the ramp.
        seconds: of a phase; a step of the ramp takes half as long.
        slo: seconds in which a verdict is of use; the service gets it as its deadline.
        rate: requests a second of the steady phase; None finds the knee and takes STEADY of it.
        seed: of the traffic.
        price: of the machine, an hour.
        headers: of each request.
    """

    url: str
    phases: tuple[str, ...] = ("steady", "bursts", "overload", "recovered")
    seconds: float = 20.0
    slo: float = 0.5
    rate: float | None = None
    seed: int = 0
    price: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class Simulation:
    """Sends the requests of a plan; `tell` gets the name of a phase and its summary. Open it with `async with`.

    Attributes:
        results: what is known so far, as JSON.
        rate: of the steady phase, once `start` found it.
    """

    def __init__(
        self, plan: Plan, examples: Sequence[Example], mix: Mix, tell: Callable[[str, dict[str, Any]], None]
    ) -> None:
        self.plan, self.tell = plan, tell
        self._random = np.random.default_rng(plan.seed)
        self._source = Source(examples, mix, self._random)
        self._patience = max(5.0, 4 * plan.slo)
        self.http = Client(plan.url, {**plan.headers, "x-timeout-ms": str(max(1, round(1000 * plan.slo)))})
        self.rate = 0.0
        self.results: dict[str, Any] = {"url": mask(plan.url), "slo_seconds": plan.slo, "price_per_hour": plan.price}
        self.results |= {"seed": plan.seed, "cores": os.cpu_count(), "load_average": os.getloadavg()[0]}
        self.results |= {"idle": None, "ramp": [], "knee": None, "phases": {}}

    async def run(self) -> dict[str, Any]:
        """Run all phases and return the results. JaxguardError: as `start`."""
        async with self.http:
            await self.start()
            for name in self.plan.phases:
                await self.phase(name, **PHASES[name])
        return self.results

    async def start(self) -> None:
        """Measure the idle service, and find the knee. JaxguardError: no service there, or no rate is held."""
        gc.freeze()  # to look through everything that is loaded, again and again, would make the client late
        idle = await self._idle()
        self.rate = self.plan.rate or STEADY * await self._ramp(idle)

    async def phase(
        self,
        name: str,
        times: float = STEADY,
        burstiness: float = 1.0,
        long: float | None = None,
        pause: float = 0.0,
        beside: Coroutine[Any, Any, Any] | None = None,
    ) -> list[Outcome]:
        """Add a phase to the results and return its outcomes.

        Args:
            name: in the results.
            times: multiple of the knee to send at.
            burstiness: as `arrivals` takes it.
            long: as `Source.plan` takes it.
            pause: seconds without requests before it.
            beside: what happens during the phase.
        """
        await asyncio.sleep(pause)
        happening = asyncio.ensure_future(beside) if beside else None
        outcomes, summary = await self._send(times / STEADY * self.rate, self.plan.seconds, burstiness, long)
        if happening:
            await happening
        self.results["phases"][name] = summary
        self.tell(name, summary)
        return outcomes

    async def _idle(self) -> float:
        """Median seconds of a request when nothing else is under way."""
        outcomes, used = list[Outcome](), 0.0
        while len(outcomes) < 3 or (len(outcomes) < _IDLE and used < self.plan.seconds):
            outcomes += await send(self.http, self._source.plan(np.zeros(1), long=0.0), self._patience)
            used = sum(each.done for each in outcomes)
        self.results["idle"] = summary = summarize(outcomes, used, self.plan.slo)
        self.tell("idle", summary)
        if summary["goodput_share"] < HELD / 2:
            raise JaxguardError(
                f"{self.results['url']}, idle, gave a verdict within {self.plan.slo:g} s to {summary['goodput_share']:.0%} of the "
                f"requests (statuses: {summary['statuses']}; 0 is no answer): is the service up, or must --slo-ms be higher?"
            )
        return median(each.latency for each in outcomes if each.answer)

    async def _ramp(self, idle: float) -> float:
        """Raise the rate until it is not held, or lower it until it is; return the knee."""
        steps, rate = list[tuple[float, float]](), 0.5 / idle
        while len(steps) < _MOST_STEPS and {share >= HELD for _, share in steps} != {True, False}:
            _, step = await self._send(rate, self.plan.seconds / 2)
            self.results["ramp"].append(step)
            self.tell(f"ramp, {rate:.3g}/s", step)
            if step["void"]:
                break
            steps.append((rate, step["goodput_share"] or 0.0))
            rate *= _STEP if steps[-1][1] >= HELD else 0.5
        value, fell = knee(steps)
        if value is None:
            raise JaxguardError("the ramp found no rate that is held; give --rate, a higher --slo-ms or more --seconds")
        self.results["knee"] = {"per_second": value, "lower_bound": not fell}
        return value

    async def _send(
        self, rate: float, seconds: float, burstiness: float = 1.0, long: float | None = None
    ) -> tuple[list[Outcome], dict[str, Any]]:
        planned = self._source.plan(arrivals(rate, seconds, burstiness, self._random), long)
        before = await self._process()
        outcomes = await send(self.http, planned, self._patience)
        used = {name: value - before[name] for name, value in (await self._process()).items() if name in before}
        cpu, verdicts = used.get("process_cpu_seconds_total"), sum(bool(each.answer) for each in outcomes)
        self.results["assumptions"] = self._source.assumptions()
        return outcomes, {
            **summarize(outcomes, seconds, self.plan.slo, self.plan.price),
            "burstiness": burstiness,
            "cpu_seconds_of_a_verdict": cpu / verdicts if cpu is not None and verdicts else None,
            "memory_growth_bytes": used.get("process_resident_memory_bytes"),
        }

    async def _process(self) -> dict[str, float]:
        """What /metrics says of the service's process."""
        try:
            async with asyncio.timeout(10.0):
                _, text = await self.http.request("GET", "/metrics")
        except (OSError, TimeoutError):
            return {}
        return {
            name.decode(): float(value) for name, value in re.findall(rb"^(process_\w+) (\S+)$", text, re.MULTILINE)
        }
