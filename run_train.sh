#!/usr/bin/env bash
# Trains: ./run_train.sh [--config FILE] [--section.key VALUE ...]     (--help-all lists every key)
#
# Sets up the environment first. Variables:
#   NGPU            processes on this machine; default: one per visible GPU, 1 on a CPU
#   NNODES          machines; default: 1. Start the same command on each (docs/CLUSTERS.md)
#   RDZV_ENDPOINT   HOST:PORT of the rendezvous; required for NNODES > 1
#   NODE_RANK       index of this machine; index 0 is HOST. Optional: set it on all or on none
#   RDZV_ID         name of the run, the same on every machine; default: switchtitan
#   RDZV_CONF       further options of the rendezvous: is_host=1, join_timeout=1800 (seconds), ...;
#                   with NODE_RANK only timeout=1800 (seconds to wait for all machines)
#   OMP_NUM_THREADS threads per process; default for several processes: cores / processes
#   PYTORCH_CUDA_ALLOC_CONF  default: expandable_segments:True, so that memory does not fragment
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/setup_env.sh"

count_gpus() {
    # Without a driver, skip the import of torch, which takes seconds.
    if [ -e /dev/nvidiactl ] || [ -e /dev/kfd ] || [ -e /dev/dxg ]; then
        "$PYTHON" -c 'import torch; print(torch.cuda.device_count())'
    else
        echo 0
    fi
}

require_count() {
    case "$2" in
        '' | *[!0-9]* | 0*) fail "$1=$2: expected an integer >= 1" ;;
    esac
}

prepare_environment

num_nodes="${NNODES:-1}"
num_processes="${NGPU:-$(count_gpus)}"
[ -n "${NGPU:-}" ] || [ "$num_processes" != 0 ] || num_processes=1
require_count NGPU "$num_processes"
require_count NNODES "$num_nodes"
[ "$num_nodes" = 1 ] || [ -n "${RDZV_ENDPOINT:-}" ] ||
    fail "NNODES=$num_nodes: needs RDZV_ENDPOINT=HOST:PORT, the same on every machine;" \
        "HOST is one of them"

[[ "${NODE_RANK:-0}" =~ ^[0-9]+$ && "10#${NODE_RANK:-0}" -lt "$num_nodes" ]] ||
    fail "NODE_RANK=$NODE_RANK: expected an index from 0 to NNODES - 1 = $((num_nodes - 1))"
if [ "$num_nodes" != 1 ] && [ -n "${NODE_RANK:-}" ] && [ -n "${RDZV_CONF:-}" ]; then
    # torchrun's static rendezvous ignores other keys.
    [[ "$RDZV_CONF" =~ ^timeout=[1-9][0-9]*$ ]] ||
        fail "RDZV_CONF=$RDZV_CONF: with NODE_RANK, expected timeout=SECONDS and nothing else;" \
            "unset NODE_RANK on all machines to use other keys"
fi
if [ -z "${PYTORCH_ALLOC_CONF+set}" ]; then
    export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}"
fi

if [ "$num_nodes" = 1 ] && [ "$num_processes" = 1 ]; then
    exec "$PYTHON" -m switchtitan train "$@"
fi

# With c10d, torchrun ignores --node_rank and orders machines by name.
rendezvous=(--rdzv_backend c10d)
[ "$num_nodes" = 1 ] || [ -z "${NODE_RANK:-}" ] ||
    rendezvous=(--rdzv_backend static --node_rank "$NODE_RANK")
exec "$PYTHON" -m switchtitan launch \
    --nnodes "$num_nodes" --nproc_per_node "$num_processes" \
    "${rendezvous[@]}" --rdzv_endpoint "${RDZV_ENDPOINT:-localhost:0}" \
    --rdzv_id "${RDZV_ID:-switchtitan}" ${RDZV_CONF:+--rdzv_conf "$RDZV_CONF"} \
    train "$@"
