"""What the tests of checkpoints share: kinds, shards, hashes."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxguard.models.hf_io.safetensors import open_folder

BF16 = np.dtype(ml_dtypes.bfloat16)
VISION = {
    "vision_tower.vision_model.embeddings.position_embedding.weight": (4, 6),
    "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": (6, 6),
    "multi_modal_projector.mm_input_projection_weight": (6, 32),
}
VISION_CONFIG = {
    "model_type": "siglip_vision_model",
    "hidden_size": 6,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}

QWEN3 = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "rms_norm_eps": 1e-6,
    "head_dim": 16,  # N H is not D, as in Qwen3-4B
    "llama3_rope": False,
}
"""What differs from the tiny Llama's config.json."""

Make = Callable[..., Path]


def write_shards(folder: Path, tensors: dict[str, np.ndarray], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    homes = {name: files[i % shards] for i, name in enumerate(tensors)}  # a layer's tensors lie in several files
    for file in files:
        save_file({n: t for n, t in tensors.items() if homes[n] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def hf(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.array(tensor.view()) for name, tensor in open_folder(folder).items()}
