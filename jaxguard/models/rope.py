"""Rotary position embeddings, rounded where PyTorch rounds."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxguard.models.spec import Rope


def rope_table(
    rope: Rope, head_dim: int, positions_BT: Int[Array, "B T"]
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Compute cosine and sine of the angles at every position, float32."""
    angles = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(rope_frequencies(rope, head_dim))
    return jnp.cos(angles), jnp.sin(angles)


def rope_frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, "half"]:
    """Compute the angle per position of each pair of dimensions, in radians, float32.

    Rounded where PyTorch rounds: a frequency that is a bit off turns a token by 3e-5 radians at position 500, which logits show.

    "llama3" scaling as published with Llama 3.1: wavelengths longer than the original context over low_freq_factor are
    stretched by factor, those shorter than it over high_freq_factor stay, and in between the two are blended.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = np.float32(1) / (rope.theta ** exponent.astype(np.float64)).astype(np.float32)
    if rope.llama3 is None:
        return frequency / np.float32(rope.factor)
    low, high, context = rope.llama3
    wavelength = 2 * math.pi / frequency
    blend = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    return ((1 - blend) * frequency / rope.factor + blend * frequency).astype(np.float32)


def rotate(
    x: Float[Array, "*shape"], cos: Float[Array, "..."], sin: Float[Array, "..."], axis: int = -1
) -> Float[Array, "*shape"]:
    """Rotate queries or keys along an axis, in float32, by tables that have half its size and broadcast to the others.

    Rotate-half layout: dimension i is paired with dimension i + H/2.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=axis)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=axis)
    return rotated.astype(x.dtype)
