"""transformers, as a peer of the checkpoint benchmark (tools/bench/checkpoints.py), in the environment of trl.txt.

`load FOLDER` reads a checkpoint as trainers do, to float32; `save FOLDER` writes such a model in bfloat16, synced.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from timed import sync, timed


def main(what: str, folder: Path) -> None:
    print(json.dumps(load(folder) if what == "load" else save(folder)))


def load(folder: Path) -> dict[str, float]:
    return timed(lambda: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32))


def save(folder: Path) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32)
    output = folder / "saved"

    def work() -> None:
        model.bfloat16().save_pretrained(output)
        sync(output)

    measured = timed(work)
    shutil.rmtree(output)
    return measured


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
