"""Every weight, declared once.

A row holds a weight's names on both sides, how Hugging Face's layout becomes ours (an einops rule over shape letters, which the
export applies backwards), and the logical axis of each of our dimensions. Initialization, sharding, import, export, the planner
and the tests read it. Values are only reshaped, transposed and stacked, so an export of unchanged weights is byte-identical.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import einops
import jax
import jax.numpy as jnp
import numpy as np

from jaxguard.models.spec import Spec

LAYER = "layers."


@dataclass(frozen=True)
class Weight:
    """One row of the table."""

    path: str  # our name; weights of all layers are stacked under one that starts with `layers.`
    hf: str  # Hugging Face's name after the model's prefix, `{i}` standing for the layer
    rule: str  # Hugging Face's layout -> ours, without the stacked L
    axes: tuple[str, ...]  # logical axis of each of our dimensions, L included

    @property
    def name(self) -> str:
        """The path without `layers.`."""
        return self.path.removeprefix(LAYER)

    @property
    def stacked(self) -> bool:
        return self.path.startswith(LAYER)

    def shape(self, spec: Spec) -> tuple[int, ...]:
        """Return our shape, L included."""
        letters = self.rule.split("->")[1].split()
        return tuple(spec.sizes[x] for x in (["L"] if self.stacked else []) + letters)

    @property
    def hf_order(self) -> tuple[int, ...]:
        """Where our dimensions, L included, are in Hugging Face's order: what comes out of a product before what it sums over."""
        theirs, ours = ([x for x in side if x.isalpha()] for side in self.rule.split("->"))
        stacked = int(self.stacked)
        return (*range(stacked), *(stacked + ours.index(x) for x in theirs))

    def hf_shape(self, spec: Spec) -> tuple[int, ...]:
        """Return Hugging Face's shape of one layer's tensor."""
        groups = self.rule.split("->")[0].replace("(N H)", "NH").replace("(K H)", "KH").split()
        return tuple(math.prod(spec.sizes[x] for x in group) for group in groups)

    def from_hf(self, tensor: np.ndarray, spec: Spec) -> np.ndarray:
        """View one layer's tensor in our layout."""
        return einops.rearrange(tensor, self.rule, **{x: size for x, size in spec.sizes.items() if x in self.rule})

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """View one layer's array, or a part of it, in Hugging Face's layout."""
        hf, ours = self.rule.split(" -> ")
        return einops.rearrange(array, f"{ours} -> {hf}")


EMBED = Weight("embed", "embed_tokens.weight", "V D -> V D", ("vocab", "embed"))
HEAD = Weight("lm_head", "lm_head.weight", "V D -> V D", ("vocab", "embed"))
"""Absent where the head is tied; on disk it has no prefix of the model."""

_MATRICES = (
    Weight("layers.q_proj", "layers.{i}.self_attn.q_proj.weight", "(N H) D -> D N H", ("layers", "embed", "heads", "head_dim")),
    Weight("layers.k_proj", "layers.{i}.self_attn.k_proj.weight", "(K H) D -> D K H", ("layers", "embed", "kv_heads", "head_dim")),
    Weight("layers.v_proj", "layers.{i}.self_attn.v_proj.weight", "(K H) D -> D K H", ("layers", "embed", "kv_heads", "head_dim")),
    Weight("layers.o_proj", "layers.{i}.self_attn.o_proj.weight", "D (N H) -> N H D", ("layers", "heads", "head_dim", "embed")),
    Weight("layers.gate_proj", "layers.{i}.mlp.gate_proj.weight", "F D -> D F", ("layers", "embed", "mlp")),
    Weight("layers.up_proj", "layers.{i}.mlp.up_proj.weight", "F D -> D F", ("layers", "embed", "mlp")),
    Weight("layers.down_proj", "layers.{i}.mlp.down_proj.weight", "D F -> F D", ("layers", "mlp", "embed")),
)  # fmt: skip

# The same Hugging Face name, post_attention_layernorm, is the norm before the MLP in Llama and the norm after
# attention in Gemma 3; our names say where a norm is applied.
_LLAMA_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_NORMS = {
    "llama": _LLAMA_NORMS,
    "qwen3": _LLAMA_NORMS | _QK_NORMS,
    "gemma3": {
        "attention_norm": "input_layernorm",
        "attention_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
        **_QK_NORMS,
    },
}
"""Family -> our name of a layer's norm -> Hugging Face's."""


def table(spec: Spec) -> tuple[Weight, ...]:
    """Return the rows of a model of this spec."""

    def norm(name: str, hf: str) -> Weight:
        letter = "H" if name in _QK_NORMS else "D"
        return Weight(LAYER + name, f"layers.{{i}}.{hf}.weight", f"{letter} -> {letter}", ("layers", "norm"))

    norms = [norm(*names) for names in _NORMS[spec.family].items()]
    norms.append(Weight("final_norm", "norm.weight", "D -> D", ("norm",)))
    return (EMBED, *_MATRICES, *norms, *(() if spec.tied else (HEAD,)))


def abstract(spec: Spec, dtype: jnp.dtype = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """Map each path to shape and type, without memory."""
    return {w.path: jax.ShapeDtypeStruct(w.shape(spec), dtype) for w in table(spec)}


def initialize(spec: Spec, key: jax.Array) -> dict[str, jax.Array]:
    """Draw random float32 weights: norms at identity, the rest normal with deviation 0.02."""

    def draw(weight: Weight, key: jax.Array) -> jax.Array:
        shape = weight.shape(spec)
        if "norm" in weight.axes:
            return jnp.full(shape, 0.0 if spec.zero_centered_norm else 1.0, jnp.float32)
        return 0.02 * jax.random.normal(key, shape, jnp.float32)

    rows = table(spec)
    return {w.path: draw(w, k) for w, k in zip(rows, jax.random.split(key, len(rows)), strict=True)}


def count(weights: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> int:
    """Count the parameters."""
    return sum(math.prod(w.shape) for w in weights.values())
