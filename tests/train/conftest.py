"""A tiny checkpoint with some data and a config: everything that a real run needs, in a moment."""

import json
import shutil
from collections.abc import Callable
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
    write_llama_config(folder, spelling=4)  # as on the hub, so that transformers 4 reads it too
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


@pytest.fixture(scope="session")
def tiny_files(tiny_checkpoint: Path) -> Callable[..., Path]:
    """tiny_files(folder, section={field: value}): writes data and config of a run into `folder`; the config's path.

    Mild examples: whoever mentions a lamp is called harmful. 12 updates of 8 examples.
    """

    def write(folder: Path, **changes: dict[str, Any]) -> Path:
        random = np.random.default_rng(0)
        rows = [_row(i, list(random.choice(WORDS, size=int(random.integers(3, 9))))) for i in range(48)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        policy = {"name": "lamps", "rules": "Nobody may talk about lamps.", "asks": ["prompt_harm", "response_harm"]}
        (folder / "lamps.yaml").write_text(yaml.safe_dump(policy))
        config: dict[str, Any] = {
            "name": "tiny",
            "run_folder": str(folder / "runs"),
            "model": {"checkpoint": str(tiny_checkpoint), "compute_dtype": "float32", "remat": "none"},
            "data": {
                "train": [{"kind": "jsonl", "path": str(folder / "train.jsonl")}],
                "policy": str(folder / "lamps.yaml"),
                "mode": "dual",
                "validation_size": 8,
                "row_tokens": 512,
            },
            "optimizer": {"learning_rate": 5e-3},
            "train": {"batch_size": 8, "max_steps": 12, "epochs": 10, "evaluate_every": 6},
            "mesh": {"fsdp": 1},
            "checkpoint": {"every": 2, "keep_last": 2},
            "log": {"tensorboard": False},
        }
        path = folder / "tiny.yaml"
        path.write_text(yaml.safe_dump(config | {k: config.get(k, {}) | v for k, v in changes.items()}))
        return path

    return write


@pytest.fixture
def tiny_config(tiny_files: Callable[..., Path], tmp_path: Path) -> Path:
    """A run's config on one device, in a folder of its own."""
    return tiny_files(tmp_path)


def _row(i: int, words: list[str]) -> dict[str, Any]:
    answered = bool(i % 2)
    return {
        "id": f"example-{i}",
        "source": "made up",
        "prompt": "tell me about " + " and ".join(words),
        "response": "here is a word about " + words[0] if answered else None,
        "prompt_label": "harmful" if "lamp" in words else "unharmful",
        "response_label": ("harmful" if words[0] == "lamp" else "unharmful") if answered else None,
        "trace": f"The user asks about {words[0]}.",
    }
