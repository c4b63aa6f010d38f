"""TRL's SFTTrainer as a peer of the training benchmark: `python tools/bench/peers/trl.py JOB.json`.

Its best on a CPU: bfloat16 autocast over float32 weights, AdamW's fused kernel, no gradient checkpointing, and TRL's own
head, which computes logits at the target tokens alone. An update's examples are sorted by length, so that those of a
micro-batch are alike.

Settings: "padded" pads each micro-batch to its longest example. "packed" lays a micro-batch out as one row without padding
(`padding_free`); that is what `packing=True` trains on too, but packing would mix the examples of different updates. TRL asks for
flash attention there. Without it, transformers masks a row's examples from each other by their positions, so they do not
see each other on a CPU either; what the mask hides is computed all the same.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder, in which `import trl` would find this file

from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

MICRO_BATCH = {"padded": 4, "packed": 4}
"""Examples; not yet measured against 1, 2 and 8."""


class Clock(TrainerCallback):
    """Prints a line for each update; its time includes its batches' collation."""

    def __init__(self, examples: int) -> None:
        self.examples, self.start, self.seconds = examples, 0.0, 0.0

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        now = time.perf_counter()
        self.start, self.seconds = now, now - self.start

    def on_log(self, args: Any, state: Any, control: Any, **values: Any) -> None:  # noqa: ARG002
        logs = values["logs"]
        if "loss" in logs:
            line = {
                "update": state.global_step,
                "seconds": self.seconds,
                "examples": self.examples,
                "loss": logs["loss"],
            }
            print(json.dumps(line), file=sys.__stdout__, flush=True)


def encode(tokenizer: Any, messages: list[dict[str, str]], longest: int) -> dict[str, list[int]]:
    """Token ids and labels: the answer and its end of turn are targets, what the template puts after them is cut."""
    prompt, whole = (
        tokenizer(tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=m is not messages), **PLAIN)
        for m in (messages[:-1], messages)
    )
    ids = whole["input_ids"]
    while ids[-1] != tokenizer.eos_token_id:
        ids.pop()
    start = len(prompt["input_ids"])
    return {"input_ids": ids[:longest], "labels": [-100] * start + ids[start:longest]}


PLAIN = {"add_special_tokens": False}


def main(path: str) -> None:
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    sys.stdout = sys.stderr
    batch, micro = job["batch_size"], min(MICRO_BATCH[job["setting"]], job["batch_size"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    lines = Path(job["data"]).read_text(encoding="utf-8").splitlines()[: batch * job["updates"]]
    rows = [encode(tokenizer, json.loads(line)["messages"], job["row_tokens"]) for line in lines]
    ordered = [
        row
        for first in range(0, len(rows), batch)
        for row in sorted(rows[first : first + batch], key=lambda row: -len(row["input_ids"]))
    ]
    settings = SFTConfig(
        output_dir=job["output"],
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        use_cpu=True,
        bf16=True,
        max_length=None,  # cut above
        padding_free=job["setting"] == "packed",
        gradient_checkpointing=False,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // micro,
        max_steps=job["updates"],
        train_sampling_strategy="sequential",
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    SFTTrainer(
        model=job["model"],
        args=settings,
        train_dataset=Dataset.from_list(ordered),
        processing_class=tokenizer,
        callbacks=[Clock(batch)],
    ).train()


if __name__ == "__main__":
    main(sys.argv[1])
