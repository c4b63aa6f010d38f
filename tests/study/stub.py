"""Stands for every stage: notes its call, waits or fails if it is to, and writes what the stage would.

Like the real ones it refuses to resume in a folder that holds output of other inputs. How it behaves is in
stub/behaviour.json: {"RUN STAGE": "fail" | "requeue" | "hang"}. It imports nothing of the
project, so that it starts in a moment.
"""

import hashlib
import json
import signal
import sys
import time
from pathlib import Path

position = sys.argv.index("--config")
stage, overrides = sys.argv[position - 1], sys.argv[position + 2 :]
fields = dict(override.split("=", 1) for override in overrides)
folder = Path(fields.get("run_folder", "runs")) / fields["name"]
behaviour = json.loads(Path("stub/behaviour.json").read_text()) if Path("stub/behaviour.json").is_file() else {}
wish = behaviour.get(f"{fields['name']} {stage}")
if wish == "hang":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
# What its result depends on: the config without what a stage does not look at, and the data.
free = ("log.", "evaluate.") if stage == "train" else ("log.",)
inputs = [sorted(text for text in overrides if not text.startswith(free))]
inputs += [hashlib.sha256(path.read_bytes()).hexdigest() for path in [Path("bread.jsonl")] if path.is_file()]
if stage == "train" and (base := Path(fields.get("model.checkpoint", "none")) / "jaxguard.json").is_file():
    inputs.append(base.read_text())  # the weights that it starts from
if stage == "evaluate" and (folder / "export/jaxguard.json").is_file():
    inputs.append((folder / "export/jaxguard.json").read_text())
head = folder / ("evaluate/head.json" if stage == "evaluate" else f"{stage}.json")
if head.is_file() and json.loads(head.read_text()) != inputs:
    sys.exit(3)
head.parent.mkdir(parents=True, exist_ok=True)
head.write_text(json.dumps(inputs))
with Path("stub/calls.txt").open("a") as calls:
    calls.write(f"{fields['name']} {stage}\n")
if wish in ("fail", "requeue"):
    sys.exit(5 if wish == "fail" else 75)
deadline = time.monotonic() + 120
while wish == "hang" and time.monotonic() < deadline and not Path("stub/release").exists():
    time.sleep(0.02)
files = {
    "train": "export/jaxguard.json",
    "mine": "mine/hard.jsonl",
    "evaluate": "evaluate/results.json",
    "build": "dataset/loaves/all.parquet",
}
(folder / files[stage]).parent.mkdir(parents=True, exist_ok=True)
(folder / files[stage]).write_text(json.dumps(inputs))
