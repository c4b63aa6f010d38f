"""`jaxguard env`: print what a bug report needs: versions, devices, memory and settings."""

import argparse
import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path

from jaxguard.cli import Command
from jaxguard.utils.terminal import shown
from jaxguard.utils.versions import versions

DESCRIPTION = "Print what a bug report needs. Paths, names and keys of this machine are not in it."
OPTIONAL = ("datasets", "huggingface-hub", "tokenizers", "torch", "sglang", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin",
            "datasketch", "py3langid", "gguf", "trackio", "wandb")  # fmt: skip
SETTINGS = ("JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "XLA_FLAGS", "XLA_CLIENT_MEM_FRACTION",
            "XLA_PYTHON_CLIENT_PREALLOCATE", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")  # fmt: skip
"""Environment variables that change what a run does, and hold no secrets."""


def environment() -> dict[str, str]:
    """Return name -> value of everything that the command prints."""
    optional = {}
    for name in OPTIONAL:
        try:
            optional[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    known = {name: version for name, version in versions().items() if version is not None}
    machine = {
        "platform": platform.platform(),
        "processors": f"{os.cpu_count()} × {platform.machine()}",
        "memory": _memory(),
        "devices": _devices(),
    }
    return known | optional | machine | {name: os.environ[name] for name in SETTINGS if name in os.environ}


def _memory() -> str:
    try:
        kilobytes = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:
        kilobytes = None
    return f"{int(kilobytes[1]) / 2**20:.1f} GiB" if kilobytes else "unknown"


def _devices() -> str:
    import jax  # takes a second

    try:
        kinds = [device.device_kind for device in jax.devices()]
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # the latter where JAX_PLATFORMS=cuda and its plugin is not installed
        return f"none: {error}"
    return ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))


def _env(_: argparse.Namespace) -> None:
    for name, value in environment().items():
        print(shown(f"{name}: {value}"))


main = Command("env", DESCRIPTION, _env, lambda _: None)

if __name__ == "__main__":
    sys.exit(main())
