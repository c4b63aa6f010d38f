"""Updates of preferences and policy gradients in `make bench`: the data of their steps, and our side of them.

All contenders get the same token ids, advantages, and log-probabilities of the weights that all start from. Pairs are a right
and a wrong verdict, and groups have right and wrong ones by chance, as a guard's own answers would; with reasoning, each answer
has its own. Our side: `python tools/bench/updates.py JOB.json` packs, updates, and prints a line for each step.

The first two steps are parts of the third: two answers, whose time does not count, and an eighth, which is all that peers
train: they share nothing between prompts, so they are no faster in a larger batch.
"""

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxguard.config.reinforce import ReinforceConfig
from jaxguard.data.encoding import EncodedExample, Encoder
from jaxguard.data.examples import LABELS, Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.packing import assemble, bucketed, pack
from jaxguard.models.sharding import batch_sharding, make_mesh, shard_batch
from jaxguard.models.spec import read_spec
from jaxguard.reinforce.rewards import advantages
from jaxguard.train.loop import base_weights
from jaxguard.train.reference import score_targets
from jaxguard.train.step import build_program
from workloads import Job, Workload, ours, read_examples

EXAMPLES = {"dpo": 32, "grpo": 8}
"""Pairs or groups of a step, 64 answers in both."""
GROUP = 8
SHARE_WRONG = 0.4
OPPOSITE = {"harmful": "unharmful", "refusal": "compliance"}
OPPOSITE |= {word: other for other, word in OPPOSITE.items()}


def write(workload: Workload, source: Path | None, model: Path, folder: Path, keep: bool) -> Job:
    """Write the steps of a workload, a JSON line of groups of answers for each, or keep what is there; else as workloads.write."""
    folder.mkdir(parents=True, exist_ok=True)
    path, count = folder / "steps.jsonl", EXAMPLES[workload.objective]
    job = Job(workload.name, str(model), "", str(path), "", str(folder), count, compute_dtype="float32")
    if keep and path.is_file():
        return job
    config = ours(job)
    encoder = Encoder.load(model, config.data)
    groups = [_answers(example, workload, encoder) for example in read_examples(source, count)]
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = build_program(config, read_spec(model), mesh, 1)
        answers = [answer for group in groups for answer in group]
        weights, sizes = base_weights(model, program), (config.train.batch_size, config.data.max_seq_len, 1)
        scores = iter(score_targets(answers, program, weights, *sizes))
    scored = [[replace(answer, reference=next(scores)) for answer in group] for group in groups]
    longest_first = sorted(scored, key=lambda group: -sum(len(answer.tokens) for answer in group))
    whole = [[_plain(answer) for answer in group] for group in longest_first]
    steps = [whole[4][:2]], whole[3::8], whole  # of medium length
    path.write_text("".join(json.dumps(step) + "\n" for step in steps), encoding="utf-8")
    return job


def _answers(example: Example, workload: Workload, encoder: Encoder) -> list[EncodedExample]:
    """Return a right answer and a wrong one, or a group of answers with their advantages."""
    random = np.random.default_rng(int.from_bytes(hashlib.sha256(example.id.encode()).digest()[:8]))
    labels = [name for name in LABELS if getattr(example, name)]
    words = ["Words:", *example.prompt.split(), *(example.response or "").split()]
    wrong = random.random((GROUP, len(labels))) < SHARE_WRONG
    if workload.objective == "dpo":
        wrong = np.repeat([[False], [True]], len(labels), axis=1)
    answers = []
    for each in wrong:
        flipped: dict[str, Any] = {
            name: OPPOSITE[getattr(example, name)] for name, flip in zip(labels, each, strict=True) if flip
        }
        length = round(workload.trace_words * random.uniform(0.75, 1.25))
        trace = None if workload.mode is Mode.DIRECT else " ".join(random.choice(words, length))
        answer = encoder.encode(replace(example, trace=trace, **flipped), workload.mode)
        assert answer is not None
        answers.append(answer)
    if workload.objective == "dpo":
        return answers
    gains = advantages(1 - wrong.mean(axis=1), ReinforceConfig())
    return [replace(answer, weight=float(gain)) for answer, gain in zip(answers, gains, strict=True)]


def _plain(answer: EncodedExample) -> dict[str, Any]:
    assert answer.reference is not None
    prompt, reference = int(np.argmax(answer.loss_mask)), answer.reference.tolist()
    return {"ids": answer.tokens.tolist(), "prompt": prompt, "reference": reference, "advantage": answer.weight}


def _encoded(group: Sequence[dict[str, Any]], objective: str) -> list[EncodedExample]:
    """Return the answers to a prompt: one pair, or each by itself."""
    answers = [
        EncodedExample(
            "", Mode.DIRECT, np.asarray(each["ids"], np.int32), np.arange(len(each["ids"])) >= each["prompt"], (), (), False,
            weight=each["advantage"], reference=np.asarray(each["reference"], np.float32),
        )
        for each in group
    ]  # fmt: skip
    return [replace(answers[0], rejected=answers[1])] if objective == "dpo" else answers


def main(path: str) -> None:
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    config = ours(job, "optimizer.schedule=constant", "reinforce.average=answers", "reinforce.clip_high=0.2")
    lines = Path(job.data).read_text(encoding="utf-8").splitlines()[: job.steps]
    steps, kind = [json.loads(line) for line in lines], config.train.objective.kind
    examples = [[each for group in step for each in _encoded(group, kind)] for step in steps]
    most, multiple = config.data.max_seq_len, config.train.accumulation
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = build_program(config, read_spec(Path(job.model)), mesh, job.steps)

        shapes = {bucketed(pack(step, most, multiple), most, multiple) for step in examples}
        update = {shape: program.train_step.lower(program.state, program.batch(shape)).compile() for shape in shapes}
        state = program.initialize(base_weights(Path(job.model), program))
        for number, step in enumerate(examples, start=1):
            start = time.perf_counter()
            rows = pack(step, most, multiple)
            shape = bucketed(rows, most, multiple)
            state, metrics = update[shape](state, shard_batch(assemble(rows, shape), batch_sharding(mesh)))
            loss, seconds = float(metrics.loss), time.perf_counter() - start
            line = {"step": number, "seconds": seconds, "examples": len(steps[number - 1]), "loss": loss}
            print(json.dumps(line), flush=True)
            print(f"{sum(row.tokens for row in rows)} tokens in {shape}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1])
