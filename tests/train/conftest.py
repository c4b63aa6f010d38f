"""A tiny checkpoint with some data and a config: everything that a real run needs, in a moment."""

import json
import shutil
from pathlib import Path
from typing import Any

import einops
import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from jaxguard.models.spec import read_spec
from jaxguard.models.weights import initialise, table

WORDS = ("bread", "garden", "river", "lamp", "guitar", "window", "paper", "cloud")


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tiny_tokenizer_folder: Path, write_llama_config: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A random Llama of 3 layers with its tokenizer, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    shutil.copytree(tiny_tokenizer_folder, folder)
    write_llama_config(folder)
    spec = read_spec(folder)
    sizes, tensors = spec.sizes, {}
    for weight, array in zip(table(spec), initialise(spec, jax.random.key(0)).values(), strict=True):
        rule = " -> ".join(reversed(weight.rule.split(" -> ")))
        known = {letter: size for letter, size in sizes.items() if letter in rule}
        prefix = "" if weight.path == "lm_head" else "model."
        for i, part in enumerate(np.asarray(array) if weight.stacked else [np.asarray(array)]):
            name = prefix + weight.hf.format(i=i)
            tensors[name] = np.ascontiguousarray(einops.rearrange(part, rule, **known))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def tiny_config(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Config of a run on mild examples: prompts that mention a lamp are called harmful. 12 updates of 8 examples."""
    random = np.random.default_rng(0)
    with (tmp_path / "train.jsonl").open("w", encoding="utf-8") as file:
        for i in range(48):
            words = random.choice(WORDS, size=int(random.integers(3, 9)))
            answered = bool(i % 2)
            row = {
                "id": f"example-{i}",
                "source": "made up",
                "prompt": "tell me about " + " and ".join(words),
                "response": "here is a word about " + words[0] if answered else None,
                "prompt_label": "harmful" if "lamp" in words else "unharmful",
                "response_label": ("harmful" if words[0] == "lamp" else "unharmful") if answered else None,
                "trace": f"The user asks about {words[0]}.",
            }
            file.write(json.dumps(row) + "\n")
    policy = {"name": "lamps", "rules": "Nobody may talk about lamps.", "asks": ["prompt_harm", "response_harm"]}
    (tmp_path / "lamps.yaml").write_text(yaml.safe_dump(policy))
    config = {
        "name": "tiny",
        "run_folder": str(tmp_path / "runs"),
        "model": {"checkpoint": str(tiny_checkpoint), "compute_dtype": "float32", "remat": "none"},
        "data": {
            "train": [{"kind": "jsonl", "path": str(tmp_path / "train.jsonl")}],
            "policy": str(tmp_path / "lamps.yaml"),
            "mode": "dual",
            "validation_size": 8,
            "row_tokens": 512,
        },
        "optimizer": {"learning_rate": 1e-3},
        "train": {"batch_size": 8, "max_steps": 12, "epochs": 10, "evaluate_every": 6},
        "mesh": {"fsdp": 1},
        "checkpoint": {"every": 2, "keep_last": 2},
        "log": {"tensorboard": False},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
