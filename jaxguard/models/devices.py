"""The devices that JAX finds, and what to do when it finds none, leaves some idle, or fills their memory."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from jaxguard.config import Config
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.versions import install

if TYPE_CHECKING:
    import jax

logger = logging.getLogger(__name__)

_FILES = {"GPU": ("gpu", "nvidia[0-9]*"), "TPU": ("tpu", "accel[0-9]*")}
"""Accelerator -> the extra that installs JAX for it, and its files in /dev."""


def find_devices(files: Path = Path("/dev")) -> "list[jax.Device]":
    """Return all devices; warn where they are CPUs beside an accelerator.

    JaxguardError: JAX_PLATFORMS asks for a platform that is not there, or not installed.
    """
    import jax  # here, so that a guard on a server does not load it

    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # an empty AssertionError: JAX_PLATFORMS=cuda without its plugin
        asked = os.environ.get("JAX_PLATFORMS", "")
        reason = (str(error).splitlines() or ["its plugin is not installed"])[0]
        raise JaxguardError(
            f"JAX cannot use the devices that JAX_PLATFORMS={asked} asks for: {reason}. Install JAX for them "
            f"({install('gpu')}, or tpu likewise), look at the driver, or unset JAX_PLATFORMS to run on the CPU"
        ) from None
    if devices[0].platform == "cpu" and os.environ.get("JAX_PLATFORMS") != "cpu":
        _warn_of_idle(files)
    return devices


@cache
def _warn_of_idle(files: Path) -> None:
    """Say once that an accelerator is not used."""
    for name, (extra, pattern) in _FILES.items():
        if found := sorted(files.glob(pattern)):
            logger.warning(
                "this machine has a %s (%s), but JAX runs on the CPU: %s, and look at the driver; JAX_PLATFORMS=cpu says that the "
                "CPU is meant",
                name, found[0], install(extra),
            )  # fmt: skip


@contextmanager
def explain_memory(remedy: str) -> Iterator[None]:
    """Turn an exhausted memory, of a device or of this machine, into a JaxguardError that names the `remedy`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = (str(error).strip().splitlines() or ["out of memory"])[0][:200]
        raise JaxguardError(f"the memory is not enough ({reason}): {remedy}") from error


def training_remedy(config: Config) -> str:
    """Return which fields of a training to change when the memory is not enough, and the command that says so beforehand."""
    train, data, model, mesh = config.train, config.data, config.model, config.mesh
    full = "" if model.remat == "full" else f"set model.remat=full (now {model.remat}), "
    return (
        f"raise train.accumulation (now {train.accumulation}), {full}lower data.max_seq_len (now {data.max_seq_len}), or shard "
        f"over more devices with mesh.fsdp and mesh.tensor (now {mesh.fsdp} and {mesh.tensor}). What fits can be known beforehand: "
        f"jaxguard plan --config {config.folder / 'config.yaml'} --target a100-80gb:8 --search"
    )


def guard_remedy(settings: EvaluateConfig) -> str:
    """As `training_remedy`, for a guard that JAX computes."""
    return (
        f"lower evaluate.batch (now {settings.batch}) or evaluate.reasoning_tokens (now {settings.reasoning_tokens}), shard over "
        "more devices with mesh.tensor and mesh.fsdp, or let a server compute the guard: evaluate.backend=sglang, or its address"
    )
