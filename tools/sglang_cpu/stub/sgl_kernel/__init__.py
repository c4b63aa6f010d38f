"""Stands in for SGLang's CUDA kernels, which SGLang imports but does not call on a CPU."""

from collections.abc import Callable
from typing import Any


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"sgl_kernel.{name} is a CUDA kernel, and this is a CPU")

    return absent
