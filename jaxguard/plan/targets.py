"""Accelerators to compile for, as public data sheets describe them, and their devices without the hardware."""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.experimental import topologies

from jaxguard.errors import JaxguardError

GIB = 1024**3
DEVICES_PER_HOST = 8


@dataclass(frozen=True)
class Gpu:
    """What XLA has to know of a GPU, beyond a Target, to compile for it. Sizes in bytes or elements."""

    compute_capability: tuple[int, int]
    cores: int
    lanes_per_core: int
    clock_ghz: float
    bandwidth: int
    l2_cache: int
    shared_memory_per_core: int
    shared_memory_per_block: int

    def config(self, name: str, memory: int) -> str:
        """The text of XLA's GpuTargetConfigProto. Limits that all of them share are written out here."""
        major, minor = self.compute_capability
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
  shared_memory_per_block_optin: {self.shared_memory_per_block}
  shared_memory_per_core: {self.shared_memory_per_core}
  core_count: {self.cores}
  fpus_per_core: {self.lanes_per_core}
  clock_rate_ghz: {self.clock_ghz}
  memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.l2_cache}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""


@dataclass(frozen=True)
class Target:
    """One kind of accelerator.

    Attributes:
        name: its product name.
        platform: cuda or tpu.
        memory: bytes of one device.
        usable: the share of it that a program may fill: JAX takes 75 % of a GPU by default.
        flops: peak dense bfloat16 FLOP/s of one device.
        gpu: for a GPU, what the compiler has to know besides.
        slices: for a TPU, number of devices -> name of the topology.
    """

    name: str
    platform: str
    memory: int
    usable: float
    flops: float
    gpu: Gpu | None = None
    slices: tuple[tuple[int, str], ...] = ()


# NVIDIA A100 data sheet: 312 TFLOP/s, 1,555 and 2,039 GB/s.
# Ampere whitepaper: 108 SMs, 164 KiB shared memory each, 40 MiB L2.
_A100_40, _A100_80 = (
    Gpu((8, 0), 108, 64, 1.41, bandwidth, 40 * 1024**2, 164 * 1024, 163 * 1024)
    for bandwidth in (1_555_000_000_000, 2_039_000_000_000)
)
# NVIDIA H100 SXM data sheet: 989 TFLOP/s, 3.35 TB/s.
# Hopper whitepaper: 132 SMs, 228 KiB shared memory each, 50 MiB L2.
_H100 = Gpu((9, 0), 132, 128, 1.98, 3_350_000_000_000, 50 * 1024**2, 228 * 1024, 227 * 1024)

TARGETS = {
    "a100-40gb": Target("NVIDIA A100-SXM4-40GB", "cuda", 40 * GIB, 0.75, 312e12, _A100_40),
    "a100-80gb": Target("NVIDIA A100-SXM4-80GB", "cuda", 80 * GIB, 0.75, 312e12, _A100_80),
    "h100": Target("NVIDIA H100 80GB HBM3", "cuda", 80 * GIB, 0.75, 989e12, _H100),
    # Google Cloud's TPU pages: v5e 197 TFLOP/s and 16 GB a chip, v5p 459 TFLOP/s and 95 GB.
    "tpu-v5e": Target(
        "TPU v5e", "tpu", 16 * GIB, 1.0, 197e12,
        slices=((4, "v5e:2x2"), (8, "v5e:2x4"), (16, "v5e:4x4"), (32, "v5e:4x8"), (64, "v5e:8x8")),
    ),
    "tpu-v5p": Target(
        "TPU v5p", "tpu", 95 * GIB, 1.0, 459e12,
        slices=((4, "v5p:2x2x1"), (8, "v5p:2x2x2"), (16, "v5p:2x2x4"), (32, "v5p:2x4x4"), (64, "v5p:4x4x4")),
    ),
}  # fmt: skip


def find_target(text: str) -> tuple[Target, int]:
    """Read a target: "a100-80gb:8" is eight A100s; without a number, eight of it.

    Raises:
        JaxguardError: no such target, or not as many devices as it comes in.
    """
    name, _, count = text.partition(":")
    if name not in TARGETS:
        raise JaxguardError(f"target {name!r} is unknown; known: {', '.join(TARGETS)}")
    if not (count or "8").isdecimal() or int(count or 8) < 1:
        raise JaxguardError(f"target {text!r}: write the number of devices after the colon, as in {name}:8")
    target, devices = TARGETS[name], int(count or 8)
    if target.gpu and devices > DEVICES_PER_HOST and devices % DEVICES_PER_HOST:
        raise JaxguardError(f"target {text!r}: more than one host means a multiple of {DEVICES_PER_HOST} devices")
    if not target.gpu and devices not in dict(target.slices):
        raise JaxguardError(f"target {text!r}: it comes as {', '.join(str(n) for n, _ in target.slices)} devices")
    return target, devices


def topology(text: str) -> Sequence[Any]:
    """The target's devices, to build a mesh of and compile for; nothing can run on them.

    Raises:
        JaxguardError: unknown target, or its compiler is not installed.
    """
    target, devices = find_target(text)
    if target.gpu:
        return _gpu_devices(target.gpu.config(target.name, target.memory), devices)
    return _tpu_devices(dict(target.slices)[devices])


def _gpu_devices(config: str, devices: int) -> Sequence[Any]:
    _require("jax_cuda12_plugin")
    per_host = min(devices, DEVICES_PER_HOST)
    shape = f"1x{devices // per_host}x{per_host}"  # slices x hosts x devices of a host
    return topologies.get_topology_desc("gpu", "cuda", target_config=config, topology=shape).devices


def _tpu_devices(name: str) -> Sequence[Any]:
    _require("libtpu")
    # libtpu must neither ask a metadata server where it runs nor claim a chip.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def _require(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise JaxguardError("the compiler for that target is not installed: pip install 'jaxguard[aot]'")
