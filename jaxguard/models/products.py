"""Products of activations and weights: in which type the operands are multiplied, and how their gradients are written."""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


@cache
def has_bfloat16_units() -> bool:
    """Has this CPU matrix units for bfloat16, Intel's AMX? Others multiply float32 faster, both in XLA and in PyTorch."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def product(equation: str, hidden: Array, weight: Array, operands: DTypeLike | None = None) -> Array:
    """Product of two arrays in the first one's type, summed over dimensions that end the first.

    In float32 the sum is made of two halves. XLA adds the terms up one after another on a CPU, and shorter sums err less:
    on SmolLM2, whose logits reach 44, at most 0.00009 instead of 0.00015.

    Args:
        equation: as for einsum; an index is in two of the three arrays.
        hidden: activations.
        weight: a weight of any type, which is also its gradient's.
        operands: the type that both are rounded to before they are multiplied, in the backward pass too; default the weight's.
    """
    operands = jnp.dtype(operands or weight.dtype)
    if hidden.dtype == weight.dtype == operands:
        return _in_halves(equation, hidden, weight) if operands == jnp.float32 else jnp.einsum(equation, hidden, weight)
    return _rounded(equation, operands, hidden, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_halves(equation: str, hidden: Array, weight: Array) -> Array:
    left, right = equation.partition("->")[0].split(",")
    halves = zip(jnp.split(hidden, 2, axis=-1), jnp.split(weight, 2, axis=right.index(left[-1])), strict=True)
    first, second = (jnp.einsum(equation, h, w) for h, w in halves)
    return first + second


def _in_halves_forward(equation: str, hidden: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _in_halves(equation, hidden, weight), (hidden, weight)


def _in_halves_backward(equation: str, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """In one product each. As JAX would have it, a CPU first copies the gradient of every product transposed."""
    return _gradients(equation, *kept, gradient, jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounded(equation: str, operands: jnp.dtype, hidden: Array, weight: Array) -> Array:
    hidden_, weight_ = hidden.astype(operands), weight.astype(operands)
    return jnp.einsum(equation, hidden_, weight_, preferred_element_type=hidden.dtype)


def _rounded_forward(
    equation: str, operands: jnp.dtype, hidden: Array, weight: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _rounded(equation, operands, hidden, weight), (hidden, weight)


def _rounded_backward(
    equation: str, operands: jnp.dtype, kept: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    """As JAX would have it, the gradient stays in the wider type, and so do both products with it."""
    return _gradients(equation, *kept, gradient, operands)


def _gradients(
    equation: str, hidden: Array, weight: Array, gradient: Array, operands: DTypeLike
) -> tuple[Array, Array]:
    left, right, out = equation.replace("->", ",").split(",")
    hidden_, weight_, gradient = (x.astype(operands) for x in (hidden, weight, gradient))
    of_hidden = jnp.einsum(f"{out},{right}->{left}", gradient, weight_, preferred_element_type=hidden.dtype)
    # In the order in which the weight's dimensions come out, so that nothing is transposed.
    factors = [(out, gradient), (left, hidden_)] if right[0] in out else [(left, hidden_), (out, gradient)]
    (first, one), (second, other) = factors
    of_weight = jnp.einsum(f"{first},{second}->{right}", one, other, preferred_element_type=weight.dtype)
    return of_hidden, of_weight


_in_halves.defvjp(_in_halves_forward, _in_halves_backward)
_rounded.defvjp(_rounded_forward, _rounded_backward)
