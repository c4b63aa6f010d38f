import hashlib
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxguard.models.spec import read_spec
from jaxguard.models.weights import table
from jaxguard.train.checkpoints import read_checkpoint_weights, write_checkpoint_weights

TOOLS = Path(__file__).parents[2] / "tools" / "convert"


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """call("hf_to_flax", source=..., output=...) -> (exit code, what it printed)."""

    def call(tool: str, **options: object) -> tuple[int, str]:
        arguments = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", [tool, *arguments])
        code = 0
        try:
            runpy.run_path(str(TOOLS / f"{tool}.py"), run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


@pytest.fixture
def source(tmp_path, tiny_tokenizer_folder, write_llama_config) -> Path:
    folder = tmp_path / "source"
    shutil.copytree(tiny_tokenizer_folder, folder)
    spec = read_spec(write_llama_config(folder))
    random = np.random.default_rng(0)
    tensors = {}
    for weight in table(spec):
        for i in range(spec.num_layers if weight.stacked else 1):
            name = ("" if weight.path == "lm_head" else "model.") + weight.hf.format(i=i)
            tensors[name] = random.standard_normal(weight.hf_shape(spec)).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_there_and_back_is_byte_identical(call, source, tmp_path):
    code, said = call("hf_to_flax", source=source, output=tmp_path / "flax")
    assert (code, said) == (0, f"wrote {tmp_path / 'flax'}\n")
    code, said = call("flax_to_hf", checkpoint=tmp_path / "flax", source=source, output=tmp_path / "back")
    assert code == 0
    assert "0.00% of" in said
    assert hashes(tmp_path / "back") == hashes(source)


def test_bfloat16_arrays(call, source, tmp_path):
    assert call("hf_to_flax", source=source, output=tmp_path / "flax", dtype="bfloat16")[0] == 0
    for path, weight in read_checkpoint_weights(tmp_path / "flax").items():
        assert str(weight.dtype) == ("float32" if "norm" in path else "bfloat16")
    code, said = call("flax_to_hf", checkpoint=tmp_path / "flax", source=source, output=tmp_path / "back")
    assert code == 0
    assert "99.63% of 60,640 stored weights" in said  # all but the norms: hardly a random float32 survives rounding
    name = "model.layers.2.mlp.up_proj.weight"
    before, after = (load_file(folder / "model.safetensors")[name] for folder in (source, tmp_path / "back"))
    np.testing.assert_allclose(after, before, rtol=2**-8)


def test_mistakes_are_told_without_a_traceback(call, source, tmp_path):
    code, said = call("hf_to_flax", source=tmp_path / "absent", output=tmp_path / "flax")
    assert (code, said.splitlines()[0][:17]) == (2, "error: no folder ")
    code, said = call("gguf_to_hf", source=source / "config.json", output=tmp_path / "hf")
    assert code == 2
    assert "not a GGUF file" in said
    code, said = call("flax_to_hf", checkpoint=tmp_path / "absent", source=source, output=tmp_path / "back")
    assert code == 2
    assert said.startswith("error: ")
    code, said = call("hf_to_flax", source=source, output=source)
    assert code == 2
    assert "is not empty" in said
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_checkpoint_of_another_model(call, source, tmp_path):
    weights = {w.path: jax.numpy.zeros(w.shape(read_spec(source))) for w in table(read_spec(source))}
    weights["layers.up_proj"] = weights["layers.up_proj"][:-1]
    write_checkpoint_weights(tmp_path / "flax", weights)
    code, said = call("flax_to_hf", checkpoint=tmp_path / "flax", source=source, output=tmp_path / "back")
    assert code == 2
    assert "'layers.up_proj' has shape (2, 32, 64), but the source has (3, 32, 64): another model" in said
    assert not (tmp_path / "back").exists()


def test_logits_beside_transformers(call, tiny_checkpoint, tiny_config):
    pytest.importorskip("torch", reason="transformers computes with torch")
    code, said = call("compare_logits", checkpoint=tiny_checkpoint, config=tiny_config, limit=3)
    assert code == 0
    assert said.count("3 of 3") == 3
    code, said = call("compare_logits", checkpoint=tiny_config.parent, config=tiny_config)
    assert code == 2
    assert "error: " in said
