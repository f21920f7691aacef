# shellcheck shell=bash
# Sourced by ./run_train.sh and ./scripts/*.sh. `prepare_environment [EXTRA]` sets PYTHON to an interpreter in which
# this project is installed: that of the active virtual environment, else that of .venv beside the code, which it makes.
# Where nothing has changed since the last time it only compares a stamp, which takes milliseconds.

project_root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

say() {
    printf '[setup] %s\n' "$*" >&2
}

prepare_environment() {
    local extra="${1:-}"
    local environment="${VIRTUAL_ENV:-${CONDA_PREFIX:-$project_root/.venv}}"
    local stamp="$environment/.switchtitan-installed-${extra:-plain}"
    local stamp_of_tests="$environment/.switchtitan-installed-dev"
    local state
    state="$(cksum <"$project_root/pyproject.toml") $project_root"
    local base_python="${PYTHON:-}"
    PYTHON="$environment/bin/python"
    # What a run needs is part of what the tests need.
    if is_stamped "$stamp" "$state" || { [ -z "$extra" ] && is_stamped "$stamp_of_tests" "$state"; }; then
        return
    fi
    if [ "$environment" = "$project_root/.venv" ]; then
        make_virtual_environment "$environment" "$base_python"
    fi
    check_python_version "$PYTHON" || fail "$PYTHON is $("$PYTHON" --version 2>&1 || echo missing), but this needs" \
        "Python 3.10 or newer; activate another environment, or none"
    warn_without_compiler
    say "installing switchtitan and what it needs into $environment (minutes, this first time)"
    "$PYTHON" -m pip install --disable-pip-version-check --editable "$project_root${extra:+[$extra]}" >&2 ||
        fail "the installation failed (see above); mend that and run this again, it goes on where it stopped"
    printf '%s\n' "$state" >"$stamp"
    say "done"
}

is_stamped() {
    [ -x "$PYTHON" ] && [ -f "$1" ] && [ "$(<"$1")" = "$2" ]
}

make_virtual_environment() {
    local environment="$1" python
    python="$(find_python "$2")" || fail "no Python 3.10 or newer found${2:+ at $2}; install one, or name it:" \
        "PYTHON=/path/to/python3 $0"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python has no venv module; install it (Debian, Ubuntu: apt install python3-venv), or activate a" \
            "virtual environment"
    say "making the virtual environment $environment with $("$python" --version)"
    "$python" -m venv "$environment" || fail "could not make $environment (see above)"
}

find_python() {
    local candidate
    if [ -n "$1" ]; then
        check_python_version "$1" && printf '%s\n' "$1"
        return
    fi
    for candidate in python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do
        if check_python_version "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    return 1
}

check_python_version() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

warn_without_compiler() {
    if ! command -v "${CXX:-g++}" >/dev/null; then
        say "warning: no C++ compiler; torch.compile needs one on a CPU (install g++, or set --compile.* false)"
    fi
}
