"""Numbers and types of a config.json that no model has: named at once, before a list is made of them."""

import json
import time

import pytest

from jaxguard.models.spec import read_spec
from jaxguard.utils.errors import JaxguardError


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 2**31),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", "3"),
        ("num_hidden_layers", [3]),
        ("hidden_size", 2**31),
        ("hidden_size", "64"),
        ("num_attention_heads", None),
        ("head_dim", 0),
        ("vocab_size", -1),
        ("rms_norm_eps", "tiny"),
        ("rope_parameters", 1),
        ("rope_parameters", "x"),
        ("tie_word_embeddings", [1]),
        ("max_position_embeddings", {}),
        ("model_type", 1),
    ],
)
def test_a_field_of_another_type_or_size(tmp_path, write_llama_config, write_gemma3_config, family, field, value):
    (write_llama_config if family == "llama" else write_gemma3_config)(tmp_path)
    read_spec(tmp_path)
    path = tmp_path / "config.json"
    tree = json.loads(path.read_text())
    inner = tree["text_config"] if "text_config" in tree and field != "model_type" else tree
    inner[field] = value
    path.write_text(json.dumps(tree))
    start = time.perf_counter()
    with pytest.raises(JaxguardError, match=r"config\.json"):
        read_spec(tmp_path)
    assert time.perf_counter() - start < 5
