"""The decoder: one for Llama 3, SmolLM2 and Gemma 3; what differs between them is data in the Spec."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxguard.models import weights as table
from jaxguard.models.attention.attend import FAR, Seen, attend, attend_seen
from jaxguard.models.attention.kernels import Layout
from jaxguard.models.compute import REFERENCE, Compute
from jaxguard.models.einsum import DOTS, einsum
from jaxguard.models.sharding import constrain, gather
from jaxguard.models.spec import Rope, Spec


class Cache(NamedTuple):
    """Keys and values of tokens that were computed before, in every layer, and their positions (FAR for padding)."""

    key_LAKSH: Float[Array, "L A K S H"]
    value_LAKSH: Float[Array, "L A K S H"]
    positions_AS: Int[Array, "A S"]


class Decoder(nnx.Module):
    """Tokens to hidden states.

    Every row of the weight table is one nnx.Param: `embed`, `final_norm`, `lm_head` where untied, and in `layers` one
    stack [L, ...] a weight, which the layer loop scans over.

    Args:
        spec: what the model is.
        weights: path -> array.
        compute: how to compute it.
        gradient_buffers: what `gradient_buffers(spec, compute)` gives, to differentiate by: the layers' matrices then have their
            gradients there, in the compute type, and none in `weights`. None differentiates as usual, which takes more memory.
    """

    def __init__(
        self,
        spec: Spec,
        weights: Mapping[str, Array],
        compute: Compute = REFERENCE,
        gradient_buffers: Mapping[str, Array] | None = None,
    ):
        self.spec = spec
        self.compute = compute
        self.gradient_buffers = nnx.data(gradient_buffers)
        self.embed = nnx.Param(weights["embed"])
        self.final_norm = nnx.Param(weights["final_norm"])
        self.lm_head = None if spec.tied else nnx.Param(weights["lm_head"])
        self.layers = nnx.Dict(
            {w.path.removeprefix(table.LAYER): nnx.Param(weights[w.path]) for w in table.table(spec) if w.stacked}
        )

    @property
    def head_VD(self) -> Float[Array, "V D"]:
        """The matrix that turns hidden states into logits."""
        return self.compute.cast((self.embed if self.lm_head is None else self.lm_head)[...])

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores of every vocabulary entry, float32. Training never needs them all at once: see train/loss.py."""
        return einsum("BTD,VD->BTV", hidden_BTD.astype(jnp.float32), self.head_VD, self.compute.matmul_dtype)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"] | None = None,
        segments_BT: Int[Array, "B T"] | None = None,
        prefixes_BT: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm.

        Args:
            tokens_BT: vocabulary indices.
            positions_BT: place of each token in its own sequence; default 0, 1, 2, …
            segments_BT: which packed segment a token belongs to, 0 for padding; default one a row.
            prefixes_BT: the segment that a token's segment continues, or its own; default all their own.
        """
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        if segments_BT is None:
            segments_BT = jnp.ones_like(tokens_BT)
        layout = Layout(segments_BT, positions_BT, prefixes_BT)

        def attention(
            query_BTNH: Array, key_BTKH: Array, value_BTKH: Array, kind: Array, _: None
        ) -> tuple[Array, None]:
            return self._attend(query_BTNH, key_BTKH, value_BTKH, kind, layout), None

        return self._run(tokens_BT, positions_BT, attention, None)[0]

    def cached(
        self, tokens_BT: Int[Array, "B T"], positions_BT: Int[Array, "B T"], seen: Sequence[Cache] = ()
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Hidden states of tokens that also see those of the caches, and the cache of these tokens alone.

        Nothing is appended: a sequence may lie in several caches, and one cache may serve several rows. Attention is XLA's.

        Args:
            tokens_BT: vocabulary indices, one sequence a row.
            positions_BT: place of each token in its sequence, FAR for padding.
            seen: what came before; row a of a cache of A rows serves rows a B/A to (a + 1) B/A - 1.
        """
        windows = jnp.asarray([FAR if kind.window is None else kind.window for kind in self.spec.kinds])

        def attention(query_BTNH: Array, key_BTKH: Array, value_BTKH: Array, kind: Array, extra: Any) -> Any:
            own = jnp.swapaxes(key_BTKH, 1, 2), jnp.swapaxes(value_BTKH, 1, 2)
            parts = [Seen(key, value, cache.positions_AS) for (key, value), cache in zip(extra, seen, strict=True)]
            mixed_BTNH = attend_seen(
                query_BTNH,
                positions_BT,
                [*parts, Seen(own[0], own[1], positions_BT)],
                window=windows[kind],
                scale=self.spec.query_scale,
                chunk=self.compute.query_chunk,
            )
            return mixed_BTNH, own

        layers = [(cache.key_LAKSH, cache.value_LAKSH) for cache in seen]
        hidden_BTD, (key_LBKTH, value_LBKTH) = self._run(tokens_BT, positions_BT, attention, layers)
        return hidden_BTD, Cache(key_LBKTH, value_LBKTH, positions_BT)

    def _run(
        self, tokens_BT: Array, positions_BT: Array, attention: Callable[..., Any], extra: Any
    ) -> tuple[Array, Any]:
        """All layers, with `attention(query, key, value, kind, extra of the layer)` -> mixed values, what to keep."""
        spec = self.spec
        ropes = [rope_table(kind.rope, spec.head_dim, positions_BT) for kind in spec.kinds]
        cos_sin = jax.tree.map(lambda *tables: jnp.stack(tables), *ropes)

        def layer(x_BTD: Array, scanned: tuple[Any, Any, Array, Any]) -> tuple[Array, Any]:
            weights, gradient_buffers, kind, extra = scanned
            cos, sin = jax.tree.map(lambda t: t[kind], cos_sin)
            return self._layer(
                x_BTD, self._gather(weights, gradient_buffers), cos, sin, lambda *qkv: attention(*qkv, kind, extra)
            )

        kinds = jnp.asarray(spec.layer_kinds)
        weights = {table.LAYER + name: param[...] for name, param in self.layers.items()}
        scanned = (weights, self.gradient_buffers, kinds, extra)
        x_BTD, kept = jax.lax.scan(self._remat(layer), self._embed(tokens_BT), scanned)
        return self._norm(x_BTD, self.final_norm[...]), kept

    def _embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Every device looks its part of the width up, for the rows of all; then they exchange parts for rows.

        Looked up before the cast, so that the gradients of a token's many places add up in float32.
        """
        dtype = self.compute.dtype
        x_BTD = jnp.take(self.embed[...], constrain(tokens_BT, "copies", None), axis=0)
        x_BTD = constrain(x_BTD.astype(dtype), "copies", None, "embed")
        if self.spec.embed_scale != 1:
            x_BTD = x_BTD * jnp.asarray(self.spec.embed_scale, dtype)
        return constrain(x_BTD, "batch", None, None)

    def _gather(self, weights: dict[str, Array], gradient_buffers: dict[str, Array] | None) -> dict[str, Array]:
        """One layer's weights by name, the matrices cast first and then gathered over fsdp, so that half the bytes move."""
        axes = {w.path: w.axes[1:] for w in table.table(self.spec)}

        def one(path: str, weight: Array) -> Array:
            if "norm" in axes[path]:
                return weight
            if gradient_buffers is None:
                return constrain(self.compute.cast(weight), *axes[path], without="fsdp")
            return gather(weight, gradient_buffers[path], axes[path])

        return {path.removeprefix(table.LAYER): one(path, weight) for path, weight in weights.items()}

    def _layer(
        self,
        x_BTD: Float[Array, "B T D"],
        w: dict[str, Array],
        cos: Float[Array, "B T half"],
        sin: Float[Array, "B T half"],
        attention: Callable[..., tuple[Array, Any]],
    ) -> tuple[Float[Array, "B T D"], Any]:
        norm, post_norm = self._norm, self.spec.post_norm
        project = partial(einsum, matmul_dtype=self.compute.matmul_dtype)
        h_BTD = norm(x_BTD, w["attention_norm"])
        query_BTNH = project("BTD,DNH->BTNH", h_BTD, w["q_proj"])
        key_BTKH = project("BTD,DKH->BTKH", h_BTD, w["k_proj"])
        value_BTKH = project("BTD,DKH->BTKH", h_BTD, w["v_proj"])
        if self.spec.qk_norm:
            query_BTNH, key_BTKH = norm(query_BTNH, w["q_norm"]), norm(key_BTKH, w["k_norm"])
        query_BTNH, key_BTKH = rotate(query_BTNH, cos, sin), rotate(key_BTKH, cos, sin)
        mixed_BTNH, kept = attention(query_BTNH, key_BTKH, value_BTKH)
        h_BTD = constrain(project("BTNH,NHD->BTD", mixed_BTNH, w["o_proj"]), "batch", None, None)
        x_BTD = x_BTD + (norm(h_BTD, w["attention_out_norm"]) if post_norm else h_BTD)

        h_BTD = norm(x_BTD, w["mlp_norm"])
        gate_BTF = project("BTD,DF->BTF", h_BTD, w["gate_proj"])
        up_BTF = project("BTD,DF->BTF", h_BTD, w["up_proj"])
        act = jax.nn.silu if self.spec.activation == "silu" else partial(jax.nn.gelu, approximate=True)
        h_BTD = constrain(project("BTF,FD->BTD", act(gate_BTF) * up_BTF, w["down_proj"]), "batch", None, None)
        return x_BTD + (norm(h_BTD, w["mlp_out_norm"]) if post_norm else h_BTD), kept

    def _attend(self, query_BTNH: Array, key_BTKH: Array, value_BTKH: Array, kind: Array, layout: Layout) -> Array:
        """A branch for each window in use; one that the row fits into is no window at all."""
        tokens = query_BTNH.shape[1]
        windows = [None if k.window is None or k.window >= tokens else k.window for k in self.spec.kinds]
        distinct = list(dict.fromkeys(windows))
        branches = [
            partial(
                attend,
                window=window,
                scale=self.spec.query_scale,
                implementation=self.compute.attention,
                query_chunk=self.compute.query_chunk,
                matmul_dtype=self.compute.matmul_dtype,
            )
            for window in distinct
        ]
        branch = jnp.asarray([distinct.index(window) for window in windows])[kind]
        return jax.lax.switch(branch, branches, query_BTNH, key_BTKH, value_BTKH, layout)

    def _norm(self, x: Array, weight: Array) -> Array:
        """RMSNorm over the last dimension, in fp32.

        For CPUs as products, whose gradients are products as well: the gradients of elementwise multiplications are sums,
        which XLA there takes up to seventy times as long for.
        """
        weight = 1 + weight if self.spec.zero_centered_norm else weight.astype(x.dtype)
        x32 = x.astype(jnp.float32)
        if self.compute.attention == "block_sparse":
            squares = jnp.einsum("...D,...D->...", x32, x32) / x.shape[-1]
            x32 = jnp.einsum("...D,...->...D", x32, jax.lax.rsqrt(squares + self.spec.norm_eps))
            return jnp.einsum("...D,D->...D", x32.astype(weight.dtype), weight).astype(x.dtype)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.spec.norm_eps)
        return (x32.astype(weight.dtype) * weight).astype(x.dtype)

    def _remat(self, layer: Callable[..., Any]) -> Callable[..., Any]:
        """Under scan the compiler cannot undo the recomputation, so prevent_cse is not needed."""
        match self.compute.remat:
            case "none":
                return layer
            case "dots":
                policy = jax.checkpoint_policies.save_only_these_names(DOTS)
            case _:
                policy = jax.checkpoint_policies.nothing_saveable
        return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def gradient_buffers(spec: Spec, compute: Compute) -> dict[str, Array]:
    """Path of each of the layers' matrices -> zeros in the compute type, for models/axes.gather."""
    matrices = [w for w in table.table(spec) if w.stacked and "norm" not in w.axes]
    return {w.path: constrain(jnp.zeros(w.shape(spec), compute.dtype), *w.axes) for w in matrices}


def rope_table(
    rope: Rope, head_dim: int, positions_BT: Int[Array, "B T"]
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cos and sin of every position's angles, float32."""
    angles = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(rope_frequencies(rope, head_dim))
    return jnp.cos(angles), jnp.sin(angles)


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angle per position of each pair of dimensions, radians, float32 [H/2].

    Rounded where PyTorch rounds: one that is a bit off turns a token by 3e-5 of a radian at position 500, which logits show.

    "llama3" scaling as published with Llama 3.1: wavelengths longer than the original context over low_freq_factor are
    stretched by factor, those shorter than it over high_freq_factor are kept, and in between the two are blended.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = np.float32(1) / (rope.theta ** exponent.astype(np.float64)).astype(np.float32)
    if rope.llama3 is None:
        return frequency / np.float32(rope.factor)
    low, high, context = rope.llama3
    wavelength = 2 * math.pi / frequency
    blend = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    return ((1 - blend) * frequency / rope.factor + blend * frequency).astype(np.float32)


def rotate(x_BTNH: Array, cos_BTh: Array, sin_BTh: Array) -> Array:
    """Rotary embedding, rotate-half layout: dimension i turns together with dimension i + H/2."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTh[:, :, None], sin_BTh[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
