"""Our float32 logits against transformers' eager torch implementation: the same checkpoint on disk, read by both.

torch computes in float64 from the float32 weights: its own rounding in float32 is as large as ours.
"""

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from small_checkpoints import QWEN3

from jaxguard.models.compute import Compute
from jaxguard.models.decoder import Decoder
from jaxguard.models.hf_io.checkpoints import read_weights
from jaxguard.models.rope import rope_frequencies
from jaxguard.models.spec import Rope, Spec, read_spec

torch = pytest.importorskip("torch", reason="torch is the reference of the parity tests")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
TOKENS = 100  # past Gemma's window of 16, Llama's original context of 64, and six query chunks
VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
CASES = (
    "llama",
    "llama tied",
    "llama tied, another head stored",
    "llama without scaling",
    "gemma3",
    "gemma3 of 8 layers, odd scale",
    "gemma3 multimodal",
    "gemma3 multimodal, untied outside",
    "qwen3",
    "qwen3 tied",
)


@pytest.fixture(scope="module", params=CASES)
def models(request, write_llama_config, write_gemma3_config, tmp_path_factory):
    """A random torch model, our spec of it, and our weights as read from what it saved."""
    folder = tmp_path_factory.mktemp("parity")
    match request.param:
        case "llama":
            write_llama_config(folder, spelling=4)
        case "llama tied":
            write_llama_config(folder, tie_word_embeddings=True)
        case "llama tied, another head stored":
            write_llama_config(folder, tie_word_embeddings=False)
        case "llama without scaling":
            write_llama_config(folder, llama3_rope=False, num_key_value_heads=1)
        case "gemma3":
            write_gemma3_config(folder, spelling=4)
        case "gemma3 of 8 layers, odd scale":
            write_gemma3_config(folder, spelling=4, num_hidden_layers=8, query_pre_attn_scalar=20, head_dim=8)
        case "qwen3":
            write_llama_config(folder, **QWEN3, spelling=4)
        case "qwen3 tied":
            write_llama_config(folder, **QWEN3, tie_word_embeddings=True)
        case "gemma3 multimodal" | "gemma3 multimodal, untied outside":
            text = json.loads((write_gemma3_config(folder) / "config.json").read_text())
            config = {"model_type": "gemma3", "text_config": text, "vision_config": VISION, "mm_tokens_per_image": 1}
            config["image_token_index"] = 500
            if request.param.endswith("outside"):
                del text["tie_word_embeddings"]
                config["tie_word_embeddings"] = False
            (folder / "config.json").write_text(json.dumps(config))
    written = json.loads((folder / "config.json").read_text())
    model = random_model(folder)
    model.save_pretrained(folder)
    if (
        "head stored" in request.param or "outside" in request.param
    ):  # which head transformers takes is its own decision
        written |= {"tie_word_embeddings": True} if "head stored" in request.param else {}
        (folder / "config.json").write_text(json.dumps(written))
        model = type(model).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
        assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    spec = read_spec(folder)
    return model.double(), spec, read_weights(folder, spec)


def random_model(folder: Path):
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = (
        transformers.AutoModelForImageTextToText if config.model_type == "gemma3" else transformers.AutoModelForCausalLM
    )
    torch.manual_seed(0)
    model = kind.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3 if "norm" in name else 0.12)
    return model


@partial(jax.jit, static_argnums=(0, 1))
def our_logits(spec: Spec, compute: Compute, weights, tokens, positions=None, segments=None):
    decoder = Decoder(spec, weights, compute)
    return decoder.logits(decoder(tokens, positions, segments))


def hf_logits(model, tokens, positions=None) -> np.ndarray:
    with torch.no_grad():
        places = None if positions is None else torch.tensor(positions)
        output = model(torch.tensor(tokens), position_ids=places, attention_mask=None, use_cache=False)
        return output.logits.numpy()


def random_tokens(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, 400, (rows, TOKENS))


def test_logits_match_transformers(models):
    model, spec, weights = models
    tokens = random_tokens(2, seed=0)
    ours, theirs = our_logits(spec, Compute(query_chunk=16), weights, tokens), hf_logits(model, tokens)
    assert np.abs(theirs).max() > 0.5
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def test_packed_rows_match_transformers(models):
    model, spec, weights = models
    tokens, lengths = random_tokens(1, seed=1), (40, 31, 29)
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    ends = np.repeat(np.cumsum(lengths) - 1, lengths)[None]
    ours = our_logits(spec, Compute(query_chunk=512), weights, tokens, positions, ends)
    np.testing.assert_allclose(ours, hf_logits(model, tokens, positions), rtol=0, atol=TOLERANCE)


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("rope", "head_dim", "parameters"),
    [
        pytest.param(Rope(1e5), 64, {"rope_type": "default", "rope_theta": 1e5}, id="SmolLM2"),
        pytest.param(Rope(5e5, 8.0, (1.0, 4.0, 8192)), 128, LLAMA3, id="Llama 3.1"),
        pytest.param(Rope(1e4), 256, {"rope_type": "default", "rope_theta": 1e4}, id="Gemma 3, local"),
        pytest.param(Rope(1e6, 8.0), 256, {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}, id="Gemma 3"),
    ],
)
def test_frequencies_are_those_of_transformers_to_the_bit(rope, head_dim, parameters):
    """All but one in a hundred: PyTorch's own power function is off by a bit at times."""
    config = transformers.LlamaConfig(head_dim=head_dim, rope_parameters=parameters, max_position_embeddings=2**17)
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq.numpy()
    ours = rope_frequencies(rope, head_dim)
    np.testing.assert_allclose(ours, theirs, rtol=2e-7)
    assert np.count_nonzero(ours != theirs) <= head_dim // 2 // 100, np.flatnonzero(ours != theirs)
