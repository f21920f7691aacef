#!/usr/bin/env bash
# Runs the tests. Sets up the environment.
#
#   ./scripts/test.sh                        all tests, on all cores
#   ./scripts/test.sh --quick                unit tests of less than about five seconds each
#   ./scripts/test.sh --faults               tests/faults in full, on all cores: an hour or more;
#                                            all other calls run a sample of its cases.
#                                            What each test did is appended to the file that
#                                            SWITCHTITAN_FAULTS_REPORT names; default: a new
#                                            outputs/faults.jsonl
#   ./scripts/test.sh tests/unit -k switch   some tests, in one process; arguments are pytest's
#
# Tests see no GPU, except those marked `gpu`: with a GPU, the first command runs them last, and fails
# if all of them are skipped.
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
    --faults)
        export SWITCHTITAN_FAULTS=long
        if [ -z "${SWITCHTITAN_FAULTS_REPORT:-}" ]; then
            export SWITCHTITAN_FAULTS_REPORT="$project_root/outputs/faults.jsonl"
            mkdir -p -- "$project_root/outputs"
            rm -f -- "$SWITCHTITAN_FAULTS_REPORT"
        fi
        status=0
        "$PYTHON" -m pytest "${parallel[@]}" tests/faults "${@:2}" || status=$?
        printf 'What was tested is in %s. To write docs/RELIABILITY.md from it:\n' \
            "$SWITCHTITAN_FAULTS_REPORT"
        printf '  python scripts/reliability_report.py %q\n' "$SWITCHTITAN_FAULTS_REPORT"
        exit "$status"
        ;;
    *)
        exec "$PYTHON" -m pytest "$@"
        ;;
esac
