"""transformers' batched forward pass, as a peer of the scoring benchmark (tools/bench/scoring.py), in the environment of trl.txt.

Its best on a CPU in float32: prompts of like length together, padded on the left, so that logits are computed at the last place
alone, and PyTorch's scaled dot-product attention.
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

BATCH = 8
"""Prompts of a batch; not yet measured against others."""


def main(path: str) -> None:
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    prompts, pairs = job["prompts"], torch.tensor(job["pairs"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="sdpa").eval()
    started = time.perf_counter()
    odds = [0.0] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    with torch.inference_mode():
        for first in range(0, len(order), BATCH):
            chosen = order[first : first + BATCH]
            longest = len(prompts[chosen[0]])
            gaps = [longest - len(prompts[i]) for i in chosen]
            ids = torch.tensor([[0] * gap + prompts[i] for gap, i in zip(gaps, chosen, strict=True)])
            mask = (torch.arange(longest) >= torch.tensor(gaps)[:, None]).long()
            places = (mask.cumsum(1) - 1).clamp(min=0)
            found = model(ids, attention_mask=mask, position_ids=places, use_cache=False, logits_to_keep=1)
            two = found.logits[:, -1].gather(1, pairs[chosen])
            for i, value in zip(chosen, (two[:, 0] - two[:, 1]).tolist(), strict=True):
                odds[i] = value
    print(json.dumps({"seconds": time.perf_counter() - started, "odds": odds}))


if __name__ == "__main__":
    main(sys.argv[1])
