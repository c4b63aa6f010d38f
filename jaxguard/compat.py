"""Private parts of libraries that jaxguard depends on, in one place. tests/test_compat.py fails when a library changes them.

Tested with jax 0.10.2; pyproject.toml states the range.
"""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def cudnn_attention_on_any_gpu() -> Iterator[None]:
    """Lower cuDNN attention although this host's GPU is another one, or absent.

    JAX checks the local GPU's compute capability before it lowers the kernel, and has no public way to check the target's.
    Whether the target can run the kernel is decided by models/compute.choose_kernel.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    check = cudnn.check_compute_capability
    cudnn.check_compute_capability = lambda _: True
    try:
        yield
    finally:
        cudnn.check_compute_capability = check
