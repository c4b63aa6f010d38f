"""The decoder of every family: embed, layers of attention and MLP, final norm, head. Families differ only in the Spec."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxguard.models.attention.attend import FAR, attend, attend_cached, attend_next
from jaxguard.models.attention.kernels import Layout
from jaxguard.models.compute import REFERENCE, Compute
from jaxguard.models.linear import DOTS, Buffered, gather_layer, project, project_features_first
from jaxguard.models.norm import norm_by_einsum
from jaxguard.models.rope import rope_table, rotate
from jaxguard.models.sharding import constrain
from jaxguard.models.spec import Spec
from jaxguard.models.weights import table

Activations = Float[Array, "_ _ _"]
"""[B T D], or [D B T] where compute.features_first says so, in spite of the names."""


class Cache(NamedTuple):
    """Keys and values of earlier tokens in every layer, and the tokens' positions (FAR for padding)."""

    key_LAKSH: Float[Array, "L A K S H"]
    value_LAKSH: Float[Array, "L A K S H"]
    positions_AS: Int[Array, "A S"]


class DecodingCache(NamedTuple):
    """A Cache as `append` takes it: scores of one query after the other are computed fastest from keys that are stored so."""

    key_LAKHS: Float[Array, "L A K H S"]
    value_LAKSH: Float[Array, "L A K S H"]
    positions_AS: Int[Array, "A S"]


class Decoder(nnx.Module):
    """Tokens to hidden states, and hidden states to logits.

    A flax nnx.Module, for other flax code: every row of the weight table is one nnx.Param, `embed`, `final_norm`, `lm_head` where
    untied, and in `layers` one stack [L, ...] per weight, which the loop over the layers scans. Our own code keeps the table's
    flat dict of weights by path, in which the layers' matrices are `Buffered` where a training step differentiates, and builds the
    module under jit.
    """

    def __init__(self, spec: Spec, weights: Mapping[str, Array | Buffered], compute: Compute = REFERENCE):
        self.spec = spec
        self.compute = compute
        self.embed = nnx.Param(weights["embed"])
        self.final_norm = nnx.Param(weights["final_norm"])
        self.lm_head = None if spec.tied else nnx.Param(weights["lm_head"])
        self.layers = nnx.Dict({w.name: nnx.Param(weights[w.path]) for w in table(spec) if w.stacked})

    @property
    def head_VD(self) -> Float[Array, "V D"]:
        """The matrix that turns hidden states into logits."""
        return self.compute.cast((self.embed if self.lm_head is None else self.lm_head)[...])

    @jax.named_scope("head")
    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Score every vocabulary entry, in float32. Training never needs all logits at once: see train/objectives.py."""
        return project("BTD,VD->BTV", hidden_BTD.astype(jnp.float32), self.head_VD, self.compute.matmul_dtype)

    @jax.named_scope("head")
    def next_logits(self, hidden_BD: Float[Array, "B D"]) -> Float[Array, "V B"]:
        """Score every vocabulary entry, in float32, in the order in which a CPU computes them fastest."""
        dtype = self.compute.matmul_dtype or self.head_VD.dtype
        operands = self.head_VD.astype(dtype), hidden_BD.astype(dtype)
        return jnp.einsum("VD,BD->VB", *operands, preferred_element_type=jnp.float32)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"] | None = None,
        ends_BT: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Compute the hidden states after the final norm, of packed rows: see Layout. By default each row is one sequence."""
        last = tokens_BT.shape[1] - 1
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(last + 1), tokens_BT.shape)
        layout = Layout(jnp.full_like(tokens_BT, last) if ends_BT is None else ends_BT, positions_BT)

        # One branch for each window in use. A window as long as the row is none.
        windows = [k.window if k.window and k.window < tokens_BT.shape[1] else None for k in self.spec.kinds]
        distinct = list(dict.fromkeys(windows))
        attend_rows = partial(attend, scale=self.spec.query_scale, compute=self.compute)
        branches = [partial(attend_rows, window=window) for window in distinct]

        def attend_kind(kind: Array, _: None, *qkv: Array) -> tuple[Array, None]:
            branch = jnp.asarray([distinct.index(window) for window in windows])[kind]
            return jax.lax.switch(branch, branches, *qkv, layout), None

        x_BTD, _ = self._run(self.embedded(tokens_BT), self.ropes(positions_BT), attend_kind, None)
        return self.normed(x_BTD)

    def cached(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        caches: Sequence[Cache] = (),
        ends_BT: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Compute the hidden states of tokens that also see those in the caches, and the cache of these tokens alone.

        Nothing is appended: a sequence may span several caches, and several rows may share one: row a of a cache of A rows serves
        rows a B/A to (a + 1) B/A - 1. A position is that of a token in its sequence, FAR for padding. Attention is XLA's.

        A row may hold several sequences, and what they share once, as trees in depth-first order: `ends_BT` is then the last
        index in the row of a token that continues this one, its own where none does.
        """
        windows = self._windows()

        def attend_caches(kind: Array, earlier: Any, query: Array, key: Array, value: Array) -> Any:
            new = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
            parts = [(k, v, cache.positions_AS) for (k, v), cache in zip(earlier, caches, strict=True)]
            parts.append((*new, positions_BT))
            scale, chunk, window = self.spec.query_scale, self.compute.query_chunk, windows[kind]
            mixed = attend_cached(query, positions_BT, parts, window=window, scale=scale, chunk=chunk, ends_BT=ends_BT)
            return mixed, new

        earlier = [(cache.key_LAKSH, cache.value_LAKSH) for cache in caches]
        x_BTD, (key_LBKTH, value_LBKTH) = self._run(
            self.embedded(tokens_BT), self.ropes(positions_BT), attend_caches, earlier
        )
        key_LBKTH, value_LBKTH = (x.astype(self.compute.operand_dtype) for x in (key_LBKTH, value_LBKTH))
        return self.normed(x_BTD), Cache(key_LBKTH, value_LBKTH, positions_BT)

    def append(
        self,
        x_B1D: Activations,
        ropes: tuple[Array, Array],
        positions_B: Int[Array, "B"],
        caches: Sequence[DecodingCache],
    ) -> tuple[Activations, DecodingCache]:
        """Run the layers on one more token of each row, which sees those in the caches; the second result is its own cache.

        From what `embedded` returns, and the `ropes` of the positions, to what `normed` takes.
        """
        windows = self._windows()

        def attend_caches(kind: Array, earlier: Any, query_B1NH: Array, key_B1KH: Array, value_B1KH: Array) -> Any:
            new = key_B1KH.transpose(0, 2, 3, 1), value_B1KH.transpose(0, 2, 1, 3)
            parts = [(*arrays, cache.positions_AS) for arrays, cache in zip(earlier, caches, strict=True)]
            parts.append((*new, positions_B[:, None]))
            scale, window = self.spec.query_scale, windows[kind]
            return attend_next(query_B1NH[:, 0], positions_B, parts, window=window, scale=scale)[:, None], new

        earlier = [(cache.key_LAKHS, cache.value_LAKSH) for cache in caches]
        x_B1D, (key_LBKH1, value_LBK1H) = self._run(x_B1D, ropes, attend_caches, earlier)
        return x_B1D, DecodingCache(key_LBKH1, value_LBK1H, positions_B[:, None])

    def _run(
        self, x_BTD: Activations, ropes: tuple[Array, Array], attend: Callable[..., Any], per_layer: Any
    ) -> tuple[Activations, Any]:
        """Run all layers, with attend(kind of layer, the layer's part of `per_layer`, query, key, value)."""

        def layer(x_BTD: Array, scanned: tuple[Any, Array, Any]) -> tuple[Array, Any]:
            weights, kind, of_layer = scanned
            weights, of_layer = jax.tree.map(_from_bits, (weights, of_layer))
            w = gather_layer(weights, self.spec, self.compute)
            rope = jax.tree.map(lambda table: table[kind], ropes)
            with jax.named_scope("layer"):
                h_BTD, output = self._attention(x_BTD, w, rope, partial(attend, kind, of_layer))
                x_BTD = x_BTD + h_BTD
                return x_BTD + self._mlp(x_BTD, w), output

        weights = {name: param.get_value() for name, param in self.layers.items()}
        if self.compute.features_first:
            weights, per_layer = jax.tree.map(_to_bits, (weights, per_layer))
        scanned = (weights, jnp.asarray(self.spec.layer_kinds), per_layer)
        return jax.lax.scan(self._remat(layer), x_BTD, scanned)

    def _windows(self) -> Int[Array, "kinds"]:
        return jnp.asarray([FAR if kind.window is None else kind.window for kind in self.spec.kinds])

    def ropes(self, positions_BT: Int[Array, "B T"]) -> tuple[Array, Array]:
        """Cosines and sines of each kind of layer, ready to multiply queries and keys."""
        tables = [rope_table(kind.rope, self.spec.head_dim, positions_BT) for kind in self.spec.kinds]
        cos, sin = (jnp.stack(each) for each in zip(*tables, strict=True))
        if self.compute.features_first:
            return jnp.moveaxis(cos, -1, 1), jnp.moveaxis(sin, -1, 1)
        return cos[..., None, :], sin[..., None, :]

    @jax.named_scope("final_norm")
    def normed(self, x_BTD: Activations) -> Float[Array, "B T D"]:
        """The hidden states after the last layer."""
        x_BTD = self._norm(x_BTD, self.final_norm[...])
        return jnp.moveaxis(x_BTD, 0, -1) if self.compute.features_first else x_BTD

    @jax.named_scope("embed")
    def embedded(self, tokens_BT: Int[Array, "B T"]) -> Activations:
        """Look up every token. Each device looks up its part of D for the rows of all; then they exchange parts of D for rows.

        The cast comes after the lookup, so that a token's gradients add up in float32.
        """
        dtype = self.compute.dtype
        x_BTD = jnp.take(self.embed[...], constrain(tokens_BT, "copies", None), axis=0)
        x_BTD = constrain(x_BTD.astype(dtype), "copies", None, "embed")
        if self.spec.embed_scale != 1:
            x_BTD = x_BTD * jnp.asarray(self.spec.embed_scale, dtype)
        if self.compute.features_first:
            x_BTD = jnp.moveaxis(x_BTD, -1, 0)
        return self._constrain_rows(x_BTD)

    @jax.named_scope("attention")
    def _attention(
        self, x_BTD: Activations, w: dict[str, Array], rope: tuple[Array, Array], attend: Callable[..., Any]
    ) -> tuple[Activations, Any]:
        """Return the output, and what attend(query_BTNH, key_BTKH, value_BTKH) returns beside the mixed values."""
        with jax.named_scope("norm"):
            x_BTD = self._norm(x_BTD, w["attention_norm"])
        with jax.named_scope("qkv"):
            query_BTNH = self._project("BTD,DNH->BTNH", x_BTD, w["q_proj"])
            key_BTKH = self._project("BTD,DKH->BTKH", x_BTD, w["k_proj"])
            value_BTKH = self._project("BTD,DKH->BTKH", x_BTD, w["v_proj"])
            if self.spec.qk_norm:
                query_BTNH, key_BTKH = self._norm(query_BTNH, w["q_norm"]), self._norm(key_BTKH, w["k_norm"])
        with jax.named_scope("rope"):
            query_BTNH, key_BTKH = (rotate(x, *rope, axis=self._axis) for x in (query_BTNH, key_BTKH))
        with jax.named_scope("attend"):
            qkv = query_BTNH, key_BTKH, value_BTKH
            if self.compute.features_first:
                mixed_BTNH, output = attend(*(x_NHBT.transpose(2, 3, 0, 1) for x_NHBT in qkv))
                mixed_BTNH = mixed_BTNH.transpose(2, 3, 0, 1)
            else:
                mixed_BTNH, output = attend(*qkv)
        with jax.named_scope("out"):
            h_BTD = self._constrain_rows(self._project("BTNH,NHD->BTD", mixed_BTNH, w["o_proj"]))
            return self._norm(h_BTD, w["attention_out_norm"]) if self.spec.post_norm else h_BTD, output

    @jax.named_scope("mlp")
    def _mlp(self, x_BTD: Activations, w: dict[str, Array]) -> Activations:
        activation = jax.nn.silu if self.spec.activation == "silu" else partial(jax.nn.gelu, approximate=True)
        x_BTD = self._norm(x_BTD, w["mlp_norm"])
        gate_BTF = self._project("BTD,DF->BTF", x_BTD, w["gate_proj"])
        up_BTF = self._project("BTD,DF->BTF", x_BTD, w["up_proj"])
        h_BTD = self._project("BTF,FD->BTD", activation(gate_BTF) * up_BTF, w["down_proj"])
        h_BTD = self._constrain_rows(h_BTD)
        return self._norm(h_BTD, w["mlp_out_norm"]) if self.spec.post_norm else h_BTD

    @property
    def _axis(self) -> int:
        """That of the features of activations."""
        return -3 if self.compute.features_first else -1

    def _constrain_rows(self, x_BTD: Activations) -> Activations:
        axes = (None, "batch", None) if self.compute.features_first else ("batch", None, None)
        return constrain(x_BTD, *axes)

    def _project(self, equation: str, x: Array, weight: Array) -> Array:
        if self.compute.features_first:
            return project_features_first(equation, x, weight)
        return project(equation, x, weight, self.compute.matmul_dtype)

    def _norm(self, x: Float[Array, "*shape"], weight: Float[Array, "_"]) -> Float[Array, "*shape"]:
        """Apply RMSNorm over the features, in float32, where the weight's gradient is summed, too."""
        x32 = x.astype(jnp.float32)
        if self.compute.features_first:
            weight = weight[:, None, None]
        if self.spec.zero_centered_norm:
            weight = 1 + weight
        elif x.dtype != weight.dtype:  # rounded as PyTorch does, but with the gradient of the float32 weight
            weight = weight + jax.lax.stop_gradient(weight.astype(x.dtype).astype(jnp.float32) - weight)
        if self.compute.norm_by_einsum:
            return norm_by_einsum(self.spec.norm_eps, x32, weight).astype(x.dtype)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=self._axis, keepdims=True) + self.spec.norm_eps)
        if not self.spec.zero_centered_norm:
            x32 = x32.astype(x.dtype).astype(jnp.float32)
        return (x32 * weight).astype(x.dtype)

    def _remat(self, layer: Callable[..., Any]) -> Callable[..., Any]:
        """Apply the rematerialization policy. Under scan the compiler cannot undo it, so prevent_cse is not needed."""
        match self.compute.remat:
            case "none":
                return layer
            case "dots":
                policy = jax.checkpoint_policies.save_only_these_names(DOTS)
            case _:
                policy = jax.checkpoint_policies.nothing_saveable
        return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def _to_bits(stack: Array) -> Array:
    """Stand for bfloat16 in a loop over a stack: XLA on a CPU would widen all of it to float32 before it takes a layer's part."""
    return jax.lax.bitcast_convert_type(stack, jnp.uint16) if stack.dtype == jnp.bfloat16 else stack


def _from_bits(part: Array) -> Array:
    return jax.lax.bitcast_convert_type(part, jnp.bfloat16) if part.dtype == jnp.uint16 else part
