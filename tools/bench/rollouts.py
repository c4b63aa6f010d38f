"""Do sampler and trainer agree? The log-probabilities of 10,000 sampled tokens, by both, of SmolLM2-135M.

    PYTHONPATH=tools:tools/bench python tools/bench/rollouts.py

Samples answers of up to 64 tokens, eight to a prompt, as `jaxguard reinforce` does, and scores them as its step does. The exit code
says whether they differ by at most 1e-4, which products in bfloat16 do not.
"""

import argparse
import sys
from pathlib import Path

import jax
import numpy as np

from demo import fetch_weights
from jaxguard.config import load
from jaxguard.data.prepare import prepare
from jaxguard.models.hf_io.checkpoints import read_weights
from jaxguard.models.sharding import make_mesh
from jaxguard.models.spec import read_spec
from jaxguard.reinforce.rollouts import Rollouts
from jaxguard.reinforce.sampling import Sampler, by_prompt, fingerprint
from jaxguard.train.reference import score_targets
from jaxguard.train.step import build_program

MODEL = Path("build/bench/base")
EXAMPLES = Path("configs/scales/smollm")
TOKENS, ROWS = 10_000, 8
OVERRIDES = {
    "model.checkpoint": str(MODEL),
    "data.train": [{"kind": "jsonl", "path": str(EXAMPLES / "traces.jsonl")}],
    "data.validation": [],
    "data.validation_size": 0,
    "data.policy": str(EXAMPLES / "policy.yaml"),
    "data.mode": "reasoning",
    "train.batch_size": 4,
    "train.epochs": 100,
    "reinforce.answers": 8,
    "reinforce.max_tokens": 64,
    "reinforce.reward.kind": "sampled",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compute-dtype", choices=["float32", "bfloat16"], default="float32")
    dtype = parser.parse_args().compute_dtype
    fetch_weights(MODEL)
    config = load("smollm_grpo", OVERRIDES | {"model.compute_dtype": dtype}, stage="reinforce")
    steps = config.train.max_steps or 1
    mesh, spec, data = make_mesh(config.mesh, jax.devices()[:1]), read_spec(MODEL), prepare(config, MODEL)
    program = build_program(config, spec, mesh, steps)
    weights = read_weights(MODEL, spec, {path: x.sharding for path, x in program.state["weights"].items()})
    rollouts = Rollouts.open(config, MODEL, data, program, steps, 1)
    parts = config, program, rollouts.encoder, weights, 1, MODEL, fingerprint(weights)
    differences, step = np.zeros(0), 0
    while len(differences) < TOKENS:
        prompts = rollouts._prompts(step)
        answers = by_prompt(Sampler(*parts).answers(prompts, seed=step))
        sequences = [each for group in answers for each in rollouts._weighted(prompts[group[0].prompt], group)]
        scored = score_targets(sequences, program, weights, ROWS, config.data.max_seq_len, 1)
        of_step = [np.abs(x - each.reference) for x, each in zip(scored, sequences, strict=True)]
        differences, step = np.concatenate([differences, *of_step]), step + 1
    most, mean = differences.max(), differences.mean()
    print(f"{len(differences):,} tokens: the log-probabilities differ by at most {most:.1e}, {mean:.1e} in the mean")
    return int(most > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
