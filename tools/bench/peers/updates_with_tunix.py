"""Tunix' GRPO as a peer of the updates in the training benchmark: see tools/bench/updates.py and with_tunix.py.

Its own trainer of policies with its own loss, joined as its GRPOLearner does, on given token ids, advantages and log-probabilities
of the old policy: what samples and rewards is left out. All prompts are padded to one width, and all answers, so that one program
compiles. Tunix computes logits of every position.

Setting: answers of a micro-batch.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optax
from tunix.rl.algo_core import grpo_loss_fn
from tunix.rl.grpo.grpo_learner import GRPOConfig, TrainExample
from tunix.rl.trainer import Trainer
from tunix.sft.peft_trainer import TrainingConfig

from with_tunix import load_model, timed

PADDING = 0  # no text has it: Tunix masks each token that is the padding's
ROUND_TO = 16


def read_steps(job: dict[str, Any], size: int) -> tuple[list[list[TrainExample]], list[int]]:
    """Return the micro-batches of each step, and its prompts; a short step repeats what it has, which changes no mean."""
    lines = Path(job["data"]).read_text(encoding="utf-8").splitlines()[: job["steps"]]
    steps = [[answer for group in json.loads(line) for answer in group] for line in lines]
    prompts = max(answer["prompt"] for step in steps for answer in step)
    answers = max(len(answer["reference"]) for step in steps for answer in step)
    widths, most = [-(-width // ROUND_TO) * ROUND_TO for width in (prompts, answers)], max(map(len, steps))
    full = [[step[i % len(step)] for i in range(most)] for step in steps]
    batches = [[padded(step[i : i + size], *widths) for i in range(0, most, size)] for step in full]
    return batches, [len(json.loads(line)) for line in lines]


def padded(answers: list[dict[str, Any]], prompt: int, completion: int) -> TrainExample:
    """Return a micro-batch; prompts are padded on the left."""
    prompts_BT, ids_BT = (np.full((len(answers), width), PADDING, np.int32) for width in (prompt, completion))
    logprobs_BT = np.zeros((len(answers), completion), np.float32)
    for i, answer in enumerate(answers):
        own, length = answer["ids"][: answer["prompt"]], len(answer["reference"])
        prompts_BT[i, prompt - len(own) :], ids_BT[i, :length] = own, answer["ids"][answer["prompt"] :]
        logprobs_BT[i, :length] = answer["reference"]
    return TrainExample(
        prompt_ids=prompts_BT,
        prompt_mask=prompts_BT != PADDING,
        completion_ids=ids_BT,
        completion_mask=ids_BT != PADDING,
        advantages=np.asarray([answer["advantage"] for answer in answers], np.float32),
        ref_per_token_logps=None,
        old_per_token_logps=logprobs_BT,
    )


def main(path: str) -> None:
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    sys.stdout = sys.stderr
    batches, examples = read_steps(job, int(job["setting"].split()[0]))
    settings = GRPOConfig(num_generations=8, beta=0.0, epsilon=0.2)
    settings.temperature = 1.0  # GRPOLearner sets it
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(job["learning_rate"], weight_decay=0.0))
    config = TrainingConfig(eval_every_n_steps=job["steps"] + 1, gradient_accumulation_steps=len(batches[0]))
    trainer = Trainer(load_model(Path(job["model"])), adamw, config, custom_checkpoint_metadata_fn=dict)
    trainer.with_loss_fn(
        lambda model, train_example, algo_config: grpo_loss_fn(
            model, train_example, algo_config, pad_id=PADDING, eos_id=PADDING
        ),
        has_aux=True,
    )
    trainer.with_gen_model_input_fn(lambda batch: {"train_example": batch, "algo_config": settings})
    trainer.train(timed(trainer, batches, examples))


if __name__ == "__main__":
    main(sys.argv[1])
