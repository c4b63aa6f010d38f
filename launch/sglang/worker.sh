#!/bin/bash
# One node of a teacher: worker.sh TEACHER.yaml [LEADER [RANK]]; a teacher of several nodes needs the leader's address.
set -euo pipefail
: "${JAXGUARD_API_KEY:?the key that clients must show}"

join=()
if [ $# -gt 1 ]; then
    join=(--dist-init-addr "$2:20000" --node-rank "${3:-$SLURM_PROCID}")
fi

# SGLang takes its key from a flag, which everyone on the machine could read, or from this file, which mktemp keeps private.
config=$(mktemp --suffix=.yaml)
quote="'"
{
    cat "$1"
    printf "\napi-key: '%s'\n" "${JAXGUARD_API_KEY//$quote/$quote$quote}"
} >"$config"

exec "${SGLANG_PYTHON:-python3}" -m sglang.launch_server --config "$config" --host 0.0.0.0 --port 30001 "${join[@]}"
