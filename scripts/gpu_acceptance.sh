#!/usr/bin/env bash
# Tests and measures training on all visible GPUs, about half an hour, without a network:
#
#   scripts/gpu_acceptance.sh [FOLDER]      logs and runs go to FOLDER, outputs/gpu_acceptance
#
# A step that fails, or takes more than half an hour, does not stop the others. Ends with status 1
# if one failed, 2 without a GPU.
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"

help_from_header "$@"
prepare_environment dev
cd -- "$project_root"

if ! "$PYTHON" -c "import torch; assert torch.cuda.is_available()" 2>/dev/null; then
    echo "error: torch sees no GPU; \`switchtitan doctor\` says why" >&2
    exit 2
fi
gpus="$("$PYTHON" -c "import torch; print(torch.cuda.device_count())")"
folder="${1:-outputs/gpu_acceptance}"
mkdir -p -- "$folder"
status=0

step() { # NAME COMMAND ...
    local name="$1" log="$folder/$1.log"
    shift
    if timeout 1800 "$@" >"$log" 2>&1; then
        echo "ok      $name"
    else
        echo "FAILED  $name: $log"
        status=1
    fi
}

titan=("$PYTHON" -m switchtitan launch --standalone --nproc_per_node "$gpus")
full=train_configs/llama_350m_full_rank.toml
switch=train_configs/llama_350m_switchlora.toml
# Speed does not depend on the tokens, and this dataset needs no network.
keys=(--data.dataset pystdlib --data.tokenizer train --data.vocab_size 1024
    --data.max_documents none --data.offline_dataset none --data.validation_fraction 0.04
    --data.test_fraction 0.04 --training.local_batch_size 8
    --training.global_batch_size "$((8 * gpus))")
short=(--training.steps 50 --lr_schedule.warmup_steps 2 --checkpoint.interval 25)

step tests "$PYTHON" -m pytest -m gpu -v
for config in "$full" "$switch"; do
    name="$(basename -- "$config" .toml)"
    rm -rf -- "${folder:?}/$name"
    run=("${titan[@]}" train --config "$config" "${keys[@]}" "${short[@]}"
        --job.output_dir "$folder/$name")
    step "train_$name" "${run[@]}"
    step "resume_$name" "${run[@]}" --training.steps 60
done
step step_times "${titan[@]}" benchmark step "$full" "$switch" "${keys[@]}" \
    --json "$folder/step_times.json"
exit "$status"
