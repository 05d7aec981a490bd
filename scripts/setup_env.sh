# shellcheck shell=bash
# Finds or makes the Python that the project's scripts run; to be sourced.
#
#   setup_env [EXTRA]   leaves the interpreter's path in PY; EXTRA names an optional dependency set
#
# Nothing runs on sourcing, so one function can be called at a time.

PROJECT_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$PROJECT_ROOT/.venv

die() {
    printf '%s\n' "$*" >&2
    exit 1
}

setup_env() {
    local extra=${1:-}
    if [ -n "${CS336_PYTHON:-}" ]; then
        use_given_python
        return
    fi
    # pip and uv end an interruption with an ordinary exit code, after which bash would go on.
    trap 'exit 130' INT
    trap 'exit 143' TERM
    PY=$VENV/bin/python
    make_venv
    if is_installed "$extra"; then
        echo "setup: .venv is up to date"
    else
        # The stamps go first, so an interrupted installation leaves none.
        rm -f "$(stamp_path "")" "$(stamp_path dev)"
        install_project "$extra"
        write_stamp "$extra"
        echo "setup: .venv is ready"
    fi
    trap - INT TERM
}

# --- an interpreter that the user brings ---

use_given_python() {
    PY=$(command -v "$CS336_PYTHON") || die "setup: CS336_PYTHON must be a Python, got $CS336_PYTHON"
    is_new_enough "$PY" || die "setup: CS336_PYTHON must be a Python >= 3.11, got $CS336_PYTHON"
    local missing
    missing=$("$PY" -c 'import sys
from importlib.util import find_spec
print(*(name for name in sys.argv[1:] if find_spec(name) is None))' torch pytest pytest_benchmark)
    [ -z "$missing" ] || die "setup: CS336_PYTHON must have torch and pytest, $CS336_PYTHON lacks: $missing"
    # This checkout comes before any other that the interpreter may know.
    export PYTHONPATH="$PROJECT_ROOT:$PROJECT_ROOT/cs336-basics${PYTHONPATH:+:$PYTHONPATH}"
    echo "setup: using $PY as it is"
}

# --- the environment in .venv ---

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Leaves in FOUND the first candidate that runs (a name on PATH may be a version manager's empty shim).
find_python() {
    local candidate incomplete=
    FOUND=
    if [ -n "${PYTHON:-}" ]; then
        set -- "$PYTHON"
    else
        set -- python3.13 python3.12 python3.11 python3
    fi
    for candidate; do
        is_new_enough "$candidate" || continue
        if "$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then
            FOUND=$candidate
            return
        fi
        incomplete=${incomplete:-$candidate}
    done
    [ -z "$incomplete" ] || die "setup: $incomplete has no venv or ensurepip: install its venv package (Debian: python3-venv) or set PYTHON="
    [ -z "${PYTHON:-}" ] || die "setup: PYTHON must be a Python >= 3.11, got $PYTHON"
    die "setup: no Python >= 3.11 among $*: install one, or name one with PYTHON="
}

make_venv() {
    if [ -x "$PY" ] && "$PY" -c '' >/dev/null 2>&1; then
        is_new_enough "$PY" || die "setup: .venv must have Python >= 3.11: remove .venv and run again"
        return
    fi
    rm -rf "$VENV"
    if command -v uv >/dev/null 2>&1; then
        echo "setup: making .venv with uv"
        uv venv --quiet --python "${PYTHON:->=3.11}" "$VENV" || die "setup: uv could not make .venv, see above"
    else
        find_python
        echo "setup: making .venv with $FOUND"
        "$FOUND" -m venv "$VENV" || die "setup: $FOUND could not make .venv, see above"
    fi
}

stamp_path() {
    echo "$VENV/.cs336-systems-installed${1:+-$1}"
}

# What an installation depends on, in plain text, so that a difference can be read with diff.
fingerprint() {
    printf '%s\n' "$PROJECT_ROOT"
    "$PY" -c 'import sys; print(sys.version)'
    cat "$PROJECT_ROOT/pyproject.toml" "$PROJECT_ROOT/cs336-basics/pyproject.toml"
}

# True when the extra asked for is there already; `dev` holds everything that the plain set does.
is_installed() {
    local now stamp
    now=$(fingerprint)
    for stamp in "$(stamp_path "$1")" "$(stamp_path dev)"; do
        if [ -f "$stamp" ] && [ "$now" = "$(cat "$stamp")" ]; then
            return 0
        fi
    done
    return 1
}

write_stamp() {
    local stamp
    stamp=$(stamp_path "$1")
    fingerprint >"$stamp.part"
    mv "$stamp.part" "$stamp"
}

# --- installing ---

# cs336-basics is installed as a package of its own, so that a replacement's dependencies come along.
# uv compiles nothing unless told to: then every process compiles torch anew, for seconds each, where
# the first one could not or was not allowed to write it down (PYTHONDONTWRITEBYTECODE).
install_project() {
    set -- --editable "$PROJECT_ROOT${1:+[$1]}" --editable "$PROJECT_ROOT/cs336-basics"
    if command -v uv >/dev/null 2>&1; then
        echo "setup: installing with uv (several GB the first time)"
        uv pip install --compile-bytecode --python "$PY" "$@" || die "setup: uv could not install the project, see above"
        return
    fi
    "$PY" -m pip --version >/dev/null 2>&1 || "$PY" -m ensurepip --default-pip >/dev/null
    if "$PY" -m pip install --quiet uv; then
        echo "setup: installing with uv in .venv (several GB the first time)"
        if (uv_like_pip && "$VENV/bin/uv" pip install --compile-bytecode --python "$PY" "$@"); then
            return
        fi
    fi
    echo "setup: installing with pip (several GB the first time)"
    "$PY" -m pip install "$@" || die "setup: pip could not install the project, see above"
}

# uv does not read pip's settings: hand it the user's indexes, local wheels, certificate and patience.
uv_like_pip() {
    PIP_SETTINGS=$("$PY" -m pip config list 2>/dev/null) || return 0
    hand_over UV_DEFAULT_INDEX index-url
    hand_over UV_INDEX extra-index-url
    hand_over UV_FIND_LINKS find-links
    hand_over SSL_CERT_FILE cert
    hand_over UV_HTTP_TIMEOUT default-timeout
    # pip looks at every index before it chooses a version.
    export UV_INDEX_STRATEGY="${UV_INDEX_STRATEGY:-unsafe-best-match}"
}

# hand_over VARIABLE KEY: exports pip's KEY as VARIABLE unless the user has set that.
hand_over() {
    local value
    value=$(printf '%s\n' "$PIP_SETTINGS" |
        sed -n -E "s/^(:env:|global|install)\.$2=['\"](.*)['\"]\$/\2/p" | sed -n '1{s/\\n/ /g;p;}')
    if [ -n "$value" ] && [ -z "${!1:-}" ]; then
        export "$1=$value"
    fi
}
