"""Seconds and memory of one piece of work; for processes with jaxguard and for those without."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

AT_HAND = 8 * 2**30
"""Bytes that a process takes and returns before it measures: the host of a virtual machine may take long to hand them out,
once."""


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Seconds, and how much the process's largest memory grew, GiB."""
    np.ones(AT_HAND, np.uint8)
    Path("/proc/self/clear_refs").write_text("5")  # the largest memory is counted from here on
    before, started = _largest_memory(), time.perf_counter()
    kept = work()
    seconds = time.perf_counter() - started
    grown = _largest_memory() - before
    del kept
    return {"seconds": seconds, "gib": grown / 2**20}


def sync(folder: Path) -> None:
    """Wait until its checkpoint's files are on the disk."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _largest_memory() -> int:
    """KiB that this process had at most."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])
