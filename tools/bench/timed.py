"""Measure seconds and memory of a function, in processes with and without jaxguard."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

WARM_BYTES = 8 * 2**30
"""Bytes that a process allocates and frees before it measures: the host of a virtual machine may be slow to provide them the
first time."""


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Seconds, and growth of the process's peak memory in GiB."""
    np.ones(WARM_BYTES, np.uint8)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, started = _peak_memory(), time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    grown = _peak_memory() - before
    del result  # only now, so that its memory counts
    return {"seconds": seconds, "gib": grown / 2**20}


def sync(folder: Path) -> None:
    """Wait until its checkpoint's files are on the disk."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _peak_memory() -> int:
    """KiB of this process at its peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])
