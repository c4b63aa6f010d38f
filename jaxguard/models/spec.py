"""A model's shape and numerics, read from its Hugging Face config.json."""

import hashlib
import logging
import math
from contextlib import suppress
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from transformers import AutoConfig

from jaxguard.models.hf_io.safetensors import open_folder
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.hub import load_pretrained
from jaxguard.utils.parse import check, shown

logger = logging.getLogger(__name__)

SUPPORTED = {
    "llama": "Llama 3.x, SmolLM2",
    "gemma3_text": "Gemma 3 1B",
    "gemma3": "Gemma 3 4B, 12B, 27B",
    "qwen3": "Qwen3 0.6B to 32B, dense",
}

_LLAMA = {"attention_bias": None, "mlp_bias": None, "hidden_act": "silu"}
REQUIRED = {
    "llama": _LLAMA,
    "qwen3": _LLAMA | {"use_sliding_window": None},
    "gemma3": {
        "hidden_activation": "gelu_pytorch_tanh", "attention_bias": None, "use_bidirectional_attention": None,
        "attn_logit_softcapping": None, "final_logit_softcapping": None,
    },
}  # fmt: skip
"""The only value of each option of a family's config.json that the decoder has; None is absent or false."""


class UnsupportedModelError(JaxguardError):
    """An architecture, or an option of one, that the decoder does not have."""


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one kind of layer."""

    theta: float  # base of the frequencies
    factor: float = 1.0  # every frequency is divided by it ("linear" scaling)
    llama3: tuple[float, float, int] | None = None  # (low_freq_factor, high_freq_factor, original context): see rope.py


@dataclass(frozen=True)
class LayerKind:
    """What layers can differ in: rope, and the window of tokens (self included) that attention sees; None for all."""

    rope: Rope
    window: int | None = None


Size = Annotated[int, Field(strict=True, gt=0, lt=2**31)]
Number = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class TextConfig:
    """The fields of a config.json that are used, as transformers fills them in."""

    model_type: str
    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    intermediate_size: Size
    rms_norm_eps: Number
    max_position_embeddings: Size
    tie_word_embeddings: bool
    rope_parameters: dict[str, Any]
    layer_types: list[Literal["sliding_attention", "full_attention"]] | None
    sliding_window: Size | None
    query_pre_attn_scalar: Number | None


@dataclass(frozen=True)
class RopeParameters:
    """Those of one kind of layer."""

    rope_theta: Number
    rope_type: str = "default"
    factor: Number | None = None
    low_freq_factor: Number | None = None
    high_freq_factor: Number | None = None
    original_max_position_embeddings: Size | None = None


@dataclass(frozen=True)
class Spec:
    """Everything that the decoder has to know. Hashable, so that it can be static under jit."""

    family: Literal["llama", "gemma3", "qwen3"]  # whose weight names and norms apply
    vocab_size: int  # V
    d_model: int  # D
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    mlp_dim: int  # F
    norm_eps: float  # added to the mean square in RMSNorm
    zero_centered_norm: bool  # the norm multiplies by 1 + w in fp32 (Gemma), else by w in the input's type
    post_norm: bool  # each half-layer's output is normalised too (Gemma)
    qk_norm: bool  # queries and keys are normalised over H before rope
    activation: Literal["silu", "gelu_tanh"]  # of the MLP's gate
    query_scale: float  # multiplies the attention scores
    embed_scale: float  # multiplies the embeddings, rounded to the compute type
    kinds: tuple[LayerKind, ...]  # the distinct kinds of layer
    layer_kinds: tuple[int, ...]  # for each layer, an index into kinds
    tied: bool  # the LM head is the embedding table
    max_position_embeddings: int  # longest sequence that the checkpoint was made for, in tokens
    dtype: str  # of the checkpoint's tensors, as config.json says

    @property
    def fingerprint(self) -> str:
        """Identify models that can load each other's weights; the storage type and the maximum length do not count."""
        text = repr(astuple(replace(self, dtype="", max_position_embeddings=0)))
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return f"{self.family}-{self.num_layers}x{self.d_model}-{digest}"

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each letter of a weight's shape."""
        return {
            "V": self.vocab_size, "D": self.d_model, "N": self.num_heads, "K": self.num_kv_heads, "H": self.head_dim,
            "F": self.mlp_dim, "L": self.num_layers,
        }  # fmt: skip


def read_spec(folder: Path) -> Spec:
    """The spec of the checkpoint in `folder`.

    Raises:
        JaxguardError: no config.json, or one that transformers cannot read.
        UnsupportedModelError: an architecture or option that the decoder does not have.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise JaxguardError(f"{folder} has no config.json: it is not a Hugging Face checkpoint")
    config = load_pretrained(AutoConfig, folder, "config.json")
    if config.model_type not in SUPPORTED:
        known = ", ".join(f"{k} ({v})" for k, v in SUPPORTED.items())
        raise UnsupportedModelError(f"{path}: model_type {config.model_type!r} is not supported; supported: {known}")
    family, text = config.model_type.removesuffix("_text"), config.get_text_config()
    for option, wanted in REQUIRED[family].items():
        value = getattr(text, option, None) or None
        if value != wanted:
            raise UnsupportedModelError(f"{path}: {option}={shown(value)} is not supported; only {wanted!r} is")
    values = {field.name: getattr(text, field.name, None) for field in fields(TextConfig)}
    values["tie_word_embeddings"] = config.tie_word_embeddings  # of a multimodal checkpoint the outer one counts
    c = check(values, TextConfig, str(path))
    return Spec(
        family=family,
        vocab_size=c.vocab_size,
        d_model=c.hidden_size,
        num_layers=c.num_hidden_layers,
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        mlp_dim=c.intermediate_size,
        norm_eps=c.rms_norm_eps,
        tied=c.tie_word_embeddings and not _stores_another_head(folder),
        max_position_embeddings=c.max_position_embeddings,
        dtype=str(text.dtype or "float32").removeprefix("torch."),
        **(_gemma3 if family == "gemma3" else _llama)(c, path),
    )


def _stores_another_head(folder: Path) -> bool:
    """Whether the weights hold a head that is not the embedding: transformers uses it, even if it should be tied."""
    with suppress(JaxguardError):  # no weights, or damaged ones: whoever reads them explains it
        tensors, ends = open_folder(folder), ("embed_tokens.weight", "lm_head.weight")
        stored = [tensor.view() for end in ends for name, tensor in tensors.items() if name.endswith(end)]
        if len(stored) == 2 and not _equal(*stored):
            logger.warning(
                "%s: tie_word_embeddings is true, but a head is stored that is not the embedding: it is used and trained, as "
                "transformers does. Set it to false, since other programs may ignore the head",
                folder / "config.json",
            )
            return True
    return False


def _equal(embed_VD: np.ndarray, head_VD: np.ndarray) -> bool:
    """Whether two matrices are equal, without memory for all of them."""
    rows = range(0, len(embed_VD), 1024)
    return embed_VD.shape == head_VD.shape and all(
        np.array_equal(embed_VD[i : i + 1024], head_VD[i : i + 1024]) for i in rows
    )


def _llama(c: TextConfig, path: Path) -> dict[str, Any]:
    """What Llama and Qwen3 have of their own: Qwen3 is Llama with norms of queries and keys."""
    return {
        "zero_centered_norm": False,
        "post_norm": False,
        "qk_norm": c.model_type == "qwen3",
        "activation": "silu",
        "query_scale": c.head_dim**-0.5,
        "embed_scale": 1.0,
        "kinds": (LayerKind(_rope(c.rope_parameters, path)),),
        "layer_kinds": (0,) * c.num_hidden_layers,
    }


def _gemma3(c: TextConfig, path: Path) -> dict[str, Any]:
    names = ("sliding_attention", "full_attention")
    if c.query_pre_attn_scalar is None or c.layer_types is None or len(c.layer_types) != c.num_hidden_layers:
        raise JaxguardError(f"{path}: needs query_pre_attn_scalar, and in layer_types {c.num_hidden_layers} names")
    local, full = (_rope(c.rope_parameters.get(name), path) for name in names)
    return {
        "zero_centered_norm": True,
        "post_norm": True,
        "qk_norm": True,
        "activation": "gelu_tanh",
        "query_scale": c.query_pre_attn_scalar**-0.5,
        "embed_scale": math.sqrt(c.hidden_size),
        "kinds": (LayerKind(local, c.sliding_window), LayerKind(full)),
        "layer_kinds": tuple(names.index(name) for name in c.layer_types),
    }


def _rope(parameters: object, path: Path) -> Rope:
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    rope = check(parameters, RopeParameters, f"{path}: rope_parameters")
    if rope.rope_type not in needed:
        raise UnsupportedModelError(
            f"{path}: rope_type {rope.rope_type!r} is not supported; supported: {', '.join(needed)}"
        )
    values = [getattr(rope, name) for name in needed[rope.rope_type]]
    if None in values:
        raise JaxguardError(f"{path}: rope_type {rope.rope_type!r} needs {', '.join(needed[rope.rope_type])}")
    factor, *bands = values or (1.0,)
    return Rope(rope.rope_theta, factor, (bands[0], bands[1], bands[2]) if bands else None)
