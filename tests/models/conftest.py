"""Small Hugging Face checkpoints of every kind, made in a moment."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_checkpoints import BF16, QWEN3, VISION, VISION_CONFIG, Make, write_shards

from jaxguard.models.spec import read_spec
from jaxguard.models.weights import table


@pytest.fixture
def make(tmp_path, tiny_tokenizer_folder, write_llama_config, write_gemma3_config) -> Make:
    """make("llama" | "gemma3" | "multimodal" | "qwen3", shards=1, dtype=BF16, prefix=None, extra={}, drop=(), **config)."""

    def make(family, shards=1, dtype=BF16, prefix=None, extra=(), drop=(), **config) -> Path:
        folder = tmp_path / "source"
        shutil.copytree(tiny_tokenizer_folder, folder)
        if family == "qwen3":
            config = QWEN3 | config
        (write_llama_config if family in ("llama", "qwen3") else write_gemma3_config)(folder, **config)
        if family == "multimodal":
            text = json.loads((folder / "config.json").read_text())
            whole = {
                "model_type": "gemma3",
                "text_config": text,
                "vision_config": VISION_CONFIG,
                "mm_tokens_per_image": 4,
            }
            if "tie_word_embeddings" in config:  # the outer one counts, and the inner one is true where it is absent
                whole["tie_word_embeddings"] = text.pop("tie_word_embeddings")
            (folder / "config.json").write_text(json.dumps(whole))
            prefix, extra = prefix or "language_model.model.", {**VISION, **dict(extra)}
        spec = read_spec(folder)
        shapes = dict(extra)
        for weight in table(spec):
            for i in range(spec.num_layers if weight.stacked else 1):
                outside = "language_model." if family == "multimodal" else ""
                start = outside if weight.path == "lm_head" else prefix or "model."
                shapes[start + weight.hf.format(i=i)] = weight.hf_shape(spec)
        random = np.random.default_rng(0)
        tensors = {n: random.standard_normal(s).astype(dtype) for n, s in sorted(shapes.items()) if n not in drop}
        write_shards(folder, tensors, shards)
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nThe base.\n")
        return folder

    return make
