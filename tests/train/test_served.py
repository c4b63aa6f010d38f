"""What we export is loaded by transformers, the newest and 4.57, without a missing or unexpected key."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxguard.models.compute import Compute
from jaxguard.models.decoder import Decoder
from jaxguard.models.hf_io.checkpoints import export_hf, read_weights
from jaxguard.models.spec import read_spec

pytest.importorskip("torch", reason="transformers computes with torch")

TRANSFORMERS_4 = Path(__file__).resolve().parents[2] / "build" / "transformers4"
TOKENS = np.random.default_rng(0).integers(5, 500, size=(2, 90))

# For 4, in another process: two versions of transformers cannot be imported into one.
LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, output_loading_info=True)
with torch.no_grad():
    logits = model(torch.tensor(json.loads(sys.argv[2]))).logits
turn = [{"role": "user", "content": "hello"}]
text = AutoTokenizer.from_pretrained(sys.argv[1]).apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
wrong = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
print(json.dumps({"version": __version__, "wrong": wrong, "logits": logits.tolist(), "text": text}))
"""


@pytest.fixture(scope="module")
def trained(tiny_checkpoint, tmp_path_factory):
    """An exported folder whose every weight was moved, and our logits."""
    spec = read_spec(tiny_checkpoint)
    weights = {path: w + 0.05 * jnp.cos(jnp.arange(w.size)).reshape(w.shape) for path, w in sorted(
        read_weights(tiny_checkpoint, spec).items()
    )}  # fmt: skip
    folder = tmp_path_factory.mktemp("served") / "export"
    report = export_hf(weights, tiny_checkpoint, folder)
    assert report.changed_fraction > 0.99
    decoder = Decoder(spec, weights, Compute())
    return folder, np.asarray(jax.jit(lambda t: decoder.logits(decoder(t)))(jnp.asarray(TOKENS)))


@pytest.mark.parametrize("version", ["4", "5"])
def test_an_export_loads_in_transformers(trained, version, monkeypatch, capsys):
    if version == "4" and not TRANSFORMERS_4.is_dir():
        pytest.skip("build/transformers4 is not there; `make test` fetches it")
    folder, ours = trained
    arguments = ["-c", str(folder), json.dumps(TOKENS.tolist())]
    if version == "4":
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(TRANSFORMERS_4)}
        command = [sys.executable, "-c", LOAD, *arguments[1:]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        output = done.stdout
    else:
        monkeypatch.setattr(sys, "argv", arguments)
        exec(LOAD, {})
        output = capsys.readouterr().out
    reply = json.loads(output.splitlines()[-1])
    assert reply["version"].startswith(f"{version}.")
    assert reply["wrong"] == {}
    assert np.abs(np.array(reply["logits"]) - ours).max() <= 1e-4
    assert "hello" in reply["text"]
