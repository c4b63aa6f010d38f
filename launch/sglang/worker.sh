#!/bin/bash
# One node of a teacher: worker.sh TEACHER.yaml [LEADER [RANK]]; a teacher of several nodes needs the leader's address.
set -euo pipefail
: "${JAXGUARD_API_KEY:?the key that clients must show}"

# What is downloaded is one commit of the model, not whatever its branch holds on the day.
if ! grep -qE '^model-path: (models)?/' "$1" && ! grep -qE '^revision: [0-9a-f]{40}$' "$1"; then
    echo "worker.sh: $1 needs revision: COMMIT, the 40 digits of https://huggingface.co/MODEL/commits" >&2
    exit 1
fi

join=()
if [ $# -gt 1 ]; then
    join=(--dist-init-addr "$2:20000" --node-rank "${3:-$SLURM_PROCID}")
fi

# SGLang takes its key from a flag, which everyone on the machine could read: set it inside. No file holds it.
exec "${SGLANG_PYTHON:-python3}" -c '
import os, runpy, sys
sys.argv += ["--api-key", os.environ["JAXGUARD_API_KEY"]]
runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
' --config "$1" --host 0.0.0.0 --port 30001 "${join[@]}"
