"""transformers, as a peer of the evaluation benchmark (tools/bench/evaluation.py), in the environment of trl.txt.

Its best on a CPU: prompts of like length together, padded on the left, so that logits are computed at the last place
alone, and PyTorch's scaled dot-product attention.
"""

import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

SCORED, GENERATED = 8, 32
"""Prompts of a batch: where nothing is generated, and where as many answers are as jaxguard makes at a time."""


def main(path: str) -> None:
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], trust_remote_code=False, dtype=getattr(torch, job["dtype"]), attn_implementation="sdpa"
    ).eval()
    result: dict[str, Any] = {"odds": [], "answers": []}
    started = time.perf_counter()
    with torch.inference_mode():
        if job["new_tokens"]:
            answers = partial(generate, model, job["prompts"], job["generations"], job["stop_ids"])
            answers(1)
            result["prompts"], started = time.perf_counter() - started, time.perf_counter()
            result["answers"] = answers(job["new_tokens"])
        else:
            result["odds"] = score(model, job["prompts"], job["pairs"])
    print(json.dumps({"seconds": time.perf_counter() - started, **result}))


def score(model: Any, prompts: list[list[int]], pairs: list[list[int]]) -> list[float]:
    odds = [0.0] * len(prompts)
    for chosen, ids, mask in batches(prompts, SCORED):
        places = (mask.cumsum(1) - 1).clamp(min=0)
        output = model(ids, attention_mask=mask, position_ids=places, use_cache=False, logits_to_keep=1)
        two = output.logits[:, -1].gather(1, torch.tensor([pairs[i] for i in chosen]))
        for i, value in zip(chosen, (two[:, 0] - two[:, 1]).tolist(), strict=True):
            odds[i] = value
    return odds


def generate(model: Any, prompts: list[list[int]], count: int, stop_ids: list[int], tokens: int) -> list[list[int]]:
    """One greedy answer of each prompt, or `count` sampled ones; an answer ends before the token that stops it."""
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": count} if count > 1 else {}
    ends = {"eos_token_id": stop_ids, "pad_token_id": stop_ids[0]}
    config = GenerationConfig(do_sample=count > 1, max_new_tokens=tokens, **ends, **sampling)
    answers: list[list[int]] = [[] for _ in range(count * len(prompts))]
    for chosen, ids, mask in batches(prompts, GENERATED // count):
        new_tokens = model.generate(ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :].tolist()
        for i, new in zip((count * i + k for i in chosen for k in range(count)), new_tokens, strict=True):
            answers[i] = new[: next((n for n, token in enumerate(new) if token in stop_ids), len(new))]
    return answers


def batches(prompts: list[list[int]], size: int) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Which prompts, their token ids, padded on the left, and where these are."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for first in range(0, len(order), size):
        chosen = order[first : first + size]
        longest = len(prompts[chosen[0]])
        gaps = [longest - len(prompts[i]) for i in chosen]
        ids = torch.tensor([[0] * gap + prompts[i] for gap, i in zip(gaps, chosen, strict=True)])
        yield chosen, ids, (torch.arange(longest) >= torch.tensor(gaps)[:, None]).long()


if __name__ == "__main__":
    main(sys.argv[1])
