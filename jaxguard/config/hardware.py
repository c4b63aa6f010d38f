"""Facts of accelerators, read from configs/hardware/targets.yaml: peak FLOP/s, memory, links, and what XLA compiles for."""

import re
from functools import cache
from pathlib import Path
from typing import Annotated, Self

from pydantic import ByteSize, Field, PositiveFloat, model_validator

from jaxguard.config.base import CONFIG_FOLDER, Schema, locate
from jaxguard.utils.parse import read_yaml

HARDWARE_FILE = CONFIG_FOLDER / "hardware" / "targets.yaml"
GIB = 1024**3


class Device(Schema):
    """One kind of accelerator."""

    title: str
    """Its product name."""
    device_kind: str
    """Pattern of JAX's name of it."""
    source: tuple[str, ...] = Field(min_length=1)
    """Where the figures are from."""
    flops: dict[str, PositiveFloat]
    """Peak dense FLOP/s of one device by type."""


class Gpu(Schema):
    """What XLA has to know of a GPU to compile for it. Sizes in bytes or elements."""

    compute_capability: tuple[int, int]
    cores: int
    lanes_per_core: int
    clock_ghz: float
    l2_cache: ByteSize
    shared_memory_per_core: ByteSize
    shared_memory_per_block: ByteSize


class Tpu(Schema):
    """How a TPU's slices are built."""

    generation: str
    """libtpu's name of it."""
    chip_config: str = "default"
    """libtpu's name of how its cores make devices."""
    chips_per_host: tuple[int, ...]
    """The smallest slice, along each dimension of the torus; those of larger ones are multiples."""
    devices_per_chip: int = 1
    """As JAX counts devices."""
    largest: tuple[int, ...]
    """The largest slice, in chips along each dimension."""


class Target(Device):
    """A kind of accelerator to compile for; rates are those of one device, links in one direction."""

    memory: ByteSize
    """Bytes of one device."""
    usable: Annotated[float, Field(gt=0, le=1)]
    """The share of it that a program may fill."""
    bandwidth: PositiveFloat
    """Bytes/s to and from that memory."""
    link: PositiveFloat
    """Bytes/s to other devices of the host or slice."""
    network: PositiveFloat
    """Bytes/s beyond them."""
    gpu: Gpu | None = None
    tpu: Tpu | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.gpu is None) == (self.tpu is None):
            raise ValueError("a target is either a gpu or a tpu")
        return self


class Hardware(Schema):
    """The file."""

    peaks: dict[str, Device]
    """Devices of which only the peak is known, matched before the targets."""
    targets: dict[str, Target]
    """Devices to compile for."""


@cache
def read_hardware(path: Path = HARDWARE_FILE) -> Hardware:
    """Read the file; JaxguardError for a field that is unknown, missing or ill-typed."""
    return read_yaml(locate(path), Hardware)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one JAX device of this kind, None where it is unknown."""
    hardware = read_hardware()
    devices = (*hardware.peaks.values(), *hardware.targets.values())
    return next((d.flops["bfloat16"] for d in devices if re.search(d.device_kind, device_kind)), None)
