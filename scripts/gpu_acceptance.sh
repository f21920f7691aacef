#!/usr/bin/env bash
# Tests and measures training on all visible GPUs, about an hour; writes docs/gpu/<card>.md and .json:
#
#   scripts/gpu_acceptance.sh                        all steps
#   scripts/gpu_acceptance.sh --steps train,switch   some; --list names them
#
#   --steps NAME,NAME        only these steps; default: all
#   --list                   list the steps, and run nothing
#   --time-limit-s SECONDS   the longest time of a step; default: 1800
#   --output FOLDER          where the page goes; default: docs/gpu
#   --logs FOLDER            the folder of logs and runs; default: outputs/gpu_acceptance
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"

help_from_header "$@"
prepare_environment dev
cd -- "$project_root"
exec "$PYTHON" -m switchtitan.benchmark.acceptance "$@"
