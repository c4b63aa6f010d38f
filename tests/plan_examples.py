from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from jaxguard.config.hardware import GIB
from jaxguard.data.packing import Shape
from jaxguard.models.compute import Compute
from jaxguard.plan.compile import Plan
from jaxguard.plan.hlo import Collective
from jaxguard.plan.targets import find_cluster


def plan_of(peak: int, **changes: Any) -> Plan:
    """A plan for eight A100-80GB with round figures."""
    plan = Plan(
        name="tiny",
        cluster=find_cluster("a100-80gb:8"),
        shape=Shape(32, 2048, 512),
        mesh={"data": 1, "fsdp": 8, "tensor": 1},
        compute=Compute(jnp.dtype(jnp.bfloat16), "xla", "full"),
        arguments=5 * GIB,
        temporaries=(peak - 5) * GIB,
        peak=peak * GIB,
        largest=[(3 * GIB, "bf16[3,1024,1024,512]", "forward: tanh")],
        flops={"layers": 8 * 300e12, "attention": 8 * 8e12, "head": 8 * 4e12, "model": 8 * 156e12},
        matmul_flops=312e12,
        traffic=2.039e12,
        collectives=[Collective("all-gather", "fsdp", 8, 8, 300 * 10**9 // 7 * 8, 1, "forward: convert_element_type")],
        ideal_sent=600e9,
        kernels={},
    )
    return replace(plan, **changes)
