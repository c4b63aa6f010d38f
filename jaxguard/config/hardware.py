"""Facts of accelerators, read from configs/hardware/targets.yaml: peak FLOP/s, memory, links, and what XLA compiles for."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from jaxguard.config.base import Schema, read_yaml, validate
from jaxguard.config.lookup import CONFIG_FOLDER, locate

HARDWARE_FILE = CONFIG_FOLDER / "hardware" / "targets.yaml"
GIB = 1024**3


def _bytes(text: Any) -> Any:
    """`40 GiB` -> bytes."""
    match = re.fullmatch(r"(\d+) (KiB|MiB|GiB)", str(text))
    return int(match[1]) * 1024 ** ("KiB", "MiB", "GiB").index(match[2]) * 1024 if match else text


Bytes = Annotated[int, BeforeValidator(_bytes)]
Rate = Annotated[float, Field(gt=0)]


class Device(Schema):
    """One kind of accelerator."""

    title: str
    """Its product name."""
    device_kind: str
    """Pattern of JAX's name of it."""
    source: tuple[str, ...] = Field(min_length=1)
    """Where the figures are from."""
    flops: dict[str, Rate]
    """Peak dense FLOP/s of one device by type."""


class Gpu(Schema):
    """What XLA has to know of a GPU to compile for it. Sizes in bytes or elements."""

    compute_capability: tuple[int, int]
    cores: int
    lanes_per_core: int
    clock_ghz: float
    l2_cache: Bytes
    shared_memory_per_core: Bytes
    shared_memory_per_block: Bytes


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

    memory: Bytes
    """Bytes of one device."""
    usable: Annotated[float, Field(gt=0, le=1)]
    """The share of it that a program may fill."""
    bandwidth: Rate
    """Bytes/s to and from that memory."""
    link: Rate
    """Bytes/s to other devices of the host or slice."""
    network: Rate
    """Bytes/s beyond them."""
    gpu: Gpu | None = None
    tpu: Tpu | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.gpu is None) == (self.tpu is None):
            raise ValueError("a target is either a gpu or a tpu")
        return self


@dataclass(frozen=True)
class Hardware:
    """The file.

    Attributes:
        peaks: devices of which only the peak is known, matched before the targets.
        targets: devices to compile for.
    """

    peaks: Mapping[str, Device]
    targets: Mapping[str, Target]


@cache
def read_hardware(path: Path = HARDWARE_FILE) -> Hardware:
    """Read the table.

    Raises:
        JaxguardError: a field of the file is unknown, missing or ill-typed.
    """
    tree = read_yaml(locate(path))
    return Hardware(
        {name: validate(Device, fields, f"{path}: {name}") for name, fields in tree["peaks"].items()},
        {name: validate(Target, fields, f"{path}: {name}") for name, fields in tree["targets"].items()},
    )


def read_targets(path: Path = HARDWARE_FILE) -> Mapping[str, Target]:
    """Name -> device to compile for; errors as of `read_hardware`."""
    return read_hardware(path).targets


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one JAX device of this kind, None where it is unknown."""
    hardware = read_hardware()
    devices = (*hardware.peaks.values(), *hardware.targets.values())
    return next((d.flops["bfloat16"] for d in devices if re.search(d.device_kind, device_kind)), None)
