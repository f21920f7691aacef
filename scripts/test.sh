#!/usr/bin/env bash
# Runs the tests. Sets up what it needs by itself.
#
#   ./scripts/test.sh                        all tests, on all cores
#   ./scripts/test.sh --quick                unit tests that take less than about five seconds each
#   ./scripts/test.sh tests/unit -k switch   some tests, in one process; all arguments go to pytest
#
# Tests see no GPU, except those marked `gpu`: where there is a GPU, the first command runs them last.
# PYTEST_XDIST_AUTO_NUM_WORKERS=N uses N processes instead of one for each core, which are at most 8.
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"

prepare_environment dev
cd -- "$project_root"
# The tests' shapes are tiny and several ranks share the cores: more threads only wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Tests of one file share what it has trained, so one process runs them.
parallel=(-n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder)
case "${1:-}" in
    '')
        status=0
        "$PYTHON" -m pytest "${parallel[@]}" --durations=20 || status=$?
        if [ -e /dev/nvidiactl ] || [ -e /dev/kfd ] || [ -e /dev/dxg ]; then
            "$PYTHON" -m pytest -m gpu || status=$?
        fi
        exit "$status"
        ;;
    --quick)
        exec "$PYTHON" -m pytest "${parallel[@]}" -m "not (slow or distributed or end_to_end)" "${@:2}"
        ;;
    *)
        exec "$PYTHON" -m pytest "$@"
        ;;
esac
