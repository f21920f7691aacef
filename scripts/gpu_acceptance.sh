#!/usr/bin/env bash
# Tests and measures training on all visible GPUs, about half an hour, without a network:
#
#   scripts/gpu_acceptance.sh [FOLDER]      logs and runs go to FOLDER, outputs/gpu_acceptance
#
# Prints the peak of 7B on one GPU with the smallest state, and measured steps next to their bounds:
# of 60M on one GPU, and of 350M on all, whose bounds are those of GPUs with 80 GB, one or eight
# (docs/measurements/GPU.md, "Compute bounds, and measure against them").
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
memory="$("$PYTHON" -c "import torch; print(torch.cuda.mem_get_info()[1])")"
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

titan=("$PYTHON" -m switchtitan launch --standalone --nproc_per_node)
# Speed does not depend on the tokens, and this dataset needs no network.
data=(--data.dataset pystdlib --data.tokenizer train --data.vocab_size 1024
    --data.max_documents none --data.offline_dataset none --data.validation_fraction 0.04
    --data.test_fraction 0.04)

measure() { # NAME RANKS SEQUENCES CONFIG ...: steps of one micro-batch for each rank
    local file="$folder/$1.json"
    rm -f -- "$file"
    step "$1" "${titan[@]}" "$2" benchmark step "${@:4}" "${data[@]}" \
        --training.local_batch_size "$3" --training.global_batch_size "$(($2 * $3))" --json "$file"
    [ ! -e "$file" ] || "$PYTHON" scripts/gpu_bounds.py compare "$file" || status=1
}

step tests "$PYTHON" -m pytest -m gpu -v
for name in llama_350m_full_rank llama_350m_switchlora; do
    rm -rf -- "${folder:?}/$name"
    run=("${titan[@]}" "$gpus" train --config "train_configs/$name.toml" "${data[@]}"
        --training.local_batch_size 8 --training.global_batch_size "$((8 * gpus))"
        --lr_schedule.warmup_steps 2 --checkpoint.interval 25 --job.output_dir "$folder/$name")
    step "train_$name" "${run[@]}" --training.steps 50
    step "resume_$name" "${run[@]}" --training.steps 60
done
seven=llama_7b_switchlora_24gb
rm -rf -- "${folder:?}/$seven"
step peak_7b "${titan[@]}" 1 train --config "train_configs/$seven.toml" "${data[@]}" \
    --training.steps 3 --training.global_batch_size 2 --lr_schedule.warmup_steps 1 \
    --method.switches_per_vector none --method.interval 256 --job.output_dir "$folder/$seven"
echo "peak of $seven (GiB column; estimated: 22.4)"
grep -h -e "step  " -e "^ *3/3 " "$folder/peak_7b.log" || true
rm -rf -- "${folder:?}/$seven"
switch=method.name=switchlora,method.rank
measure step_times_60m 1 72 llama_60m.toml "llama_60m.toml:$switch="{128,64}
measure step_times_350m "$gpus" "$((memory > 75 * 10**9 ? 72 : 8))" \
    llama_350m.toml "llama_350m.toml:$switch="{256,128}
exit "$status"
