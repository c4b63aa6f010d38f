"""TRL's DPOTrainer as a peer of tools/bench/preferences.py: its loss on the job's token ids, and the gradient of every weight."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

LOSSES = {"dpo": "sigmoid", "ipo": "ipo"}


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    sequences = job["sequences"]
    longest = max(len(each["ids"]) for each in sequences)

    def padded(rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows])

    reference = torch.tensor([each["reference"] for each in sequences])
    chosen, rejected = reference.chunk(2)
    batch = {
        "input_ids": padded([each["ids"] for each in sequences]),
        "attention_mask": padded([[1] * len(each["ids"]) for each in sequences]),
        "completion_mask": padded([[int(i >= each["prompt"]) for i in range(len(each["ids"]))] for each in sequences]),
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    tokenizer = AutoTokenizer.from_pretrained(job["model"], trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    unused = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    losses = {}
    for kind, name in LOSSES.items():
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, trust_remote_code=False)
        settings = DPOConfig(
            output_dir=str(folder / "trl"),
            loss_type=name,
            beta=job["beta"][kind],
            use_cpu=True,
            bf16=False,
            report_to=[],
            precompute_ref_log_probs=True,
        )
        trainer = DPOTrainer(model=model, args=settings, train_dataset=unused, processing_class=tokenizer)
        trainer.model.eval()
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        losses[kind] = float(loss)
        gradients = {name: weight.grad for name, weight in trainer.model.named_parameters()}
        save_file(gradients, str(folder / f"{kind}.safetensors"))
    (folder / "losses.json").write_text(json.dumps(losses), encoding="utf-8")


main(Path(sys.argv[1]))
