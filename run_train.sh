#!/usr/bin/env bash
# Trains: ./run_train.sh [--config FILE] [--section.key VALUE ...]     (--help lists every key)
#
# Sets up the environment first. Variables:
#   NGPU            processes on this machine; default: one per visible GPU, 1 on a CPU
#   NNODES          machines; default: 1. Start the same command on each
#   NODE_RANK       index of this machine, from 0; optional
#   RDZV_ENDPOINT   HOST:PORT of the rendezvous; required for NNODES > 1
#   OMP_NUM_THREADS threads per process; default for several processes: cores / processes
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

if [ "$num_nodes" = 1 ] && [ "$num_processes" = 1 ]; then
    exec "$PYTHON" -m switchtitan train "$@"
fi

if [ -z "${OMP_NUM_THREADS:-}" ]; then
    num_cores="$("$PYTHON" -c 'import os; print(os.cpu_count() or 1)')"
    export OMP_NUM_THREADS=$((num_cores > num_processes ? num_cores / num_processes : 1))
fi
exec "$PYTHON" -m switchtitan launch \
    --nnodes "$num_nodes" --nproc_per_node "$num_processes" ${NODE_RANK:+--node_rank "$NODE_RANK"} \
    --rdzv_backend c10d --rdzv_endpoint "${RDZV_ENDPOINT:-localhost:0}" \
    --rdzv_id "${RDZV_ID:-switchtitan}" \
    train "$@"
