"""The decoder of every family: embed, layers of attention and MLP, final norm, head. Families differ only in the Spec."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxguard.models.attention.attend import FAR, attend, attend_cached
from jaxguard.models.attention.kernels import Layout
from jaxguard.models.compute import REFERENCE, Compute
from jaxguard.models.linear import DOTS, Buffered, gather_layer, project
from jaxguard.models.rope import rope_table, rotate
from jaxguard.models.sharding import constrain
from jaxguard.models.spec import Spec
from jaxguard.models.weights import table


class Cache(NamedTuple):
    """Keys and values of earlier tokens in every layer, and the tokens' positions (FAR for padding)."""

    key_LAKSH: Float[Array, "L A K S H"]
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

        return self._run(tokens_BT, positions_BT, attend_kind, None)[0]

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
        windows = jnp.asarray([FAR if kind.window is None else kind.window for kind in self.spec.kinds])

        def attend_caches(kind: Array, earlier: Any, query: Array, key: Array, value: Array) -> Any:
            new = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
            parts = [(k, v, cache.positions_AS) for (k, v), cache in zip(earlier, caches, strict=True)]
            parts.append((*new, positions_BT))
            scale, chunk, window = self.spec.query_scale, self.compute.query_chunk, windows[kind]
            mixed = attend_cached(query, positions_BT, parts, window=window, scale=scale, chunk=chunk, ends_BT=ends_BT)
            return mixed, new

        earlier = [(cache.key_LAKSH, cache.value_LAKSH) for cache in caches]
        hidden_BTD, (key_LBKTH, value_LBKTH) = self._run(tokens_BT, positions_BT, attend_caches, earlier)
        return hidden_BTD, Cache(key_LBKTH, value_LBKTH, positions_BT)

    def _run(
        self, tokens_BT: Array, positions_BT: Array, attend: Callable[..., Any], per_layer: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Run the whole model, with attend(kind of layer, the layer's part of `per_layer`, query, key, value)."""
        spec = self.spec
        ropes = [rope_table(kind.rope, spec.head_dim, positions_BT) for kind in spec.kinds]
        cos_sin = jax.tree.map(lambda *tables: jnp.stack(tables), *ropes)

        def layer(x_BTD: Array, scanned: tuple[Any, Array, Any]) -> tuple[Array, Any]:
            weights, kind, of_layer = scanned
            w = gather_layer(weights, spec, self.compute)
            rope = jax.tree.map(lambda table: table[kind], cos_sin)
            with jax.named_scope("layer"):
                h_BTD, output = self._attention(x_BTD, w, rope, partial(attend, kind, of_layer))
                x_BTD = x_BTD + h_BTD
                return x_BTD + self._mlp(x_BTD, w), output

        weights = {name: param.get_value() for name, param in self.layers.items()}
        scanned = (weights, jnp.asarray(spec.layer_kinds), per_layer)
        x_BTD, outputs = jax.lax.scan(self._remat(layer), self._embed(tokens_BT), scanned)
        with jax.named_scope("final_norm"):
            return self._norm(x_BTD, self.final_norm[...]), outputs

    @jax.named_scope("embed")
    def _embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Look up every token. Each device looks up its part of D for the rows of all; then they exchange parts of D for rows.

        The cast comes after the lookup, so that a token's gradients add up in float32.
        """
        dtype = self.compute.dtype
        x_BTD = jnp.take(self.embed[...], constrain(tokens_BT, "copies", None), axis=0)
        x_BTD = constrain(x_BTD.astype(dtype), "copies", None, "embed")
        if self.spec.embed_scale != 1:
            x_BTD = x_BTD * jnp.asarray(self.spec.embed_scale, dtype)
        return constrain(x_BTD, "batch", None, None)

    @jax.named_scope("attention")
    def _attention(
        self, x_BTD: Float[Array, "B T D"], w: dict[str, Array], rope: tuple[Array, Array], attend: Callable[..., Any]
    ) -> tuple[Float[Array, "B T D"], Any]:
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
            query_BTNH, key_BTKH = rotate(query_BTNH, *rope), rotate(key_BTKH, *rope)
        with jax.named_scope("attend"):
            mixed_BTNH, output = attend(query_BTNH, key_BTKH, value_BTKH)
        with jax.named_scope("out"):
            h_BTD = constrain(self._project("BTNH,NHD->BTD", mixed_BTNH, w["o_proj"]), "batch", None, None)
            return self._norm(h_BTD, w["attention_out_norm"]) if self.spec.post_norm else h_BTD, output

    @jax.named_scope("mlp")
    def _mlp(self, x_BTD: Float[Array, "B T D"], w: dict[str, Array]) -> Float[Array, "B T D"]:
        activation = jax.nn.silu if self.spec.activation == "silu" else partial(jax.nn.gelu, approximate=True)
        x_BTD = self._norm(x_BTD, w["mlp_norm"])
        gate_BTF = self._project("BTD,DF->BTF", x_BTD, w["gate_proj"])
        up_BTF = self._project("BTD,DF->BTF", x_BTD, w["up_proj"])
        h_BTD = self._project("BTF,FD->BTD", activation(gate_BTF) * up_BTF, w["down_proj"])
        h_BTD = constrain(h_BTD, "batch", None, None)
        return self._norm(h_BTD, w["mlp_out_norm"]) if self.spec.post_norm else h_BTD

    def _project(self, equation: str, x: Array, weight: Array) -> Array:
        return project(equation, x, weight, self.compute.matmul_dtype)

    def _norm(self, x: Float[Array, "*rows D"], weight: Float[Array, "D"]) -> Float[Array, "*rows D"]:
        """Apply RMSNorm over the last dimension, in float32, where the weight's gradient is summed, too."""
        x32 = x.astype(jnp.float32)
        if self.spec.zero_centered_norm:
            weight = 1 + weight
        elif x.dtype != weight.dtype:  # rounded as PyTorch does, but with the gradient of the float32 weight
            weight = weight + jax.lax.stop_gradient(weight.astype(x.dtype).astype(jnp.float32) - weight)
        if self.compute.norm_by_einsum:
            squares = jnp.einsum("...D,...D->...", x32, x32) / x.shape[-1]
            x32 = jnp.einsum("...D,...->...D", x32, jax.lax.rsqrt(squares + self.spec.norm_eps))
        else:
            x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.spec.norm_eps)
        if not self.spec.zero_centered_norm:
            x32 = x32.astype(x.dtype).astype(jnp.float32)
        scaled = jnp.einsum("...D,D->...D", x32, weight) if self.compute.norm_by_einsum else x32 * weight
        return scaled.astype(x.dtype)

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
