"""Tunix' PeftTrainer as a peer of the training benchmark: see common.py.

These are Tunix' own parts: its Llama 3 model, its safetensors loader, its PeftTrainer with its default loss (the mean over
a micro-batch's target tokens, then the mean over micro-batches) and its gradient accumulation. What makes the settings its
best for this job: rows are padded to one of three widths, so that few are much longer than their example and few programs
compile; nothing is recomputed in the backward pass; the step's graph is cached; no checkpoints, no evaluation.
Tunix 0.1.7 packs no sequences in supervised training (PeftTrainer refuses it), computes logits of every position, and
multiplies in its weights' type, which is float32 here as everybody's weights are.
"""

import functools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from transformers import AutoTokenizer
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params
from tunix.sft import utils
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

from common import Messages, encode, read, report

MICRO_BATCH = 1  # chosen for memory; larger ones have not been timed
ROUND_TO = 64  # widths are multiples of this many tokens
WIDEST = (0.75, 0.95, 1.0)  # quantiles of the examples' lengths that a row may be padded to


def load_model(folder: Path) -> llama3.Llama3:
    """The checkpoint in fp32, which is also the type that it multiplies in."""
    config = json.loads((folder / "config.json").read_text())
    # Tunix 0.1.7 ignores its own rope_theta for Llama: Attention never hands it to apply_rope, whose default is 1,000,000.
    llama3.apply_rope = functools.partial(llama3.apply_rope, rope_theta=config["rope_theta"])
    return params.create_model_from_safe_tensors(
        str(folder),
        llama3.ModelConfig(
            num_layers=config["num_hidden_layers"],
            vocab_size=config["vocab_size"],
            embed_dim=config["hidden_size"],
            hidden_dim=config["intermediate_size"],
            num_heads=config["num_attention_heads"],
            head_dim=config["head_dim"],
            num_kv_heads=config["num_key_value_heads"],
            rope_theta=config["rope_theta"],
            norm_eps=config["rms_norm_eps"],
            weight_tying=config["tie_word_embeddings"],
        ),
        dtype=jnp.float32,
    )


def read_batches(job: dict[str, Any], chats: list[Messages]) -> list[TrainingInput]:
    """The micro-batches in the file's order, each of shape (MICRO_BATCH, T); the mask is true on target tokens."""
    tokenizer = AutoTokenizer.from_pretrained(job["model"], trust_remote_code=False)
    rows = [encode(tokenizer, messages, job["max_seq_len"]) for messages in chats]
    lengths = [len(tokens) for tokens, _ in rows]
    widths = [-(-int(length) // ROUND_TO) * ROUND_TO for length in np.quantile(lengths, WIDEST, method="higher")]
    return [padded(rows[i : i + MICRO_BATCH], widths) for i in range(0, len(rows), MICRO_BATCH)]


def padded(rows: list[tuple[list[int], int]], widths: list[int]) -> TrainingInput:
    """A micro-batch as wide as the first of `widths` that its rows fit into."""
    longest = max(len(tokens) for tokens, _ in rows)
    width = next(width for width in widths if width >= longest)
    tokens_BT = np.zeros((len(rows), width), np.int32)
    targets_BT = np.zeros((len(rows), width), bool)
    for i, (tokens, prompt) in enumerate(rows):
        tokens_BT[i, : len(tokens)] = tokens
        targets_BT[i, prompt : len(tokens)] = True
    return TrainingInput(tokens_BT, targets_BT)


def model_input(batch: TrainingInput) -> dict[str, jax.Array]:
    """Arguments of Tunix' loss. Padding stands on the right, so the causal mask alone keeps it from every real token."""
    real_BT = jnp.ones(batch.input_tokens.shape, bool)
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(real_BT),
        "attention_mask": utils.make_causal_attn_mask(real_BT),
    }


def timed(trainer: PeftTrainer, steps: list[list[Any]], examples: list[int]) -> Iterator[Any]:
    """Feed the trainer; after a step's last micro-batch, wait for the new weights and print the step's line."""
    for step, micro_batches in enumerate(steps):
        start = time.perf_counter()
        yield from micro_batches
        jax.block_until_ready(nnx.state(trainer.model, nnx.Param))
        seconds = time.perf_counter() - start
        loss = float(trainer._prev_buffered_train_metrics.loss)  # Tunix logs it one step later
        report(step + 1, seconds, examples[step], loss)


def main(path: str) -> None:
    job, chats = read(path)
    sys.stdout = sys.stderr
    batches, count = read_batches(job, chats), job["batch_size"] // MICRO_BATCH
    steps = [batches[first : first + count] for first in range(0, len(batches), count)]
    config = TrainingConfig(eval_every_n_steps=job["steps"] + 1, gradient_accumulation_steps=count)
    trainer = PeftTrainer(load_model(Path(job["model"])), optax.adamw(job["learning_rate"]), config)
    trainer.with_gen_model_input_fn(model_input).train(timed(trainer, steps, [job["batch_size"]] * len(steps)))


if __name__ == "__main__":
    main(sys.argv[1])
