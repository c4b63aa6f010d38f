"""Every family and size of docs/models.md with its own tokenizer: the real config and vocabulary, and small matrices."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_checkpoints import BF16, hashes, write_shards

from jaxguard.config.base import CONFIG_FOLDER
from jaxguard.config.data import DataConfig, SourceConfig
from jaxguard.data.encoding import Encoder
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.format.template import check_vocabulary
from jaxguard.data.policies import Policy
from jaxguard.models.hf_io.checkpoints import export_hf, read_weights
from jaxguard.models.spec import read_spec
from jaxguard.models.weights import table

SHAPES = CONFIG_FOLDER / "shapes"
TOKENIZERS = {"meta-llama": "llama3_1", "google": "gemma3", "Qwen": "qwen3", "HuggingFaceTB": "smollm2"}
SMOLLM2 = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
    "rope_theta": 1e5, "tie_word_embeddings": True, "eos_token_id": 2,
}  # fmt: skip
SMALL = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 7, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8,
}  # fmt: skip
VISION = {"multi_modal_projector.mm_input_projection_weight": (2, 2)}
NAMES = [*sorted(path.name for path in SHAPES.iterdir()), "HuggingFaceTB--SmolLM2-135M-Instruct"]


@pytest.fixture
def checkpoint(tmp_path, tokenizer_folder):
    """checkpoint(name): a folder with that size's config, but for SMALL, weights of those shapes, and the real tokenizer."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        tree = json.loads((SHAPES / name / "config.json").read_text()) if (SHAPES / name).is_dir() else SMOLLM2
        tree |= {"text_config": tree["text_config"] | SMALL} if "text_config" in tree else SMALL
        (folder / "config.json").write_text(json.dumps(tree))
        spec = read_spec(folder)
        prefix, outside = ("language_model.model.", "language_model.") if "text_config" in tree else ("model.", "")
        shapes = dict(VISION) if "text_config" in tree else {}
        for weight in table(spec):
            for i in range(spec.num_layers if weight.stacked else 1):
                start = outside if weight.path == "lm_head" else prefix
                shapes[start + weight.hf.format(i=i)] = weight.hf_shape(spec)
        random = np.random.default_rng(0)
        write_shards(folder, {n: random.random(s, np.float32).astype(BF16) for n, s in sorted(shapes.items())}, 2)
        for file in tokenizer_folder(TOKENIZERS[name.partition("--")[0]]).glob("tokenizer*"):
            shutil.copyfile(file, folder / file.name)
        return folder

    return make


ENCODERS: dict[tuple[str, int], Encoder] = {}
"""Family and vocabulary size -> the encoder of its first checkpoint: a tokenizer takes seconds to read."""


QUICK = ("0.6B", "gemma-3-1b-it", "gemma-3-4b-it", "3.2-1B-Instruct", "135M-Instruct")
"""The end of the names of one size each; the others are slow."""


@pytest.mark.parametrize(
    "name", [name if name.endswith(QUICK) else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_a_listed_size_is_read_encoded_and_exported_with_its_own_tokenizer(name, checkpoint, tmp_path):
    folder = checkpoint(name)
    spec, key = read_spec(folder), (name.partition("--")[0], read_spec(folder).vocab_size)
    if key not in ENCODERS:
        data = DataConfig(train=(SourceConfig(kind="jsonl", path="absent.jsonl"),), max_seq_len=512)
        ENCODERS[key] = Encoder.load(folder, data, Policy("short", rules="Be kind.", asks=("prompt_harm",)))
    encoder = ENCODERS[key]
    check_vocabulary(encoder.tokenizer, folder)
    encoded = encoder.encode(
        Example("a", "made up", "How do I <bos>bake<|eot_id|>?", prompt_label="unharmful"), Mode.DIRECT
    )
    assert encoded.tokens.max() < spec.vocab_size
    report = export_hf(read_weights(folder, spec), folder, tmp_path / "out")
    assert (report.changed, report.carried) == (0, len(VISION) if "gemma-3" in name and "-1b" not in name else 0)
    assert hashes(tmp_path / "out") == hashes(folder)
