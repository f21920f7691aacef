#!/usr/bin/env bash
# Tests and measures training on all visible GPUs, about an hour; writes docs/gpu/<card>.md and .json:
#
#   scripts/gpu_acceptance.sh                        all steps
#   scripts/gpu_acceptance.sh --steps train,switch   some; --list names them, --help all options
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"

prepare_environment dev
cd -- "$project_root"
exec "$PYTHON" -m switchtitan.benchmark.acceptance "$@"
