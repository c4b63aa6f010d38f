"""`make bench-preferences`: losses and gradients of preference optimisation beside TRL's, SmolLM2-135M in float32.

Both get the same token ids and the same log-probabilities of a reference: random prompts of 20 to 60 tokens with two random answers
of 5 to 40. The gradients are those of every weight, compared by the largest difference relative to the weight's largest gradient.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from safetensors.numpy import load_file

from demo import fetch_weights
from jaxguard.config.train import MeshConfig, ObjectiveConfig
from jaxguard.data.encoding import EncodedExample
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.packing import assemble, bucketed, pack
from jaxguard.models.compute import Compute
from jaxguard.models.hf_io.checkpoints import export_hf, read_weights
from jaxguard.models.sharding import make_mesh, weight_shardings
from jaxguard.models.spec import read_spec
from jaxguard.report import Table
from jaxguard.train.objectives import Preference
from jaxguard.train.step import loss_and_gradient

MODEL = Path("build/bench/base")
FOLDER = Path("build/bench/preferences")
PEER = (".venv-bench-trl/bin/python", "tools/bench/peers/preferences_with_trl.py")
PAIRS, ROW = 8, 512
SETTINGS = {kind: ObjectiveConfig(kind=kind, beta=0.1) for kind in ("dpo", "ipo")}


def main() -> int:
    fetch_weights(MODEL)
    FOLDER.mkdir(parents=True, exist_ok=True)
    spec = read_spec(MODEL)
    examples = _pairs(spec.vocab_size)
    sequences: list[EncodedExample] = [*examples, *(e.rejected for e in examples if e.rejected is not None)]
    job = {
        "model": str(MODEL),
        "beta": {kind: settings.beta for kind, settings in SETTINGS.items()},
        "sequences": [
            {"ids": s.tokens.tolist(), "prompt": int(np.argmax(s.loss_mask)), "reference": float(np.sum(reference))}
            for s in sequences
            if (reference := s.reference) is not None
        ],
    }
    (FOLDER / "job.json").write_text(json.dumps(job), encoding="utf-8")
    subprocess.run([*PEER, str(FOLDER)], check=True)  # noqa: S603 (our own command)
    losses = json.loads((FOLDER / "losses.json").read_text(encoding="utf-8"))
    weights = read_weights(MODEL, spec, weight_shardings(spec, make_mesh(MeshConfig(), jax.devices()[:1])))
    rows = pack(examples, ROW, 1)
    batch = assemble(rows, bucketed(rows, ROW, 1))
    compute = Compute(attention="block_sparse", query_chunk=64)
    table = Table(("loss", "jaxguard", "TRL", "relative difference", "largest of a gradient"), left=1)
    for kind, settings in SETTINGS.items():
        loss, gradient, _ = loss_and_gradient(
            weights, batch, Preference(settings), spec=spec, compute=compute, accumulation=1, loss_chunk=256
        )
        export_hf(gradient, MODEL, FOLDER / kind)
        ours = load_file(FOLDER / kind / "model.safetensors")
        theirs = load_file(FOLDER / f"{kind}.safetensors")
        worst = max(float(np.abs(ours[n] - x).max() / np.abs(x).max()) for n, x in theirs.items())
        own, other = float(loss), losses[kind]
        table.add(kind, f"{own:.6f}", f"{other:.6f}", f"{abs(own / other - 1):.1e}", f"{worst:.1e}")
    Console().print(table.rich())
    return 0


def _pairs(vocabulary: int) -> list[EncodedExample]:
    random = np.random.default_rng(0)

    def answer(i: int, prompt: np.ndarray) -> EncodedExample:
        length = int(random.integers(5, 41))
        tokens = np.concatenate([prompt, random.integers(100, vocabulary, length)]).astype(np.int32)
        target, reference = np.arange(len(tokens)) >= len(prompt), random.normal(-11, 1, length).astype(np.float32)
        return EncodedExample(str(i), Mode.DIRECT, tokens, target, (), (), False, reference=reference)

    out = []
    for i in range(PAIRS):
        prompt = random.integers(100, vocabulary, int(random.integers(20, 61)))
        chosen, rejected = answer(i, prompt), answer(i, prompt)
        out.append(EncodedExample(**(vars(chosen) | {"rejected": rejected})))
    return out


if __name__ == "__main__":
    sys.exit(main())
