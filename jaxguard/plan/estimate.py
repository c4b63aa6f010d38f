"""How long an update takes on a target, by the roofline of its data sheet."""

from dataclasses import dataclass

from jaxguard.plan.compile import Plan
from jaxguard.plan.program import Collective
from jaxguard.plan.targets import Target

ASSUMPTIONS = (
    "matrix products at the data sheet's dense peak; memory and links at the data sheet's rates; nothing overlaps. That "
    "products never reach their peak and that communication hides behind them are taken to cancel out. The bound is the "
    "longest of the three alone"
)


@dataclass(frozen=True)
class Estimate:
    """Seconds of one update.

    Attributes:
        compute: of the matrix products.
        memory: of reading and writing the device's memory.
        network: of the collectives.
        mfu: share of the devices' peak that the model's own FLOPs make up, recomputation and padding of rows counted as loss.
    """

    compute: float
    memory: float
    network: float
    mfu: float

    @property
    def step(self) -> float:
        """Where nothing overlaps."""
        return self.compute + self.memory + self.network

    @property
    def bound(self) -> float:
        """Where all overlaps: no update can be faster."""
        return max(self.compute, self.memory, self.network)


def estimate(plan: Plan) -> Estimate:
    """Of a compiled plan; see ASSUMPTIONS."""
    target = plan.cluster.target
    peak = target.flops.get(plan.compute.dtype.name) or target.flops["bfloat16"]
    compute = (plan.matmul_flops + plan.kernel_flops) / peak
    memory = plan.traffic / target.bandwidth
    network = sum(one.sent / rate(target, one) for one in plan.collectives)
    mfu = plan.flops.model / (plan.cluster.devices * peak * (compute + memory + network))
    return Estimate(compute, memory, network, mfu)


def rate(target: Target, one: Collective) -> float:
    """Bytes/s at which a device sends its part: over links, or over the network cards of all its linked peers together."""
    return target.link if one.near == one.group else min(target.link, target.network * one.near)
