"""Estimate the time of a step on a target, by the roofline of its data sheet."""

from dataclasses import dataclass

from jaxguard.config.hardware import Target
from jaxguard.plan.compile import Plan
from jaxguard.plan.hlo import Collective

ASSUMPTIONS = (
    "matrix products at the data sheet's dense peak; memory and links at the data sheet's rates; nothing overlaps. We assume "
    "that two errors cancel out: products never reach their peak, and communication hides behind them. The bound is the "
    "longest of the three alone"
)


@dataclass(frozen=True)
class Estimate:
    """Seconds of one step.

    Attributes:
        compute: time of the matrix products.
        memory: time to read and write the device's memory.
        network: time of the collectives.
        mfu: share of the devices' peak FLOPs that the model's own are; recomputation and padding do not count as such.
    """

    compute: float
    memory: float
    network: float
    mfu: float

    @property
    def step(self) -> float:
        """If nothing overlaps."""
        return self.compute + self.memory + self.network

    @property
    def bound(self) -> float:
        """If all overlaps: no step can be faster."""
        return max(self.compute, self.memory, self.network)


def estimate(plan: Plan) -> Estimate:
    """Estimate a compiled plan; see ASSUMPTIONS."""
    target = plan.cluster.target
    peak = target.flops.get(plan.compute.dtype.name) or target.flops["bfloat16"]
    compute = (plan.matmul_flops + plan.kernel_flops) / peak
    memory = plan.traffic / target.bandwidth
    network = sum(collective.sent / rate(target, collective) for collective in plan.collectives)
    mfu = plan.flops.model / (plan.cluster.devices * peak * (compute + memory + network))
    return Estimate(compute, memory, network, mfu)


def rate(target: Target, collective: Collective) -> float:
    """Bytes/s at which a device sends its part: over links, or over the network cards of all its linked peers together."""
    if collective.near == collective.group:
        return target.link
    return min(target.link, target.network * collective.near)
