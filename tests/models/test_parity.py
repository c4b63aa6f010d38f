"""Our logits against transformers' eager torch implementation, float32, on the same random weights."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxguard.models.decoder import Compute, Decoder
from jaxguard.models.spec import Spec, read_spec
from jaxguard.models.weights import table

torch = pytest.importorskip("torch", reason="torch is the reference of the parity tests")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
LLAMA3_SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
GEMMA = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 40,
    "intermediate_size": 80,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "sliding_window": 24,
    "query_pre_attn_scalar": 20,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
CASES = {
    "llama untied": LLAMA,
    "llama tied, llama3 scaling": LLAMA | {"tie_word_embeddings": True, "rope_scaling": LLAMA3_SCALING},
    "llama untied, llama3 scaling": LLAMA | {"rope_scaling": LLAMA3_SCALING},
    "gemma3, past window": GEMMA,
    "gemma3, one period": GEMMA | {"num_hidden_layers": 7, "query_pre_attn_scalar": 16},
}


def build(config: dict, folder):
    """A random torch model, its spec, and its weights in our layout by the table's own rules."""
    import einops

    (folder / "config.json").write_text(json.dumps(config))
    spec = read_spec(folder)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(folder), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3 if parameter.ndim == 1 else 0.1)
    tensors = {k.removeprefix("model."): v.detach().numpy() for k, v in model.state_dict().items()}

    def ours(weight):
        names = [weight.hf.format(i=i) for i in range(spec.layers)] if weight.stacked else [weight.hf]
        sizes = {x: n for x, n in spec.sizes.items() if x in weight.rule}
        parts = [einops.rearrange(tensors[name], weight.rule, **sizes) for name in names]
        return jnp.asarray(np.stack(parts) if weight.stacked else parts[0])

    return model, spec, {w.path: ours(w) for w in table(spec)}


@partial(jax.jit, static_argnums=(0, 1))
def our_logits(spec: Spec, compute: Compute, weights, tokens, positions=None, segments=None):
    decoder = Decoder(spec, weights, compute)
    return decoder.logits(decoder(tokens, positions, segments))


def hf_logits(model, tokens, positions=None):
    with torch.no_grad():
        ids = torch.tensor(np.asarray(tokens))
        places = None if positions is None else torch.tensor(np.asarray(positions))
        return model(ids, position_ids=places, attention_mask=None, use_cache=False).logits.numpy()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [512, 32])
def test_logits_match_transformers_past_window_and_original_context(case, chunk, tmp_path):
    model, spec, weights = build(CASES[case], tmp_path)
    tokens = np.random.default_rng(0).integers(0, spec.vocab, (2, 100))
    ours = our_logits(spec, Compute(query_chunk=chunk), weights, tokens)
    theirs = hf_logits(model, tokens)
    assert np.abs(theirs).max() > 0.5
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", ["llama untied, llama3 scaling", "gemma3, past window"])
def test_packed_rows_match_transformers(case, tmp_path):
    model, spec, weights = build(CASES[case], tmp_path)
    tokens = np.random.default_rng(1).integers(0, spec.vocab, (1, 120))
    lengths = (50, 31, 39)
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    segments = np.repeat(np.arange(1, 4), lengths)[None]
    ours = our_logits(spec, Compute(query_chunk=32), weights, tokens, positions, segments)
    np.testing.assert_allclose(ours, hf_logits(model, tokens, positions), rtol=0, atol=TOLERANCE)
