"""TRL's SFTTrainer as a peer of the training benchmark: see common.py.

Its best on a CPU: float32 weights, under bfloat16 autocast where the job says so, AdamW's fused kernel, no gradient
checkpointing, and TRL's own head, which computes logits at the target tokens alone. A step's examples are sorted by length, so
that those of a micro-batch are alike.

Settings: "padded" pads each micro-batch to its longest example. "packed" lays a micro-batch out as one row without padding
(`padding_free`); that is what `packing=True` trains on too, but packing would mix the examples of different steps. TRL asks for
flash attention there. Without it, transformers masks a row's examples from each other by their positions, so they do not
see each other on a CPU either; what the mask hides is computed all the same.
"""

import sys

from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from clock import Clock
from common import encode, longest_first, read

MICRO_BATCH = {"padded": 4, "packed": 4}
"""Examples; not yet measured against 1, 2 and 8."""


def main(path: str) -> None:
    job, chats = read(path)
    sys.stdout = sys.stderr
    batch, micro = job["batch_size"], min(MICRO_BATCH[job["setting"]], job["batch_size"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"], trust_remote_code=False)
    encoded = [encode(tokenizer, messages, job["max_seq_len"]) for messages in chats]
    rows = [{"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]} for ids, prompt in encoded]
    order = longest_first([len(ids) for ids, _ in encoded], batch)
    settings = SFTConfig(
        output_dir=job["output"],
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        use_cpu=True,
        bf16=job["compute_dtype"] == "bfloat16",
        max_length=None,  # cut above
        padding_free=job["setting"] == "packed",
        gradient_checkpointing=False,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // micro,
        max_steps=job["steps"],
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
        train_dataset=Dataset.from_list([rows[i] for i in order]),
        processing_class=tokenizer,
        callbacks=[Clock([batch] * job["steps"])],
    ).train()


if __name__ == "__main__":
    main(sys.argv[1])
