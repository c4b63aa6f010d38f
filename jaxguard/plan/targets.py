"""Find clusters by name, and make their devices to compile for, without the hardware."""

import importlib.util
import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from jaxguard.config.hardware import Gpu, Target, Tpu, read_hardware
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import nearest
from jaxguard.utils.versions import install

GPUS_PER_HOST = 8
"""Where a target's shape is only a number."""
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Environment of libtpu on a host that has no TPU; the type does not change what it compiles for."""


@dataclass(frozen=True)
class Cluster:
    """Devices of one target, named as on the command line, such as a100-80gb:2x8.

    `shape` is hosts × GPUs of a host, or the chips along each dimension of one of the `slices`, which only the network connects.
    """

    name: str
    target: Target
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def devices(self) -> int:
        return self.slices * math.prod(self.shape) * (self.target.tpu.devices_per_chip if self.target.tpu else 1)

    @property
    def linked(self) -> int:
        """Devices that reach one another by `link`: the GPUs of a host, all of a TPU slice."""
        return self.shape[-1] if self.target.gpu else self.devices // self.slices

    @property
    def usable(self) -> int:
        """Bytes of a device that a program may fill; XLA_CLIENT_MEM_FRACTION sets a GPU's share, as it does for training."""
        share = os.environ.get("XLA_CLIENT_MEM_FRACTION") if self.target.gpu else None
        return int(self.target.memory * float(share or self.target.usable))


def find_cluster(text: str) -> Cluster:
    """Parse `NAME:SHAPE`.

    For GPUs SHAPE is hosts × GPUs of each, as in a100-80gb:2x8, or a number of GPUs, eight to a host. For a TPU it is a
    slice's topology, as in v5p:8x8x16, or a number of chips, whose topology is the squarest; the number of slices comes
    before either, as in v5p:2*8x8x16. Without SHAPE it is 8. JaxguardError: no such target, or it is not built in that shape.
    """
    name, _, shape = text.partition(":")
    known = read_hardware().targets
    if name not in known:
        raise JaxguardError(f"target {name!r} is unknown: {nearest(name, known)}known: {', '.join(known)}")
    match = re.fullmatch(r"(?:([1-9]\d*)\*)?([1-9]\d*(?:x[1-9]\d*)*)", shape or "8")
    if match is None:
        raise JaxguardError(f"target {text!r}: write the number of devices, or their shape, after the colon: {name}:8")
    target, slices, sides = known[name], int(match[1] or 1), tuple(int(side) for side in match[2].split("x"))
    if target.tpu:
        return Cluster(text, target, _slice(text, sides, target.tpu), slices)
    if match[1]:
        raise JaxguardError(f"target {text!r}: GPUs have no slices; write hosts x GPUs of each, as in {name}:2x8")
    if len(sides) == 1:
        hosts, rest = divmod(sides[0], GPUS_PER_HOST)
        if hosts and rest:
            raise JaxguardError(
                f"target {text!r}: {sides[0]} GPUs are not whole hosts of {GPUS_PER_HOST}; write hosts x GPUs of each, as in 3x4"
            )
        sides = (hosts, GPUS_PER_HOST) if hosts else (1, rest)
    elif len(sides) > 2:
        raise JaxguardError(f"target {text!r}: GPUs come as hosts x GPUs of each, as in 2x8")
    return Cluster(text, target, sides)


def topology(cluster: Cluster) -> Sequence[Any]:
    """Make devices to compile for; nothing can run on them. JaxguardError if their compiler is missing or rejects them."""
    # Nothing runs, so no device of this host is claimed; without one, JAX's CUDA plugin would not load.
    jax.config.update("jax_platforms", "cpu")
    gpu, tpu, shape = cluster.target.gpu, cluster.target.tpu, "x".join(map(str, cluster.shape))
    if importlib.util.find_spec("jax_cuda12_plugin" if gpu else "libtpu") is None:
        raise JaxguardError(f"target {cluster.name!r}: its compiler is not installed: {install('aot')}")
    if tpu:
        # libtpu must neither ask a metadata server where it runs nor claim a chip; without these it complains.
        os.environ.update(LIBTPU | os.environ)
        name = {"platform": "tpu", "topology_name": f"{tpu.generation}:{shape}"}
        options: dict[str, Any] = {"chip_config_name": tpu.chip_config, "num_slices": cluster.slices}
    elif gpu:
        name = {"platform": "cuda", "topology_name": "gpu"}
        options = {"target_config": _gpu_config(cluster.target, gpu), "topology": f"1x{shape}"}
    try:
        return topologies.get_topology_desc(**name, **options).devices
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise JaxguardError(f"target {cluster.name!r}: the installed compiler rejects it: {reason}") from None


def _slice(text: str, sides: tuple[int, ...], tpu: Tpu) -> tuple[int, ...]:
    """The topology of a slice: a common one, whose sides are those of a host doubled, in ascending order, nearly equal."""
    doubled = (
        [side * 2**n for n in range(10) if side * 2**n <= most]
        for side, most in zip(tpu.chips_per_host, tpu.largest, strict=True)
    )
    even = (shape for shape in itertools.product(*doubled) if [*shape] == sorted(shape) and shape[-1] <= 2 * shape[0])
    built = sorted({tpu.chips_per_host, *even}, key=lambda shape: (math.prod(shape), shape))
    fitting = [shape for shape in built if sides in (shape, (math.prod(shape),))]
    if fitting:
        return min(fitting, key=lambda shape: max(shape) / min(shape))
    if len(sides) > 1:
        examples = ", ".join("x".join(map(str, shape)) for shape in built[:8])
        raise JaxguardError(f"target {text!r}: not one of its topologies, such as {examples}")
    counts = sorted(set(map(math.prod, built)))
    raise JaxguardError(
        f"target {text!r}: it comes as {', '.join(map(str, counts))} chips; write several slices as 2*{counts[-1]}"
    )


def _gpu_config(target: Target, gpu: Gpu) -> str:
    """The text of XLA's GpuTargetConfigProto. The limits that are written out are the same for all."""
    major, minor = gpu.compute_capability
    return f"""\
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  shared_memory_per_block: 49152  shared_memory_per_block_optin: {gpu.shared_memory_per_block}
  shared_memory_per_core: {gpu.shared_memory_per_core}
  core_count: {gpu.cores}  fpus_per_core: {gpu.lanes_per_core}  clock_rate_ghz: {gpu.clock_ghz}
  memory_bandwidth: {int(target.bandwidth)}  l2_cache_size: {gpu.l2_cache}  device_memory_size: {target.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{target.title}"
"""
