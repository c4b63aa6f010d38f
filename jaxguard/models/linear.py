"""Products of activations and weights. To read the decoder, it is enough to know that `project` is an einsum.

It hides the types and gradients of a product, and the gathering of a weight that is sharded over `fsdp`.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxguard.models.compute import Compute
from jaxguard.models.sharding import constrain, gather_over_fsdp, scatter_over_fsdp
from jaxguard.models.spec import Spec
from jaxguard.models.weights import table

DOTS = "dots"
"""The name of the results that `model.remat=dots` keeps."""

MAX_TERMS = 768
"""Most terms that a float32 product adds up in one sum, approximately."""


class Buffered(NamedTuple):
    """A float32 weight, and the array of zeros by which to differentiate instead: its gradient buffer.

    The gradient of a float32 weight would be float32, although it is computed in the compute type: twice the memory. The buffer
    has the compute type, and nobody reads its values.
    """

    weight: Array
    buffer: Array


Weights = Mapping[str, Array | Buffered]
"""Path, or name within a layer, of a row of the weight table -> weight."""


def gradient_buffers(spec: Spec, compute: Compute) -> dict[str, Array]:
    """Path of each of the layers' matrices -> zeros in the compute type, for `Buffered`."""
    matrices = [w for w in table(spec) if w.stacked and "norm" not in w.axes]
    return {w.path: constrain(jnp.zeros(w.shape(spec), compute.dtype), *w.axes) for w in matrices}


def gather_layer(weights: Weights, spec: Spec, compute: Compute) -> dict[str, Array]:
    """Prepare one layer's weights for products: cast the matrices, then gather them over fsdp, so that half the bytes move."""
    orders = {w.name: w.hf_order if compute.features_first else range(len(w.axes)) for w in table(spec)}
    axes = {w.name: tuple(w.axes[i] for i in orders[w.name])[1:] for w in table(spec) if w.stacked}

    def prepare(name: str, weight: Array | Buffered) -> Array:
        if isinstance(weight, Buffered):
            return gather(*weight, axes[name])
        if "norm" in axes[name]:
            return weight
        return gather_over_fsdp(compute.cast(weight), *axes[name])

    return {name: prepare(name, weight) for name, weight in weights.items()}


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def gather(weight: Array, buffer: Array, axes: tuple[str, ...]) -> Array:
    """Cast a weight to its gradient buffer's type and gather it over fsdp.

    The gradient goes to the buffer, and none to the weight. Devices add it up and cut it in one go, by a reduce-scatter; JAX's own
    gradient of a gathered array would be a gathered one.
    """
    return gather_over_fsdp(weight.astype(buffer.dtype), *axes)


def _gather_forward(weight: Array, buffer: Array, axes: tuple[str, ...]) -> tuple[Array, None]:
    return gather(weight, buffer, axes), None


def _gather_backward(axes: tuple[str, ...], _: None, gradient: Array) -> tuple[None, Array]:
    return None, scatter_over_fsdp(gradient, *axes)


gather.defvjp(_gather_forward, _gather_backward)


def project(equation: str, x: Array, weight: Array, matmul_dtype: DTypeLike | None = None) -> Array:
    """Multiply activations by a weight, as jnp.einsum does; the result has the activations' type.

    Each letter of the equation is in exactly two of the three arrays. `matmul_dtype` is what both are rounded to before they are
    multiplied, in the backward pass too; default the weight's type, which is also its gradient's.
    """
    matmul_dtype = jnp.dtype(matmul_dtype or weight.dtype)
    same = x.dtype == weight.dtype == matmul_dtype
    # JAX's own gradients are good where all are bfloat16.
    multiply = jnp.einsum if same and matmul_dtype != jnp.float32 else partial(_multiply, matmul_dtype)
    named: Array = checkpoint_name(multiply(equation, x, weight), DOTS)
    return named


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _multiply(matmul_dtype: jnp.dtype, equation: str, x: Array, weight: Array) -> Array:
    """Multiply what is rounded to the matmul_dtype.

    In float32, where nothing is differentiated, sum pairwise: XLA on a CPU adds up to 512 terms in a row, and errs more.
    """
    if not x.dtype == weight.dtype == matmul_dtype:
        rounded_x, rounded_weight = x.astype(matmul_dtype), weight.astype(matmul_dtype)
        return jnp.einsum(equation, rounded_x, rounded_weight, preferred_element_type=x.dtype)
    left, right, _ = equation.replace("->", ",").split(",")
    axes = next((left.index(letter), right.index(letter)) for letter in left if letter in right)

    def add(x: Array, weight: Array, terms: int) -> Array:
        if terms <= MAX_TERMS:
            return jnp.einsum(equation, x, weight)
        halves = (jnp.array_split(array, 2, axis) for array, axis in zip((x, weight), axes, strict=True))
        first, second = (add(x, weight, terms // 2) for x, weight in zip(*halves, strict=True))
        return first + second

    return add(x, weight, _size(left, x, right))


def _multiply_forward(
    matmul_dtype: jnp.dtype, equation: str, x: Array, weight: Array
) -> tuple[Array, tuple[Array, Array]]:
    multiply = jnp.einsum if x.dtype == weight.dtype == matmul_dtype else partial(_multiply, matmul_dtype)
    return multiply(equation, x, weight), (x, weight)


def _multiply_backward(
    matmul_dtype: jnp.dtype, equation: str, saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    """Multiply what is rounded, once for each gradient.

    JAX's own rule would compute both products in the wider type, and have a CPU copy the gradient of every product transposed.
    """
    x, weight = saved
    left, right, out = equation.replace("->", ",").split(",")
    rounded_x, rounded_weight, gradient = (array.astype(matmul_dtype) for array in (x, weight, gradient))
    of_x = jnp.einsum(f"{out},{right}->{left}", gradient, rounded_weight, preferred_element_type=x.dtype)
    # The narrower factor first: a CPU copies the first one transposed. The barrier keeps XLA from swapping them back.
    factors = (left, rounded_x), (out, gradient)
    (a, first), (b, second) = sorted(factors, key=lambda factor: _size(factor[0], factor[1], right))
    order = "".join(letter for letter in a + b if letter in right)
    of_weight = jnp.einsum(f"{a},{b}->{order}", first, second, preferred_element_type=weight.dtype)
    if order != right:
        of_weight = jnp.einsum(f"{order}->{right}", jax.lax.optimization_barrier(of_weight))
    return of_x, of_weight


_multiply.defvjp(_multiply_forward, _multiply_backward)


def _size(letters: str, array: Array, within: str) -> int:
    """The size of an array in those of its dimensions that another, with the letters `within`, has too."""
    return math.prod(size for letter, size in zip(letters, array.shape, strict=True) if letter in within)


def project_features_first(equation: str, x: Array, weight: Array) -> Array:
    """Multiply as `project`, where the activations' features come before rows and tokens, and what the weight sums over comes last.

    The equation is that of `project`. Not for training: float32 sums are XLA's, and gradients JAX's own.
    """
    left, _ = equation.split(",")
    features = len(left) - 2
    outputs, summed = weight.shape[:-features], math.prod(weight.shape[-features:])
    # As plain matrices: XLA would copy one with more dimensions.
    operands = weight.reshape(-1, summed), x.astype(weight.dtype).reshape(summed, -1)
    return jnp.matmul(*operands, preferred_element_type=x.dtype).reshape(*outputs, *x.shape[features:])
