#!/usr/bin/env bash
# Measures all tables of docs/PERFORMANCE.md, about two hours on two idle CPU cores:
#
#   scripts/measure_performance.sh [NAME ...]      all measurements, or the named ones
#
# Writes docs/measurements/NAME.json at the end, then generates the tables. Use an otherwise idle
# machine and a clean checkout: the files name the commit.
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"

help_from_header "$@"
prepare_environment
cd -- "$project_root"

F=train_configs/llama_60m_full_rank.toml
S=train_configs/llama_60m_switchlora.toml
# Times do not depend on the tokens; this dataset needs no network.
data=(--data.dataset pystdlib --data.tokenizer train --data.vocab_size 1024 --data.max_documents none
    --data.offline_dataset none --data.validation_fraction 0.04 --data.test_fraction 0.04)
inline=(--data.num_workers 0)
tokens_4096=(--training.global_batch_size 8 --training.local_batch_size 8)
tokens_512=(--training.global_batch_size 1 --training.local_batch_size 1)
uncompiled=(--compile.blocks false --compile.loss false --compile.optimizer false)

benchmark() {
    "$PYTHON" scripts/benchmark.py "$@"
}

estimate() {
    OMP_NUM_THREADS=1 "$PYTHON" scripts/estimate.py "$@"
}

measure_step() {
    benchmark step $F $S:method.rank=64 $S:method.rank=128 $S:method.rank=256 $S:method.rank=511 \
        "${data[@]}" "${inline[@]}" "${tokens_4096[@]}" --rounds 6 --steps-per-round 1 --json "$1"
}

measure_methods() { # steps compared with full rank's, at rank hidden/8
    local scale=optimizer.name=scale,compile.optimizer=false low=method.rank=64
    local gentle=method.candidates=constant,method.switches_per_vector=9.4,method.decay=constant
    gentle+=,method.freeze_steps=0,method.reset_moments=momentum
    benchmark step $F $F:optimizer.name=muon $F:$scale $F:method.name=low_rank,$low \
        $F:method.name=galore,$low $F:method.name=fira,$low $F:method.name=apollo,$low \
        $S:$low $S:$low,$gentle $S:$low,$gentle,optimizer.name=muon \
        "${data[@]}" "${inline[@]}" "${tokens_4096[@]}" --rounds 6 --steps-per-round 1 --json "$1"
}

measure_products() { # layers without a frozen weight, at rank hidden/8
    benchmark step $F $F:method.name=low_rank,method.rank=64 $F:method.name=sltrain,method.rank=64 \
        $F:model.name=cola,model.rank=64 "${data[@]}" "${inline[@]}" "${tokens_4096[@]}" --rounds 6 --steps-per-round 1 --json "$1"
}

measure_host() { # matrices so small that the host is the limit
    local size=train_configs/llama_350m narrow=(--model.hidden_size 64 --model.intermediate_size 176 --model.num_heads 4)
    OMP_NUM_THREADS=1 benchmark step "${size}_full_rank.toml" "${size}_full_rank.toml:parallelism.blocks_per_unit=1" \
        "${size}_switchlora.toml:method.rank=16" "${size}_switchlora.toml:method.rank=16,parallelism.blocks_per_unit=1" \
        "${narrow[@]}" --model.vocab_size 1024 "${data[@]}" "${inline[@]}" --data.seq_len 16 "${tokens_512[@]}" \
        --training.dtype float32 --rounds 6 --steps-per-round 10 --json "$1"
}

measure_switch() {
    benchmark switch $S "${data[@]}" "${inline[@]}" "${tokens_4096[@]}" --rounds 6 --steps-per-round 4 --json "$1"
}

measure_switch_two_ranks() {
    OMP_NUM_THREADS=1 "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 scripts/benchmark.py switch \
        $S "${data[@]}" "${inline[@]}" --training.global_batch_size 8 --training.local_batch_size 4 \
        --rounds 4 --steps-per-round 4 --json "$1"
}

measure_switch_sizes() {
    benchmark switch $S $S:method.interval=10 $S:method.rank=256 $S:model.num_layers=4 \
        "${data[@]}" "${inline[@]}" "${tokens_512[@]}" --rounds 4 --steps-per-round 4 --json "$1"
}

measure_layer() {
    benchmark layer --shape 512x512 1376x512 --rank 128 --tokens 256 1024 4096 --compile --rounds 6 \
        --calls-per-round 2 --json "$1"
}

measure_loss() {
    benchmark loss --json "$1"
}

measure_loader() {
    benchmark loader $S "${data[@]}" "${tokens_4096[@]}" --json "$1"
}

measure_checkpoint() {
    benchmark checkpoint $S "${data[@]}" "${inline[@]}" "${uncompiled[@]}" --data.seq_len 128 \
        --training.global_batch_size 2 --training.local_batch_size 2 --rounds 4 --steps 2 --json "$1"
}

measure_startup() {
    benchmark startup train_configs/llama_quickstart_switchlora.toml --json "$1"
}

measure_state() {
    local size=train_configs/llama_350m
    local constant="${size}_switchlora.toml:method.candidates=constant" bf16=training.frozen_dtype=bfloat16
    estimate "${size}_full_rank.toml" "${size}_lora.toml:method.rank=256" "${size}_switchlora.toml" \
        "${size}_switchlora.toml:method.candidates_device=host" "$constant" "$constant,$bf16" \
        "$constant,method.rank=128" "$constant,method.rank=128,$bf16" \
        --world-size 1 "${tokens_512[@]}" --json "$1"
}

measure_one_gpu() {
    local full=activation_checkpoint.mode=full
    estimate train_configs/llama_350m_full_rank.toml train_configs/llama_350m_switchlora.toml \
        train_configs/llama_350m_switchlora.toml:$full \
        --world-size 1 --training.global_batch_size 48 --training.local_batch_size 24 --json "$1"
}

measure_one_gpu_1b() {
    local full=activation_checkpoint.mode=full size=train_configs/llama_1b
    estimate "${size}_full_rank.toml:$full" "${size}_switchlora.toml:method.candidates=constant,$full" \
        --world-size 1 --training.global_batch_size 16 --training.local_batch_size 8 --json "$1"
}

estimate_fits() { # FILE SIZE:RANK ...
    local file=$1 sides=() base=train_configs/llama_350m size rank method
    shift
    for size in "$@"; do
        rank="method.rank=${size#*:}" size="model.size=${size%:*}"
        sides+=("${base}_full_rank.toml:$size" "${base}_full_rank.toml:$size,optimizer.name=adamw8bit"
            "${base}_apollo_mini.toml:$size")
        for method in apollo galore relora lora switchlora; do
            sides+=("${base}_$method.toml:$size,$rank")
        done
        sides+=("${base}_switchlora.toml:$size,$rank,method.candidates=constant"
            "${base}_switchlora.toml:$size,$rank,method.candidates=constant,training.frozen_dtype=bfloat16")
    done
    estimate "${sides[@]}" --world-size 1 --fit 24 80 --data.seq_len 512 --training.dtype bfloat16 \
        --activation_checkpoint.mode full \
        --parallelism.frozen_weights shard --parallelism.reshard_after_forward true \
        --parallelism.blocks_per_unit 1 --json "$file"
}

# Ranks are a quarter of the hidden size.
measure_fits_to_350m() {
    estimate_fits "$1" 9m:32 20m:64 35m:96 60m:128 130m:192 250m:192 350m:256
}

measure_fits_from_1b() {
    estimate_fits "$1" 1b:512 3b:640 7b:1024
}

measure_ranks() { # FILE SIZE RANK: one micro-batch of 8 sequences for each of 8 ranks
    local size="train_configs/llama_$2" frozen=parallelism.frozen_weights
    estimate "${size}_full_rank.toml" "${size}_lora.toml:method.rank=$3,$frozen=gather_once" \
        "${size}_switchlora.toml:$frozen=gather_once" "${size}_switchlora.toml:$frozen=shard" \
        "${size}_switchlora.toml:$frozen=replicate" \
        --world-size 8 --training.global_batch_size 64 --training.local_batch_size 8 --json "$1"
}

measure_ranks_350m() {
    measure_ranks "$1" 350m 256
}

measure_ranks_1b() {
    measure_ranks "$1" 1b 512
}

measure_ranks_7b() {
    measure_ranks "$1" 7b 1024
}

measure_micro_batches() { # two micro-batches per rank
    local size=train_configs/llama_1b frozen=parallelism.frozen_weights
    estimate "${size}_full_rank.toml" "${size}_switchlora.toml:$frozen=gather_once" \
        "${size}_switchlora.toml:$frozen=shard" "${size}_switchlora.toml:$frozen=replicate" \
        --world-size 8 --training.global_batch_size 128 --training.local_batch_size 8 --json "$1"
}

if [ $# = 0 ]; then
    set -- step methods products host switch switch_two_ranks switch_sizes layer loss loader checkpoint startup \
        state one_gpu one_gpu_1b fits_to_350m fits_from_1b ranks_350m ranks_1b ranks_7b micro_batches
fi
for name in "$@"; do
    declare -F "measure_$name" >/dev/null || fail "$name: no such measurement"
done
# Outside the checkout: otherwise the next measurement would find a dirty commit.
results="$(mktemp -d)"
keep_results() {
    mkdir -p docs/measurements
    sed -i "s|$results/|docs/measurements/|" "$results"/*.json # the path in the command
    cp "$results"/*.json docs/measurements/
    rm -r "$results"
}
trap keep_results EXIT
for name in "$@"; do
    echo "measuring $name" >&2
    "measure_$name" "$results/$name.json"
done
trap - EXIT
keep_results
"$PYTHON" scripts/generate_docs.py
