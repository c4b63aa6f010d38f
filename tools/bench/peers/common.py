"""Code that the peers of the training benchmark share: their job, its tokens, and the line that they print for each step.

A peer runs as `python tools/bench/peers/with_NAME.py JOB.json`, in an environment without jaxguard. JOB is a `Job` of
tools/bench/workloads.py. Only these lines of its standard output are read.
"""

import json
import sys
from pathlib import Path
from typing import Any

Messages = list[dict[str, str]]


def read(path: str) -> tuple[dict[str, Any], list[Messages]]:
    """Read the job, and the chats of its steps in training order.

    Raises:
        SystemExit: there are too few.
    """
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    needed = job["batch_size"] * job["steps"]
    lines = Path(job["data"]).read_text(encoding="utf-8").splitlines()[:needed]
    if len(lines) < needed:
        raise SystemExit(f"{job['data']} holds {len(lines)} examples; batch_size * steps is {needed}")
    return job, [json.loads(line)["messages"] for line in lines]


def encode(tokenizer: Any, messages: Messages, longest: int) -> tuple[list[int], int]:
    """Token ids up to the answer's end of turn, and how many of them are the prompt's; the rest are the targets."""
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    while ids[-1] != tokenizer.eos_token_id:  # what the template appends
        ids.pop()
    return ids[:longest], len(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def longest_first(sizes: list[int], batch: int) -> list[int]:
    """Indices of the examples, each step's sorted by length, so that a micro-batch holds similar lengths."""
    steps = (range(first, first + batch) for first in range(0, len(sizes), batch))
    return [i for step in steps for i in sorted(step, key=lambda i: -sizes[i])]


def report(step: int, seconds: float, examples: int, loss: float) -> None:
    """Print a step's line."""
    line = {"step": step, "seconds": seconds, "examples": examples, "loss": loss}
    print(json.dumps(line), file=sys.__stdout__, flush=True)
