"""Our side of the training benchmark: `python tools/bench/ours.py JOB.json` trains through the CLI and prints the log.

Settings: "shared" computes the policy once for the examples of a row, "plain" once for each example.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from workloads import Job, ours


def main(path: str) -> int:
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    config = ours(job, f"name={job.setting}", f"train.max_steps={job.steps}")
    shutil.rmtree(config.folder, ignore_errors=True)
    written = Path(job.output) / f"{job.setting}.yaml"
    written.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    command = [sys.executable, "-m", "jaxguard.train", "--config", str(written)]
    done = subprocess.run(command, stdout=sys.stderr, check=False)  # noqa: S603 (our own command)
    if done.returncode:
        return done.returncode
    for line in (config.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        if "speed" in values:
            seconds = values["speed"]["seconds"]
            print(
                json.dumps(
                    {"step": values["step"], "seconds": seconds, "examples": job.batch_size, "loss": values["loss"]}
                )
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
