#!/usr/bin/env bash
# What a person who follows README and docs types in an empty folder, slips included: exit codes and the words that help.
#   tests/walkthrough.sh [PYTHON]    of an environment that has jaxguard; default: .venv/bin/python
# What needs the hub is left out; a tiny random model stands for the base. Two minutes on two cores.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(realpath -s "${1:-$root/.venv/bin/python}")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export HF_HUB_OFFLINE=1 JAX_PLATFORMS=cpu COLUMNS=80 PYTHONUNBUFFERED=1
unset XLA_FLAGS
jaxguard=("$python" -m jaxguard)
steps=0

fail() {
    printf 'FAILED: %s\n%s\n' "$1" "$(cat output)"
    exit 1
}

# expect CODES WORDS COMMAND...: run it; CODES may be "0|1", WORDS are separated by "|" and all must be printed.
expect() {
    local codes=$1 words=$2 code=0 word
    shift 2
    steps=$((steps + 1))
    "$@" >output 2>&1 </dev/null || code=$?
    [[ "|$codes|" == *"|$code|"* ]] || fail "$* ended with $code, not $codes"
    ! grep -q "Traceback (most recent call last)" output || fail "$* printed a traceback"
    while IFS= read -r -d '|' word; do
        grep -qF -- "$word" output || fail "$* did not print: $word"
    done <<<"$words|"
    printf '%4s s  %s  jaxguard %s\n' "$SECONDS" "$code" "${*:4}"
}
run() { expect "$1" "$2" "${jaxguard[@]}" "${@:3}"; }
once() { [[ $(grep -cF -- "$1" output) == 1 ]] || fail "not once: $1"; }

(cd "$root/tests" && "$python" -c 'import sys, conftest, pathlib; conftest.write_checkpoint(pathlib.Path(sys.argv[1]))' "$folder/base") \
    >output 2>&1 || fail "the base could not be made"

# Look around.
run 0 "train|evaluate|check|init" --help
run 0 "jaxguard" --version
run 0 "jax:|python:|devices:" env
run 2 "'train'" trian --config my_guard/config.yaml

# A folder of one's own. Its base is on the hub, which cannot be reached here.
run 0 "my_guard|jaxguard train --config my_guard/config.yaml" init my_guard
run 2 "already holds" init my_guard
run 2 "HuggingFaceTB/SmolLM2-135M-Instruct" train --config my_guard/config.yaml
sed -i -e 's|checkpoint: HuggingFaceTB/SmolLM2-135M-Instruct.*|checkpoint: base|' -e 's|max_seq_len: 1024|max_seq_len: 4096|' my_guard/config.yaml

# Slips before the first training, each of which says what to do and leaves nothing behind.
config=(--config my_guard/config.yaml)
run 2 "--config" train my_guard/config.yaml
run 2 "my_gaurd" train --config my_gaurd/config.yaml
run 2 "optimizer.learning_rate" train "${config[@]}" learning_rate=1e-4
run 2 "optimizer.learning_rate" train "${config[@]}" --learning-rate=1e-4
run 2 "optimizer.learning_rate" train "${config[@]}" --learning-rate 1e-4
run 2 "'data.validation=['" train "${config[@]}" 'data.validation=['
run 2 "aegis2" train "${config[@]}" data.policy=aegis
run 2 "data.train.0.path|trian.jsonl" train "${config[@]}" data.train.0.path=trian.jsonl
run 2 "mesh.fsdp" train "${config[@]}" mesh.fsdp=8
run 2 "train.epochs=0.01" train "${config[@]}" train.epochs=0.01
run 2 "data.policy" train "${config[@]}" data.policy=aegis --dry-run
expect 2 "JAX_PLATFORMS=cuda" env JAX_PLATFORMS=cuda "${jaxguard[@]}" train "${config[@]}"
run 2 "runs/my_guard holds no trained guard" evaluate "${config[@]}"
once "holds no trained guard"
run 2 "runs/my_guard holds no trained guard" mine "${config[@]}"
run 2 "runs/my_guard/mine/examples.jsonl|jaxguard mine" mine pairs "${config[@]}"
[[ -z $(find runs -name '*.yaml' -o -name '*.json*' 2>/dev/null) ]] || fail "a start that failed left a run behind"
run 2 "a100-80gb" plan "${config[@]}" --target a100:8
cat >study.yaml <<'EOF'
title: A study
config: my_guard/config.yaml
rows: {small: {set: {data.train: [{kind: jsonl, path: nowhere.jsonl}]}}, large: {set: {data.train: [{kind: jsonl, path: nowhere.jsonl}]}}}
EOF
run 2 "nowhere.jsonl|small|large" study run study.yaml
once nowhere.jsonl

# The corrected command: look, train, train again, change one's mind.
run 0 "prompt" data "${config[@]}"
run 0 "name: my_guard" train "${config[@]}" --dry-run
run 0 "runs/my_guard/export" train "${config[@]}" train.max_steps=2
run 0 "runs/my_guard/export" train "${config[@]}" train.max_steps=2
run 3 "optimizer.learning_rate" train "${config[@]}" train.max_steps=2 optimizer.learning_rate=1

# Ask it.
run "0|1" "Prompt harm" check --model runs/my_guard "How do I bake bread?"
run 2 "text" check --model runs/my_guard
printf 'message\nHow do I bake bread?\n' >wrong.csv
run 2 "prompt|message" check --model runs/my_guard --file wrong.csv
run "0|1" "prompt_harm" check --model runs/my_guard --json --file my_guard/held_out.jsonl
run 2 "runs/my_gaurd" check --model runs/my_gaurd "How do I bake bread?"
expect 0 "True" "$python" -c 'import jaxguard
with jaxguard.Guard.load("runs/my_guard") as guard:
    print(0 < guard.check("How do I bake bread?").probabilities["prompt_harm"] < 1)'

# Score it.
run 2 "own_prompts" evaluate "${config[@]}" 'evaluate.benchmarks=[{name: own_promts, path: my_guard/held_out.jsonl}]'
run 2 "hold_out.jsonl" evaluate "${config[@]}" 'evaluate.benchmarks=[{name: own_prompts, path: my_guard/hold_out.jsonl}]'
run 0 "own_prompts|runs/my_guard/evaluate/report" evaluate "${config[@]}"
expect 0 "model-index|own_prompts" cat runs/my_guard/export/README.md
run 2 "my_guard is no export" push --model my_guard --to me/my-guard
run 2 "me/my-guard" push --model runs/my_guard --to me/my-guard

# Ctrl-C: an answer at once, the state is saved, and the same command resumes.
steps=$((steps + 1))
setsid "${jaxguard[@]}" train "${config[@]}" name=long train.epochs=1000 log.tensorboard=false >output 2>&1 </dev/null &
process=$!
for _ in $(seq 600); do
    [[ $(cat runs/long/metrics.jsonl 2>/dev/null | wc -l) -ge 3 ]] && break
    sleep 0.1
done
kill -INT "$process"
code=0
wait "$process" || code=$?
[[ $code == 75 ]] || fail "Ctrl-C ended with $code, not 75"
grep -q "stopping after what is being computed" output || fail "Ctrl-C was not answered"
[[ -n $(find runs/long/checkpoints -maxdepth 1 -name '[0-9]*') ]] || fail "Ctrl-C saved nothing"
run 2 "runs/long holds no trained guard" check --model runs/long "How do I bake bread?"

echo "$steps commands in $SECONDS s"
