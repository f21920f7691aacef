# shellcheck shell=bash
# Sourced by ./run_train.sh, ./scripts/test.sh and .ci/run. `prepare_environment [EXTRA]` installs
# this project with an extra, by default `train`, and sets PYTHON to the interpreter of the active
# virtual environment, or of .venv, which it creates. If a stamp shows that nothing has changed, it
# returns in milliseconds.
#
#   PYTHON                    interpreter that creates .venv; default: python3, or the first of
#                             python3.14 ... python3.10
#   SWITCHTITAN_CONSTRAINTS   constraints file for pip, such as constraints.txt

project_root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    # A batch script reads that file, and prints the message; see switchtitan/errors.py.
    (set -o noclobber && printf '2\nerror: %s\n' "$*" >"${SWITCHTITAN_ENDED:?}") 2>/dev/null ||
        [ -s "${SWITCHTITAN_ENDED:-}" ] || printf 'error: %s\n' "$*" >&2
    exit 2
}

# help_from_header ARGUMENT ...: with --help, prints the comment at the start of the script, and exits.
# Call it before `prepare_environment`, which may install for minutes.
help_from_header() {
    local argument
    for argument in "$@"; do
        case "$argument" in
            -h | --help)
                sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"
                exit 0
                ;;
        esac
    done
}

prepare_environment() {
    local extra="${1:-train}" base_python="${PYTHON:-}"
    environment="${VIRTUAL_ENV:-${CONDA_PREFIX:-$project_root/.venv}}"
    PYTHON="$environment/bin/python"
    # Nodes that share the checkout start at the same time: one installs, the others wait.
    is_installed "$extra" || install_project "$extra" "$base_python" 9>"$project_root/.setup.lock"
}

is_installed() {
    local name state
    state="$(cksum <"$project_root/pyproject.toml") $project_root"
    for name in "$1" dev; do # dev includes train
        if [ -x "$PYTHON" ] && [ -f "$environment/.switchtitan-installed-$name" ] &&
            [ "$(<"$environment/.switchtitan-installed-$name")" = "$state" ]; then
            return
        fi
    done
    return 1
}

install_project() {
    local extra="$1" python="$2" constraints="${SWITCHTITAN_CONSTRAINTS:-}"
    if ! { command -v flock >/dev/null && flock 9; }; then
        echo "warning: no file locks; start only one process until the installation is complete" >&2
    fi
    is_installed "$extra" && return
    if [ "$environment" = "$project_root/.venv" ]; then
        create_environment "$python"
    fi
    is_recent "$PYTHON" || fail "$PYTHON is $("$PYTHON" --version 2>&1 || echo missing);" \
        "expected Python 3.10 or newer; activate another environment, or none"
    echo "installing switchtitan and its dependencies into $environment (minutes, once)" >&2
    "$PYTHON" -m pip install --disable-pip-version-check ${constraints:+--constraint "$constraints"} \
        --editable "${project_root}[$extra]" >&2 9>&- ||
        fail "the installation failed (see above); fix the cause and run this again"
    printf '%s\n' "$(cksum <"$project_root/pyproject.toml") $project_root" \
        >"$environment/.switchtitan-installed-$extra"
}

create_environment() {
    local python="$1" candidate
    local candidates=(python3 python3.14 python3.13 python3.12 python3.11 python3.10)
    [ -z "$python" ] || candidates=("$python")
    for candidate in "${candidates[@]}"; do
        if is_recent "$candidate"; then
            "$candidate" -c 'import ensurepip, venv' 2>/dev/null ||
                fail "$candidate has no venv module; install it" \
                    "(Debian, Ubuntu: apt install python3-venv), or activate a virtual environment"
            "$candidate" -m venv "$environment" || fail "could not create $environment (see above)"
            return
        fi
    done
    fail "no Python 3.10 or newer found${python:+ at $python};" \
        "install one, or set PYTHON=/path/to/python3"
}

is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}
