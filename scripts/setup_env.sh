# shellcheck shell=bash
# Sourced by ./run_train.sh, ./scripts/test.sh and .ci/run. `prepare_environment [EXTRA]` sets PYTHON to an interpreter in
# which this project is installed: that of the active virtual environment, else that of .venv, which it creates. If nothing
# has changed since the last time it compares a stamp and returns, in milliseconds.
#
#   PYTHON                    creates .venv; default: python3, or the first of python3.14 ... python3.10
#   SWITCHTITAN_CONSTRAINTS   a file of versions for pip, such as constraints.txt; read when something is installed

project_root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

prepare_environment() {
    local extra="${1:-}" base_python="${PYTHON:-}"
    environment="${VIRTUAL_ENV:-${CONDA_PREFIX:-$project_root/.venv}}"
    PYTHON="$environment/bin/python"
    # Nodes of a cluster that share the checkout start at once: one installs, the others wait.
    is_installed "$extra" || install_project "$extra" "$base_python" 9>"$project_root/.setup.lock"
}

is_installed() {
    local name state
    state="$(cksum <"$project_root/pyproject.toml") $project_root"
    for name in "${1:-plain}" dev; do # what a run needs is part of what the tests need
        if [ -x "$PYTHON" ] && [ -f "$environment/.switchtitan-installed-$name" ] &&
            [ "$(<"$environment/.switchtitan-installed-$name")" = "$state" ]; then
            return
        fi
    done
    return 1
}

install_project() {
    local extra="$1" python="$2" constraints="${SWITCHTITAN_CONSTRAINTS:-}"
    if command -v flock >/dev/null && ! flock 9; then
        echo "warning: no file locks here; do not start this twice at once until it is installed" >&2
    fi
    is_installed "$extra" && return
    if [ "$environment" = "$project_root/.venv" ]; then
        create_environment "$python"
    fi
    is_recent "$PYTHON" || fail "$PYTHON is $("$PYTHON" --version 2>&1 || echo missing), but this needs Python 3.10" \
        "or newer; activate another environment, or none"
    echo "installing switchtitan and its dependencies into $environment (takes minutes the first time)" >&2
    "$PYTHON" -m pip install --disable-pip-version-check ${constraints:+--constraint "$constraints"} \
        --editable "$project_root${extra:+[$extra]}" >&2 9>&- ||
        fail "the installation failed (see above); fix the cause and run this again"
    printf '%s\n' "$(cksum <"$project_root/pyproject.toml") $project_root" \
        >"$environment/.switchtitan-installed-${extra:-plain}"
}

create_environment() {
    local python="$1" candidate
    local candidates=(python3 python3.14 python3.13 python3.12 python3.11 python3.10)
    [ -z "$python" ] || candidates=("$python")
    for candidate in "${candidates[@]}"; do
        if is_recent "$candidate"; then
            "$candidate" -c 'import ensurepip, venv' 2>/dev/null || fail "$candidate has no venv module; install it" \
                "(Debian, Ubuntu: apt install python3-venv), or activate a virtual environment"
            "$candidate" -m venv "$environment" || fail "could not create $environment (see above)"
            return
        fi
    done
    fail "no Python 3.10 or newer found${python:+ at $python}; install one, or set PYTHON=/path/to/python3"
}

is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}
