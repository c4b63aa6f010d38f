"""LlamaFactory as a peer of the training benchmark: see common.py.

Its best on a CPU: float32 weights, under bfloat16 autocast where the job says so, PyTorch's scaled dot-product attention, AdamW's
fused kernel and no gradient checkpointing. It loads a bfloat16 copy of the weights and casts that to float32.

Settings: "padded" pads micro-batches of examples of like length, each to its longest. "packed" is `neat_packing`: rows of
`max_seq_len` hold several examples, which a mask keeps apart; packing works through a step's examples at a time. A step then
trains as many rows as the first step's examples fill, so `examples` counts those that these rows hold.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from llamafactory.data.formatter import StringFormatter
from llamafactory.data.processor.processor_utils import greedy_knapsack
from llamafactory.data.template import TEMPLATES, register_template
from llamafactory.train.tuner import run_exp
from transformers import AutoTokenizer

from clock import Clock
from common import longest_first, read

MICRO_BATCH = {"padded": 4, "packed": 1}
"""Examples or rows; not yet measured against others."""
SHAREGPT = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def template(tokenizer: Any) -> Any:
    """The checkpoint's own chat template for one question and one answer, its end of turn the last target."""
    question = [{"role": "user", "content": "{{content}}"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    answer = StringFormatter(slots=["{{content}}", {"eos_token"}])
    register_template("checkpoint", format_user=StringFormatter(slots=[prompt]), format_assistant=answer)
    return TEMPLATES["checkpoint"]


def main(path: str) -> None:
    job, chats = read(path)
    sys.stdout = sys.stderr
    folder, batch, packed = Path(job["output"]), job["batch_size"], job["setting"] == "packed"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(job["model"], trust_remote_code=False)
    form = template(tokenizer)
    sizes = [sum(map(len, form.encode_oneturn(tokenizer, messages))) for messages in chats]
    order = longest_first(sizes, batch)
    data = "".join(json.dumps({"messages": chats[i]}) + "\n" for i in order)
    (folder / "llamafactory.jsonl").write_text(data, encoding="utf-8")
    info = {"file_name": "llamafactory.jsonl", "formatting": "sharegpt", "tags": SHAREGPT}
    info["columns"] = {"messages": "messages"}
    (folder / "dataset_info.json").write_text(json.dumps({"bench": info}), encoding="utf-8")
    micro = min(MICRO_BATCH[job["setting"]], batch)
    examples, micro_batches = [batch] * job["steps"], batch // micro
    if packed:  # LlamaFactory leaves one token of a row free
        packs = [
            greedy_knapsack(sizes[first : first + batch], job["max_seq_len"] - 1)
            for first in range(0, len(sizes), batch)
        ]
        micro_batches, sizes = len(packs[0]), [len(pack) for step in packs for pack in step]
        examples = [sum(sizes[i * micro_batches : (i + 1) * micro_batches]) for i in range(job["steps"])]
    settings = {
        "model_name_or_path": job["model"],
        "template": "checkpoint",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset_dir": str(folder),
        "dataset": "bench",
        "cutoff_len": job["max_seq_len"],
        "neat_packing": packed,
        "preprocessing_batch_size": batch,
        "overwrite_cache": True,
        "disable_shuffling": True,
        "disable_gradient_checkpointing": True,
        "flash_attn": "sdpa",
        "use_cpu": True,
        "bf16": job["compute_dtype"] == "bfloat16",
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": micro_batches,
        "max_steps": job["steps"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # it always saves the model in the end
        config = folder / "llamafactory.yaml"
        config.write_text(yaml.safe_dump(settings | {"output_dir": scratch}), encoding="utf-8")
        sys.argv = [sys.argv[0], str(config)]
        run_exp(callbacks=[Clock(examples)])


if __name__ == "__main__":
    main(sys.argv[1])
