#!/usr/bin/env bash
# Runs the tests. Sets up the environment.
#
#   ./scripts/test.sh [-k TEXT]              all tests, on all cores; options are pytest's
#   ./scripts/test.sh --quick                tests/unit: what is quick, on all cores
#   ./scripts/test.sh --faults               tests/faults and the quickstart in full, an hour or more;
#                                            all other calls run a sample of their cases
#   ./scripts/test.sh --mutations [-k TEXT]  plants the faults of tests/support/mutations.toml, one
#                                            at a time; tests must notice each
#   ./scripts/test.sh --numbers [-k TEXT]    runs the command line, and compares losses, exports and
#                                            switches with tests/data/reference_numbers.json
#   ./scripts/test.sh tests/unit -k switch   some tests, by their path or -m MARK, in one process
#
# Tests see no GPU, except those marked `gpu`; with a GPU, the first command runs them last
# if it has no options.
# PYTEST_XDIST_AUTO_NUM_WORKERS=N sets the number of processes; default: one per core, at most 8.
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"

help_from_header "$@"
prepare_environment dev
cd -- "$project_root"
# Shapes are tiny and several ranks share the cores: more threads would be slower.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

if [ -z "${PYTEST_XDIST_AUTO_NUM_WORKERS:-}" ]; then
    # Not in one command with `export`, which would hide a failure.
    PYTEST_XDIST_AUTO_NUM_WORKERS="$(
        "$PYTHON" -c "from switchtitan.cores import num_cores; print(num_cores())"
    )"
fi
export PYTEST_XDIST_AUTO_NUM_WORKERS

# The tests of a file share trained runs, so one process runs them.
parallel=(-n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder --durations=20)
case "${1:-}" in
    --quick)
        exec "$PYTHON" -m pytest "${parallel[@]}" tests/unit "${@:2}"
        ;;
    --faults)
        export SWITCHTITAN_FAULTS=long
        exec "$PYTHON" -m pytest "${parallel[@]}" \
            tests/faults tests/end_to_end/test_run_train.py "${@:2}"
        ;;
    --mutations)
        exec "$PYTHON" tests/support/mutation_ledger.py "${@:2}"
        ;;
    --numbers)
        exec "$PYTHON" tests/support/reference_numbers.py "${@:2}"
        ;;
esac
for argument in "$@"; do
    case "$argument" in
        tests | tests/* | */tests/* | -m) exec "$PYTHON" -m pytest "$@" ;;
    esac
done
status=0
"$PYTHON" -m pytest "${parallel[@]}" "$@" || status=$?
if [ $# = 0 ] && { [ -e /dev/nvidiactl ] || [ -e /dev/kfd ] || [ -e /dev/dxg ]; }; then
    "$PYTHON" -m pytest -m gpu || status=$?
fi
exit "$status"
