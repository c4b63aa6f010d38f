"""`make bench-objectives`: losses, gradients and updates of preferences and policy gradients beside TRL's, SmolLM2-135M in float32.

Both get the same token ids and advantages, and the same log-probabilities of the model that the loss is relative to: random prompts
of 10 to 20 tokens with random answers of 4 to 16, two of a preference or eight that were sampled. Differences are relative; that of
gradients is the largest of all weights, of norms. Both also compute in float64, for which every float32 that they name is made one:
there they must agree, and what float32 is off by is rounding. It takes 8 GB of memory and 12 of disk.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from safetensors.numpy import load_file

from demo import fetch_weights
from jaxguard.config.reinforce import ReinforceConfig
from jaxguard.config.train import MeshConfig, ObjectiveConfig, OptimizerConfig
from jaxguard.data.encoding import EncodedExample
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.packing import Batch, Row, assemble, bucketed, pack, target_spans
from jaxguard.models.compute import Compute
from jaxguard.models.hf_io.checkpoints import export_hf, read_weights
from jaxguard.models.linear import Weights
from jaxguard.models.sharding import make_mesh, weight_shardings
from jaxguard.models.spec import Spec, read_spec
from jaxguard.report import Table
from jaxguard.train.objectives import Objective, PolicyGradient, Preference
from jaxguard.train.step import logprobs, loss_and_gradient, optimizer

MODEL = Path("build/bench/base")
FOLDER = Path("build/bench/objectives")
PEER = (".venv-bench-trl/bin/python", "tools/bench/peers/objectives_with_trl.py")
PAIRS, PROMPTS, ANSWERS, ROW, LONGEST = 4, 2, 8, 512, 16
COMPUTE = Compute(attention="block_sparse", query_chunk=64)
CLIPPED = {"epsilon": 0.2, "epsilon_high": 0.28}  # the defaults of ReinforceConfig
# With the settings of TRL's trainers that say the same. TRL's cispo takes the cap itself, which is 1 + clip_high.
OBJECTIVES: dict[str, tuple[Objective, dict[str, Any]]] = {
    "dpo": (Preference(ObjectiveConfig(kind="dpo", beta=0.1)), {"loss_type": "sigmoid", "beta": 0.1}),
    "ipo": (Preference(ObjectiveConfig(kind="ipo", beta=0.1)), {"loss_type": "ipo", "beta": 0.1}),
    "grpo": (PolicyGradient("grpo", ReinforceConfig(average="answers")), {"loss_type": "grpo", **CLIPPED}),
    "dapo": (PolicyGradient("grpo", ReinforceConfig()), {"loss_type": "dapo", **CLIPPED}),
    "dr_grpo": (
        PolicyGradient("grpo", ReinforceConfig(average="constant", max_tokens=LONGEST)),
        {"loss_type": "dr_grpo", "max_completion_length": LONGEST, **CLIPPED},
    ),
    "gspo": (
        PolicyGradient("gspo", ReinforceConfig(average="answers")),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", **CLIPPED},
    ),
    "cispo": (PolicyGradient("cispo", ReinforceConfig()), {"loss_type": "cispo", "epsilon_high": 1.28}),
}
UPDATED, UPDATES = "dapo", 10
PRECISIONS = ("float32", "float64")
STEP = {"accumulation": 1, "loss_chunk": 256}
ADAMW = OptimizerConfig(learning_rate=1e-5, schedule="constant", clip_norm=None)
_gradient = jax.jit(loss_and_gradient, static_argnames=("objective", "spec", "compute", "accumulation", "loss_chunk"))


def main() -> int:
    fetch_weights(MODEL)
    shutil.rmtree(FOLDER, ignore_errors=True)  # of a run that was stopped
    FOLDER.mkdir(parents=True)
    spec = read_spec(MODEL)
    weights = read_weights(MODEL, spec, weight_shardings(spec, make_mesh(MeshConfig(), jax.devices()[:1])))
    pairs, answers = _pairs(spec.vocab_size), _answers(weights, spec)
    job = {
        "model": str(MODEL),
        "objectives": {name: settings for name, (_, settings) in OBJECTIVES.items()},
        "pairs": [_plain(sequence) for example in pairs for sequence in example.sequences],
        "answers": [_plain(answer) for answer in answers],
        "updated": UPDATED,
        "updates": UPDATES,
        "learning_rate": ADAMW.learning_rate,
    }
    (FOLDER / "job.json").write_text(json.dumps(job), encoding="utf-8")
    with (FOLDER / "examples.pickle").open("wb") as file:
        pickle.dump((pairs, answers), file)
    for run in (*([*PEER, str(FOLDER), precision] for precision in PRECISIONS), [sys.executable, __file__, "float64"]):
        environment = os.environ | {"JAX_ENABLE_X64": str(run[-1] == "float64")}
        subprocess.run(run, env=environment, check=True)  # noqa: S603 (our own commands)
    gradients("float32", weights, spec, pairs, answers)
    adamw, steps, (objective, _) = optimizer(ADAMW, spec, UPDATES), list[float](), OBJECTIVES[UPDATED]
    moments, batch = adamw.init(weights), _batch(answers)[1]
    for _ in range(UPDATES):
        loss, gradient, _ = _gradient(weights, batch, objective, spec=spec, compute=COMPUTE, **STEP)
        changes, moments = adamw.update(gradient, moments, weights)
        weights = optax.apply_updates(weights, changes)
        steps.append(float(loss))
    export_hf(weights, MODEL, FOLDER / "updated")
    ours, ours64, theirs, theirs64 = (
        json.loads((FOLDER / f"{who}{name}.json").read_text(encoding="utf-8"))
        for who in ("ours-", "")
        for name in PRECISIONS
    )
    columns = (
        "loss / gradients",
        "jaxguard",
        "TRL",
        "apart",
        "jaxguard to float64",
        "TRL to float64",
        "apart in float64",
    )
    table = Table(columns, left=1)
    for name in OBJECTIVES:
        losses = [each[name] for each in (ours, theirs, theirs64, ours64)]
        files = [_file(f"{name}-float32"), *(FOLDER / f"{name}-{precision}.safetensors" for precision in PRECISIONS)]
        files.append(_file(f"{name}-float64"))
        apart = [
            (abs(losses[a] / losses[b] - 1), _largest(files[a], files[b])) for a, b in ((0, 1), (0, 2), (1, 2), (3, 2))
        ]
        table.add(name, f"{losses[0]:.6f}", f"{losses[1]:.6f}", *(f"{a:.1e} / {b:.1e}" for a, b in apart))
    Console(width=150).print(table.rich())
    ends = _file("updated"), FOLDER / "updated.safetensors"
    most = max(abs(a - b) for a, b in zip(steps, theirs["updates"], strict=True))
    print(
        f"{UPDATED}, {UPDATES} updates of AdamW at {ADAMW.learning_rate:g}: the loss goes from {steps[0]:.6f} to {steps[-1]:.6f}, "
        f"at most {most:.1e} from TRL's; the weights end {_largest(*ends):.1e} apart, and their changes "
        f"{_largest(*ends, MODEL / 'model.safetensors'):.1e}"
    )
    shutil.rmtree(FOLDER)
    return 0


def gradients(
    precision: str, weights: Weights, spec: Spec, pairs: list[EncodedExample], answers: list[EncodedExample]
) -> None:
    """Write the gradient of each objective, in float32, and the losses."""
    dtype, losses = jnp.dtype(precision), dict[str, float]()

    def cast(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if x.dtype == np.float32 else x

    for name, (objective, _) in OBJECTIVES.items():
        batch = _batch(pairs if isinstance(objective, Preference) else answers)[1]
        of_step = {"spec": spec, "compute": replace(COMPUTE, dtype=dtype), **STEP}
        loss, gradient, _ = _gradient(jax.tree.map(cast, weights), jax.tree.map(cast, batch), objective, **of_step)
        losses[name] = float(loss)
        export_hf({path: x.astype("float32") for path, x in gradient.items()}, MODEL, FOLDER / f"{name}-{precision}")
    (FOLDER / f"ours-{precision}.json").write_text(json.dumps(losses), encoding="utf-8")


def in_float64() -> int:
    """Compute losses and gradients of the main process's examples in float64, in a process of its own."""
    jnp.float32 = jnp.float64
    spec = read_spec(MODEL)
    weights = read_weights(MODEL, spec, weight_shardings(spec, make_mesh(MeshConfig(), jax.devices()[:1])))
    pairs, answers = pickle.loads((FOLDER / "examples.pickle").read_bytes())  # noqa: S301 (our own file)
    gradients("float64", weights, spec, pairs, answers)
    return 0


def _batch(examples: Sequence[EncodedExample]) -> tuple[list[Row], Batch]:
    rows = pack(examples, ROW, 1)
    return rows, assemble(rows, bucketed(rows, ROW, 1))


def _file(name: str) -> Path:
    return FOLDER / name / "model.safetensors"


def _largest(ours: Path, theirs: Path, start: Path | None = None) -> float:
    """Return the largest difference of two files' arrays, relative to the second: of norms, and less those of `start`, if given."""
    a, b = load_file(ours), load_file(theirs)
    before = dict.fromkeys(b, np.float64(0)) if start is None else load_file(start)

    def norm(x: np.ndarray) -> float:
        return float(np.linalg.norm(x))

    return max(norm(a[name] - x) / norm(x - before[name]) for name, x in b.items())


def _plain(answer: EncodedExample) -> dict[str, Any]:
    reference, prompt = np.asarray(answer.reference).tolist(), int(np.argmax(answer.loss_mask))
    return {"ids": answer.tokens.tolist(), "prompt": prompt, "reference": reference, "advantage": answer.weight}


def _groups(count: int, size: int, vocabulary: int) -> list[list[EncodedExample]]:
    """Random answers to each of some prompts, relative to random log-probabilities."""
    random = np.random.default_rng(0)

    def answer(name: str, prompt: np.ndarray) -> EncodedExample:
        length = int(random.integers(4, LONGEST + 1))
        tokens = np.concatenate([prompt, random.integers(100, vocabulary, length)]).astype(np.int32)
        target, reference = np.arange(len(tokens)) >= len(prompt), random.normal(-11, 1, length).astype(np.float32)
        return EncodedExample(name, Mode.DIRECT, tokens, target, (), (), False, reference=reference)

    prompts = [random.integers(100, vocabulary, int(random.integers(10, 21))) for _ in range(count)]
    return [[answer(f"{i}.{k}", prompt) for k in range(size)] for i, prompt in enumerate(prompts)]


def _pairs(vocabulary: int) -> list[EncodedExample]:
    return [replace(chosen, rejected=rejected) for chosen, rejected in _groups(PAIRS, 2, vocabulary)]


def _answers(weights: Weights, spec: Spec) -> list[EncodedExample]:
    """Return sampled answers whose tokens have become more and less likely since, by up to about two times."""
    random = np.random.default_rng(1)
    rows, batch = _batch([answer for group in _groups(PROMPTS, ANSWERS, spec.vocab_size) for answer in group])
    ids_BM1 = batch.target_ids_BM[..., None]
    now_BM1 = np.asarray(logprobs(weights, batch, ids_BM1, spec=spec, compute=COMPUTE, loss_chunk=256))
    answers = []
    for r, row in enumerate(rows):
        for answer, span in target_spans(row):
            change = random.normal(random.normal(0, 0.3), 0.3, answer.loss_mask.sum())
            reference = (now_BM1[r, span, 0] - change).astype(np.float32)
            answers.append(replace(answer, weight=float(random.normal()), reference=reference))
    return answers


if __name__ == "__main__":
    sys.exit(in_float64() if sys.argv[1:] == ["float64"] else main())
