"""TRL's DPOTrainer and GRPOTrainer as peers of tools/bench/objectives.py: the loss on the job's token ids, and all gradients.

In float32, and in float64, for which every float32 that torch, transformers and TRL name is made one.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

COMMON = {"use_cpu": True, "bf16": False, "report_to": []}
PREFERENCES = ("sigmoid", "ipo")


def main(folder: Path, precision: str) -> None:
    job, results = json.loads((folder / "job.json").read_text(encoding="utf-8")), dict[str, Any]()
    state = load_file(Path(job["model"]) / "model.safetensors")
    if precision == "float64":
        torch.float32 = torch.float = torch.float64
        torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
        torch.set_default_dtype(torch.float64)
    config = AutoConfig.from_pretrained(job["model"], trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    weights = dict(model.named_parameters())
    for name, settings in job["objectives"].items():
        model.zero_grad()
        trainer, batch = prepare(folder, job["model"], settings, model), batch_of(job, settings)
        loss = trainer.compute_loss(model, dict(batch))
        loss.backward()
        results[name] = float(loss)
        save_file({path: x.grad for path, x in weights.items()}, folder / f"{name}-{precision}.safetensors")
    if precision == "float32":
        settings = job["objectives"][job["updated"]]
        trainer, batch = prepare(folder, job["model"], settings, model), batch_of(job, settings)
        adamw, losses = torch.optim.AdamW(model.parameters(), lr=job["learning_rate"], weight_decay=0), list[float]()
        for _ in range(job["updates"]):
            model.zero_grad()
            loss = trainer.compute_loss(model, dict(batch))
            loss.backward()
            adamw.step()
            losses.append(float(loss))
        results["updates"] = losses
        save_file({path: x.data for path, x in weights.items()}, folder / "updated.safetensors")
    (folder / f"{precision}.json").write_text(json.dumps(results), encoding="utf-8")


def batch_of(job: dict[str, Any], settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the batch that an objective's loss takes."""
    return preferences(job["pairs"]) if settings["loss_type"] in PREFERENCES else sampled(job["answers"])


def prepare(folder: Path, checkpoint: str, settings: dict[str, Any], model: torch.nn.Module) -> Any:
    """Return the trainer of an objective, and let the model compute as its loss needs it, without division by micro-batches."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    kwargs = {"model": model, "processing_class": tokenizer}
    if settings["loss_type"] in PREFERENCES:
        unused = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        own = DPOConfig(str(folder / "trl"), **COMMON, **settings, precompute_ref_log_probs=True)
        trainer = DPOTrainer(args=own, train_dataset=unused, **kwargs)
    else:
        unused, sizes = Dataset.from_list([{"prompt": "a"}]), {"per_device_train_batch_size": 8, "num_generations": 8}
        own = GRPOConfig(str(folder / "trl"), **COMMON, **settings, **sizes)
        trainer = GRPOTrainer(args=own, train_dataset=unused, reward_funcs=lambda **_: [], **kwargs)
    model.eval()
    return trainer


def padded(rows: list[list[Any]], left: bool = False) -> torch.Tensor:
    longest = max(map(len, rows))
    fill = [[0] * (longest - len(row)) for row in rows]
    return torch.tensor([more + row if left else row + more for row, more in zip(rows, fill, strict=True)])


def preferences(answers: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The chosen answers, then the rejected ones; the job has them by turns."""
    answers = answers[::2] + answers[1::2]
    chosen, rejected = torch.tensor([sum(each["reference"]) for each in answers], dtype=torch.float32).chunk(2)
    return {
        "input_ids": padded([each["ids"] for each in answers]),
        "attention_mask": padded([[1] * len(each["ids"]) for each in answers]),
        "completion_mask": padded([[int(i >= each["prompt"]) for i in range(len(each["ids"]))] for each in answers]),
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }


def sampled(answers: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    prompts = [each["ids"][: each["prompt"]] for each in answers]
    completions = [each["ids"][each["prompt"] :] for each in answers]
    mask = padded([[1] * len(ids) for ids in completions])
    return {
        "prompt_ids": padded(prompts, left=True),
        "prompt_mask": padded([[1] * len(ids) for ids in prompts], left=True),
        "completion_ids": padded(completions),
        "completion_mask": mask,
        "old_per_token_logps": padded([each["reference"] for each in answers]).to(torch.float32),
        "advantages": torch.tensor([each["advantage"] for each in answers], dtype=torch.float32),
        "num_items_in_batch": mask.sum(),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
