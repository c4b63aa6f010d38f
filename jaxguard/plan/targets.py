"""Accelerators to compile for, as configs/hardware/targets.yaml describes them, and their devices without the hardware."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from jaxguard.config.hardware import Gpu, Target, Tpu, read_targets
from jaxguard.config.lookup import nearest
from jaxguard.utils.errors import JaxguardError

GPUS_PER_HOST = 8
"""Where a target's shape is only a number."""
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""What libtpu's environment must say on a host that has no TPU; the type does not change what it compiles for."""


@dataclass(frozen=True)
class Cluster:
    """Devices of one target.

    Attributes:
        name: as asked for, such as a100-80gb:2x8.
        target: what they are.
        shape: hosts × GPUs of a host, or the chips of a slice along each dimension.
        slices: of TPUs, each of that shape, with only the network between them.
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


def find_cluster(text: str) -> Cluster:
    """Read `NAME:SHAPE`.

    For GPUs SHAPE is hosts × GPUs of each, as in a100-80gb:2x8, or a number of GPUs, eight to a host. For a TPU it is a
    slice's topology, as in v5p:8x8x16, or a number of chips, whose topology is the squarest; several slices are written
    before either, as in v5p:2*8x8x16. Without SHAPE it is 8.

    Raises:
        JaxguardError: no such target, or it is not built in that shape.
    """
    name, _, shape = text.partition(":")
    known = read_targets()
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
    return Cluster(text, target, _hosts(text, sides))


def topology(cluster: Cluster) -> Sequence[Any]:
    """The devices, to build a mesh of and compile for; nothing can run on them.

    Raises:
        JaxguardError: their compiler is not installed, or does not know them.
    """
    # Nothing runs, so no device of this host is claimed; without one, JAX's CUDA plugin would not load.
    jax.config.update("jax_platforms", "cpu")
    _require("jax_cuda12_plugin" if cluster.target.gpu else "libtpu", cluster)
    try:
        return (_gpus if cluster.target.gpu else _tpus)(cluster)
    except (RuntimeError, ValueError) as error:
        said = str(error).partition("\n")[0]
        raise JaxguardError(f"target {cluster.name!r}: the installed compiler does not take it: {said}") from None


def _gpus(cluster: Cluster) -> Sequence[Any]:
    assert cluster.target.gpu is not None
    shape = "x".join(map(str, (1, *cluster.shape)))  # slices x hosts x devices of a host
    config = _gpu_config(cluster.target, cluster.target.gpu)
    return topologies.get_topology_desc("gpu", "cuda", target_config=config, topology=shape).devices


def _tpus(cluster: Cluster) -> Sequence[Any]:
    # libtpu must neither ask a metadata server where it runs nor claim a chip; it complains where it is told nothing.
    for name, value in LIBTPU.items():
        os.environ.setdefault(name, value)
    tpu = cluster.target.tpu
    assert tpu is not None
    name = f"{tpu.generation}:{'x'.join(map(str, cluster.shape))}"
    return topologies.get_topology_desc(
        platform="tpu", topology_name=name, chip_config_name=tpu.chip_config, num_slices=cluster.slices
    ).devices


def _hosts(text: str, sides: tuple[int, ...]) -> tuple[int, ...]:
    if len(sides) == 2:
        return sides
    if len(sides) > 2:
        raise JaxguardError(f"target {text!r}: GPUs come as hosts x GPUs of each, as in 2x8")
    hosts, rest = divmod(sides[0], GPUS_PER_HOST)
    if hosts and rest:
        raise JaxguardError(
            f"target {text!r}: {sides[0]} GPUs are not whole hosts of {GPUS_PER_HOST}; say hosts x GPUs of each, as in 3x4"
        )
    return (hosts, GPUS_PER_HOST) if hosts else (1, rest)


def _slice(text: str, sides: tuple[int, ...], tpu: Tpu | None) -> tuple[int, ...]:
    assert tpu is not None
    built = _slices(tpu)
    if len(sides) == 1:
        fitting = [slice_ for slice_ in built if math.prod(slice_) == sides[0]]
        if not fitting:
            counts = sorted({math.prod(slice_) for slice_ in built})
            raise JaxguardError(
                f"target {text!r}: it comes as {', '.join(map(str, counts))} chips; several slices are written as 2*{counts[-1]}"
            )
        return min(fitting, key=lambda slice_: max(slice_) / min(slice_))
    if sides not in built:
        raise JaxguardError(
            f"target {text!r}: not one of its topologies, such as {', '.join('x'.join(map(str, s)) for s in built[:8])}"
        )
    return sides


def _slices(tpu: Tpu) -> list[tuple[int, ...]]:
    """The common topologies: a host, and sides twice, four times … as long as its, in ascending order and nearly equal."""
    found = {tpu.chips_per_host}
    grown = found
    while grown:
        grown = {
            (*sides[:i], sides[i] * 2, *sides[i + 1 :])
            for sides in grown
            for i in range(tpu.dimensions)
            if sides[i] * 2 <= tpu.largest[i]
        } - found
        found |= grown
    even = [sides for sides in found if list(sides) == sorted(sides) and max(sides) <= 2 * min(sides)]
    return sorted({tpu.chips_per_host, *even}, key=lambda sides: (math.prod(sides), sides))


def _gpu_config(target: Target, gpu: Gpu) -> str:
    """The text of XLA's GpuTargetConfigProto. Limits that all of them share are written out here."""
    major, minor = gpu.compute_capability
    return f"""\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_memory_per_block}
  shared_memory_per_core: {gpu.shared_memory_per_core}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.lanes_per_core}
  clock_rate_ghz: {gpu.clock_ghz}
  memory_bandwidth: {int(target.bandwidth)}
  l2_cache_size: {gpu.l2_cache}
  device_memory_size: {target.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{target.title}"
"""


def _require(module: str, cluster: Cluster) -> None:
    if importlib.util.find_spec(module) is None:
        raise JaxguardError(f"target {cluster.name!r}: its compiler is not installed: pip install 'jaxguard[aot]'")
