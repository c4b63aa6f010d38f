"""TRL's DPOTrainer and GRPOTrainer as peers of the updates in the training benchmark: see tools/bench/updates.py.

Timed are their own loss, its gradient, clipping and AdamW on given token ids, in float32, without anything else that their
loops do. Their best on a CPU: log-probabilities of the reference and of the old policy are given, PyTorch's scaled
dot-product attention, logits of answers alone, AdamW's fused kernel, no gradient checkpointing, and micro-batches of one prompt
or of prompts of like length. TRL 1.16 lays out neither preferences nor sampled answers without padding: `padding_free` of its
DPOTrainer is switched off.

Setting: answers of a micro-batch.
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from common import report
from objectives_with_trl import preferences, prepare, sampled

SETTINGS = {"dpo": {"loss_type": "sigmoid", "beta": 0.1}, "grpo": {"loss_type": "grpo", "epsilon": 0.2}}


def main(path: str) -> None:
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    sys.stdout = sys.stderr
    steps = [json.loads(line) for line in Path(job["data"]).read_text(encoding="utf-8").splitlines()[: job["steps"]]]
    kind, size = job["workload"].rpartition("-")[2], int(job["setting"].split()[0])
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], trust_remote_code=False, dtype=torch.float32, attn_implementation="sdpa"
    )
    trainer = prepare(Path(job["output"]), job["model"], SETTINGS[kind], model)
    collate = preferences if kind == "dpo" else sampled
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["learning_rate"], weight_decay=0.0, fused=True)
    for number, step in enumerate(steps, start=1):
        start, total = time.perf_counter(), 0.0
        answers = [answer for group in step for answer in group]
        for first in range(0, len(answers), size):
            part = answers[first : first + size]
            loss = trainer.compute_loss(model, collate(part)) * len(part) / len(answers)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report(number, time.perf_counter() - start, len(step), total)


if __name__ == "__main__":
    main(sys.argv[1])
