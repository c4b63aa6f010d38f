"""A plain torch loop around a transformers model, as a peer of the training benchmark: see common.py.

It runs in the environment of trl.txt. Its best on a CPU: float32 weights, under bfloat16 autocast where the job says so,
PyTorch's scaled dot-product attention, AdamW's fused kernel, and micro-batches of examples of like length, each padded to its
longest. The logits are those of every token, as transformers computes them; nobody who writes such a loop cuts them down.

Setting: "padded".
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import encode, longest_first, read, report

MICRO_BATCH = 4
"""Examples; not yet measured against 1, 2 and 8."""


def collate(rows: list[tuple[list[int], int]], padding: int) -> dict[str, torch.Tensor]:
    """Ids, mask and labels of shape (examples, longest)."""
    longest = max(len(ids) for ids, _ in rows)
    batch = [
        (
            ids + [padding] * (gap := longest - len(ids)),
            [1] * len(ids) + [0] * gap,
            [-100] * start + ids[start:] + [-100] * gap,
        )
        for ids, start in rows
    ]
    names = ("input_ids", "attention_mask", "labels")
    return {name: torch.tensor(values) for name, values in zip(names, zip(*batch, strict=True), strict=True)}


def main(path: str) -> None:
    job, chats = read(path)
    if job["setting"] != "padded":
        raise SystemExit(f"setting {job['setting']!r}: there is only 'padded'")
    batch, micro = job["batch_size"], MICRO_BATCH
    tokenizer = AutoTokenizer.from_pretrained(job["model"], trust_remote_code=False)
    rows = [encode(tokenizer, messages, job["max_seq_len"]) for messages in chats]
    rows = [rows[i] for i in longest_first([len(ids) for ids, _ in rows], batch)]
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], trust_remote_code=False, dtype=torch.float32, attn_implementation="sdpa"
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["learning_rate"], weight_decay=0.0, fused=True)
    for step in range(job["steps"]):
        start, loss = time.perf_counter(), 0.0
        chosen = rows[step * batch : (step + 1) * batch]
        targets = torch.tensor(sum(len(ids) - prompt for ids, prompt in chosen))
        for first in range(0, batch, micro):
            inputs = collate(chosen[first : first + micro], tokenizer.pad_token_id)
            with torch.autocast("cpu", torch.bfloat16, enabled=job["compute_dtype"] == "bfloat16"):
                part = model(**inputs, num_items_in_batch=targets, use_cache=False).loss
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report(step + 1, time.perf_counter() - start, batch, loss)


if __name__ == "__main__":
    main(sys.argv[1])
