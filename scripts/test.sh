#!/usr/bin/env bash
# Runs the tests: ./scripts/test.sh [PYTEST_ARGUMENTS], e.g. ./scripts/test.sh tests/unit -k switch
# Sets up what it needs by itself.
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"

prepare_environment dev
cd -- "$project_root"
# The tests' shapes are tiny and several ranks share the cores: more threads only wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest "$@"
