"""Products of activations and weights: in which type the matmul_dtype are multiplied, and how their gradients are written."""

import math
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array

DOTS = "dots"
"""The name of the results that `model.remat=dots` keeps."""

PART = 192
"""Terms that are added up one after another, about."""


@cache
def has_bfloat16_units() -> bool:
    """Has this CPU instructions for bfloat16 products (AVX-512, AMX)? Others multiply float32 faster, XLA and PyTorch alike."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def einsum(equation: str, hidden: Array, weight: Array, matmul_dtype: DTypeLike | None = None) -> Array:
    """Product of two arrays in the first one's type, summed over the dimensions that both have.

    Args:
        equation: as for einsum; an index is in two of the three arrays.
        hidden: activations.
        weight: a weight of any type, which is also its gradient's.
        matmul_dtype: the type that both are rounded to before they are multiplied, in the backward pass too; default the weight's.
    """
    matmul_dtype = jnp.dtype(matmul_dtype or weight.dtype)
    if not hidden.dtype == weight.dtype == matmul_dtype:
        result = _rounded(equation, matmul_dtype, hidden, weight)
    elif matmul_dtype == jnp.float32:
        result = _in_parts(equation, hidden, weight)
    else:
        result = jnp.einsum(equation, hidden, weight)
    return checkpoint_name(result, DOTS)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_parts(equation: str, hidden: Array, weight: Array) -> Array:
    """In float32, outside of training, pairwise: XLA on a CPU adds up to 512 terms one after another, and shorter sums err less."""
    left, right, _ = equation.replace("->", ",").split(",")
    axes = next((left.index(letter), right.index(letter)) for letter in left if letter in right)
    terms = math.prod(hidden.shape[left.index(letter)] for letter in left if letter in right)

    def add(hidden: Array, weight: Array, terms: int) -> Array:
        if terms <= PART:
            return jnp.einsum(equation, hidden, weight)
        halves = (jnp.array_split(x, 2, axis) for x, axis in zip((hidden, weight), axes, strict=True))
        first, second = (add(h, w, terms // 2) for h, w in zip(*halves, strict=True))
        return first + second

    return add(hidden, weight, terms)


def _in_parts_forward(equation: str, hidden: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return jnp.einsum(equation, hidden, weight), (hidden, weight)


def _in_parts_backward(equation: str, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """In one product each. As JAX would have it, a CPU first copies the gradient of every product transposed."""
    return _gradients(equation, *kept, gradient, jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounded(equation: str, matmul_dtype: jnp.dtype, hidden: Array, weight: Array) -> Array:
    hidden_, weight_ = hidden.astype(matmul_dtype), weight.astype(matmul_dtype)
    return jnp.einsum(equation, hidden_, weight_, preferred_element_type=hidden.dtype)


def _rounded_forward(
    equation: str, matmul_dtype: jnp.dtype, hidden: Array, weight: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _rounded(equation, matmul_dtype, hidden, weight), (hidden, weight)


def _rounded_backward(
    equation: str, matmul_dtype: jnp.dtype, kept: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    """As JAX would have it, the gradient stays in the wider type, and so do both products with it."""
    return _gradients(equation, *kept, gradient, matmul_dtype)


def _gradients(
    equation: str, hidden: Array, weight: Array, gradient: Array, matmul_dtype: DTypeLike
) -> tuple[Array, Array]:
    left, right, out = equation.replace("->", ",").split(",")
    hidden_, weight_, gradient = (x.astype(matmul_dtype) for x in (hidden, weight, gradient))
    of_hidden = jnp.einsum(f"{out},{right}->{left}", gradient, weight_, preferred_element_type=hidden.dtype)
    # In the order in which the weight's dimensions come out, so that nothing is transposed.
    factors = [(out, gradient), (left, hidden_)] if right[0] in out else [(left, hidden_), (out, gradient)]
    (first, one), (second, other) = factors
    of_weight = jnp.einsum(f"{first},{second}->{right}", one, other, preferred_element_type=weight.dtype)
    return of_hidden, of_weight


_in_parts.defvjp(_in_parts_forward, _in_parts_backward)
_rounded.defvjp(_rounded_forward, _rounded_backward)
